"""What warmup learns, per sequence and from all its chains together: step size and mass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltm_pyro.inference.mcmc.target import State, Target
from ltm_pyro.inference.mcmc.transition import Factor, take_step

WINDOWS = (0.1, 0.2, 0.45, 0.85)
"""Shares of warmup between which draws are gathered for the mass: the first draws are not, since
the chains still travel, and the last part settles the step size for the final mass."""

PRIOR_DRAWS = 5
PRIOR_VARIANCE = 1e-3
"""The mass is shrunk as by five draws with a thousandth of the start's variance, as in Stan."""

DENSE_DRAWS = 5
"""Draws per dimension from which a dense mass is learned; fewer give a diagonal one."""

FIRST_TRIES = 30
"""Doublings or halvings of the first step size at most."""


class DualAveraging:
    """Step sizes (B,) whose mean acceptance tends to a target (Hoffman & Gelman 2014, 3.2.1)."""

    GREED = 2.0
    """Larger steps are tried first; the usual 10 costs every other sequence of the batch the long
    trajectories of one that has swung back too far."""
    SHRINKAGE = 0.05
    OFFSET = 10.0
    DECAY = 0.75

    def __init__(self, step_size: Tensor, target: float) -> None:
        self.target = target
        self.restart(step_size)

    def restart(self, step_size: Tensor) -> None:
        """Forgets the past: the mass has changed."""
        self.centre = (self.GREED * step_size).log()
        self.log_step = step_size.log()
        self.log_mean = torch.zeros_like(step_size)
        self.error = torch.zeros_like(step_size)
        self.count = 0

    def update(self, accept: Tensor) -> None:
        """Takes one step's acceptance probabilities (C, B)."""
        self.count += 1
        share = 1 / (self.count + self.OFFSET)
        self.error = (1 - share) * self.error + share * (self.target - accept.mean(0))
        self.log_step = self.centre - math.sqrt(self.count) / self.SHRINKAGE * self.error
        weight = self.count**-self.DECAY
        self.log_mean = weight * self.log_step + (1 - weight) * self.log_mean

    @property
    def current(self) -> Tensor:
        """(B,) to explore with while adapting."""
        return self.log_step.exp()

    @property
    def final(self) -> Tensor:
        """(B,) the averaged step size, to freeze."""
        return self.log_mean.exp() if self.count else self.current


def first_step_size(target: Target, state: State, weights: Tensor, factor: Factor) -> Tensor:
    """(B,) step sizes at which one leapfrog step is accepted about half the time.

    Hoffman & Gelman (2014), algorithm 4, for all sequences at once.
    """
    size = torch.full_like(factor.scale[:, 0], factor.scale.shape[-1] ** -0.25).double()
    one = torch.ones_like(size, dtype=torch.long)
    direction = torch.zeros_like(size)
    for _ in range(FIRST_TRIES):
        accept = take_step(target, state, weights, factor, size, one).accept.mean(0)
        wanted = torch.where(accept > 0.5, 1.0, -1.0)
        direction = torch.where(direction == 0, wanted, direction)
        still = direction == wanted
        if not bool(still.any()):
            break
        size = torch.where(still, size * 2.0**direction, size)
        direction = torch.where(still, direction, -2.0 * direction)  # never equals +-1 again
    return size


class MassWindows:
    """Gathers warmup draws and turns them into preconditioners.

    Args:
        scale: (B, N) the start's standard deviations, the first preconditioner.
        warmup: Steps of warmup.
        dense: Learn a dense mass where there are draws enough.
    """

    origin: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, scale: Tensor, warmup: int, dense: bool) -> None:
        self.start = scale
        self.dense = dense
        self.edges = [round(share * warmup) for share in WINDOWS]
        self._clear(torch.zeros_like(scale).double())

    def update(self, step: int, z: Tensor) -> Factor | None:
        """Takes the draws (C, B, N) after a step; a new preconditioner at a window's end."""
        if not self.edges[0] <= step < self.edges[-1]:
            return None
        self.count += len(z)
        change = z.double() - self.origin
        self.total = self.total + change.sum(0)
        squares = torch.einsum("cbi,cbj->bij", change, change) if self.dense else change.square()
        self.squares = self.squares + (squares if self.dense else squares.sum(0))
        if step + 1 not in self.edges or self.count < 2 * PRIOR_DRAWS:
            return None
        factor = self._factor()
        self._clear(self.total / self.count + self.origin)
        return factor

    def _clear(self, origin: Tensor) -> None:
        """Empty sums, kept relative to an origin near the draws so that nothing cancels."""
        self.origin = origin
        self.count = 0
        self.total = torch.zeros_like(origin)
        self.squares = torch.diag_embed(self.total) if self.dense else self.total

    def _factor(self) -> Factor:
        n, mean = self.count, self.total / self.count
        small = PRIOR_VARIANCE * self.start.double().square()
        outer = mean[..., None] * mean[:, None] if self.dense else mean.square()
        spread = (self.squares - n * outer) / (n - 1)
        share = n / (n + PRIOR_DRAWS)
        if not self.dense:
            variance = share * spread + (1 - share) * small
            return Factor(variance.sqrt().to(self.start))
        covariance = share * spread + (1 - share) * torch.diag_embed(small)
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        if n < DENSE_DRAWS * mean.shape[-1]:
            return Factor(scale.to(self.start))
        tril, failed = torch.linalg.cholesky_ex(covariance)
        tril = torch.where((failed > 0)[:, None, None], torch.diag_embed(scale), tril)
        return Factor(scale.to(self.start), tril.to(self.start))
