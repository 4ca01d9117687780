"""Normalizing flows over thoughts that bend by row: one network, one context vector per row.

    eps ~ N(0, I)                                                     (N,), N = K * D
    z   = loc + scale * T(eps; context)
    T   = L o A_n o ... o A_1

Each A is autoregressive in eps (`zuko`): dimension i is moved by a function whose parameters are a
network's answer to the dimensions before it and the context, every other one in reverse order. L is
one lower triangular matrix with ones on its diagonal, the same for all rows. A fresh network gives
T = identity, and then z is a factorised normal.

The autoregression runs along the draw of z (Kingma et al. 2016, inverse autoregressive flow,
section 3), so a draw and its own density cost one pass. The density of any other z needs eps, which
is found by fixed-point iteration (`_solve`).
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ltm_pyro.checks import MOST, one_of, refuse_too_large, whole_number
from ltm_pyro.models.drawn import Drawn, Shape
from ltm_pyro.models.zuko_import import (
    MaskedAutoregressiveTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)

FlowKind = Literal["affine", "spline"]
SPLINE_BOUND = 5.0
"""Splines bend eps between -5 and 5, in units of the base's standard deviation, and nothing else:
one draw in 1.7 million of a dimension lies outside. Tails are therefore those of a normal, however
long the fit."""

MOST_STRETCH = 20.0
"""One shift and scale stretches by less than this and more than its inverse. What a sequence needs
beyond, its own `scale` gives; without a bound, inverses of a badly fitted flow lose all digits."""

LOWER_GAIN = 8.0
"""Correlations are what a posterior needs first: they learn this much faster than the networks."""

_MOMENT_DRAWS = 1024
_MOMENT_SEED = 20131220
_MOMENT_CHUNK = 1 << 22  # numbers held at once while moments are computed

_MOST_TRANSFORMS = 256  # each is a network of its own, built one after another
_MOST_BINS = 1024


class ConditionalFlow(nn.Module):
    """The network behind T, shared by all rows.

    Args:
        features: N, dimensions of eps.
        context: C, numbers in a row's context vector.
        kind: `affine`: each A shifts and scales. `spline`: each A is a monotonic rational-quadratic
            spline of `bins` pieces (Durkan et al. 2019) followed by a shift and scale.
        transforms: n, autoregressive transforms.
        hidden: Units in each of the two hidden layers of a transform's network.
        bins: Pieces of a spline.
    """

    places: Tensor

    def __init__(
        self,
        features: int,
        context: int,
        kind: FlowKind = "affine",
        transforms: int = 2,
        hidden: int = 64,
        bins: int = 8,
    ) -> None:
        super().__init__()
        one_of("flow kind", kind, get_args(FlowKind))
        whole_number("flow transforms", transforms, 1, _MOST_TRANSFORMS)
        whole_number("flow bins", bins, 1, _MOST_BINS)
        whole_number("flow context_dim", context, 1, MOST)
        whole_number("flow hidden", hidden, 1, MOST)
        weights = transforms * hidden * (2 * features + context + hidden)
        size = f"{transforms} transforms with {hidden} hidden units and context_dim {context}"
        refuse_too_large(f"a flow of {size}", 4 * weights, "choose smaller ones")
        self.features = features
        # A vector: the slow clock's weight decay of matrices would pull correlations to zero.
        self.lower = nn.Parameter(torch.zeros(features * (features - 1) // 2))
        places = torch.tril_indices(features, features, offset=-1)
        self.register_buffer("places", places, persistent=False)
        steps: list[Any] = []
        for i in range(transforms):
            order = torch.arange(features) if i % 2 == 0 else torch.arange(features).flip(0)
            # `zuko` makes one dimension an elementwise transform, which has no order.
            options = {"order": order} if features > 1 else {}
            for univariate, shapes in _univariates(kind, bins):
                step: Any = MaskedAutoregressiveTransform(
                    features,
                    context,
                    univariate=univariate,
                    shapes=shapes,
                    hidden_features=(hidden, hidden),
                    activation=nn.SiLU,
                    **options,
                )
                # The identity: an answer of 0 means no shift, no stretch, straight splines.
                nn.init.zeros_(step.hyper[-1].weight)
                nn.init.zeros_(step.hyper[-1].bias)
                step.hyper = _Scaled(step.hyper, hidden**-0.5)
                steps.append(step)
        self.steps = nn.ModuleList(steps)

    def matrix(self) -> Tensor:
        """L, (N, N)."""
        eye = torch.eye(self.features, dtype=self.lower.dtype, device=self.lower.device)
        return eye.index_put((self.places[0], self.places[1]), LOWER_GAIN * self.lower)

    def snapshot(self) -> ConditionalFlow:
        """A copy that stays as it is when this network learns on, and asks for no gradient."""
        return copy.deepcopy(self).requires_grad_(False)

    def push(self, eps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """T(eps) (..., N) and log |det dT/deps| (...), for contexts (..., C)."""
        y, log_det = eps, eps.new_zeros(())
        for step in self.steps:
            y, change = step(torch.tanh(context)).call_and_ladj(y)
            log_det = log_det + change
        return y @ self.matrix().T, log_det

    def pull(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The eps (..., N) with T(eps) = y, and log |det dT/deps| (...) there."""
        flat = y.flatten(0, -2) if y.dim() > 1 else y[None]
        x = torch.linalg.solve_triangular(self.matrix(), flat.T, upper=False, unitriangular=True)
        x, log_det = x.T.reshape(y.shape), y.new_zeros(())
        for step in reversed(self.steps):
            transform = step(torch.tanh(context))
            x = _solve(transform, x)
            log_det = log_det + transform.call_and_ladj(x)[1]
        return x, log_det


