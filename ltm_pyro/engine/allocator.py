"""Whether glibc keeps the memory of freed tensors for the next ones, or gives it back."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_NEVER_TRIMMED = -1
_DEFAULT_MMAP_MAX = 2**16
_LARGE = 2**22
_GIVEN_BACK = {_MMAP_MAX: _DEFAULT_MMAP_MAX, _MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: _LARGE}
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLES = ("mmap_threshold", "mmap_max", "trim_threshold")


def keep_freed() -> None:
    """From now on the memory of freed tensors waits for the next ones, whatever their size.

    Every fast step makes and frees the same tensors. To begin with glibc returns such memory, and
    the system hands it out again as pages of zeros: a tenth to a fifth of a step's time. It learns
    to keep tensors of up to 32 MB and no larger ones, so all are taken from the one heap, which
    is never cut.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER_TRIMMED})


def give_back_freed() -> None:
    """From now on freed tensors of 4 MB and more go back to the system, and what was freed before.

    A fit leaves hundreds of megabytes in pieces that are too small for the tensors of what comes
    next. For when speed no longer counts.
    """
    if _set(_GIVEN_BACK):
        ctypes.CDLL(None).malloc_trim(0)


_blocks = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block `keep_freed`; after the outermost of such blocks glibc's way once more.

    What was freed inside goes back as glibc sees fit: a cut of the whole heap at each call of a
    clock would be felt by the next one.
    """
    global _blocks
    if _blocks == 0:
        keep_freed()
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if _blocks == 0:
            _set(_GIVEN_BACK)


def _set(options: dict[int, int]) -> bool:
    """Sets options of glibc's allocator; `False` if it is another, or the environment sets them."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = any(v in os.environ for v in _VARIABLES) or any(t in tunables for t in _TUNABLES)
    if sys.platform != "linux" or told:
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "malloc_trim") and hasattr(library, "mallopt")):
        return False
    for option, value in options.items():
        library.mallopt(option, value)
    return True
