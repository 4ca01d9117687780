"""What torch raises on numbers out of range, told as a fit that left the finite numbers."""

from __future__ import annotations

import re

import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.guides.base import LocalGuide

_VALUES = re.compile(r"\b(nan|inf)\b")
_ELEMENT = re.compile(r"Batch element (\d+)")


def tell_non_finite(error: Exception, guide: LocalGuide, batch: Batch, step: int = -1) -> None:
    """Tells what torch says of NaN, infinity and singular matrices as a `NonFiniteError`.

    A distribution refuses its parameters, a factorisation its matrix, `multinomial` its
    probabilities, each in words of its own, before any objective is there to look at.

    Args:
        error: What torch raised; another error is left alone.
        guide: Holds the rows of the batch.
        batch: B sequences.
        step: The slow step, or -1 for a fast loop alone.

    Raises:
        NonFiniteError: naming the sequences where they are known.
    """
    bad = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    for p in dict(guide.local_parameters()).values():
        if len(p) == len(batch):
            bad |= ~p.detach().flatten(1).isfinite().all(1)
    singular = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
    plain = type(error) in (RuntimeError, ValueError)
    if not (singular or (plain and (bool(bad.any()) or _VALUES.search(str(error))))):
        return
    element = _ELEMENT.search(str(error))
    if element is not None and not bool(bad.any()):
        bad[int(element[1]) % len(batch)] = True  # the sequences are the last batch dimension
    reason = "a matrix of q is singular" if singular else "numbers of q are out of range"
    raise NonFiniteError(batch.ids[bad].tolist(), step, reason) from None
