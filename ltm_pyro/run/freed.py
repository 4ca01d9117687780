"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE = 2**22


def keep_little_freed() -> None:
    """From now on freed tensors of 4 MB and more go back to the system, and what was freed before.

    A fit leaves hundreds of megabytes in pieces that are too small for the tensors of what comes
    next. For when speed no longer counts, since fresh memory is slow to touch; does nothing where
    the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim") and hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.malloc_trim(0)
