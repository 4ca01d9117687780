"""Semi-amortised posterior: an encoder gives the start, the fast clock goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, Unit
from ltm_pyro.inference.guides.base import Loss
from ltm_pyro.inference.guides.encoder import EncodingGuide, factorised_normal
from ltm_pyro.inference.guides.registry import register_guide
from ltm_pyro.models.base import LatentModel


@register_guide("semi_amortized")
class SemiAmortized(EncodingGuide):
    """q(z_i) = prod_kd N(z_kd; encoder(x_i) + offset_i) (SA-VAE; Kim et al. 2018, algorithm 1).

    The fast clock moves the offsets, which start at 0: with T_fast = 0 this is `amortized`. Offsets
    of loc count in the encoder's own scales, so that one learning rate suits sharp and flat
    posteriors. With `Fast(optimizer="adam")` a short loop with a large `Fast.lr` makes a good
    encoder's q worse: Adam's first steps have the length of the rate, however little is left to do.

    The encoder learns on the slow clock from two gradients. One is that of the ELBO at the fitted
    q, passed on to the encoder as if the offsets did not depend on it: the first-order form of
    SA-VAE, which leaves out how the start changes the course of the fast loop. The other is that of
    the ELBO at the encoder's own answer (`shared_loss`), because the first vanishes where the fast
    loop converges.

    In a persistent fit the store keeps offsets and not their sum with the encoder's answer, so that
    a stored q moves with the encoder.

    Args:
        width: H of the encoder; by default the decoder's, or 64 for other models than tokens'.
        layers: Layers of the encoder.

    Local parameters: `loc_offset` and `log_variance_offset`, each (B, K, D).
    """

    def __init__(self, model: LatentModel, width: int | None = None, layers: int = 2) -> None:
        super().__init__(model, width, layers)
        self._at_start = False

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Both offsets at 0, each (B, K, D)."""
        shape = (len(batch), *self.thought_shape)
        names = ("loc_offset", "log_variance_offset")
        return {name: self.anchor.new_zeros(shape) for name in names}

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D)."""
        loc, log_variance = self.encoded()
        if self._at_start:
            return factorised_normal(loc, log_variance)
        # As a unit only: a gradient through it would train the encoder's scale for its loc.
        scale = torch.exp(0.5 * log_variance.detach())
        return factorised_normal(
            loc + scale * self.local["loc_offset"],
            log_variance + self.local["log_variance_offset"],
        )

    def units(self) -> dict[str, Unit]:
        """One scale of q for `loc_offset`, which counts in the encoder's scales."""
        scale = torch.exp(0.5 * self.local["log_variance_offset"])
        return {"loc_offset": scale, "log_variance_offset": LOG_VARIANCE_UNIT}

    def shared_loss(self, loss: Loss, batch: Batch) -> Tensor | None:
        """The summed -ELBO at the encoder's own answer, whatever the offsets are."""
        with self._without_offsets():
            return loss(batch)

    @contextmanager
    def _without_offsets(self) -> Iterator[None]:
        self._at_start = True
        try:
            yield
        finally:
            self._at_start = False
