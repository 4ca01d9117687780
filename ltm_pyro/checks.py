"""What people give, checked where it comes in: one line with the name, the value and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Real

import numpy as np

from ltm_pyro.errors import InputError, shown, unknown_name

MOST_COUNT = 10**7
"""Steps, draws or evaluations that anyone can mean; memory may set a lower limit."""

QUIET_SECONDS = 3.0
"""Work that takes longer shows a progress bar."""

MOST_SEED = 2**63 - 1
"""What torch's generators take."""

MEMORY_SHARE = 0.5
"""Of the machine's memory that the draws of one call may take."""


def whole_number(
    name: str, value: object, at_least: int | None = None, at_most: int | None = None
) -> int:
    """`value` as an `int`, known to be a whole number in its range.

    Raises:
        InputError: if it is not, naming `name`.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if (
        not whole
        or (at_least is not None and int(value) < at_least)  # type: ignore[call-overload]
        or (at_most is not None and int(value) > at_most)  # type: ignore[call-overload]
    ):
        bounds = "" if at_least is None else f", {at_least} or more"
        if at_most is not None:
            bounds = f" from {at_least} to {at_most}" if at_least is not None else f" to {at_most}"
        raise InputError(f"{name} is {shown(value)}: must be a whole number{bounds}")
    return int(value)  # type: ignore[call-overload]


def switch(name: str, value: object) -> bool:
    """`value` as a `bool`, known to be True or False.

    Raises:
        InputError: if it is neither, naming `name`.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {shown(value)}: must be True or False")
    return bool(value)


def one_of(kind: str, value: object, known: Iterable[str]) -> str:
    """`value`, known to be one of some names.

    Raises:
        InputError: if it is not, with the nearest name.
    """
    if not isinstance(value, str) or value not in known:
        raise unknown_name(kind, value, known)
    return value


def real_number(name: str, value: object) -> float:
    """`value` as a `float`; infinity is one, NaN is none.

    Raises:
        InputError: if it is no number, naming `name`.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise InputError(f"{name} is {shown(value)}: must be a number")
    return float(value)


def fits_memory(name: str, count: int, bytes_each: int) -> None:
    """Refuses a count whose tensors would not fit into this machine's memory.

    Args:
        name: The argument.
        count: Its value.
        bytes_each: What one more of it takes.

    Raises:
        InputError: naming the largest value that would fit.
    """
    room = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if count * bytes_each > room:
        raise InputError(
            f"{name} is {shown(count)}: would take {count * bytes_each / 2**30:,.0f} GiB; "
            f"at most {room // bytes_each} fit into half of this machine's memory"
        )