class _Scaled(nn.Module):
    """A network times a constant, which slows what it learns."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network = network
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The scaled answer."""
        return self.factor * self.network(x)


def _univariates(kind: FlowKind, bins: int) -> list[tuple[Any, tuple[tuple[int, ...], ...]]]:
    """What moves one dimension, one after the other, with the shapes of its parameters."""
    affine = (_affine, ((), ()))
    if kind == "affine":
        return [affine]
    return [(_spline, ((bins,), (bins,), (bins - 1,))), affine]


def _affine(shift: Tensor, scale: Tensor) -> Any:
    return MonotonicAffineTransform(shift, scale, slope=1 / MOST_STRETCH)


def _spline(widths: Tensor, heights: Tensor, derivatives: Tensor) -> Any:
    return MonotonicRQSTransform(widths, heights, derivatives, bound=SPLINE_BOUND)


def _solve(transform: Any, y: Tensor) -> Tensor:
    """The x with transform(x) = y, by repeating x <- (the map that x asks for)^-1 (y).

    The i-th dimension's map asks for the i - 1 dimensions before it alone, so after i rounds i
    dimensions are final, and N rounds solve it exactly. A trained network leans weakly enough on
    each dimension that all are final much earlier (Song et al. 2021, "Accelerating feedforward
    computation via parallel nonlinear equation solving"): 5 rounds at N = 96.
    """
    if not hasattr(transform, "meta"):
        return transform.inv(y)
    x = torch.zeros_like(y)
    tolerance = 64 * torch.finfo(y.dtype).eps
    for _ in range(y.shape[-1]):
        before, x = x, transform.meta(x).inv(y)
        if bool(((x - before).abs() <= tolerance * (1 + x.abs())).all()):
            break
    return x


