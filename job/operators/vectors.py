"""Machine code with vectors of numbers, for loops that numba's compiler does not turn into vector instructions.

A numba intrinsic writes the code of its body itself. :class:`Code` is what it writes with. Each value is rounded as it
is in a plain loop: of all liberties a compiler may take, only a product and a sum may become one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

AVAILABLE = not numba.config.DISABLE_JIT  # machine code has no interpreter
LANES = 16  # of the longest piece of a row

_FUSED = ("contract",)


def pieces(length: int) -> tuple[tuple[None, ...], tuple[None, ...]]:
    """Two tuples, as long as a piece of a row, and as what is left of a row of ``length`` cut into such pieces.

    The length of a tuple is part of its type, so that there is machine code for each length.
    """
    piece = max(1, min(length, LANES))
    return (None,) * piece, (None,) * (length % piece)


class Code:
    """The body of an intrinsic.

    Args:
        number: of its arguments the array whose kind of numbers it computes with.
        context, builder, signature, arguments: as numba hands them over.
    """

    def __init__(self, number: int, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self._context, self._signature = context, signature
        self.builder, self.arguments = builder, arguments
        self.number = context.get_data_type(signature.args[number].dtype)
        self.bits = signature.args[number].dtype.bitwidth

    def integer(self, value: int) -> ir.Constant:
        """A place in memory, or a distance."""
        return ir.Constant(ir.IntType(64), value)

    def bytes(self, value: int, lanes: int) -> ir.Constant:
        """A vector of bytes that are all ``value``."""
        return ir.Constant(ir.VectorType(ir.IntType(8), lanes), [value] * lanes)

    def zeros(self, lanes: int) -> ir.Constant:
        """A vector of zeros."""
        return ir.Constant(ir.VectorType(self.number, lanes), None)

    def array(self, index: int) -> Any:
        """Argument ``index``: its ``data`` and its ``shape``."""
        return make_array(self._signature.args[index])(self._context, self.builder, self.arguments[index])

    def pointer(self, index: int, place: Any) -> Any:
        """Where argument ``index``, an array, has its number ``place``, counted through all axes."""
        return self.builder.gep(self.array(index).data, [place])

    def load(self, pointer: Any, lanes: int) -> Any:
        """A vector of what is there."""
        kind = ir.VectorType(pointer.type.pointee, lanes)
        return self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()), align=1)

    def store(self, values: Any, pointer: Any) -> None:
        """Write a vector there."""
        self.builder.store(values, self.builder.bitcast(pointer, values.type.as_pointer()), align=1)

    def spread(self, scalar: Any, lanes: int) -> Any:
        """A vector that has the scalar in each lane."""
        empty = ir.Constant(ir.VectorType(self.number, lanes), ir.Undefined)
        one = self.builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        return self.pick(one, one, [0] * lanes)

    def pick(self, first: Any, second: Any, lanes: Sequence[int]) -> Any:
        """A vector of these lanes of two vectors, those of the second one counted on from the first one's."""
        return self.builder.shuffle_vector(
            first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
        )

    def product_sum(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    def sum(self, vector: Any) -> Any:
        """Of all lanes, a power of two: halves are added until one is left."""
        lanes = vector.type.count
        while lanes > 1:
            lanes //= 2
            low, high = (self.pick(vector, vector, range(start, start + lanes)) for start in (0, lanes))
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    def accumulators(self, count: int, lanes: int) -> list[Any]:
        """Places for vectors, with zeros in them, that the compiler keeps in registers."""
        return [cgutils.alloca_once_value(self.builder, self.zeros(lanes)) for _ in range(count)]


def body(number: int, write: Callable[[Code], None]) -> Callable[..., Any]:
    """What numba calls for the code of an intrinsic without a result, from what writes it. ``number`` as in Code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(Code(number, context, builder, signature, arguments))
        return context.get_dummy_value()

    return generate


@intrinsic
def copy_piece(_, piece, source, start, target, to):  # type: ignore[no-untyped-def]
    """``target[to + v] = source[start + v]`` for each v of a piece; places counted through all axes."""

    def write(code: Code) -> None:
        if piece.count:
            code.store(code.load(code.pointer(1, code.arguments[2]), piece.count), code.pointer(3, code.arguments[4]))

    return types.void(piece, source, types.intp, target, types.intp), body(1, write)


@intrinsic
def raise_piece(_, piece, source, start, by, target, to):  # type: ignore[no-untyped-def]
    """``target[to + v] = source[start + v] + by``, likewise."""

    def write(code: Code) -> None:
        if lanes := piece.count:
            values = code.load(code.pointer(1, code.arguments[2]), lanes)
            raised = code.builder.fadd(values, code.spread(code.arguments[3], lanes))
            code.store(raised, code.pointer(4, code.arguments[5]))

    return types.void(piece, source, types.intp, source.dtype, target, types.intp), body(1, write)
