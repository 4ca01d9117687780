"""Draws of q with everything about them that diagnostics ask, and steps from them towards p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import fresh_draws
from ltm_pyro.engine.execution import frozen
from ltm_pyro.inference.mcmc.target import State, Target
from ltm_pyro.inference.mcmc.transition import Factor, take_step
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel

_REALS_AT_ONCE, _TOKENS_AT_ONCE = 2**20, 2**13
"""Positions scored in one pass. A token costs a row of logits, a real number only itself."""

_TARGET_ACCEPTANCE = 0.6
"""Near the optimum for Langevin proposals, 0.574 (Roberts & Rosenthal 1998)."""


class Joint(Target):
    """log p(x, z) of each sequence of a batch, some draws at a time so that memory stays small."""

    def __init__(self, model: LatentModel, batch: Batch) -> None:
        super().__init__(self._log_joint, model.thought_shape)
        self.model = model
        with torch.no_grad():
            self.prepared = model.prepare(batch)
        most = _REALS_AT_ONCE if batch.observed.is_floating_point() else _TOKENS_AT_ONCE
        self.at_once = max(1, most // batch.mask.numel())

    def _log_joint(self, z: Tensor) -> tuple[Tensor, ...]:
        log_prior = self.model.prior().log_prob(z).double()
        return (self.model.log_likelihood(z, self.prepared).double() + log_prior,)

    def __call__(self, z: Tensor) -> State:
        """Value and gradient at z (S, B, M)."""
        with frozen(self.model.parameters()):
            parts = [super(Joint, self).__call__(part) for part in z.split(self.at_once)]
        terms, gradients = [p.terms for p in parts], [p.gradients for p in parts]
        return State(z, torch.cat(terms, 1), torch.cat(gradients, 1))

    def value(self, z: Tensor) -> Tensor:
        """Log p(x, z) in nats alone, z (S, B, K, D) to (S, B)."""
        with torch.no_grad():
            return torch.cat([self._log_joint(part)[0] for part in z.split(self.at_once)])


@dataclass(frozen=True)
class Draws:
    """S draws of q for each of B sequences, M = K D dimensions in row order, in float64.

    Attributes:
        state: The draws (S, B, M) with log p(x, z) and its gradient, in the model's dtype.
        u: (S, B, M) in q's own units: less their mean `centre` (B, M), over `scale` (B, M), their
            standard deviation, not below their rounding.
        h: (S, B, M) d log p(x, z) / d u.
        frozen: (B, M) true where q's draws do not vary at all.
        log_joint: (S, B) log p(x, z), nats; `log_q` (S, B) log q(z).
        elbo: (B,) as `evaluate` gives it from these draws, with the KL in closed form where q has
            one.
    """

    state: State
    u: Tensor
    h: Tensor
    centre: Tensor
    scale: Tensor
    frozen: Tensor
    log_joint: Tensor
    log_q: Tensor
    elbo: Tensor


@torch.no_grad()
def draw(target: Joint, post: Posterior, draws: int, seed: int = 0) -> Draws:
    """The draws of q that `evaluate` scores for this number and seed."""
    z = torch.cat(list(fresh_draws(post.distribution, post.ids, draws, seed)))
    log_q = post.log_prob(z).double()
    state = target(z.flatten(-2))
    elbo = (state.terms[0] - log_q).mean(0)
    if post.kl_estimator == "analytic":
        log_prior = target.model.prior().log_prob(z).double()
        elbo = (state.terms[0] - log_prior).mean(0) - post.kl().double()
    flat = state.z.double()
    spread, centre = flat.std(0), flat.mean(0)
    rounding = torch.finfo(z.dtype).eps * flat.abs().amax(0).clamp_min(1e-3)
    stuck = spread <= rounding
    scale = torch.where(stuck, rounding, spread)
    return Draws(
        state=state,
        u=torch.where(stuck, 0.0, (flat - centre) / scale),
        h=state.gradients[0].double() * scale,
        centre=centre,
        scale=scale,
        frozen=stuck,
        log_joint=state.terms[0],
        log_q=log_q,
        elbo=elbo,
    )


@torch.no_grad()
def walk(target: Joint, draws: Draws, steps: int) -> tuple[State, Tensor]:
    """Metropolis-adjusted Langevin steps from the draws, towards p(z | x).

    Every draw decides for itself, so draws that follow p(z | x) still follow it afterwards, however
    long or short the steps are. Step sizes are q's scales times one factor per sequence, tuned on
    the acceptance of the sequence's S draws together: too weak a dependence between them to matter.
    Gives where the draws are now, and the share of proposals accepted, (B,).
    """
    state = draws.state
    M = state.z.shape[-1]
    factor = Factor(draws.scale.to(state.z))
    size = torch.full(draws.scale.shape[:1], 1.2 * M ** (-1 / 6)).to(draws.log_q)
    one = torch.ones_like(size)
    rates = []
    for _ in range(steps):
        step = take_step(target, state, one[None], factor, size, one.long())
        state = step.state
        rates.append(step.accept.double().mean(0))
        size = size * torch.exp(rates[-1] - _TARGET_ACCEPTANCE)
    return state, torch.stack(rates).mean(0)
