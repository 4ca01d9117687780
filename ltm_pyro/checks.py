"""What people give, checked where it comes in: one line with the name, the value and the remedy.

Sizes here are the least that a count must cost: what passes may still be too much, and then ends in
the line on memory that has run out. `ltm-pyro cost` has the whole estimate.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ltm_pyro.errors import InputError, shown, unknown_name

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

T = TypeVar("T")

MOST_COUNT = 10**7
"""Steps, draws or evaluations that anyone can mean; memory may set a lower limit."""

QUIET_SECONDS = 3.0
"""Work that takes longer shows a progress bar."""

MOST_SEED = 2**63 - 1
"""What torch's generators take."""

MOST = 10**9
"""Above it no count means anything, whatever a single one costs."""

MEMORY_SHARE = 0.5
"""Of the machine's memory that what is counted may take by itself."""

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
    """Refuses what (`"batch_size is 1000000"`) takes more memory, at least, than there is.

    `most` is what there is, in bytes; the machine's by default.
    """
    most = memory_bytes() if most is None else most
    if n_bytes > most:
        raise InputError(
            f"{what}: it takes {n_bytes / 1e9:,.3g} GB at least, and there are {most / 1e9:,.3g} "
            f"GB of memory; {remedy}"
        )


def whole_number(
    name: str,
    value: object,
    at_least: int | None = None,
    at_most: int | None = None,
    *,
    limit: str = "",
    bytes_each: float = 0,
) -> int:
    """`value` as an `int`; `InputError`, naming `name`, where it is no whole number in its range.

    `limit` says in the message what sets the range. One takes `bytes_each` of memory at the least,
    and all of them may take `MEMORY_SHARE`.
    """
    if bytes_each:
        fit = min(MOST, MEMORY_SHARE * memory_bytes() / bytes_each)
        if at_most is None or fit < at_most:
            at_most, limit = max(int(fit), at_least or 0), "for which there is memory"
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    number = int(value) if whole else math.nan  # type: ignore[call-overload]
    low = -math.inf if at_least is None else at_least
    if not low <= number <= (math.inf if at_most is None else at_most):
        least = "" if at_least is None else f"{at_least} or more"
        most = "" if at_most is None else f"at most {at_most}"
        bounds = " and ".join(bound for bound in (least, most) if bound)
        expected = ", ".join(part for part in ("a whole number", bounds, limit) if part)
        raise InputError(f"{name} is {shown(value)}: must be {expected}")
    return int(number)


def log_variance(value: object) -> float:
    """`value`, known to be a log variance that a fit can start from; `InputError` else."""
    widest = WIDEST_LOG_VARIANCE
    number = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not abs(number) <= widest:  # type: ignore[operator]
        raise InputError(
            f"init_log_variance is {shown(value)}: must be a finite number from {-widest:g} to "
            f"{widest:g}"
        )
    return float(number)


def switch(name: str, value: object) -> bool:
    """`value` as a `bool`; `InputError`, naming `name`, if it is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {shown(value)}: must be True or False")
    return bool(value)


def one_of(kind: str, value: object, known: Iterable[str]) -> str:
    """`value`, known to be one of some names; `InputError` if it is not, with the nearest name."""
    if not isinstance(value, str) or value not in known:
        raise unknown_name(kind, value, known)
    return value


def real_number(name: str, value: object) -> float:
    """`value` as a `float`; infinity is one, NaN is none, and `InputError` names `name`."""
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise InputError(f"{name} is {shown(value)}: must be a number")
    return float(value)


def finite_number(name: str, value: object, at_least: float = -math.inf) -> float:
    """`value` as a `float`, known to be finite; `InputError` if it is not, naming `name`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} is {shown(value)}: must be a finite number")
    if value < at_least:
        raise InputError(f"{name} is {shown(value)}: must be {at_least:g} or more")
    return float(value)


def settings(name: str, given: object, kind: type[T], example: str = "lr=0.01") -> T:
    """Settings of a kind, its defaults for `None`; `InputError` if they are of another."""
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise InputError(
            f"{name} is {shown(given)}: must be ltm_pyro.{kind.__name__}(...), e.g. "
            f"{kind.__name__}({example})"
        )
    return given


class Identified(Protocol):
    """A batch, or a posterior: something with a row per sequence."""

    @property
    def ids(self) -> Tensor:
        """(B,) stable ids."""

    @property
    def corpus(self) -> str | None:
        """Fingerprint of the corpus that the ids belong to; `None` where it is not known."""


def refuse_other_sequences(
    first: Identified | xr.Dataset,
    second: Identified | xr.Dataset,
    names: tuple[str, str] = ("the posterior", "the batch"),
) -> None:
    """Refuses two things that are not about the same sequences in the same order.

    Each is a batch, a posterior or scores: a Dataset over `sequence` of `evaluate`. Ids are counted
    within a corpus, so those of two corpora may coincide: where both fingerprints are known they
    must be equal too.
    """
    (ids, corpus), (others, other_corpus) = _identity(first), _identity(second)
    both = f"{names[0]} and {names[1]}"
    if None not in (corpus, other_corpus) and corpus != other_corpus:
        raise InputError(
            f"{both} are of other sequences: their ids are of different corpora, or of one corpus "
            "cut or tokenised in two ways; make both from the same corpus"
        )
    if not np.array_equal(ids, others):
        raise InputError(
            f"{both} hold other sequences, or in another order: their ids must be equal"
        )


def _identity(thing: Any) -> tuple[Any, str | None]:
    if hasattr(thing, "ids"):
        return thing.ids.cpu().numpy(), thing.corpus
    return thing["sequence"].values, thing.attrs.get("corpus")


def refuse_other_batch(post: Any, batch: Any, name: str = "the posterior") -> None:
    """Refuses a batch that a posterior is not about; see `Posterior.refuse_other_batch`."""
    refuse_other_sequences(post, batch, (name, "the batch"))
    if post.x is None or batch.x is None:
        return
    x, mask = post.x.to(batch.device), post.mask.to(batch.device)
    if x.shape != batch.x.shape or not bool((x == batch.x)[mask].all()):
        raise InputError(
            f"{name} and the batch hold other sequences under the same ids: infer on this batch"
        )
    for covariate, value in post.covariates.items():
        one, other = value.to(batch.device), batch.covariates.get(covariate)
        if other is None or one.shape != other.shape or not bool(_equal(one, other).all()):
            raise InputError(
                f"{name} and the batch differ in covariate {shown(covariate)}: infer on this batch"
            )


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors hold the same, NaN included."""
    return (one == other) | (one.isnan() & other.isnan())
