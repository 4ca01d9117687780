"""An AR(1) process over the thoughts, the prior of the delta-VAE.

    z_1 ~ N(0, I)        z_k | z_{k-1} ~ N(a z_{k-1}, 1 - a^2)        a = tanh(raw), per dimension

Razavi et al. (2019, arXiv 1901.03416, section 2). There a is fixed and large, to keep a distance
between prior and posterior; here it is learned, from 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, Normal, register_kl
from torch.nn.functional import softplus

from ltm_pyro.errors import InputError
from ltm_pyro.models.drawn import NO_SHAPE, Drawn, Shape
from ltm_pyro.models.priors.base import ThoughtPrior, register_prior


class StationaryAR1(Drawn):
    """K steps of a stationary AR(1) process in D independent dimensions, each of unit variance.

    Batch shape (...), event shape (K, D).

    Args:
        raw: (D,) any real numbers; the process's coefficients are a = tanh(raw).
        n_thoughts: K.
        batch_shape: Independent copies of the process.
    """

    def __init__(
        self,
        raw: Tensor,
        n_thoughts: int,
        batch_shape: Shape = NO_SHAPE,
        validate_args: bool | None = None,
    ) -> None:
        self.raw = raw
        super().__init__(raw, batch_shape, (n_thoughts, *raw.shape), validate_args)

    @property
    def coefficient(self) -> Tensor:
        """A, (D,): correlation of neighbouring thoughts."""
        return self.raw.tanh()

    @property
    def _log_scale(self) -> Tensor:
        """Log sqrt(1 - a^2), (D,): as log sech it stays exact where a rounds to 1."""
        size = self.raw.abs()
        return math.log(2.0) - size - softplus(-2.0 * size)

    def expand(self, batch_shape: Shape, _instance: object = None) -> StationaryAR1:
        """The same process for more rows."""
        return StationaryAR1(self.raw, self.event_shape[0], batch_shape, self._validate_args)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Draws from standard normal numbers, (..., K * D) to (..., K, D)."""
        noise = noise.to(self.raw.dtype).unflatten(-1, tuple(self.event_shape))
        scale = self._log_scale.exp()
        thoughts = [noise[..., 0, :]]
        for step in noise[..., 1:, :].unbind(-2):
            thoughts.append(self.coefficient * thoughts[-1] + scale * step)
        return torch.stack(thoughts, dim=-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., K, D) to (...)."""
        if self._validate_args:
            self._validate_sample(value)
        first, rest = value[..., :1, :], value[..., 1:, :]
        innovation = rest - self.coefficient * value[..., :-1, :]
        squares = torch.cat([first, innovation * torch.exp(-self._log_scale)], dim=-2).square()
        constant = 0.5 * value.shape[-2] * value.shape[-1] * math.log(2.0 * math.pi)
        log_volume = (value.shape[-2] - 1) * self._log_scale.sum()
        log_prob = -0.5 * squares.sum((-2, -1)) - log_volume - constant
        shape = torch.broadcast_shapes(log_prob.shape, self.batch_shape)
        return log_prob.expand(shape)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (...)."""
        thoughts, dim = self.event_shape
        normal = 0.5 * thoughts * dim * (1.0 + math.log(2.0 * math.pi))
        return (normal + (thoughts - 1) * self._log_scale.sum()).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """0, (..., K, D)."""
        return torch.zeros_like(self.raw).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, all 1, (..., K, D)."""
        return torch.ones_like(self.raw).expand(self.batch_shape + self.event_shape)


def _kl_of_independent_normals(q: Any, p: StationaryAR1) -> Tensor:
    """KL(q || p) in nats, (...), for q of independent normals with means m and variances v.

    E_q (z_k - a z_{k-1})^2 = (m_k - a m_{k-1})^2 + v_k + a^2 v_{k-1}
    """
    if not isinstance(q.base_dist, Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError
    mean, variance = q.mean, q.variance
    spread = variance[..., 1:, :] + p.coefficient.square() * variance[..., :-1, :]
    # At the means the log density has all but the spread, which comes in the innovations' units.
    first = variance[..., 0, :].sum(-1)
    rest = (spread * torch.exp(-2.0 * p._log_scale)).sum((-2, -1))
    cross_entropy = 0.5 * (first + rest) - p.log_prob(mean)
    return cross_entropy - q.entropy()


register_kl(Independent, StationaryAR1)(_kl_of_independent_normals)


@register_prior("autoregressive")
class AutoregressivePrior(ThoughtPrior):
    """AR(1) over thoughts in the order of the layers; learned: one coefficient per dimension.

    Every thought by itself stays N(0, I), so that the prior can neither shrink onto q nor run away
    from it: all it learns is how much of a thought the one before it tells. It starts at a = 0, the
    standard normal. KL against it has a closed form for posteriors of independent normals, and is
    estimated on draws for others.

    Raises:
        InputError: for one thought: a process of one step is the standard normal.
    """

    def __init__(self, n_thoughts: int, thought_dim: int) -> None:
        if n_thoughts < 2:
            raise InputError(
                f"an autoregressive prior over {n_thoughts} thought is the standard normal: "
                "use prior 'standard_normal', or 2 thoughts or more"
            )
        super().__init__(n_thoughts, thought_dim)
        self.raw = nn.Parameter(torch.zeros(thought_dim))

    def forward(self) -> TorchDistribution:
        """The prior of one sequence's thoughts."""
        return StationaryAR1(self.raw.clone(), self.shape[0])

    def named_values(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """`prior_coefficient` a = tanh(raw), (D,)."""
        return {"prior_coefficient": (("dim",), self.raw.tanh())}
