"""The fast clock: T_fast gradient steps on the local parameters of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pyro
import torch
from torch import Tensor, nn

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.store import RowStore
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.clocks.schedules import learning_rate, steps_naturally
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.non_finite import tell_non_finite
from ltm_pyro.inference.objectives import Objective, Terms
from ltm_pyro.inference.row_adam import RowAdam
from ltm_pyro.inference.row_natural import RowNatural
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Drawing, Noise


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters ask for no gradient, so none is computed for them."""
    kept = [(p, p.requires_grad) for p in parameters]
    for p, _ in kept:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in kept:
            p.requires_grad_(flag)


RowOptimizer = RowNatural | RowAdam


def local_optimizer(
    guide: LocalGuide, fast: Fast, objective: Objective | None = None
) -> RowOptimizer:
    """A fresh optimiser for the guide's rows.

    Adam alone for an objective that weighs its draws: a q that is far too wide then gets many small
    pushes outwards for each large one back, which a trust region cuts, and natural steps grow with
    q's scale.

    On fresh noise Adam forgets the first gradients quickly; with `noise="fixed"`, the published
    loop to be studied as it is, it is Adam itself.
    """
    params: dict[str, Tensor] = dict(guide.local_parameters())
    if steps_naturally(fast):
        weighs = objective is not None and objective.weighs_draws
        units = dict if weighs else guide.units
        return RowNatural(params, units, fast.momentum, fast.betas)
    return RowAdam(params, fast.betas, memory=1.0 if fast.noise == "fixed" else 0.6)


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


Watch = Callable[[list[Terms], dict[str, Tensor], float], object]
"""Shown each fast step's terms, gradients by name and learning rate, before the step is taken."""


