"""Priors over documents in parts: each part's thoughts are a linear function of its parent's.

    z_0 ~ N(0, I)        z_m | z_p(m) ~ N(A z_p(m), diag(s^2)),   m = 1..M-1,   p(m) < m

M blocks of equally many thoughts. Where the parent is the block before, this is a state-space model
(Kalman 1960), where it is the first block of all, a two-level hierarchy (Gelman & Hill 2007,
chapter 12). A (N, N) and s (N,) are learned, N the numbers of one block.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, register_kl

from ltm_pyro.checks import whole_number
from ltm_pyro.errors import InputError
from ltm_pyro.models.drawn import NO_SHAPE, Drawn, Shape
from ltm_pyro.models.full_normal import (
    BlockNormal,
    FullNormal,
    LowRankNormal,
    is_factorised_normal,
)
from ltm_pyro.models.priors.base import ThoughtPrior, register_prior


class NormalTree(Drawn):
    """M blocks of thoughts, each but the first normal around a linear function of its parent.

    Batch shape (...), event shape (K, D), K a multiple of M.

    Args:
        transition: (N, N) A, with N = K D / M.
        log_scale: (N,) log s.
        parents: Of blocks 1..M-1, each an earlier block.
        shape: (K, D).
        batch_shape: Independent copies.
    """

    def __init__(
        self,
        transition: Tensor,
        log_scale: Tensor,
        parents: tuple[int, ...],
        shape: tuple[int, int],
        batch_shape: Shape = NO_SHAPE,
        validate_args: bool | None = None,
    ) -> None:
        self.transition, self.log_scale, self.parents = transition, log_scale, parents
        super().__init__(log_scale, batch_shape, shape, validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> NormalTree:
        """The same tree for more rows."""
        k, d = self.event_shape
        return NormalTree(
            self.transition, self.log_scale, self.parents, (k, d), batch_shape, self._validate_args
        )

    def blocks(self, value: Tensor) -> Tensor:
        """(..., K, D) as (..., M, N)."""
        return value.flatten(-2).unflatten(-1, (len(self.parents) + 1, -1))

    def step(self, parent: Tensor) -> TorchDistribution:
        """p(z_m | z_p(m)) for parents (..., N): event shape (N,)."""
        loc = parent @ self.transition.T
        return dist.Normal(loc, self.log_scale.exp()).to_event(1)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Draws from standard normal numbers, (..., K * D) to (..., K, D)."""
        noise = noise.to(self.log_scale.dtype).unflatten(-1, (len(self.parents) + 1, -1))
        made = [noise[..., 0, :]]
        for own, parent in zip(noise[..., 1:, :].unbind(-2), self.parents, strict=True):
            made.append(made[parent] @ self.transition.T + self.log_scale.exp() * own)
        return torch.stack(made, dim=-2).flatten(-2).unflatten(-1, tuple(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., K, D) to (...)."""
        if self._validate_args:
            self._validate_sample(value)
        blocks = self.blocks(value)
        first, rest = blocks[..., :1, :], blocks[..., 1:, :]
        innovation = rest - blocks[..., self.parents, :] @ self.transition.T
        squares = torch.cat([first, innovation * torch.exp(-self.log_scale)], dim=-2).square()
        log_prob = -0.5 * squares.sum((-2, -1)) - self._log_volume
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @property
    def _log_volume(self) -> Tensor:
        constant = 0.5 * self.event_shape.numel() * math.log(2.0 * math.pi)
        return len(self.parents) * self.log_scale.sum() + constant

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (...)."""
        return (self._log_volume + 0.5 * self.event_shape.numel()).expand(self.batch_shape)

    def expected_log_prob(self, q: Any) -> Tensor:
        """E_q log p(z) in nats, (...), from q's mean, variance and, if it has one, covariance."""
        a, variance = self.transition, self.blocks(q.variance)
        first, own, parent = variance[..., 0, :], variance[..., 1:, :], [*self.parents]
        covariance = getattr(q, "covariance", None)
        if covariance is None:
            spread = own + variance[..., parent, :] @ a.square().T
        else:
            size = (len(parent) + 1, len(a))
            c = covariance.unflatten(-1, size).unflatten(-3, size)  # (..., M, N, M, N)
            each = torch.arange(1, len(parent) + 1)
            # Indices on both sides of a slice: torch puts the blocks' axis first.
            shared, above = c[..., each, :, parent, :], c[..., parent, :, parent, :]
            spread = own - 2 * torch.einsum("m...ij,ij->...mi", shared, a)
            spread = spread + torch.einsum("ij,m...jk,ik->...mi", a, above, a)
        scaled = spread * torch.exp(-2.0 * self.log_scale)
        return self.log_prob(q.mean) - 0.5 * (first.sum(-1) + scaled.sum((-2, -1)))

    def predict(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., N) and covariance (..., N, N) of a block, from those of its parent."""
        a = self.transition
        return mean @ a.T, a @ covariance @ a.T + torch.diag(torch.exp(2.0 * self.log_scale))

    @property
    def mean(self) -> Tensor:
        """0, (..., K, D)."""
        return self.log_scale.new_zeros(self.batch_shape + self.event_shape)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), dimensions in row order: (k, d) at k * D + d."""
        eye = torch.eye(self.noise_size, dtype=self.log_scale.dtype, device=self.log_scale.device)
        draws = self.from_noise(eye).flatten(-2)
        return (draws.mT @ draws).expand(self.batch_shape + draws.shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., K, D)."""
        flat = self.covariance.diagonal(dim1=-2, dim2=-1)
        return flat.unflatten(-1, tuple(self.event_shape))


def _kl_of_normals(q: Any, p: NormalTree) -> Tensor:
    """KL(q || p) in nats, (...), for any normal q over the same event."""
    known = is_factorised_normal(q) or not isinstance(q, Independent)
    if not known or q.event_shape != p.event_shape:
        raise NotImplementedError
    return -p.expected_log_prob(q) - q.entropy()


for _normal in (Independent, FullNormal, BlockNormal, LowRankNormal):
    register_kl(_normal, NormalTree)(_kl_of_normals)


class _TreePrior(ThoughtPrior):
    """What the two families share: A starts at a multiple of I, and each block at N(0, I)."""

    _start: ClassVar = 0.0

    def __init__(self, n_thoughts: int, thought_dim: int, blocks: int | None = None) -> None:
        super().__init__(n_thoughts, thought_dim)
        blocks = n_thoughts if blocks is None else whole_number("blocks", blocks, at_least=1)
        if blocks < 2 or n_thoughts % blocks:
            raise InputError(
                f"{blocks} blocks of {n_thoughts} thoughts: a {self.family} prior needs 2 blocks "
                "or more, of equally many thoughts; for one thought use prior 'standard_normal'"
            )
        size = n_thoughts // blocks * thought_dim
        self.parents = self._parents(blocks)
        self.transition = nn.Parameter(self._start * torch.eye(size))
        self.log_scale = nn.Parameter(torch.full((size,), 0.5 * math.log(1 - self._start**2)))

    def _parents(self, blocks: int) -> tuple[int, ...]:
        raise NotImplementedError

    def forward(self) -> NormalTree:
        """The prior of one document's thoughts."""
        return NormalTree(self.transition.clone(), self.log_scale.clone(), self.parents, self.shape)

    def named_values(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """`prior_transition` A (N, N) and `prior_scale` s (N,)."""
        return {
            "prior_transition": (("state", "parent_state"), self.transition),
            "prior_scale": (("state",), self.log_scale.exp()),
        }

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """All of them: neither no memory nor a scale of 1 is a better place."""
        return [self.transition, self.log_scale]


@register_prior("state_space")
class StateSpacePrior(_TreePrior):
    """A chain of blocks: each block's thoughts are a learned transition of the block's before.

    KL is in closed form for normal posteriors, and estimated on draws for others.

    Args:
        blocks: M, e.g. segments of a document; by default each thought is a block.
    """

    def _parents(self, blocks: int) -> tuple[int, ...]:
        return tuple(range(blocks - 1))


@register_prior("hierarchical")
class HierarchicalPrior(_TreePrior):
    """Two levels: the first block is a session's, all others are its turns', given that one.

    A starts at 0.3 I: at 0 the session's thoughts would stay unused, since nothing else sees them,
    and A without a gradient, since they are unused.

    Args:
        blocks: M, one and the number of turns; by default each thought is a block.
    """

    _start: ClassVar = 0.3

    def _parents(self, blocks: int) -> tuple[int, ...]:
        return (0,) * (blocks - 1)
