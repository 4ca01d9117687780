"""The fast clock: T_fast gradient steps on the local parameters of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor, nn

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import frozen
from ltm_pyro.engine.rows.finite import refuse_non_finite, tell_non_finite
from ltm_pyro.engine.rows.optimizers import RowAdam, RowNatural, TailMean
from ltm_pyro.engine.rows.store import RowStore
from ltm_pyro.inference.clocks.schedules import learning_rate, steps_naturally
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import Objective, Terms
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Drawing, Noise

RowOptimizer = RowNatural | RowAdam
Call = Callable[[], tuple[Tensor, list[Terms]]]
Watch = Callable[[list[Terms], dict[str, Tensor]], object]
"""Shown each fast step's terms and gradients by name, before the step is taken."""


def local_optimizer(
    guide: LocalGuide, fast: Fast, objective: Objective | None = None
) -> RowOptimizer:
    """A fresh optimiser for the guide's rows.

    Adam alone for an objective that weighs its draws: a q that is far too wide then gets many small
    pushes outwards for each large one back, which a trust region cuts, and natural steps grow with
    q's scale. On fresh noise Adam forgets the first gradients quickly; with `noise="fixed"`, the
    published loop to be studied as it is, it is Adam itself.
    """
    params: dict[str, Tensor] = dict(guide.local_parameters())
    if not steps_naturally(fast):
        return RowAdam(params, fast.betas, memory=1.0 if fast.noise == "fixed" else 0.6)
    units = dict if objective is not None and objective.weighs_draws else guide.units
    return RowNatural(params, units, fast.momentum, fast.betas)


@dataclass(frozen=True)
class FastResult:
    """What a fast loop reports; the fitted values are in the guide.

    Attributes:
        first: Loss before the first step, in nats, summed over the batch.
        last: Loss before the last step.
        grad_norm: Mean over sequences of the last local gradient's Euclidean norm.
        own_draw_elbo: With `noise="fixed"`: (B,) the ELBO at the fitted values on the very draws
            that fitted them, KL weight 1. Not a bound.
    """

    first: Tensor
    last: Tensor
    grad_norm: Tensor
    own_draw_elbo: Tensor | None = None


class FastLoop:
    """Ascends the objective by the guide's local parameters, batch after batch, `slow` frozen."""

    def __init__(
        self,
        model: LatentModel,
        guide: LocalGuide,
        objective: Objective,
        slow: Iterable[nn.Parameter],
    ) -> None:
        self.model, self.guide, self.objective, self.slow = model, guide, objective, list(slow)

    def __call__(
        self,
        batch: Batch,
        fast: Fast,
        seed: int,
        *,
        weight: float = 1.0,
        store: RowStore | None = None,
        watch: Watch | None = None,
    ) -> tuple[FastResult, RowOptimizer]:
        """A fast loop on rows as `store` knows them, fresh ones where it does not.

        The guide holds the rows afterwards, and the optimiser their moments.

        Args:
            batch: B sequences.
            fast: The fast clock.
            seed: Of the noise.
            weight: Of the KL.
            store: Rows and moments by sequence id; read alone.
            watch: Is shown every step.

        Raises:
            NonFiniteError: if the objective or local parameters are not finite any more.
        """
        optimizer = self._start(batch, fast, store)
        if not self.guide.local_parameters():
            return FastResult(*torch.zeros(3, device=batch.device)), optimizer
        # What may change between steps, that numbers are finite, the loop checks itself.
        with frozen(self.slow), torch.enable_grad(), pyro.validation_enabled(False):
            try:
                call = self._objective(batch, fast, seed, weight)
                return self._run(call, optimizer, batch, fast, watch), optimizer
            except (RuntimeError, ValueError) as error:
                tell_non_finite(error, self.guide.local_parameters().values(), batch.ids)
                raise

    def _start(self, batch: Batch, fast: Fast, store: RowStore | None) -> RowOptimizer:
        self.guide.reset(batch)
        optimizer = local_optimizer(self.guide, fast, self.objective)
        if store is not None and self.guide.local_parameters():
            stored = store.gather(batch.ids, {**self.guide.rows(), **optimizer.state()})
            self.guide.load_rows({name: stored[name] for name in self.guide.rows()})
            optimizer = local_optimizer(self.guide, fast, self.objective)
            optimizer.load(stored)
        return optimizer

    def _objective(self, batch: Batch, fast: Fast, seed: int, weight: float) -> Call:
        """Gives a step's loss in nats, summed over the batch, and the terms of its draws.

        Each call has noise of its own; with `noise="fixed"` all have the same.
        """
        model, guide, fixed = self.model, self.guide, fast.noise == "fixed"
        prepared, prior = model.prepare(batch), model.prior()
        calls = fast.fixed_draws if fixed else 1
        ahead = self.objective.particles * (calls if fixed else fast.steps)
        pairs = steps_naturally(fast)  # Adam stays the yardstick that it was: independent draws
        draw = Drawing(Noise(seed, batch.ids), guide.anchor.dtype, ahead, antithetic=pairs)

        def call() -> tuple[Tensor, list[Terms]]:
            if fixed:
                draw.rewind()
            runs = [
                self.objective.descend(model, guide, prepared, draw, weight, prior)
                for _ in range(calls)
            ]
            loss = runs[0][0] if calls == 1 else torch.stack([run[0] for run in runs]).mean(0)
            return loss, [terms for _, terms in runs]

        return call

    def _run(
        self, call: Call, optimizer: RowOptimizer, batch: Batch, fast: Fast, watch: Watch | None
    ) -> FastResult:
        params: dict[str, Tensor] = dict(self.guide.local_parameters())
        fixed, natural = fast.noise == "fixed", optimizer.name.startswith("natural")
        tail = TailMean(params, fast.steps, 0.0 if fixed else fast.average, natural)
        first = last = norm = torch.zeros((), device=batch.device)
        for step in range(fast.steps):
            loss, terms = call()
            found = torch.autograd.grad(loss, list(params.values()))
            gradients = dict(zip(params, found, strict=True))
            last = loss.detach()
            first = last if step == 0 else first
            if watch is not None:
                watch(terms, gradients)
            optimizer.step(gradients, learning_rate(fast, step, fast.steps))
            tail.add(step)
        if fast.steps:
            norm = row_norms(gradients).mean()
            # Once, because asking waits for the device; NaN does not go away by itself.
            refuse_non_finite((*mean_report(terms), *params.values()), batch.ids)
        tail.put()
        if not fixed:
            return FastResult(first, last, norm)
        with torch.no_grad():
            nll, kl = mean_report(call()[1])
        return FastResult(first, last, norm, -nll - kl)


def mean_report(terms: list[Terms]) -> tuple[Tensor, Tensor]:
    """(nll, kl) of each sequence, (B,) each, mean over several calls."""
    reports = [each.report() for each in terms]
    if len(reports) == 1:
        return reports[0]
    nll, kl = (torch.stack(part).mean(0) for part in zip(*reports, strict=True))
    return nll, kl


def row_norms(gradients: dict[str, Tensor]) -> Tensor:
    """Euclidean norm of each sequence's gradient, (B,)."""
    rows = [g.flatten(1) for g in gradients.values()]
    return torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)
