"""Amortised posterior: an encoder reads the sequence and answers with q(z_i) at once."""

from __future__ import annotations

from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.guides.encoder import EncodingGuide, factorised_normal
from ltm_pyro.inference.guides.registry import register_guide


@register_guide("amortized")
class Amortized(EncodingGuide):
    """q(z_i) = prod_kd N(z_kd; encoder(x_i)), as in a variational autoencoder.

    Kingma & Welling (2014, section 2). There are no local parameters, so the fast clock has nothing
    to do, and a fresh encoder answers with the standard normal whatever it reads: all learning is
    on the slow clock (`svi.fit`, `svi.step` or `svi.fit_guide`). For tokens the encoder is a
    bidirectional Transformer, for any other model a linear map with a perceptron over x, mask and
    those covariates that the model's `blank` makes up.

    Args:
        width: H of the encoder; by default the decoder's, or 64 for other models than tokens'.
        layers: Layers of the encoder.
    """

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """None."""
        return {}

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D)."""
        return factorised_normal(*self.encoded())