class FlowDistribution(Drawn):
    """z = loc + scale * T(eps; context): batch shape (...), event shape (K, D).

    The density of the last draw is kept with the draw, so that scoring one's own draws costs
    nothing. Mean, variance and covariance have no closed form: they are Monte Carlo estimates from
    draws of eps that are the same for every row and every call, symmetric, and (up to 256
    dimensions) of unit covariance, so that they are exact wherever T is linear in eps.

    Args:
        network: T.
        context: (B, C), or anything that broadcasts against the rows.
        loc: (..., K, D).
        scale: (..., K, D), above 0.
    """

    def __init__(
        self,
        network: ConditionalFlow,
        context: Tensor,
        loc: Tensor,
        scale: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.context, self.loc, self.scale = network, context, loc, scale
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(loc, loc.shape[:-2], loc.shape[-2:], validate_args)

    def expand(self, batch_shape: Shape, _instance: object = None) -> FlowDistribution:
        """The same distribution over more rows."""
        shape = torch.Size(batch_shape) + self.event_shape
        context = self.context.expand(*batch_shape, self.context.shape[-1])
        loc, scale = self.loc.expand(shape), self.scale.expand(shape)
        return FlowDistribution(self.network, context, loc, scale, self._validate_args)

    def select_rows(self, index: Tensor) -> FlowDistribution:
        """The rows at `index`."""
        context = self.context.expand(*self.batch_shape, self.context.shape[-1])[index]
        return FlowDistribution(self.network, context, self.loc[index], self.scale[index])

    def from_noise(self, noise: Tensor) -> Tensor:
        """Draws from standard normal numbers, (..., K * D) to (..., K, D); the density is kept."""
        eps = noise.to(self.loc.dtype)
        y, log_det = self.network.push(eps, self.context)
        z = self._place(y)
        self._drawn = (z, self._density(eps, log_det))
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., K, D) to (...)."""
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        y = ((value - self.loc) / self.scale).flatten(-2)
        return self._density(*self.network.pull(y, self.context))

    @property
    def mean(self) -> Tensor:
        """Estimate of E[z], (..., K, D)."""
        return self._place(self._moments[0])

    @property
    def variance(self) -> Tensor:
        """Estimate of the marginal variances, (..., K, D)."""
        covariance = self._moments[1].diagonal(dim1=-2, dim2=-1)
        return self.scale.square() * covariance.unflatten(-1, tuple(self.event_shape))

    @property
    def covariance(self) -> Tensor:
        """Estimate of the covariance, (..., K * D, K * D), dimensions in row order."""
        scale = self.scale.flatten(-2)
        return scale[..., :, None] * self._moments[1] * scale[..., None, :]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean (..., N) and covariance (..., N, N) of T(eps)."""
        n, rows = self.network.features, self.batch_shape
        base = _symmetric_draws(n).to(self.loc)
        first = self.loc.new_zeros((*rows, n))
        second = self.loc.new_zeros((*rows, n, n))
        size = max(1, _MOMENT_CHUNK // max(1, rows.numel() * n))
        for eps in base.split(size):
            lead = (len(eps), *(1,) * len(rows), n)
            y, _ = self.network.push(eps.view(lead).expand(-1, *rows, -1), self.context)
            first = first + y.sum(0) / len(base)
            second = second + torch.einsum("s...i,s...j->...ij", y, y) / len(base)
        return first, second - first[..., :, None] * first[..., None, :]

    def _place(self, y: Tensor) -> Tensor:
        """(..., N) of the flow to thoughts (..., K, D)."""
        return self.loc + self.scale * y.unflatten(-1, tuple(self.event_shape))

    def _density(self, eps: Tensor, log_det: Tensor) -> Tensor:
        """Log q of the z that was made from `eps` (..., N)."""
        normal = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1)
        return normal - log_det - self.scale.log().sum((-2, -1))


def _symmetric_draws(n: int) -> Tensor:
    """Standard-normal draws (S, n), always the same: mean 0, and unit covariance where n allows."""
    generator = torch.Generator().manual_seed(_MOMENT_SEED)
    half = torch.randn(_MOMENT_DRAWS // 2, n, generator=generator, dtype=torch.float64)
    if n <= _MOMENT_DRAWS // 4:
        cholesky = torch.linalg.cholesky(half.T @ half / len(half))
        half = torch.linalg.solve_triangular(cholesky, half.T, upper=False).T
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat((half, -half))
