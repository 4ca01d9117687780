"""Densities of q at parameters that are held constant."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide


class _LogProb(nn.Module):
    """Log q(z) as a module's call, which `functional_call` can make."""

    def __init__(self, guide: LocalGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, z: Tensor) -> Tensor:
        return self.guide.posterior().log_prob(z)


def stopped_log_prob(guide: LocalGuide, z: Tensor) -> Tensor:
    """Log q(z) at the guide's present parameters, local and shared, held constant.

    It has a gradient by z and none by the parameters, for any guide: its parameters are exchanged
    for constants while the density is computed, and not only while the distribution is made, since
    a flow reads its network when it is asked for a density.

    Args:
        guide: Holds B rows; one that is another Pyro program is refused.
        z: (..., B, K, D).
    """
    if not isinstance(guide, LocalGuide):
        raise InputError(
            f"{type(guide).__name__} is no guide of this package, and this objective holds q's "
            "parameters constant: use objective 'elbo' or 'iwae'"
        )
    # Parameters still, because a guide may ask for its parameters by that type.
    held: dict[str, Tensor] = {
        f"guide.{name}": nn.Parameter(p.detach(), requires_grad=False)
        for name, p in guide.named_parameters()
    }
    # Another tensor object, so that no transform answers from what it kept of the draw.
    return functional_call(_LogProb(guide), held, (z.view(z.shape),))
