"""Annealing between a start q0 and p(x, z), in both directions (Neal 2001; Grosse et al. 2015).

    log f_beta(z) = log q0(z) + beta (log p(x, z) - log q0(z)),    beta from 0 to 1

Forward, from z ~ q0, the weights' mean is p(x); backward, from z ~ p(z | x), the mean of their
inverses is 1 / p(x). Pilot runs choose each sequence's ladder of temperatures, and the
preconditioner and step size at each rung; the runs that count use all three as they are, with
fresh random numbers, so that nothing is adapted to the chains that it moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.inference.mcmc.mover import JITTER, KERNELS, Mover
from ltm_pyro.inference.mcmc.target import Setting, State, Target
from ltm_pyro.inference.mcmc.transition import Factor, leapfrog_steps, take_step

TRAJECTORY = KERNELS["hmc"].trajectory
PILOT_CHAINS = 16
PILOT_WARMUP = 150
"""Steps at beta = 1 from which the preconditioner there is learned."""

PILOT_STRIDE = 0.5
"""Standard deviations of the log weight between two rungs of the pilot's ladder."""

PILOT_MOST = 400
"""Rungs of the pilot at most; strides grow towards the end so that 1 is reached."""

PILOT_MOVES = 2

TARGET_ACCEPT = 0.8
LEARNING_RATE = 1.0
"""Of the pilot's log step sizes, per transition and unit of acceptance off its target."""

REVERSE_BURN = 30
"""Transitions at beta = 1 before a backward chain: they leave p(z | x) as it is, and spread the
chains, which start from one and the same exact draw."""


Tick = Callable[[], object]


WEIGHT_VARIANCE = 0.5
"""Of log weights in squared nats, that `rungs_needed` aims at."""

FEWEST, MOST = 200, 4000
"""Rungs that `rungs_needed` answers."""


@dataclass(frozen=True)
class Ladder:
    """Where and how the chains move."""

    beta: Tensor
    """(n + 1, B) from 0 to 1, increasing."""
    step_size: Tensor
    """(n + 1, B) leapfrog step sizes in units of the preconditioner there."""


class Bridge:
    """Preconditioners along the way, by interpolating precisions: exact between two normals.

    Args:
        start: (B, N) the start's standard deviations.
        end: The preconditioner at beta = 1.
    """

    def __init__(self, start: Tensor, end: Factor) -> None:
        self.start = start
        self.axes: Tensor | None = None
        if end.root is None:
            self.ratio = (end.scale / start).double().square()
        else:
            root = (end.root / start[..., None]).double()
            self.ratio, axes = torch.linalg.eigh(root @ root.mT)
            self.axes = start[..., None] * axes.to(start)
            self.ratio = self.ratio.clamp(min=torch.finfo(start.dtype).eps)

    def at(self, beta: Tensor) -> Factor:
        """The preconditioner at temperatures (B,)."""
        root = (1 - beta[:, None] + beta[:, None] / self.ratio).rsqrt().to(self.start)
        if self.axes is None:
            return Factor(self.start * root)
        return Factor(self.start, self.axes * root[:, None])


