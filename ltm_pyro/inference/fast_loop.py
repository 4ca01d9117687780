"""The fast clock: T_fast gradient steps on the local parameters of one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.guides.base import LocalGuide, Loss
from ltm_pyro.inference.objectives import (
    ElboByHand,
    KLWeight,
    TermRecorder,
    quiet_about_nan,
    repeating,
)
from ltm_pyro.inference.posterior import FastTrace
from ltm_pyro.inference.random import reseed, seeded
from ltm_pyro.inference.row_adam import RowAdam
from ltm_pyro.inference.schedules import learning_rate


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


def sequence_terms(
    recorder: TermRecorder, guide: LocalGuide, prior: TorchDistribution
) -> tuple[Tensor, Tensor]:
    """(nll, kl) per sequence, (B,) each, the KL in closed form where the family has one."""
    kl = recorder.closed_kl
    if kl is None:
        with torch.no_grad():
            kl = guide.kl(prior)
    return recorder.nll(), recorder.kl() if kl is None else kl


def objective(loss: Loss, batch: Batch, draws: int) -> Tensor:
    """The loss averaged over `draws` calls, each with its own draws."""
    if draws == 1:
        return loss(batch)
    return torch.stack([loss(batch) for _ in range(draws)]).mean(0)


def by_autograd(
    loss: Loss, batch: Batch, draws: int, params: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """`objective`, and its gradient by each of `params`."""
    value = objective(loss, batch, draws)
    gradients = torch.autograd.grad(value, list(params.values()))
    return value.detach(), dict(zip(params, gradients, strict=True))


def local_optimizer(guide: LocalGuide, fast: Fast) -> RowAdam:
    """A fresh optimiser for the guide's rows.

    On fresh noise it forgets the first gradients quickly; with `noise="fixed"`, the published loop
    to be studied as it is, it is Adam itself.
    """
    params: dict[str, Tensor] = dict(guide.local_parameters())
    if fast.noise == "fixed":
        return RowAdam(params, fast.betas, memory=1.0)
    return RowAdam(params, fast.betas)


@dataclass(frozen=True)
class FastResult:
    """What a fast loop reports; the fitted values are in the guide.

    Attributes:
        first: Loss before the first step, in nats, summed over the batch.
        last: Loss before the last step.
        grad_norm: Mean over sequences of the last local gradient's Euclidean norm.
        own_draw_elbo: With `noise="fixed"`: (B,) the ELBO at the fitted values on the very draws
            that fitted them, KL weight 1. Not a bound.
        trace: The course of every sequence, if it was asked for.
    """

    first: Tensor
    last: Tensor
    grad_norm: Tensor
    own_draw_elbo: Tensor | None = None
    trace: FastTrace | None = None


def run_fast_loop(
    loss: Loss,
    guide: LocalGuide,
    prior: TorchDistribution,
    batch: Batch,
    fast: Fast,
    *,
    optimizer: RowAdam,
    seed: int,
    kl_weight: float,
    record: bool,
    ran: bool,
) -> FastResult:
    """Fits the guide's local parameters, in place.

    Everything else must be frozen by the caller. Gradients come from `torch.autograd.grad` on the
    local parameters alone, so no `.grad` is written anywhere.

    Args:
        loss: Summed -ELBO of the batch.
        guide: A guide reset for this batch.
        prior: p(z).
        batch: The batch, possibly prepared by the model.
        fast: The fast clock.
        optimizer: Of the guide's rows; fresh, or with the moments that they had.
        seed: Of the noise. `noise="fixed"` draws the same noise at every step.
        kl_weight: Weight of the KL term in the objective.
        record: Keep the course of every sequence.
        ran: A loop with this model, guide and objective has run before, so that not even the first
            step has to go through Pyro's handlers and checks (see `Repeat`).

    Raises:
        NonFiniteError: if the objective or local parameters became NaN or infinite.
    """
    params: dict[str, Tensor] = dict(guide.local_parameters())
    steps = fast.steps
    zero = torch.zeros((), device=batch.device)
    if not params:
        return FastResult(zero, zero, zero)
    draws = fast.fixed_draws if fast.noise == "fixed" else 1
    course = _Course()
    tail = _TailMean(params, steps, 0.0 if fast.noise == "fixed" else fast.average)
    first = last = norm = zero
    by_hand: ElboByHand | None = None
    with (
        seeded(seed, batch.device),
        torch.enable_grad(),
        quiet_about_nan(),
        KLWeight(kl_weight),
        ExitStack() as unchecked,
    ):
        for step in range(steps):
            if step == (0 if ran else 1):
                # Pyro and torch check the first step alone: the later ones run the same program.
                # What may change, that numbers are finite, the loop checks itself.
                unchecked.enter_context(repeating(prior))
                by_hand = ElboByHand.of(loss) if draws == 1 else None
            if fast.noise == "fixed":
                reseed(seed, batch.device)
            lr = learning_rate(fast, step, steps)
            recorder = TermRecorder()
            if by_hand is not None:
                last, gradients = by_hand(batch, recorder)
            else:
                with recorder:
                    last, gradients = by_autograd(loss, batch, draws, params)
            if record or step == steps - 1:
                norms = _row_norms(gradients)
            if record:
                course.add(*sequence_terms(recorder, guide, prior), norms, lr)
            optimizer.step(gradients, lr)
            tail.add(step)
            if step == steps - 1 or not math.isfinite(last.item()):
                _refuse_non_finite(params, last, recorder, batch)
            first = last if step == 0 else first
            if step == steps - 1:
                norm = norms.mean()
        tail.put()
        own = (
            _own_draw_elbo(loss, guide, prior, batch, draws, seed)
            if fast.noise == "fixed"
            else None
        )
    return FastResult(first, last, norm, own, course.trace() if record and steps else None)


class _TailMean:
    """Mean of the local parameters over the last steps: gradient noise that Adam keeps cancels.

    Args:
        params: The parameters, read after each step and replaced by `put`.
        steps: T_fast.
        share: Of the steps beyond the first `BURN_IN`; a shorter loop is not averaged, since its
            mean would lag behind where it has arrived.
    """

    BURN_IN = 100

    def __init__(self, params: dict[str, Tensor], steps: int, share: float) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        self.count = round(share * max(steps - self.BURN_IN, 0))
        self.first = steps - self.count
        self.total = {name: torch.zeros_like(p) for name, p in params.items()}

    def add(self, step: int) -> None:
        """Takes the parameters after `step` into the mean, if it is one of the last."""
        if step >= self.first:
            for name, p in self.params.items():
                self.total[name] += p

    def put(self) -> None:
        """Replaces the parameters by their mean."""
        if self.count > 1:
            for name, p in self.params.items():
                p.copy_(self.total[name] / self.count)


class _Course:
    """Collects a `FastTrace` step by step."""

    def __init__(self) -> None:
        self.terms: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rates: list[float] = []

    def add(self, nll: Tensor, kl: Tensor, grad_norm: Tensor, lr: float) -> None:
        self.terms.append((nll, kl, grad_norm))
        self.rates.append(lr)

    def trace(self) -> FastTrace:
        nll, kl, norm = (torch.stack(part) for part in zip(*self.terms, strict=True))
        return FastTrace(-nll - kl, nll, kl, torch.tensor(self.rates), norm)


def _own_draw_elbo(
    loss: Loss, guide: LocalGuide, prior: TorchDistribution, batch: Batch, draws: int, seed: int
) -> Tensor:
    reseed(seed, batch.device)
    with torch.no_grad(), TermRecorder() as recorder:
        objective(loss, batch, draws)
        nll, kl = sequence_terms(recorder, guide, prior)
    return -nll - kl


def _row_norms(gradients: dict[str, Tensor]) -> Tensor:
    rows = [g.flatten(1) for g in gradients.values()]
    return torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)


def _refuse_non_finite(
    params: dict[str, Tensor], value: Tensor, recorder: TermRecorder, batch: Batch
) -> None:
    """Names the sequences whose parameters, or whose terms of the objective, are not finite."""
    bad = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    for p in params.values():
        bad |= ~p.detach().flatten(1).isfinite().all(1)
    if not bool(value.isfinite()):
        kl = recorder.kl() if recorder.closed_kl is None else recorder.closed_kl
        bad |= ~(recorder.nll() + kl).isfinite()
    if bool(bad.any()):
        raise NonFiniteError(batch.ids[bad].tolist(), step=-1)
