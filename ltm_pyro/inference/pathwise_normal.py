"""Draws of independent normals, and the gradient that comes back through them, by hand.

With z = loc + scale * noise, scale = exp(log_variance / 2), and a prior of independent normals
N(m, s^2), r = (scale / s)^2 and d = (loc - m) / s:

    KL                      =  1/2 sum_kd [ r + d^2 - 1 - log r ]
    d loss / d loc          =  g + c d / s                                      g = d nll / dz
    d loss / d log_variance =  (g noise scale + c (1 - 1 / r) scale^2 / s^2) / 2

for loss = nll + c KL. Autograd finds the same, and takes several times as long to: a fast step of a
small decoder feels it. Operations and their order are autograd's, but for factors of 1 and powers
of two, so that the two agree to the bit: it does not matter to a fit which steps Pyro ran.
"""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


class PathwiseNormal:
    """Draws at the present values of two parameters, one after the other.

    Args:
        loc: (B, K, D), whose later values count, as those of `log_variance`.
        log_variance: (B, K, D).
        prior: Independent normals over (K, D).
        weight: c.

    Attributes:
        kl: Of the last draw: KL(q || prior) in nats, (B,).
    """

    def __init__(
        self, loc: Tensor, log_variance: Tensor, prior: TorchDistribution, weight: float
    ) -> None:
        self._loc, self._log_variance = loc.detach(), log_variance.detach()
        self._weight = loc.new_full((), weight)
        p = prior.base_dist
        standard = bool((p.loc == 0).all() & (p.scale == 1).all())
        self._prior = None if standard else (p.loc, p.scale)

    def draw(self) -> Tensor:
        """A draw z (B, K, D), a leaf that asks for a gradient."""
        loc = self._loc
        self._scale = torch.exp(0.5 * self._log_variance)
        self._noise = torch.empty(loc.shape, dtype=loc.dtype, device=loc.device).normal_()
        z = loc + self._noise * self._scale
        self._relative, self._distance = self._scale, loc
        if self._prior is not None:
            mean, scale = self._prior
            self._relative, self._distance = self._scale / scale, (loc - mean) / scale
        self._ratio = self._relative.pow(2)
        each = 0.5 * (self._ratio + self._distance.pow(2) - 1 - self._ratio.log())
        self.kl = each.flatten(1).sum(-1)
        return z.requires_grad_()

    def loss(self, log_lik: Tensor) -> Tensor:
        """The loss c KL - log p(x | z), summed over the batch, from (B,)."""
        return (self._weight * self.kl - log_lik.detach()).sum()

    def gradients(self, by_z: Tensor) -> dict[str, Tensor]:
        """Of the loss, by `loc` and `log_variance`, each (B, K, D).

        Args:
            by_z: Gradient of -log p(x | z) by z, (B, K, D).
        """
        by_loc = self._weight * self._distance
        by_scale = (self._weight - self._weight / self._ratio) * self._relative
        if self._prior is not None:
            by_loc, by_scale = by_loc / self._prior[1], by_scale / self._prior[1]
        through_z = by_z * self._noise * self._scale
        return {
            "loc": by_z + by_loc,
            "log_variance": (through_z + by_scale * self._scale) * 0.5,
        }
