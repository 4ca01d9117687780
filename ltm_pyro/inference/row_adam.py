"""Adam on local parameters: B independent optimisers, one per sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _unbias(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, without the cancellation that costs single precision four digits."""
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)


class RowAdam:
    """Adam (Kingma & Ba 2015) whose moments and step counts belong to rows.

    Each parameter has a leading dimension of B rows. Every operation is elementwise, so what a row
    does depends on that row alone; a row that comes back from a store brings its own step count.

    The second moment forgets faster than Adam's in the first steps: at step t its decay is at most
    1 - t^-0.6 (after Shazeer & Stern 2018, section 7.2). Local gradients fall by orders of
    magnitude within a fast loop, and steps scaled by the first ones would stay far too short.

    Args:
        params: Parameters (B, ...) by name.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        memory: The exponent above; 1 gives Adam itself.
    """

    name = "adam"

    def __init__(
        self,
        params: dict[str, Tensor],
        betas: tuple[float, float],
        eps: float = 1e-8,
        memory: float = 0.6,
    ) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        self.betas = betas
        self.eps = eps
        self.memory = memory
        first = next(iter(params.values()), torch.zeros(0))
        # At least single precision: counts in bfloat16 would stop at 256.
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.steps = torch.zeros(len(first), device=first.device, dtype=dtype)
        self.first = {name: torch.zeros_like(p) for name, p in params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in params.items()}

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        """One step of descent along `gradients`, in place."""
        beta1, beta2 = self.betas
        self.steps += 1
        # The second moment is kept with its bias taken out. Rounded from double precision: in
        # single, torch's power of a number depends on its place among the others, and a row must
        # not depend on the rows beside it.
        power = (self.steps.double() ** -self.memory).to(self.steps.dtype)
        newest = torch.maximum((1 - beta2) / _unbias(beta2, self.steps), power)
        bias = _unbias(beta1, self.steps)
        for name, p in self.params.items():
            gradient, rows = gradients[name], (-1,) + (1,) * (p.dim() - 1)
            m, v = self.first[name], self.second[name]
            m.lerp_(gradient, 1 - beta1)
            v.lerp_(gradient.square(), newest.to(p.dtype).view(rows))
            p.sub_(lr * (m / bias.view(rows)) / v.sqrt().add_(self.eps))

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by row, as flat names to (B, ...) tensors."""
        out = {"adam_steps": self.steps}
        for name in self.params:
            out[f"adam_first.{name}"] = self.first[name]
            out[f"adam_second.{name}"] = self.second[name]
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        self.steps.copy_(state["adam_steps"])
        for name in self.params:
            self.first[name].copy_(state[f"adam_first.{name}"])
            self.second[name].copy_(state[f"adam_second.{name}"])
