"""The likelihood compiled, for batches of any size in a bounded number of graphs.

A graph is compiled for one shape, and compiling takes tens of seconds. Batches are therefore filled
up with empty rows to one of a few sizes; how long their sequences are, `Batch.filled_length` has
already rounded. Which graph serves a batch depends on its shape alone, so a fit that is interrupted
and goes on uses the same ones.
"""

from __future__ import annotations

import os
import struct
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from ltm_pyro.data.cache import default_folder

F = TypeVar("F", bound=Callable[..., Any])
Score = Callable[..., Tensor]
"""Log p(x | z) per row, (B,), of tensors that each have B rows."""

GRAPHS = 32
"""Shapes that are compiled in one process; torch runs further ones uncompiled."""
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_SETTLED = 10.0
"""Seconds after which no process still writes a file."""


def bucket_rows(rows: int) -> int:
    """The number of rows that a batch is filled up to: at most a seventh more than it has."""
    step = max(1, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


def compiled_function(function: F, dynamic: bool = False) -> F:
    """`function`, compiled for each shape that it meets; with `dynamic`, once for all shapes.

    Compiled code is kept in the package's cache folder, so the next process starts faster.
    """
    remove_torn(cache_of_compiled_code())
    # Wrapping has a side effect in torch 2.13: it turns off validation in all distributions.
    validate = Distribution._validate_args
    compiled: Any = torch.compile(function, dynamic=dynamic)
    Distribution.set_default_validate_args(validate)
    return cast("F", compiled)


def cache_of_compiled_code() -> Path:
    """Where torch keeps compiled code: the package's cache folder, unless the user has chosen one.

    torch sets its variable to its own default as soon as its compiler is imported, by whomever.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds

    if os.environ.get(_CACHE, default_cache_dir()) == default_cache_dir():
        os.environ[_CACHE] = str(default_folder() / "compiled")
    return Path(os.environ[_CACHE])


@cache
def remove_torn(folder: Path) -> None:
    """Removes what a process killed while it compiled has left of libraries; once per process.

    torch takes a library that is in `folder`, its cache, for whole, and would fail at each start.
    """
    for file in folder.glob("*/*.so"):
        try:
            if time.time() - file.stat().st_mtime > _SETTLED and _torn(file):
                file.unlink()
        except OSError:
            continue  # removed by another process, or not ours to remove


def _torn(file: Path) -> bool:
    """Whether a library is empty, or an ELF file that ends before its last table does."""
    size = file.stat().st_size
    with file.open("rb") as library:
        head = library.read(64)
    if head[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return size == 0
    if len(head) < 64:
        return True
    (at,), (each, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return bool(size < at + each * count)


class CompiledScore:
    """`score`, compiled per bucket; where no compiler works, uncompiled, with a warning."""

    def __init__(self, score: Score) -> None:
        self._plain = score
        self._compiled: Score | None = compiled_function(score)

    def __call__(self, *inputs: Tensor, **shared: Any) -> Tensor:
        """Log p(x | z) per row, (B,), of inputs that each have B rows, and others by name."""
        if self._compiled is None:
            return self._plain(*inputs, **shared)
        rows = len(inputs[0])
        empty = bucket_rows(rows) - rows
        filled = [_filled(value, empty) for value in inputs] if empty else inputs
        try:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                scores = self._compiled(*filled, **shared)
                return scores[:rows] if empty else scores
        except Exception as error:  # whatever a missing or broken compiler raises
            warnings.warn(
                f"the likelihood runs uncompiled, more slowly: {type(error).__name__}",
                stacklevel=2,
            )
            self._compiled = None
            return self._plain(*inputs, **shared)


def _filled(value: Tensor, empty: int) -> Tensor:
    """`value` (B, ...) with `empty` rows of zeros after it: masked out, they score 0."""
    return torch.nn.functional.pad(value, (0, 0) * (value.dim() - 1) + (0, empty))
