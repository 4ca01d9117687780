"""Normalizing-flow posterior: a factorised normal, bent by a network that all sequences share."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import log_variance, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, Unit
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import register_guide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.conditional_flow import ConditionalFlow, FlowDistribution, FlowKind


@register_guide("flow")
class Flow(LocalGuide):
    """z_i = loc_i + scale_i * T(eps; context_i), eps ~ N(0, I); see `ConditionalFlow`.

    What is local is a factorised normal and a context vector; the network T, with the correlations
    in it, is shared and learned by slow steps (`svi.fit`, `svi.step` or `svi.fit_guide`). A network
    that has seen no slow step is the identity: `infer` then gives what `mean_field` gives. The KL
    has no closed form.

    Args:
        model: The model, in single or double precision.
        kind: `affine` (autoregressive shifts and scales) or `spline` (neural splines, each followed
            by a shift and scale; they bend the inner five standard deviations of the base, so tails
            stay normal).
        transforms: Autoregressive transforms.
        context_dim: C, numbers in the context vector of a sequence.
        hidden: Units in each of the two hidden layers of a transform's network.
        bins: Pieces of each spline.
        init_log_variance: Where the log variances start; see `mean_field`.

    Local parameters: `loc` and `log_variance`, each (B, K, D), and `context` (B, C).
    """

    def __init__(
        self,
        model: LatentModel,
        kind: FlowKind = "affine",
        transforms: int = 2,
        context_dim: int = 8,
        hidden: int = 64,
        bins: int = 8,
        init_log_variance: float = 0.0,
    ) -> None:
        super().__init__(model)
        _refuse_half_precision(self.anchor.dtype)
        self.init_log_variance = self.start_log_variance = log_variance(init_log_variance)
        self.context_dim = whole_number("flow context_dim", context_dim, 1, bytes_each=4)
        features = math.prod(self.thought_shape)
        network = ConditionalFlow(features, context_dim, kind, transforms, hidden, bins)
        self.network = network.to(self.anchor)

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """`loc` and `context` at 0, `log_variance` at its start."""
        _refuse_half_precision(self.anchor.dtype)
        shape = (len(batch), *self.thought_shape)
        return {
            "loc": self.anchor.new_zeros(shape),
            "log_variance": self.anchor.new_full(shape, self.init_log_variance),
            "context": self.anchor.new_zeros(len(batch), self.context_dim),
        }

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D).

        Where no gradient is computed it holds a copy of the network, and stays what it is while the
        guide learns on.
        """
        network = self.network if torch.is_grad_enabled() else self.network.snapshot()
        scale = torch.exp(0.5 * self.local["log_variance"])
        return FlowDistribution(network, self.local["context"], self.local["loc"], scale)

    def units(self) -> dict[str, Unit]:
        """One scale of the base for `loc`; `context` has none."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return {"loc": scale, "log_variance": LOG_VARIANCE_UNIT}


def _refuse_half_precision(dtype: torch.dtype) -> None:
    if torch.finfo(dtype).bits < 32:
        raise InputError(
            f"guide 'flow' with a model in {dtype}: a flow's inverse and log determinant need at "
            "least single precision; call model.float() first"
        )
