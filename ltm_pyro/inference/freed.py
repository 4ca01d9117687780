"""Whether glibc keeps the memory of freed tensors for the next ones, or gives it back."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**25
"""The largest tensor that glibc can be told to keep once it is freed, 32 MB."""
_LARGE = 2**22
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@cache
def keep_freed() -> None:
    """From now on the memory of freed tensors of up to 32 MB waits for the next ones.

    Every fast step makes and frees the same tensors. To begin with glibc returns such memory, and
    the system hands it out again as pages of zeros: a tenth of a step's time. It changes its mind
    when it happens to see a tensor of 32 MB freed; this is where it then stands. Done once in a
    process, so that `give_back_freed` is not undone.
    """
    _set({_MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: 2 * _LARGEST})


def give_back_freed() -> None:
    """From now on freed tensors of 4 MB and more go back to the system, and what was freed before.

    A fit leaves hundreds of megabytes in pieces that are too small for the tensors of what comes
    next. For when speed no longer counts.
    """
    if _set({_MMAP_THRESHOLD: _LARGE}):
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> bool:
    """Sets options of glibc's allocator; `False` if it is another, or the environment sets them."""
    told = any(name in os.environ for name in _VARIABLES)
    if sys.platform != "linux" or told or "_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "malloc_trim") and hasattr(library, "mallopt")):
        return False
    for option, value in options.items():
        library.mallopt(option, value)
    return True
