"""Natural-gradient steps on local parameters: B independent optimisers, one per sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ltm_pyro.inference.row_adam import RowAdam

Unit = Tensor | float
"""How far a unit step moves a parameter: a number, or one for each of its entries (B, ...)."""
LOG_VARIANCE_UNIT = 0.7
"""Of a log variance: its Fisher information is 1/2, so the natural gradient's own unit is 1.4, and
half of it steadies the noisier of a normal's two gradients."""
LONGEST = 2.0
"""Longest step of a row in units, in one parameter: half its square is the KL between q before and
after."""
ADAM_SHARE = 1 / 4
"""Adam's rate as a share of the natural one: its steps have the length of its rate, whatever the
gradient says."""


class RowNatural:
    """Steps in units of q, with momentum that belongs to rows (after Khan & Lin 2017, eq. 8 and 9).

    For N(loc, sd^2) the natural gradient is sd^2 times the gradient by loc, and twice that by the
    log variance. With units u of one sd for loc, and 0.7 for a log variance,

        d = clip(shorten(lr u gradient), -1, 1),  m <- momentum m + (1 - momentum) d,  p <- p - u m

    is that gradient (a quarter of it for the log variance, whose gradient is the noisier), within a
    trust region: over all dimensions of a row a length of `LONGEST`, about as many nats of KL, and
    one unit in each, however badly q is scaled. Shortened first, a step keeps its direction: if all
    of its entries were cut to one unit before, far from the posterior each would be a sign, noise
    as long as signal. Momentum holds bounded steps, so that none is carried far past a posterior
    that narrows.

    Adam (`RowAdam`) moves what has no unit.

    Args:
        params: Parameters (B, ...) by name.
        units: Gives the units at the present values, by name; see `LocalGuide.units`.
        momentum: Share of the last step that is kept.
        betas: Adam's, for the parameters that have no unit.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        units: Callable[[], dict[str, Unit]],
        momentum: float,
        betas: tuple[float, float],
    ) -> None:
        self.units, self.momentum = units, momentum
        known = units().keys()
        self.params = {name: p.detach() for name, p in params.items() if name in known}
        rest = {n: p for n, p in params.items() if n not in known}
        self.adam = RowAdam(rest, betas) if rest else None
        self.kept = {name: p.new_zeros(p.shape) for name, p in self.params.items()}

    @property
    def name(self) -> str:
        """What moves the parameters, told apart where not all have a unit."""
        rest = ", ".join(self.adam.params) if self.adam else ""
        if not self.params:
            return f"adam: {rest}"
        return f"natural; adam: {rest}" if rest else "natural"

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        """One step of descent along `gradients`, in place."""
        if self.adam is not None:
            self.adam.step(gradients, ADAM_SHARE * lr)
        with torch.no_grad():
            units = self.units()
        for name, p in self.params.items():
            unit, kept = units[name], self.kept[name]
            step = (gradients[name] * unit).mul_(lr)
            length = torch.linalg.vector_norm(step.flatten(1), dim=1).clamp_(min=LONGEST)
            step.mul_((LONGEST / length).view(-1, *(1,) * (step.dim() - 1))).clamp_(-1.0, 1.0)
            kept.lerp_(step, 1 - self.momentum)
            p.sub_(kept * unit)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by row, as flat names to (B, ...) tensors."""
        adam = self.adam.state() if self.adam else {}
        return {**adam, **{f"momentum.{name}": kept for name, kept in self.kept.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        if self.adam is not None:
            self.adam.load(state)
        for name, kept in self.kept.items():
            kept.copy_(state[f"momentum.{name}"])
