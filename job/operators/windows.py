"""2x2 windows side by side in vector registers: the innermost part of BatchNorm with ReLU and max pooling.

The intrinsics compute a piece of a row of windows, ``piece`` being as long as the piece (:func:`.vectors.pieces`).
``start`` is where the upper left value of its first window lies in ``x``, whose rows are ``width`` numbers long.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from job.operators.vectors import LANES, Code, body

NOWHERE = 4  # the gradient of a result that ReLU has set to 0; otherwise 2 * row + column within the window


@intrinsic
def affine(_, piece, x, start, width, center, scale, shift, out, kept, to):  # type: ignore[no-untyped-def]
    """The largest ``(x - center) * scale + shift`` of each window, or 0 if that is more; and where it came from.

    Written to ``out`` and to ``kept`` from ``to`` on.
    """

    def write(code: Code) -> None:
        build, n = code.builder, piece.count
        if not n:
            return
        center, scale, shift = (code.spread(code.arguments[index], n) for index in (4, 5, 6))
        first, *others = (code.product_sum(build.fsub(value, center), scale, shift) for value in _corners(code, n))
        most, place = first, code.bytes(0, n)
        for number, value in enumerate(others, start=1):
            larger = build.fcmp_ordered(">", value, most)  # not of NaN, and not of a tie: the first one stays
            most = build.select(larger, value, most)
            place = build.select(larger, code.bytes(number, n), place)
        off = build.fcmp_ordered("<=", most, code.zeros(n))
        code.store(build.select(off, code.zeros(n), most), code.pointer(7, code.arguments[9]))
        code.store(build.select(off, code.bytes(NOWHERE, n), place), code.pointer(8, code.arguments[9]))

    floats = (x.dtype,) * 3
    return types.void(piece, x, types.intp, types.intp, *floats, out, kept, types.intp), body(1, write)


@intrinsic
def products(_, piece, x, start, width, center, dy, kept, at, sums):  # type: ignore[no-untyped-def]
    """Add to ``sums`` (2, LANES), in the lane of each window, dy, and dy * (x - center) of where dy goes to.

    ``dy`` and ``kept`` are read from ``at`` on.
    """

    def write(code: Code) -> None:
        build, n = code.builder, piece.count
        if not n:
            return
        center = code.spread(code.arguments[4], n)
        place = code.load(code.pointer(6, code.arguments[7]), n)
        somewhere = build.icmp_unsigned("<", place, code.bytes(NOWHERE, n))
        gradient = build.select(somewhere, code.load(code.pointer(5, code.arguments[7]), n), code.zeros(n))
        value, *others = _corners(code, n)
        for number, other in enumerate(others, start=1):
            value = build.select(build.icmp_unsigned("==", place, code.bytes(number, n)), other, value)
        totals, products = (code.pointer(8, code.integer(lane)) for lane in (0, LANES))
        code.store(build.fadd(code.load(totals, n), gradient), totals)
        code.store(code.product_sum(gradient, build.fsub(value, center), code.load(products, n)), products)

    return types.void(piece, x, types.intp, types.intp, x.dtype, dy, kept, types.intp, sums), body(1, write)


@intrinsic
def combine(_, piece, x, start, width, center, a, b, c, dy, kept, at, out):  # type: ignore[no-untyped-def]
    """``out = b * (x - center) + c``, and ``a * dy`` more where the gradient of a window goes to.

    ``dy`` and ``kept`` are read from ``at`` on; ``out`` is like ``x``.
    """

    def write(code: Code) -> None:
        build, n = code.builder, piece.count
        if not n:
            return
        center, a, b, c = (code.spread(code.arguments[index], n) for index in (4, 5, 6, 7))
        gradient = code.load(code.pointer(8, code.arguments[10]), n)
        place = code.load(code.pointer(9, code.arguments[10]), n)
        found = []
        for number, value in enumerate(_corners(code, n)):
            rest = code.product_sum(build.fsub(value, center), b, c)
            here = build.icmp_unsigned("==", place, code.bytes(number, n))
            found.append(build.select(here, code.product_sum(a, gradient, rest), rest))
        in_turn = [lane for pair in zip(range(n), range(n, 2 * n)) for lane in pair]
        for row, (left, right) in zip(_rows(code), (found[:2], found[2:])):
            code.store(code.pick(left, right, in_turn), code.pointer(11, row))

    floats = (x.dtype,) * 4
    return types.void(piece, x, types.intp, types.intp, *floats, dy, kept, types.intp, out), body(1, write)


def _rows(code: Code) -> tuple[Any, Any]:
    """Where the two rows of values of the windows begin."""
    start, width = code.arguments[2], code.arguments[3]
    return start, code.builder.add(start, width)


def _corners(code: Code, n: int) -> list[Any]:
    """The four values of each of ``n`` windows, row by row."""
    found = []
    for row in _rows(code):
        values = code.load(code.pointer(1, row), 2 * n)
        found += [code.pick(values, values, range(side, 2 * n, 2)) for side in (0, 1)]
    return found
