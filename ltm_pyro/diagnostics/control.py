"""The control, the same decoder without thoughts, and scores held against it.

At z = 0 cross-attention adds exactly nothing, so the control is a plain autoregressive model with
the same weights elsewhere, the same start, the same batches and the same schedule. Whatever a
latent-thought model gains must show against it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ltm_pyro.checks import refuse_other_sequences
from ltm_pyro.config import Slow
from ltm_pyro.diagnostics.estimates import (
    BOUNDS,
    COMPARED,
    Estimate,
    clustered_ratio,
    documents_of,
    exponential,
    loss_rate,
    losses,
    scored,
    text_sizes,
)
from ltm_pyro.engine.execution import Execution
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel


def control(
    model: LatentThoughtModel,
    slow: Slow,
    steps: int,
    seed: int = 0,
    execution: Execution | None = None,
) -> DualRateSVI:
    """A fit whose thoughts never start: its `elbo` is log p(x | z = 0), exactly.

    Args:
        model: A freshly initialised model; trained in place.
        slow: The slow clock of the fit that this is the control of.
        steps: Slow steps over which its schedules run.
        seed: Of the order of batches.
        execution: How it is computed; as the fit that this is the control of.
    """
    slow = replace(slow, thoughts_start=1.0, kl_start=1.0, word_dropout=0.0)
    svi = DualRateSVI(model, "mean_field", slow=slow, seed=seed, execution=execution)
    svi.horizon = steps
    return svi


def against_control(
    scores: xr.Dataset, control: xr.Dataset, per: str = "token"
) -> dict[str, dict[str, Any]]:
    """Each score's ratio to the control's exact perplexity, paired sequence by sequence.

    Perplexities are per `token`, `byte` or `word`, which stands in the names. By score (`ppl_elbo`
    and `ppl_iw`, or `ppl_predictive`): `ratio` and `ratio_error`; `difference_per_token` (nats,
    below 0 where the thoughts' model is better), `difference_per_token_se` clustered by document
    and not below the Monte Carlo error, `difference_per_token_error`, of which two on either side
    hold 95 %, for each score alone; `documents` (each sequence counts as one where not known) and
    the `verdict` that the error allows.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in scored(scores, COMPARED):
        rate = paired_loss(scores, control, name, per)
        ratio = exponential(rate.value)
        out[name] = {
            "ratio": ratio,
            "ratio_error": ratio * rate.error,
            f"difference_per_{per}": rate.value,
            f"difference_per_{per}_se": rate.se,
            f"difference_per_{per}_error": rate.error,
            "documents": rate.documents,
            "verdict": _verdict(rate, bound=name in BOUNDS),
        }
    return out


def paired_loss(scores: xr.Dataset, control: xr.Dataset, name: str, per: str) -> Estimate:
    """Loss by one of `COMPARED` less the control's exact one, nats per unit, as in `loss_rate`."""
    gap = losses(scores, name) - losses(control, "ppl_z0")
    rate = clustered_ratio(gap, text_sizes(scores, per), documents_of(scores))
    # The spread over documents holds the draws' error on average; of a few documents it may by luck
    # not, where one sequence's draws are far noisier than the others'.
    return replace(rate, se=max(rate.se, loss_rate(scores, name, per)[1]))


def _verdict(difference: Estimate, *, bound: bool) -> str:
    """What a paired difference of losses allows to say of these two fits, and no more."""
    if not math.isfinite(difference.value + difference.margin()):
        return "no error, so nothing can be said"
    if difference.few:
        return "too few documents to say"
    if not difference.differs():
        return "not told apart"
    if difference.value < 0:
        return "this fit is better than this fit of the control"
    if bound:
        return "this bound is above the control; whether the model is, a bound cannot say"
    return "this fit is worse than this fit of the control"


def gains_by_document(scores: xr.Dataset, control: xr.Dataset) -> xr.Dataset:
    """Nats above the control, document by document.

    Args:
        scores: Of `evaluate`.
        control: Of the decoder without thoughts, on the same sequences.

    Returns:
        Dataset over `document`: `sequences`, `tokens`, and for each score that there is
        `elbo_gain` and `iw_bound_gain` or `log_predictive_gain`, nats per sequence of the document.

    Raises:
        InputError: if the two are about other sequences.
    """
    refuse_other_sequences(scores, control, ("scores", "control"))
    names = [n for n in ("elbo", "iw_bound", "log_predictive") if n in scores]
    known = documents_of(scores)
    documents = np.arange(scores.sizes["sequence"]) if known is None else known
    found, place, sizes = np.unique(documents, return_inverse=True, return_counts=True)

    def total(values: xr.DataArray) -> NDArray[Any]:
        return np.bincount(place, weights=values.values)

    columns: dict[str, NDArray[Any]] = {}
    columns |= {"sequences": sizes, "tokens": total(scores["n_tokens"]).astype(np.int64)}
    columns |= {f"{name}_gain": total(scores[name] + control["nll_z0"]) / sizes for name in names}
    return xr.Dataset({k: ("document", v) for k, v in columns.items()}, {"document": found})
