"""A normalising flow as prior: couplings of a standard normal (Dinh et al. 2017, arXiv 1605.08803).

    f(z) ~ N(0, I)        f a stack of affine couplings over the K * D dimensions

In a coupling, half of the dimensions are scaled and shifted by what a small network makes of the
other half; the halves change places from one coupling to the next. Density and draws cost the same
few passes.
"""

from __future__ import annotations

import copy

import torch
from pyro.distributions import TorchDistribution
from torch import nn

from ltm_pyro.checks import whole_number
from ltm_pyro.errors import InputError
from ltm_pyro.models.priors.base import ThoughtPrior, register_prior
from ltm_pyro.models.shaped import Shaped

_MOST_TRANSFORMS = 256  # each is a network of its own, built one after another


@register_prior("flow")
class FlowPrior(ThoughtPrior):
    """A learned flow, at its start exactly the standard normal.

    The last layer of every network starts at zero, which makes every coupling the identity; weight
    decay pulls back to it. Its mean and variance have no closed form; KL against it is estimated on
    draws. K * D is at least 2.

    Args:
        transforms: Couplings, at least 2, so that every dimension is transformed.
        hidden: Units of the hidden layer of each coupling's network.
    """

    def __init__(
        self, n_thoughts: int, thought_dim: int, transforms: int = 4, hidden: int = 64
    ) -> None:
        features = n_thoughts * thought_dim
        if features < 2:
            raise InputError("a flow prior couples dimensions: it needs at least 2, not 1")
        whole_number("transforms of the flow prior", transforms, 2, _MOST_TRANSFORMS)
        whole_number("hidden of the flow prior", hidden, 1, bytes_each=12 * transforms * features)
        super().__init__(n_thoughts, thought_dim)
        # Imported here: only those who use a flow wait for the library.
        from ltm_pyro.models.zuko_import import MAF

        # With two passes an autoregressive transform is a coupling.
        self.flow = MAF(features, transforms=transforms, passes=2, hidden_features=(hidden,))
        for coupling in self.flow.transform.transforms:
            last = [layer for layer in coupling.hyper if isinstance(layer, nn.Linear)][-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self) -> TorchDistribution:
        """The prior of one sequence's thoughts."""
        flow = self.flow
        if not torch.is_grad_enabled():
            # The distribution calls the networks when it is asked; it keeps those of this moment.
            flow = copy.deepcopy(flow).requires_grad_(False)
        return Shaped(flow(), self.shape)
