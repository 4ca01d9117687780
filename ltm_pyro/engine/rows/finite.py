"""Rows that left the finite numbers, told by the ids of their sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ltm_pyro.errors import NonFiniteError

_VALUES = re.compile(r"\b(nan|inf)\b")
_ELEMENT = re.compile(r"Batch element (\d+)")


def refuse_non_finite(values: Iterable[Tensor], ids: Tensor, step: int = -1) -> None:
    """`NonFiniteError`, naming the sequences, where one of `values` (B, ...) is not finite.

    Args:
        values: Each (B, ...).
        ids: (B,) of the sequences.
        step: The slow step, or -1 for a fast loop alone.
    """
    bad = _not_finite(values, ids)
    if bool(bad.any()):
        raise NonFiniteError(ids[bad].tolist(), step)


def tell_non_finite(error: Exception, local: Iterable[Tensor], ids: Tensor) -> None:
    """Tells what torch says of NaN, infinity and singular matrices as a `NonFiniteError`.

    A distribution refuses its parameters, a factorisation its matrix, `multinomial` its
    probabilities, each in words of its own, before any objective is there to look at. Another error
    is left alone; sequences are named where they are known.

    Args:
        error: What torch raised.
        local: Local parameters, each (B, ...).
        ids: (B,) of the sequences.
    """
    bad = _not_finite(local, ids)
    singular = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
    plain = type(error) in (RuntimeError, ValueError)
    if not (singular or (plain and (bool(bad.any()) or _VALUES.search(str(error))))):
        return
    element = _ELEMENT.search(str(error))
    if element is not None and not bool(bad.any()):
        bad[int(element[1]) % len(ids)] = True  # the sequences are the last batch dimension
    reason = "a matrix of q is singular" if singular else "numbers of q are out of range"
    raise NonFiniteError(ids[bad].tolist(), -1, reason) from None


def _not_finite(values: Iterable[Tensor], ids: Tensor) -> Tensor:
    bad = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for value in values:
        if len(value) == len(ids):
            bad |= ~value.detach().reshape(len(ids), -1).isfinite().all(1)
    return bad
