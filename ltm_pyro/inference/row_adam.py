"""Adam on local parameters: B independent optimisers, one per sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

AHEAD = 16
"""Steps whose weights are computed at once: a dozen operations on a few numbers each."""


def _unbias(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, without the cancellation that costs single precision four digits."""
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)


def _weights(
    done: Tensor, params: dict[str, Tensor], betas: tuple[float, float], memory: float
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What differs between steps, for one step after another and each parameter by name.

    Args:
        done: (B,) steps that rows have done.
        params: Parameters (B, ...) by name.
        betas: Decay rates of the two moments.
        memory: See `RowAdam`.

    Yields:
        The bias of the first moment, and the weight of the new square in the second, which is kept
        with its bias taken out; both (B, 1, ...).
    """
    beta1, beta2 = betas
    ahead = torch.arange(1, AHEAD + 1, device=done.device).to(done.dtype)
    while True:
        steps = done + ahead[:, None]
        unbias = _unbias(beta1, steps)
        # Rounded from double precision: in single, torch's power of a number depends on its place
        # among the others, and a row must not depend on the rows beside it.
        power = (steps.double() ** -memory).to(steps.dtype)
        weight = torch.maximum((1 - beta2) / _unbias(beta2, steps), power)
        by_name = {}
        for name, p in params.items():
            rows = (AHEAD, -1) + (1,) * (p.dim() - 1)
            by_name[name] = unbias.view(rows).unbind(), weight.to(p.dtype).view(rows).unbind()
        for step in range(AHEAD):
            yield {
                name: (biases[step], squares[step]) for name, (biases, squares) in by_name.items()
            }
        done = steps[-1]


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
        self._weights = _weights(self.steps.clone(), self.params, self.betas, self.memory)

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        """One step of descent along `gradients`, in place."""
        weights = next(self._weights)
        self.steps += 1
        for name, p in self.params.items():
            gradient = gradients[name]
            unbias, weight = weights[name]
            m, v = self.first[name], self.second[name]
            m.lerp_(gradient, 1 - self.betas[0])
            v.lerp_(gradient.square(), weight)
            p.sub_(lr * (m / unbias) / v.sqrt().add_(self.eps))

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
        self._weights = _weights(self.steps.clone(), self.params, self.betas, self.memory)
        for name in self.params:
            self.first[name].copy_(state[f"adam_first.{name}"])
            self.second[name].copy_(state[f"adam_second.{name}"])
