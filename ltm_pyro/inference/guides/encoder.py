"""What guides with an encoder have in common: reading a batch, and not reading it twice."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.encoder import VectorEncoder, build_encoder


class EncodingGuide(LocalGuide):
    """A factorised normal that starts from an encoder's answer; not a family by itself.

    Args:
        model: The model; see `build_encoder` for what is read.
        width: H of the encoder.
        layers: Its layers.
    """

    def __init__(self, model: LatentModel, width: int | None = None, layers: int = 2) -> None:
        super().__init__(model)
        self.encoder = build_encoder(model, 2, width, layers).to(self.anchor)
        self._kept: tuple[list[Tensor], list[tuple[int, int]], Tensor] | None = None

    def initial_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """`x` with what the mask hides set to 0, and `mask`, each (B, T).

        For a model of another kind than tokens, covariates stand behind x.
        """
        if isinstance(self.encoder, VectorEncoder):
            return dict(zip(("x", "mask"), self.encoder.row_of_numbers(batch), strict=True))
        return {"x": torch.where(batch.mask, batch.observed, 0), "mask": batch.mask}

    def encoded(self) -> tuple[Tensor, Tensor]:
        """The encoder's own loc and log variance, (B, K, D) each.

        Computed once and kept for as long as neither weights nor inputs change and no gradient of
        the weights is asked for, as in a fast loop.
        """
        inputs = self.inputs.values()
        sources = [*inputs.values(), *self.encoder.parameters()]
        versions = [(t.data_ptr(), t._version) for t in sources]
        if self._kept is not None and not self._learning():
            kept_sources, kept_versions, answer = self._kept
            same = all(a is b for a, b in zip(kept_sources, sources, strict=True))
            if same and kept_versions == versions:
                loc, log_variance = answer.chunk(2, dim=-1)
                return loc, log_variance
        answer = self.encoder(inputs["x"], inputs["mask"])
        self._kept = None if answer.requires_grad else (sources, versions, answer)
        loc, log_variance = answer.chunk(2, dim=-1)
        return loc, log_variance

    def _learning(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())


def factorised_normal(loc: Tensor, log_variance: Tensor) -> TorchDistribution:
    """Batch shape (B,), event shape (K, D)."""
    return dist.Normal(loc, torch.exp(0.5 * log_variance)).to_event(2)
