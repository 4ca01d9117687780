"""Optimisers of local parameters: one for each of B rows, all in a few operations.

Each parameter has a leading dimension of B rows. What a row does depends on that row alone, and its
moments and step counts go with it to a store and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

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


def _unbias(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, without the cancellation that costs single precision four digits."""
    return -torch.expm1(steps * math.log(beta)) if beta > 0 else torch.ones_like(steps)


class RowAdam:
    """Adam (Kingma & Ba 2015) whose moments and step counts belong to rows.

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


class TailMean:
    """Mean of parameters over the last steps: gradient noise in them cancels.

    Weights grow linearly from 0, so that where the steps come from counts little.

    Args:
        params: Read after each step, and replaced by `put`.
        steps: How many there are.
        share: Of the steps, how many are meant.
        natural: Whether any step is natural. Of Adam's the first `ADAMS_BURN_IN` are left out: they
            have one length, and a mean would lag behind.
    """

    ADAMS_BURN_IN = 100

    def __init__(self, params: dict[str, Tensor], steps: int, share: float, natural: bool) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        burn_in = 0 if natural else self.ADAMS_BURN_IN
        self.first = steps - round(share * max(steps - burn_in, 0))
        self.mean: dict[str, Tensor] = {}

    def add(self, step: int) -> None:
        """Takes the parameters after `step` into the mean, if it is one of the last."""
        n = step - self.first + 1
        if n == 1:
            self.mean = {name: p.clone() for name, p in self.params.items()}
        elif n > 1:
            for name, p in self.params.items():
                self.mean[name].lerp_(p, 2.0 / (n + 1))

    def put(self) -> None:
        """Replaces the parameters by their mean."""
        for name, value in self.mean.items():
            self.params[name].copy_(value)