class FastLoop:
    """Fits the guide's local parameters to one batch after another, in place.

    Everything else is frozen meanwhile. Gradients come from `torch.autograd.grad` on the local
    parameters alone, so no `.grad` is written anywhere.

    Args:
        model: The model.
        guide: Reset for each batch.
        objective: What is ascended.
        slow: The parameters of the slow clock.
    """

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

        Args:
            batch: B sequences; the guide holds their rows afterwards.
            fast: The fast clock. `noise="fixed"` draws the same noise at every step.
            seed: Of the noise.
            weight: Of the KL.
            store: Rows and moments by sequence id; read alone.
            watch: Is shown every step.

        Returns:
            What the loop reports, and the optimiser with the rows' moments.

        Raises:
            NonFiniteError: if the objective or local parameters became NaN or infinite.
        """
        optimizer = self._start(batch, fast, store)
        if not self.guide.local_parameters():
            return FastResult(*torch.zeros(3, device=batch.device)), optimizer
        # What may change between steps, that numbers are finite, the loop checks itself.
        with frozen(self.slow), torch.enable_grad(), pyro.validation_enabled(False):
            try:
                calls = _Calls(self, batch, fast, seed, weight)
                return self._run(calls, optimizer, watch), optimizer
            except (RuntimeError, ValueError) as error:
                tell_non_finite(error, self.guide, batch)
                raise

    def _start(self, batch: Batch, fast: Fast, store: RowStore | None) -> RowOptimizer:
        self.guide.reset(batch)
        optimizer = local_optimizer(self.guide, fast, self.objective)
        if store is not None and self.guide.local_parameters():
            fresh = {**self.guide.rows(), **optimizer.state()}
            stored = store.gather(batch.ids, fresh)
            self.guide.load_rows({name: stored[name] for name in self.guide.rows()})
            optimizer = local_optimizer(self.guide, fast, self.objective)
            optimizer.load(stored)
        return optimizer

    def _run(self, calls: _Calls, optimizer: RowOptimizer, watch: Watch | None) -> FastResult:
        fast, batch = calls.fast, calls.batch
        params: dict[str, Tensor] = dict(self.guide.local_parameters())
        natural = isinstance(optimizer, RowNatural) and bool(optimizer.params)
        tail = _TailMean(params, fast, natural)
        first = last = norm = torch.zeros((), device=batch.device)
        own: Tensor | None = None
        for step in range(fast.steps):
            lr = learning_rate(fast, step, fast.steps)
            loss, terms = calls()
            found = torch.autograd.grad(loss, list(params.values()))
            gradients = dict(zip(params, found, strict=True))
            last = loss.detach()
            first = last if step == 0 else first
            if watch is not None:
                watch(terms, gradients, lr)
            if step == fast.steps - 1:
                norm = row_norms(gradients).mean()
                # Once, because asking waits for the device; NaN does not go away by itself.
                report = mean_report(terms)
            optimizer.step(gradients, lr)
            tail.add(step)
        if fast.steps:
            _refuse_non_finite(params, report, batch)
        tail.put()
        if fast.noise == "fixed":
            with torch.no_grad():
                nll, kl = mean_report(calls()[1])
            own = -nll - kl
        return FastResult(first, last, norm, own)


class _Calls:
    """The objective of one step after another, each on noise of its own or all on the same."""

    def __init__(self, loop: FastLoop, batch: Batch, fast: Fast, seed: int, weight: float) -> None:
        self.batch, self.fast, self.weight = batch, fast, weight
        self.model, self.guide, self.objective = loop.model, loop.guide, loop.objective
        self.prepared, self.prior = loop.model.prepare(batch), loop.model.prior()
        self.fixed = fast.noise == "fixed"
        self.count = fast.fixed_draws if self.fixed else 1
        ahead = self.objective.particles * (self.count if self.fixed else fast.steps)
        # Adam stays the yardstick that it was: on independent draws.
        pairs = steps_naturally(fast)
        noise, dtype = Noise(seed, batch.ids), loop.guide.anchor.dtype
        self.draw = Drawing(noise, dtype, ahead, antithetic=pairs)

    def __call__(self) -> tuple[Tensor, list[Terms]]:
        """The loss in nats, summed over the batch, and the terms of its draws."""
        if self.fixed:
            self.draw.rewind()
        runs = [
            self.objective.descend(
                self.model, self.guide, self.prepared, self.draw, self.weight, self.prior
            )
            for _ in range(self.count)
        ]
        loss = runs[0][0] if len(runs) == 1 else torch.stack([run[0] for run in runs]).mean(0)
        return loss, [terms for _, terms in runs]


class _TailMean:
    """Mean of the local parameters over the last steps: gradient noise in them cancels.

    Weights grow linearly from 0, so that where the steps come from counts little.

    Args:
        params: The parameters, read after each step and replaced by `put`.
        fast: The clock. Its `average` is a share of the steps.
        natural: Whether any step is natural. Of Adam's the first `ADAMS_BURN_IN` are left out: they
            have one length, and a mean would lag behind.
    """

    ADAMS_BURN_IN: ClassVar = 100

    def __init__(self, params: dict[str, Tensor], fast: Fast, natural: bool) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        share = 0.0 if fast.noise == "fixed" else fast.average
        burn_in = 0 if natural else self.ADAMS_BURN_IN
        self.first = fast.steps - round(share * max(fast.steps - burn_in, 0))
        self.mean: dict[str, Tensor] = {}

    def add(self, step: int) -> None:
        """Takes the parameters after `step` into the mean, if it is one of the last."""
        n = step - self.first + 1
        if n == 1:
            self.mean = {name: p.clone() for name, p in self.params.items()}
        elif n > 1:
            for name, p in self.params.items():
                self.mean[name].lerp_(p, 2.0 / (n + 1))

    def put(self) -> None:
        """Replaces the parameters by their mean."""
        for name, value in self.mean.items():
            self.params[name].copy_(value)


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


def _refuse_non_finite(
    params: dict[str, Tensor], report: tuple[Tensor, Tensor], batch: Batch
) -> None:
    """Names the sequences whose parameters, or whose terms of the objective, are not finite."""
    bad = ~(report[0] + report[1]).isfinite()
    for p in params.values():
        bad |= ~p.detach().flatten(1).isfinite().all(1)
    if bool(bad.any()):
        raise NonFiniteError(batch.ids[bad].tolist(), step=-1)
