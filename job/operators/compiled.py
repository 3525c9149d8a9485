"""Loops compiled to machine code, which is kept for the next run where that is possible and never needed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numba
from numba.core.caching import FunctionCache

# Sums in another order than they are written in, for vector units; but in the same one each time.
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}


def compiled(reorders_sums: bool) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call with each kind of arguments, or take what an earlier process compiled.

    It runs without the interpreter's lock.
    """

    def compile_(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, fastmath=_REORDERED if reorders_sums else False)(function)
        if numba.config.DISABLE_JIT:  # then it is the function itself, for debuggers
            return dispatcher
        with contextlib.suppress(RuntimeError, OSError):  # nowhere to keep compiled code, as in a read-only container
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compile_


def load_kept(*modules: ModuleType) -> None:
    """Load what earlier processes compiled of the loops of these modules.

    So what is damaged is told, and compiled anew, before a run starts to work. What nobody has compiled yet waits for
    its first call. A loop takes some milliseconds.
    """
    for module in modules:
        for loop in vars(module).values():
            kept = getattr(loop, "_cache", None)
            for signature in kept.signatures(loop.targetctx) if isinstance(kept, _Cache) else ():
                loop.compile(signature)


class _Cache(FunctionCache):
    """Compiled code in files, which a loss of power or a full disk may have cut short: then it is compiled anew."""

    def signatures(self, target_context: Any) -> list[Any]:
        """The arguments for which code of this processor is kept, as numba's types."""
        try:
            kept = list(self._cache_file._load_index())
        except Exception as error:  # as in load_overload
            self._mend(error)
            return []
        return [key[0] for key in kept if key == self._index_key(key[0], target_context.codegen())]

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # whatever the remains of a file make of pickle
            self._mend(error)
        return None

    def _mend(self, error: Exception) -> None:
        _warn("cannot be used", self.cache_path, error)
        try:
            self.flush()  # the index, so that good files take the place of the damaged ones
        except Exception as why:
            _warn("cannot be mended", self.cache_path, why)

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except Exception as error:
            _warn("cannot be written", self.cache_path, error)


@cache
def _told(what: str, folder: str) -> None:
    print(
        f"warning: {folder}: the compiled code kept there {what}; it is compiled anew, which takes some seconds",
        file=sys.stderr,
        flush=True,
    )


def _warn(what: str, folder: str, error: Exception) -> None:
    _told(f"{what} ({getattr(error, 'strerror', None) or type(error).__name__})", folder)
