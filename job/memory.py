"""Memory of a process that does the same thing again and again: what a step frees, the next one asks for."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_TRIM_BYTES = 2**30
_MMAP_BYTES = 2**25  # the largest that glibc takes


def settle() -> None:
    """To be called before the loop: keep what is freed from now on, and leave what is there now to itself.

    glibc gives freed memory back to the system, which hands it out again page by page, filled with zeros: 600 page
    faults in a step of the tutorial's network. Another C library is left as it is. Python's garbage collector looks
    through all objects now and then, of which imports leave a hundred thousand that stay.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
    gc.freeze()
