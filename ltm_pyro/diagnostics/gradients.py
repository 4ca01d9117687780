"""How noisy a gradient is, estimator by estimator: signal, variance and their ratio per sequence.

With g the gradient of one call of an objective, at fixed parameters and fresh draws,

    gradient_norm      |E g|
    gradient_variance  trace Cov g = E |g - E g|^2
    snr                |E g| / sqrt(trace Cov g)

the last after Rainforth et al. (2018, section 3.1), for the gradient as one vector where they take
each parameter by itself. Two objectives may have the same expectation and very different noise, and
a tighter bound may have a gradient that carries less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
import xarray as xr
from pyro.infer import ELBO
from torch import Tensor, nn

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.estimates import jackknife, provenance
from ltm_pyro.doors import door
from ltm_pyro.engine.execution import frozen
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide, Loss
from ltm_pyro.inference.objectives import as_objective, describe, kl_estimator
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Stream, derive_seed, seeded

BLOCKS = 10
"""Draws are cut into so many blocks; standard errors come from leaving each out (jackknife)."""


@door
def gradient_noise(
    model: LatentModel,
    guide: LocalGuide,
    batch: Batch,
    objectives: Sequence[ELBO | str] = ("elbo", "stl"),
    draws: int = 200,
    *,
    slow: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Signal and noise of each objective's gradient at the parameters that the guide holds.

    Model and guide are left as they are.

    Args:
        model: Prior and likelihood.
        guide: Holds the rows of `batch`, as after `svi.infer(batch)`.
        batch: The sequences.
        objectives: Names, objectives or Pyro ELBO objects; all see the same seed.
        draws: Gradients per objective, at least 2 * `BLOCKS`.
        slow: Also measure the gradient of the slow parameters (decoder, prior and what the guide
            shares), which is one for the whole batch.
        seed: Of the draws.

    Returns:
        Dataset over `objective` and `sequence` (coordinate: stable ids), of the loss' gradient
        in nats by the local parameters: `gradient_variance`; `gradient_signal`, `|E g|^2` corrected
        for the noise of its own estimate, so that it may fall below 0 and its average over
        sequences is unbiased; `gradient_norm`, its root; and `snr`, NaN where neither signal nor
        noise is left. Each with its standard error `_se`. With `slow`, the same over `objective`
        as `slow_gradient_variance` and so on. Coordinates of `objective`: `decoder_evaluations` per
        gradient and sequence, and `kl_estimator` (`analytic`, `monte_carlo`, `none`, `unknown`).

    Raises:
        InputError: if there are too few draws, no objective, nothing to differentiate, or the
            guide holds other rows.
    """
    whole_number("draws", draws, at_most=MOST_COUNT)
    if draws < 2 * BLOCKS:
        raise InputError(f"draws is {draws}: must be {2 * BLOCKS} or more, for standard errors")
    if not objectives:
        raise InputError("objectives is empty: name at least one, e.g. 'elbo'")
    batch = batch.to(model.device)
    model.check(batch)
    if not guide.local_parameters() and not slow:
        raise InputError(
            f"guide {guide.family!r} has no local parameters: give slow=True to measure the "
            "gradient of what it shares"
        )
    elbos = [as_objective(chosen) for chosen in objectives]
    with _asking_for_gradients(model, guide, slow) as (local, others):
        prepared = batch if slow else model.prepare(batch)
        measured = [
            _measure(elbo(cast("nn.Module", model), guide), prepared, local, others, draws, seed)
            for elbo in elbos
        ]
    return _dataset(model, guide, batch, elbos, measured, draws, seed)


