"""One step of every chain: leapfrog trajectories, and one accept decision per row.

With L the square root of the mass's inverse, the target is explored in y = L^-1 z with unit mass
(Neal 2011, section 4.1): momenta are standard normal and no system is solved. One leapfrog step is
a MALA proposal with the preconditioner L L^T (Neal 2011, section 5.2); many are HMC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.inference.mcmc.target import State, Target

DIVERGED = 1000.0
"""Nats by which the energy may rise within a trajectory before it is given up, as in Stan."""


@dataclass(frozen=True)
class Factor:
    """L of each sequence, with L L^T close to the posterior's covariance.

    Attributes:
        scale: (B, N) L's diagonal where it is diagonal, else the root of L L^T's.
        root: (B, N, N) L where it is not diagonal; triangular or not.
    """

    scale: Tensor
    root: Tensor | None = None

    def apply(self, momentum: Tensor) -> Tensor:
        """L p, (C, B, N)."""
        if self.root is None:
            return self.scale * momentum
        return (momentum.transpose(0, 1) @ self.root.mT).transpose(0, 1)

    def transpose(self, gradient: Tensor) -> Tensor:
        """L^T g, (C, B, N)."""
        if self.root is None:
            return self.scale * gradient
        return (gradient.transpose(0, 1) @ self.root).transpose(0, 1)


@dataclass(frozen=True)
class Step:
    """What one step did."""

    state: State
    """Where the chains are now."""
    accept: Tensor
    """(C, B) acceptance probabilities; 0 where a proposal had no finite density."""


def leapfrog_steps(trajectory: float, step_size: Tensor, most: int, jitter: float) -> Tensor:
    """Leapfrog steps (B,), `most` at most, of a trajectory in units of the mass's scale.

    It is `jitter` times as long as usual, drawn anew each time: no period of the target resonates.
    """
    steps = (jitter * trajectory / step_size).round()
    return steps.nan_to_num(most).clamp(1, most).long()


def take_step(
    target: Target,
    state: State,
    weights: Tensor,
    factor: Factor,
    step_size: Tensor,
    steps: Tensor,
    *,
    adjusted: bool = True,
) -> Step:
    """Moves every row once, with fresh momenta from torch's global random generator.

    Args:
        target: What is explored.
        state: Where the rows are.
        weights: (P, B) of the target's terms.
        factor: The preconditioner.
        step_size: (B,) leapfrog step sizes in units of the preconditioner.
        steps: (B,) leapfrog steps; a row that has made its own waits for the longest.
        adjusted: Accept or refuse each row. Without it every finite proposal is taken, and the
            chains' stationary distribution is off by a bias of the order of the squared step size.
    """
    momentum = torch.randn_like(state.z)
    start = state.log_density(weights) - _kinetic(momentum)
    proposal, alive, end = state, torch.ones_like(start, dtype=torch.bool), start
    force = factor.transpose(state.gradient(weights))
    for i in range(int(steps.max())):
        size = (step_size * (alive & (i < steps)))[..., None].to(state.z)
        momentum = momentum + 0.5 * size * force
        z = proposal.z + size * factor.apply(momentum)
        alive = alive & z.isfinite().all(-1)
        proposal = target(torch.where(alive[..., None], z, state.z))
        force = factor.transpose(proposal.gradient(weights))
        momentum = momentum + 0.5 * size * force
        end = proposal.log_density(weights) - _kinetic(momentum)
        alive = alive & (end > start - DIVERGED)
    accept = torch.where(alive, (end - start).clamp(max=0.0).exp(), 0.0)
    taken = torch.rand_like(accept) < accept if adjusted else alive
    return Step(proposal.where(taken, state), accept)


def _kinetic(momentum: Tensor) -> Tensor:
    """Half the squared momenta, (C, B, N) to (C, B) float64."""
    return 0.5 * momentum.double().square().sum(-1)
