"""The densities that chains move on, with their gradients, for all rows at once.

Thoughts are flat here: z is (C, B, N) for C chains of B sequences with N = K * D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import frozen
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel

SCALE_DRAWS = 512
"""Draws that stand in for a variance that has no closed form."""

START_TRIES = 20
"""Times that a start with no finite density is drawn again."""

Terms = Callable[[Tensor], tuple[Tensor, ...]]
"""z (C, B, K, D) to the P terms of a log density, (C, B) each, in nats."""


@dataclass(frozen=True)
class State:
    """Where the chains are, and the log density's terms there.

    Attributes:
        z: (C, B, N) flat thoughts.
        terms: (P, C, B) float64, in nats.
        gradients: (P, C, B, N) of each term.
    """

    z: Tensor
    terms: Tensor
    gradients: Tensor

    def log_density(self, weights: Tensor) -> Tensor:
        """The terms' weighted sum, weights (P, B), (C, B) float64; -inf where not finite."""
        value = (weights[:, None] * self.terms).sum(0)
        return torch.where(value.isfinite(), value, -torch.inf)

    def gradient(self, weights: Tensor) -> Tensor:
        """Of `log_density`, (C, B, N); 0 where not finite, and such a proposal is refused."""
        total = (weights[:, None, :, None].to(self.gradients) * self.gradients).sum(0)
        return total.nan_to_num(0.0, 0.0, 0.0)

    def where(self, keep: Tensor, other: State) -> State:
        """This state in the rows (C, B) where `keep`, the other one elsewhere."""
        return State(
            torch.where(keep[..., None], self.z, other.z),
            torch.where(keep, self.terms, other.terms),
            torch.where(keep[..., None], self.gradients, other.gradients),
        )


class Target:
    """A log density as a sum of terms that may be weighted anew at every step.

    Args:
        terms: The terms; what they depend on must ask for no gradient.
        shape: (K, D).
    """

    def __init__(self, terms: Terms, shape: tuple[int, int]) -> None:
        self.terms = terms
        self.shape = shape
        self.evaluations = 0
        """Times that all rows were evaluated, each with its gradient."""

    def __call__(self, z: Tensor) -> State:
        """Terms and gradients at z (C, B, N), which must be finite."""
        self.evaluations += 1
        # Out there a rate may overflow: such a proposal is refused, and is no one's mistake.
        with torch.enable_grad(), pyro.validation_enabled(False):
            leaf = z.detach().unflatten(-1, self.shape).requires_grad_()
            values = self.terms(leaf)
            # Terms may share what comes before the last of them, and a compiled likelihood, which
            # is in the last, must not be retained.
            last = len(values) - 1
            gradients = [
                torch.autograd.grad(value.sum(), leaf, retain_graph=i < last)[0].flatten(-2)
                for i, value in enumerate(values)
            ]
        terms = torch.stack([value.detach().double() for value in values])
        return State(z, terms, torch.stack(gradients))


@dataclass(frozen=True)
class Setting:
    """One batch made ready for chains.

    Attributes:
        model: With its weights frozen.
        batch: Prepared by the model, on its device.
        prior: p(z).
        base: Where chains start, q or the prior, batch shape (B,).
        scale: (B, N) standard deviations of `base`.
    """

    model: LatentModel
    batch: Batch
    prior: TorchDistribution
    base: TorchDistribution
    scale: Tensor

    def log_joint(self, z: Tensor) -> tuple[Tensor, ...]:
        """Log p(x, z) as one term."""
        return (self.model.log_likelihood(z, self.batch) + self.prior.log_prob(z),)

    def path(self, z: Tensor) -> tuple[Tensor, ...]:
        """The start's log density, and what it lacks of log p(x, z): two terms."""
        log_likelihood = self.model.log_likelihood(z, self.batch)
        if self.base_is_prior:
            return self.base.log_prob(z), log_likelihood
        base = self.base.log_prob(z)
        return base, log_likelihood + self.prior.log_prob(z) - base

    @property
    def base_is_prior(self) -> bool:
        """Whether chains start from the prior."""
        return self.base is self.prior

    def target(self, terms: Terms) -> Target:
        """A target over this batch's thoughts."""
        return Target(terms, self.model.thought_shape)

    def draw(self, chains: int) -> Tensor:
        """Independent starts (C, B, N), from torch's global random generator."""
        shape = (chains, len(self.batch)) if self.base_is_prior else (chains,)
        return self.base.sample(torch.Size(shape)).flatten(-2)

    def start(self, target: Target, chains: int) -> State:
        """The state at independent starts, drawn again where a term is not finite.

        `InputError` names the sequences with no finite density at any try.
        """
        state = target(self.draw(chains))
        for _ in range(START_TRIES):
            good = state.terms.isfinite().all(0)
            if bool(good.all()):
                return state
            state = state.where(good, target(self.draw(chains)))
        bad = self.batch.ids[~state.terms.isfinite().all(0).all(0)].tolist()
        raise InputError(
            f"log p(x, z) of sequence ids {bad[:8]} is not finite where the chains start: "
            "start from the prior (start=None), or look at these sequences"
        )


@contextmanager
def setting(model: LatentModel, batch: Batch, start: Posterior | None) -> Iterator[Setting]:
    """Checks what was given; inside the block the model's weights are frozen."""
    batch = batch.to(model.device)
    model.check(batch)
    check_start(start, batch)
    with frozen(model.parameters()), torch.no_grad():
        prior = model.prior()
        base = prior if start is None else start.distribution
        yield Setting(model, model.prepare(batch), prior, base, _scale(base, len(batch)))


def check_start(start: Posterior | None, batch: Batch) -> None:
    """Refuses a start that is not about this batch, or that is a point."""
    if start is None:
        return
    start.refuse_other_batch(batch, "start")
    if not start.has_density:
        raise InputError(
            f"start is a {start.family!r} guide, a point mass without a density: every chain "
            "would start at the same place; give another guide's posterior, or None for the prior"
        )


def check_count(name: str, value: int, least: int, why: str) -> None:
    """Refuses a count that is too small, or that nobody can mean."""
    whole_number(name, value, at_most=MOST_COUNT)
    if value < least:
        raise InputError(f"{name} is {value}: must be {least} or more, {why}")


def _scale(base: TorchDistribution, rows: int) -> Tensor:
    """Standard deviations (B, N) of a start: its own, or those of its draws."""
    try:
        variance = base.variance
    except (NotImplementedError, AttributeError):
        variance = base.sample(torch.Size([SCALE_DRAWS])).var(0)
    return variance.sqrt().flatten(-2).expand(rows, -1)
