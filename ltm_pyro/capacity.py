"""What the machine's memory allows, asked before anything is allocated.

The sizes here are the least that a count must cost: what passes may still be too much, what is
refused could never have been held. `ltm-pyro cost` has the whole estimate.
"""

from __future__ import annotations

import functools
import math
import os
from contextlib import suppress
from pathlib import Path

from ltm_pyro.errors import InputError, shown

MOST = 10**9
"""Above it no count means anything, whatever a single one costs."""
WIDEST_LOG_VARIANCE = 30.0
"""A scale of exp(15), 3 million: beyond it float32 has no room for what is made of it."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@functools.cache
def memory_bytes() -> float:
    """The memory that this process may use; infinite where the system does not tell."""
    found = [math.inf]
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        found.append(int(_CGROUP.read_text()))
    return min(size for size in found if size > 0)


def refuse_too_large(what: str, n_bytes: float, remedy: str, most: float | None = None) -> None:
    """Refuses what cannot be held.

    Args:
        what: Names what was asked for, e.g. `"batch_size is 1000000"`.
        n_bytes: The least memory that it takes.
        remedy: What to do.
        most: Memory that there is; the machine's by default.

    Raises:
        InputError: if it is more than there is.
    """
    most = memory_bytes() if most is None else most
    if n_bytes > most:
        raise InputError(
            f"{what}: it takes {n_bytes / 1e9:,.3g} GB at least, and there are {most / 1e9:,.3g} "
            f"GB of memory; {remedy}"
        )


def count(
    name: str,
    value: object,
    *,
    at_least: int = 1,
    at_most: int = MOST,
    limit: str = "",
    bytes_each: float = 0,
) -> int:
    """`value`, known to be a whole number in its limits of which the memory holds as many.

    Args:
        name: Of the option.
        value: What was given.
        at_least: Smallest.
        at_most: Largest, where there is memory for it.
        limit: What sets `at_most`, for the message.
        bytes_each: The least memory that one takes.

    Raises:
        InputError: naming what fits.
    """
    fits = memory_bytes() / bytes_each if bytes_each else math.inf
    most = int(min(at_most, max(fits, at_least)))
    if isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= most:
        return value
    expected = f"a whole number, {at_least} or more"
    if at_most < MOST or (isinstance(value, int) and value > most):
        why = "for which there is memory" if most < at_most else limit
        expected = f"{expected} and at most {most}" + (f", {why}" if why else "")
    raise InputError(f"{name} is {shown(value)}: must be {expected}")


def log_variance(value: object) -> float:
    """`value`, known to be a log variance that a fit can start from.

    Raises:
        InputError: naming the range.
    """
    widest = WIDEST_LOG_VARIANCE
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and -widest <= value <= widest:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise InputError(
        f"init_log_variance is {shown(value)}: must be a finite number from {-widest:g} to "
        f"{widest:g}"
    )
