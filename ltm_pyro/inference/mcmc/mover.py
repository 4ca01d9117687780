"""The chains of one batch, how they move, and their warmup."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.inference.mcmc.adaptation import DualAveraging, MassWindows, first_step_size
from ltm_pyro.inference.mcmc.target import Setting, State, Target
from ltm_pyro.inference.mcmc.transition import Factor, Step, leapfrog_steps, take_step


@dataclass(frozen=True)
class Kernel:
    """How a chain moves.

    Attributes:
        target_accept: Acceptance that the step size is adapted to: for HMC 0.9, the upper end of
            the flat optimum from 0.6 to 0.9 (Betancourt, Byrne & Girolami 2014), since refused
            proposals cost effective draws; for MALA 0.574 (Roberts & Rosenthal 1998). Unadjusted
            Langevin takes MALA's step: the two differ in nothing but the accept decision.
        trajectory: Length in units of the mass's scale; 0 for a single leapfrog step. A quarter of
            a period, pi / 2, makes draws of a normal target independent.
        adjusted: Whether proposals are accepted or refused.
    """

    target_accept: float
    trajectory: float
    adjusted: bool


KERNELS = {
    "hmc": Kernel(0.9, math.pi / 2, True),
    "mala": Kernel(0.574, 0.0, True),
    "ula": Kernel(0.574, 0.0, False),
}

MASSES = ("auto", "dense", "diagonal", "start")
DENSE_LIMIT = 64
"""Dimensions K * D up to which `mass="auto"` learns a dense mass."""

JITTER = 0.4
"""A trajectory is from 0.6 to 1.4 times its usual length, drawn anew at each step."""


class Mover:
    """The chains of one batch, with what they are moved by.

    Args:
        place: The batch, made ready.
        how: The kernel.
        chains: Independent starts per sequence.
        step_size: In units of the start's scale; found by trying where `None`.
        most: Leapfrog steps at most.
    """

    def __init__(
        self, place: Setting, how: Kernel, chains: int, step_size: float | None, most: int
    ) -> None:
        self.how = how
        self.most = most
        self.target: Target = place.target(place.log_joint)
        self.state: State = place.start(self.target, chains)
        self.weights = torch.ones_like(self.state.terms[:, 0])
        self.factor = Factor(place.scale)
        if step_size is None:
            self.step_size = self.fitting_step_size()
        else:
            self.step_size = torch.full_like(self.weights[0], step_size)

    def fitting_step_size(self) -> Tensor:
        """(B,) a first guess for the present preconditioner."""
        return first_step_size(self.target, self.state, self.weights, self.factor)

    def step(self, warm: bool) -> Step:
        """Moves every chain once.

        In warmup no sequence makes more leapfrog steps than the median one, nor more than half of
        what is allowed, since all wait for the longest. It also decides on every proposal: an
        unadjusted chain that is still looking for its step size can run away.
        """
        jitter = 1 + JITTER * (2 * float(torch.rand(())) - 1)
        steps = leapfrog_steps(self.how.trajectory, self.step_size, self.most, jitter)
        if not warm:
            steps = steps.clamp(max=min(int(steps.median()), max(1, self.most // 2)))
        done = take_step(
            self.target, self.state, self.weights, self.factor, self.step_size, steps,
            adjusted=self.how.adjusted or not warm,
        )  # fmt: skip
        self.state = done.state
        return done

    def warm_up(self, warmup: int, mass: str, adapt_step: bool, tick: Callable[[], object]) -> None:
        """Moves the chains to where they belong, and learns how to move them; then all is frozen.

        `mass` is one of `MASSES`; `tick` is called after each of the `warmup` steps.
        """
        scale = self.factor.scale
        dense = mass == "dense" or (mass == "auto" and scale.shape[-1] <= DENSE_LIMIT)
        windows = None if mass == "start" else MassWindows(scale, warmup, dense)
        averaging = DualAveraging(self.step_size, self.how.target_accept) if adapt_step else None
        for step in range(warmup):
            done = self.step(warm=False)
            if averaging is not None:
                averaging.update(done.accept)
                self.step_size = averaging.current
            factor = None if windows is None else windows.update(step, self.state.z)
            if factor is not None:
                self.factor = factor
                if averaging is not None:
                    averaging.restart(self.fitting_step_size())
                    self.step_size = averaging.current
            tick()
        if averaging is not None:
            self.step_size = averaging.final
