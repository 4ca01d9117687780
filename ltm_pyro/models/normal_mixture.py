"""Mixtures of diagonal normals over thoughts, with draws that carry a gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltm_pyro.models.drawn import Drawn, Shape


class NormalMixture(Drawn):
    """sum_c w_c N(loc_c, diag(scale_c^2)): batch shape (...), event shape (K, D).

    Draws are reparametrised with the transport equation (Jankowiak & Karaletsos 2019, "Pathwise
    derivatives for multivariate distributions"), in a form that keeps to logarithms. Pyro's
    `MixtureOfDiagNormals` multiplies densities: in single precision they vanish from about 60
    dimensions on, and its gradient is NaN there and wherever two components have one mean.

    Args:
        logits: (..., C) unnormalised log weights.
        loc: (..., C, K, D).
        scale: (..., C, K, D), above 0.
    """

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None
    ) -> None:
        self.component = Categorical(logits=logits, validate_args=validate_args)
        self.loc, self.scale = loc, scale
        super().__init__(loc, loc.shape[:-3], loc.shape[-2:], validate_args)

    @property
    def log_weights(self) -> Tensor:
        """Log w_c, (..., C)."""
        return self.component.logits

    def expand(self, batch_shape: Shape, _instance: Any = None) -> NormalMixture:
        """The same distribution over more rows."""
        shape = torch.Size(batch_shape)
        weights = self.log_weights.expand(shape + self.log_weights.shape[-1:])
        loc, scale = (value.expand(shape + value.shape[-3:]) for value in (self.loc, self.scale))
        return NormalMixture(weights, loc, scale, self._validate_args)

    def select_rows(self, index: Tensor) -> NormalMixture:
        """The rows at `index`."""
        return NormalMixture(self.log_weights[index], self.loc[index], self.scale[index])

    @property
    def noise_size(self) -> int:
        """Normal numbers that a draw takes: K * D, and one that chooses the component."""
        return self.event_shape.numel() + 1

    def from_noise(self, noise: Tensor) -> Tensor:
        """Reparametrised draws from standard normal numbers, (..., K * D + 1) to (..., K, D)."""
        with torch.no_grad():
            place = torch.special.ndtr(noise[..., -1:]).to(self.loc.dtype)
            which = (place > self.log_weights.exp().cumsum(-1)[..., :-1]).sum(-1)
            noise = noise[..., :-1].to(self.loc.dtype).unflatten(-1, tuple(self.event_shape))
        z: Tensor = _Draw.apply(  # type: ignore[no-untyped-call]
            self.log_weights, self.loc.flatten(-2), self.scale.flatten(-2), which, noise.flatten(-2)
        )
        return z.unflatten(-1, tuple(self.event_shape))

    def component_log_prob(self, value: Tensor) -> Tensor:
        """Log w_c + log density of component c, (..., K, D) to (..., C)."""
        return self.log_weights + _log_densities(value.unsqueeze(-3), self.loc, self.scale).sum(
            (-2, -1)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., K, D) to (...)."""
        return self.component_log_prob(value).logsumexp(-1)

    @property
    def mean(self) -> Tensor:
        """(..., K, D)."""
        return (self._weights * self.loc).sum(-3)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, within and between components, (..., K, D)."""
        spread = self.loc - self.mean.unsqueeze(-3)
        return (self._weights * (self.scale.square() + spread.square())).sum(-3)

    @property
    def _weights(self) -> Tensor:
        return self.log_weights.exp()[..., None, None]


def _log_densities(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log N(z; loc, scale^2), elementwise."""
    return -0.5 * ((z - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


class _Draw(torch.autograd.Function):
    """z = loc_c + scale_c * noise at the drawn component c, with a gradient in all parameters.

    A gradient in the parameters theta needs a velocity field v = dz/dtheta that carries the mass
    where q moves it, dq/dtheta + div(q v) = 0. For means and scales that is the component's own
    field times its responsibility r_c(z) = w_c q_c(z) / q(z). For weights, mass goes from component
    a to component b, and

        q_b - q_a = sum_i  (prod_{j<i} q_bj) (q_bi - q_ai) (prod_{j>i} q_aj)

    telescopes over the dimensions, so that the field that carries it has as its ith component

        u_i = (prod_{j<i} q_bj) (Phi_bi - Phi_ai) (prod_{j>i} q_aj) / q         (Phi: normal cdf).

    The mean over the two orders, a before b and b before a, has the lower variance.
    """

    @staticmethod
    def forward(
        ctx: Any, log_weights: Tensor, loc: Tensor, scale: Tensor, which: Tensor, noise: Tensor
    ) -> Tensor:
        """Flat draws (S..., B..., N) from loc and scale (B..., C, N), which (S..., B...)."""
        shape = which.shape + loc.shape[-2:]
        index = which[..., None, None].expand(*which.shape, 1, loc.shape[-1])
        at = [value.expand(shape).gather(-2, index).squeeze(-2) for value in (loc, scale)]
        z = at[0] + at[1] * noise
        ctx.save_for_backward(log_weights, loc, scale, z)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """From dL/dz (S..., B..., N) to the gradients of log weights, means and scales."""
        log_weights, loc, scale, z = ctx.saved_tensors
        each = _log_densities(z.unsqueeze(-2), loc, scale)
        joint = log_weights + each.sum(-1)
        log_q = joint.logsumexp(-1)
        share = (joint - log_q[..., None]).exp()[..., None] * gradient.unsqueeze(-2)
        standard = (z.unsqueeze(-2) - loc) / scale
        by_weight = _weight_gradient(log_weights, each, standard, log_q, gradient)
        return (
            by_weight.sum_to_size(log_weights.shape),
            share.sum_to_size(loc.shape),
            (share * standard).sum_to_size(scale.shape),
            None,
            None,
        )


def _weight_gradient(
    log_weights: Tensor, each: Tensor, standard: Tensor, log_q: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient in the log weights, (S..., B..., C).

    Args:
        log_weights: (B..., C), normalised.
        each: (S..., B..., C, N) log densities of z under each component, by dimension.
        standard: (S..., B..., C, N) z in units of each component.
        log_q: (S..., B...) log density of z.
        gradient: (S..., B..., N) dL/dz.
    """
    before = each.cumsum(-1) - each
    after = each.sum(-1, keepdim=True) - before - each
    cdf = torch.special.ndtr(standard)
    # [..., a, b, i]: dimensions before i from b, those after it from a.
    rest = (before.unsqueeze(-3) + after.unsqueeze(-2) - log_q[..., None, None, None]).exp()
    moved = rest * (cdf.unsqueeze(-3) - cdf.unsqueeze(-2))
    work = (moved * gradient[..., None, None, :]).sum(-1)
    work = 0.5 * (work - work.mT)
    # d/dlogit_a moves w_a w_b from each b to a; log weights pass through softmax once more.
    weights = log_weights.exp()
    return weights * (work * weights.unsqueeze(-2)).sum(-1)