@contextmanager
def _asking_for_gradients(
    model: LatentModel, guide: LocalGuide, slow: bool
) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Local parameters and slow ones that ask for a gradient; afterwards all is as before."""
    local = list(guide.local_parameters().values())
    rest = [*model.parameters(), *guide.shared_parameters()]
    with frozen(local), frozen(() if slow else rest):
        for p in local:
            p.requires_grad_(True)
        yield local, [p for p in rest if p.requires_grad]


def _measure(
    loss: Loss,
    batch: Batch,
    local: list[nn.Parameter],
    others: list[nn.Parameter],
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """The statistics of one objective's gradient, (B,) each, and () for the slow parameters."""
    rows, whole = _Moments(draws), _Moments(draws)
    noise = derive_seed(seed, Stream.SCORE)
    with torch.enable_grad(), seeded(noise, batch.device):
        parameters = [*local, *others]
        for _ in range(draws):
            found = torch.autograd.grad(
                loss(batch), parameters, allow_unused=True, materialize_grads=True
            )
            if local:
                rows.add(torch.cat([g.flatten(1) for g in found[: len(local)]], 1))
            if others:
                whole.add(torch.cat([g.flatten() for g in found[len(local) :]]))
    out = rows.statistics() if local else {}
    if others:
        out |= {f"slow_{name}": value for name, value in whole.statistics().items()}
    return out


class _Moments:
    """First and second moments of gradients (..., P), block by block, in double precision."""

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.seen = 0
        self.counts = torch.zeros(BLOCKS, dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        """Takes one gradient in."""
        gradient = gradient.detach().double()
        if self.seen == 0:
            # Moments about the first gradient: no large numbers cancel where there is no noise.
            self.pivot = gradient
            self.sums = gradient.new_zeros(BLOCKS, *gradient.shape)
            self.squares = gradient.new_zeros(BLOCKS, *gradient.shape[:-1])
        block = self.seen * BLOCKS // self.draws
        moved = gradient - self.pivot
        self.sums[block] += moved
        self.squares[block] += moved.square().sum(-1)
        self.counts[block] += 1
        self.seen += 1

    def statistics(self) -> dict[str, Tensor]:
        """The four variables of the dataset, each with its `_se`."""
        total, squares, count = self.sums.sum(0), self.squares.sum(0), float(self.counts.sum())
        out = self._of(total, squares, count)
        left_out = [
            self._of(total - self.sums[i], squares - self.squares[i], count - float(n))
            for i, n in enumerate(self.counts)
        ]
        for name in list(out):
            out[f"{name}_se"] = jackknife(torch.stack([block[name] for block in left_out]))
        return out

    def _of(self, total: Tensor, squares: Tensor, count: float) -> dict[str, Tensor]:
        variance = ((squares - total.square().sum(-1) / count) / (count - 1)).clamp(min=0.0)
        signal = (self.pivot + total / count).square().sum(-1) - variance / count
        norm = signal.clamp(min=0.0).sqrt()
        return {
            "gradient_signal": signal,
            "gradient_norm": norm,
            "gradient_variance": variance,
            "snr": norm / variance.sqrt(),
        }


_UNITS = {
    "gradient_signal": "nats^2", "gradient_norm": "nats", "gradient_variance": "nats^2", "snr": "1",
}  # fmt: skip


def _dataset(
    model: LatentModel,
    guide: LocalGuide,
    batch: Batch,
    elbos: Sequence[ELBO],
    measured: list[dict[str, Tensor]],
    draws: int,
    seed: int,
) -> xr.Dataset:
    names = [describe(elbo) for elbo in elbos]
    coords = {
        "objective": names,
        "sequence": batch.ids.cpu().numpy(),
        "decoder_evaluations": ("objective", [int(elbo.num_particles) for elbo in elbos]),
        "kl_estimator": ("objective", [kl_estimator(elbo, model, guide) for elbo in elbos]),
    }
    variables = {}
    for name in measured[0]:
        values = np.stack([statistics[name].cpu().numpy() for statistics in measured])
        what = name.removeprefix("slow_").removesuffix("_se")
        dims = ("objective", "sequence")[: values.ndim]
        variables[name] = (dims, values, {"units": _UNITS[what]})
    attrs = {
        "guide": guide.family,
        "draws": draws,
        "seed": seed,
        "local_parameters": sum(p[0].numel() for p in guide.local_parameters().values()),
        "slow_gradient": "of the loss summed over the batch",
        **provenance(batch),
    }
    return xr.Dataset(variables, coords, attrs)


def efficiency(data: xr.Dataset) -> xr.DataArray:
    """Signal-to-noise ratio per square root of decoder evaluations, (objective, sequence).

    What averaging until the same cost would make of each estimator: the fair comparison between
    objectives of different S that share their expectation.
    """
    return data["snr"] / np.sqrt(data["decoder_evaluations"])
