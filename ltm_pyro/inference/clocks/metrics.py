"""What a slow step reports: sums over a part of its batch, and the row of metrics of all parts.

A point mass has no density, hence neither a KL nor an ELBO. Its objective is log p(x, z) at the
point: no bound on log p(x), since a density of z may have any value, and so under another name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ltm_pyro.course import Metrics
from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.clocks.fast import FastResult
from ltm_pyro.inference.clocks.slow import SlowLoss, Sums


def sums_of(batch: Batch, loss: SlowLoss, fitted: FastResult) -> Sums:
    """Of the rows of `batch`, what both clocks found."""
    return {
        "nll": loss.nll.sum(),
        "kl": loss.kl.sum(),
        "objective": loss.objective.detach(),
        "grad_norm_fast": fitted.grad_norm * len(batch),
        "fast_gain": fitted.first - fitted.last,
        "n_tokens": batch.n_tokens.sum(),
        "n_sequences": torch.tensor(len(batch), device=batch.device),
    }


def metrics_row(has_density: bool, sums: Mapping[str, float], told: Mapping[str, float]) -> Metrics:
    """A slow step's metrics, see `DualRateSVI.step`, from sums over sequences, and what is told."""
    rows, tokens = sums["n_sequences"], sums["n_tokens"]
    nll, kl = sums["nll"] / rows, sums["kl"] / rows
    total = -(nll + kl)
    name, cost = ("elbo", {"kl": kl}) if has_density else ("log_joint", {"log_prior": -kl})
    bound = {name: total, "nll": nll, **cost, f"{name}_per_token": total / (tokens / rows)}
    return {
        "step": told["step"],
        **bound,
        "objective": -sums["objective"] / rows,
        **{name: told[name] for name in ("kl_weight", "lr_fast", "lr_slow")},
        "grad_norm_fast": sums["grad_norm_fast"] / rows,
        "grad_norm_slow": told["grad_norm_slow"],
        "fast_gain": sums["fast_gain"] / rows,
        "tokens_per_second": tokens / told["seconds"],
        "seconds": told["seconds"],
    }