class Annealer:
    """Chains of one batch between its start and p(x, z), of some gradients a transition at most."""

    def __init__(self, place: Setting, max_leapfrog: int) -> None:
        self.place = place
        self.most = max_leapfrog
        self.target: Target = place.target(place.path)
        mover = Mover(place, KERNELS["hmc"], PILOT_CHAINS, None, 2 * max_leapfrog)
        mover.warm_up(PILOT_WARMUP, "auto", True, lambda: None)
        self.pilot_cost = mover.target.evaluations * PILOT_CHAINS
        self.bridge = Bridge(place.scale, mover.factor)
        self.last_step_size = mover.step_size

    def pilot(self) -> Ladder:
        """A rough ladder whose rungs are equally far apart, as the spread of weights counts."""
        state = self.place.start(self.target, PILOT_CHAINS)
        beta = torch.zeros_like(state.terms[0, 0])
        size = self.last_step_size
        betas, sizes = [beta], [size]
        for rung in range(PILOT_MOST):
            stride = PILOT_STRIDE / state.terms[1].std(0)
            least = (1 - beta) / (PILOT_MOST - rung) ** 2
            beta = (beta + torch.maximum(stride, least)).clamp(max=1.0)
            for _ in range(PILOT_MOVES):
                state, accept = self._move(state, beta, size)
                size = size * (LEARNING_RATE * (accept.mean(0) - TARGET_ACCEPT)).exp()
            betas.append(beta)
            sizes.append(size)
            if bool((beta == 1).all()):
                break
        self.pilot_cost += self.target.evaluations * PILOT_CHAINS
        self.target.evaluations = 0
        return Ladder(torch.stack(betas), torch.stack(sizes))

    def forward(self, ladder: Ladder, chains: int, tick: Tick) -> Tensor:
        """Log weights (C, B) of chains from the start to p(x, z): E[exp] = p(x)."""
        state = self.place.start(self.target, chains)
        total = torch.zeros_like(state.terms[0])
        rungs = len(ladder.beta)
        for k in range(1, rungs):
            total = total + (ladder.beta[k] - ladder.beta[k - 1]) * state.terms[1]
            if k < rungs - 1:
                state, _ = self._move(state, ladder.beta[k], ladder.step_size[k])
            tick()
        return total

    def backward(self, ladder: Ladder, z: Tensor, chains: int, tick: Tick) -> Tensor:
        """Log weights (C, B) of chains from exact draws z (B, N) back: E[exp of minus] = 1/p(x)."""
        state = self.target(z.expand(chains, *z.shape))
        for _ in range(REVERSE_BURN):
            state, _ = self._move(state, ladder.beta[-1], ladder.step_size[-1])
        total = torch.zeros_like(state.terms[0])
        for k in range(len(ladder.beta) - 1, 0, -1):
            total = total + (ladder.beta[k] - ladder.beta[k - 1]) * state.terms[1]
            if k > 1:
                state, _ = self._move(state, ladder.beta[k - 1], ladder.step_size[k - 1])
            tick()
        return total

    def _move(self, state: State, beta: Tensor, size: Tensor) -> tuple[State, Tensor]:
        jitter = 1 + JITTER * (2 * float(torch.rand(())) - 1)
        steps = leapfrog_steps(TRAJECTORY, size, self.most, jitter)
        factor = self.bridge.at(beta)
        done = take_step(self.target, state, _weights(beta), factor, size, steps)
        return done.state, done.accept


def refine(pilot: Ladder, rungs: int) -> Ladder:
    """The pilot's ladder with n = `rungs` rungs, spread as the pilot's are."""
    # A sequence that reached 1 early waits there: its own way is stretched over all rungs.
    last = (pilot.beta < 1).sum(0).double()
    share = torch.linspace(0, 1, rungs + 1, dtype=last.dtype, device=last.device)
    at = share[:, None] * last
    low = at.floor().long().clamp(max=len(pilot.beta) - 2)
    part = at - low

    def between(values: Tensor) -> Tensor:
        return (1 - part) * values.gather(0, low) + part * values.gather(0, low + 1)

    beta = between(pilot.beta)
    beta[0], beta[-1] = 0.0, 1.0
    return Ladder(beta, between(pilot.step_size.log()).exp())


def rungs_needed(pilot: Ladder) -> int:
    """Rungs at which perfectly mixing chains' log weights vary by `WEIGHT_VARIANCE`.

    The variance is the squared length of the way, as the pilot counts it, divided by the rungs.
    """
    length = PILOT_STRIDE * (len(pilot.beta) - 1)
    return min(max(round(length**2 / WEIGHT_VARIANCE), FEWEST), MOST)


def fixed(name: str, pilot: Ladder, rungs: int) -> Ladder:
    """A schedule of temperatures that does not look at the data, with the pilot's step sizes.

    Args:
        name: `linear`, or `sigmoid` from -4 to 4, rescaled (Grosse et al. 2015).
        pilot: Where the step sizes are read off, by temperature.
        rungs: n.
    """
    share = torch.linspace(0, 1, rungs + 1).to(pilot.beta)
    if name == "sigmoid":
        curve = torch.sigmoid(8 * share - 4)
        share = (curve - curve[0]) / (curve[-1] - curve[0])
    beta = share[:, None].expand(-1, pilot.beta.shape[1]).contiguous()
    beta[0], beta[-1] = 0.0, 1.0
    found = torch.searchsorted(pilot.beta.T.contiguous(), beta.T.contiguous()).T
    return Ladder(beta, pilot.step_size.gather(0, found.clamp(max=len(pilot.beta) - 1)))


def _weights(beta: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(beta), beta])
