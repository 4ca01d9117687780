"""Draws from a distribution over sequences, each made of that sequence's own noise.

A distribution says how many standard normal numbers a draw takes (`noise_size`) and makes draws of
them (`from_noise`): our own do as methods, torch's normals here. Any other one draws from a
generator that is seeded by the row (`_drawn_by_rows`), which is slower.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.overrides import TorchFunctionMode

from ltm_pyro.models.shaped import Shaped
from ltm_pyro.random import Noise

AHEAD = 2**20
"""Numbers that are made ahead at most, of draws to come: 8 MiB of them."""


class TakesNoise(Protocol):
    """A distribution with batch shape (..., B) whose draws can be made of normal numbers."""

    @property
    def noise_size(self) -> int:
        """N: standard normal numbers that a draw of one row takes."""
        ...

    def from_noise(self, noise: Tensor) -> Tensor:
        """A draw of each row, with a path to its parameters: (..., B, N) to (..., B, *event)."""
        ...


def noise_size(q: Distribution) -> int | None:
    """Standard normal numbers that a draw of one row takes; `None` where none can be made so."""
    if hasattr(q, "from_noise"):
        return cast("TakesNoise", q).noise_size
    if isinstance(q, Shaped):
        return noise_size(q.flat)
    if isinstance(q, Delta):
        return 0
    inner, size = _inner(q), q.event_shape.numel()
    if isinstance(inner, LowRankMultivariateNormal):
        return size + size // inner.event_shape[0] * inner.cov_factor.shape[-1]
    return size if isinstance(inner, Normal | MultivariateNormal) else None


def from_noise(q: Distribution, noise: Tensor) -> Tensor:
    """A draw of each row, with a path to q's parameters: (..., B, N) to (..., B, *event).

    Raises:
        TypeError: for a distribution without a `noise_size`.
    """
    if hasattr(q, "from_noise"):
        return cast("TakesNoise", q).from_noise(noise)
    if isinstance(q, Shaped):
        return q.shape_up(from_noise(q.flat, noise))
    if isinstance(q, Delta):
        return q.v.expand(noise.shape[:-1] + q.event_shape)
    inner, size = _inner(q), q.event_shape.numel()
    if not isinstance(inner, Normal | MultivariateNormal | LowRankMultivariateNormal):
        raise TypeError(f"{type(q).__name__} cannot be drawn from normal noise")
    noise = noise.to(inner.loc.dtype)
    eps = noise[..., :size].reshape(noise.shape[:-1] + q.event_shape)
    if isinstance(inner, Normal):
        return inner.loc + inner.scale * eps
    if isinstance(inner, MultivariateNormal):
        return inner.loc + (inner.scale_tril @ eps[..., None]).squeeze(-1)
    factor = inner.cov_factor
    rest = noise[..., size:].reshape(*eps.shape[:-1], factor.shape[-1], 1)
    return inner.loc + inner.cov_diag.sqrt() * eps + (factor @ rest).squeeze(-1)


def _inner(q: Distribution) -> Distribution:
    """The distribution whose independent parts make up q's event."""
    return q.base_dist if isinstance(q, Independent) else q


class Drawing:
    """Draws one after another, e.g. of the steps of a fast loop.

    Args:
        noise: That of the B sequences.
        dtype: In which its numbers are kept; a distribution's draws are of its own.
        ahead: Draws that will be asked for, so that their noise is made at once.
        antithetic: Every second draw is of the negated noise of the one before it, so that what is
            odd in it cancels over the two; without effect on a distribution that takes no noise.
    """

    def __init__(
        self,
        noise: Noise,
        dtype: torch.dtype = torch.float64,
        ahead: int = 1,
        *,
        antithetic: bool = False,
    ) -> None:
        self.noise, self.dtype, self.ahead, self.antithetic = noise, dtype, ahead, antithetic
        self.next = 0
        """The next draw's number."""
        self._start = 0
        self._made = torch.empty(0, 0, 0)

    def rewind(self) -> None:
        """The draws to come are those from the first one on."""
        self.next = 0

    def __call__(self, q: TorchDistribution, draws: int = 1) -> Tensor:
        """The next S draws from q, (S, B, *event_shape), with a path to q's parameters.

        Args:
            q: Batch shape (B,), or (S, B) for one draw of each.
            draws: S.
        """
        first, self.next = self.next, self.next + draws
        size, many = noise_size(q), len(q.batch_shape) > 1
        if size is not None:
            noise = self._normal(size, first, draws)
            return from_noise(q, noise.view(*q.batch_shape, size) if many else noise)
        if many:
            return _drawn_by_rows(q, self.noise, first)
        return torch.stack([_drawn_by_rows(q, self.noise, first + s) for s in range(draws)])

    def _normal(self, size: int, first: int, draws: int) -> Tensor:
        """(S, B, size), from what was made ahead as far as it goes."""
        start, end = first - self._start, first - self._start + draws
        if self._made.shape[-1] != size or start < 0 or end > len(self._made):
            most = AHEAD // max(size * len(self.noise), 1)
            count = max(draws, min(self.ahead - first, most))
            self._made = self._make(size, count, first).to(self.dtype)
            self._start, start, end = first, 0, draws
        return self._made[start:end]

    def _make(self, size: int, count: int, first: int) -> Tensor:
        """Noise of the draws from `first` on, (S, B, size)."""
        if not self.antithetic:
            return self.noise.normal(size, count, first)
        low, high = first // 2, (first + count + 1) // 2
        half = self.noise.normal(size, high - low, low)
        pairs = torch.stack((half, -half), dim=1).flatten(0, 1)
        return pairs[first - 2 * low :][:count]


def draw(q: TorchDistribution, noise: Noise, draws: int) -> Tensor:
    """S draws from q, (S, B, *event_shape), S as many as asked for.

    Args:
        q: Batch shape (B,).
        noise: That of the B sequences.
        draws: S.
    """
    return Drawing(noise)(q, draws)


def _drawn_by_rows(q: TorchDistribution, noise: Noise, draw: int) -> Tensor:
    """A draw from any q of batch shape (..., B), row by row from the rows' own generators."""
    with _RowGenerators(noise.generators(draw), len(q.batch_shape) - 1):
        drawn: Tensor = q.rsample() if q.has_rsample else q.sample()
    return drawn


_IN_PLACE = (
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.cauchy_,
    torch.Tensor.log_normal_, torch.Tensor.geometric_, torch.Tensor.random_,
    torch.Tensor.bernoulli_,
)  # fmt: skip
_BY_SHAPE = {torch.randn: torch.Tensor.normal_, torch.rand: torch.Tensor.uniform_}
_ALIKE = {torch.randn_like: torch.Tensor.normal_, torch.rand_like: torch.Tensor.uniform_}
_BY_PARAMETERS = (
    torch.normal, torch.bernoulli, torch.Tensor.bernoulli, torch.poisson, torch.binomial,
    torch._standard_gamma, torch._sample_dirichlet, torch.multinomial, torch.Tensor.multinomial,
)  # fmt: skip


class _RowGenerators(TorchFunctionMode):
    """Inside the block what torch draws for B rows is drawn for each from a generator of its own.

    Args:
        generators: One a row.
        dim: Which dimension of what is drawn is that of rows; categorical draws come flattened up
            to it, and are of one row more often.
    """

    def __init__(self, generators: list[torch.Generator], dim: int) -> None:
        super().__init__()
        self.generators, self.dim = generators, dim

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in _IN_PLACE:
            return self._fill(func, *args, **kwargs)
        if func in _BY_SHAPE:
            size = kwargs.pop("size") if "size" in kwargs else args
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self._fill(_BY_SHAPE[func], torch.empty(shape, **kwargs))
        if func in _ALIKE:
            return self._fill(_ALIKE[func], torch.empty_like(args[0], **kwargs))
        if func in _BY_PARAMETERS:
            flat = func in (torch.multinomial, torch.Tensor.multinomial)
            return self._draw(func, 0 if flat else self.dim, args, kwargs)
        return func(*args, **kwargs)

    def _fill(self, func: Any, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for row, generator in enumerate(self.generators):
            func(target.select(self.dim, row), *args, generator=generator, **kwargs)
        return target

    def _draw(self, func: Any, dim: int, args: Any, kwargs: Any) -> Tensor:
        tensors = torch.broadcast_tensors(*(a for a in args if isinstance(a, Tensor)))
        rest = [a for a in args if not isinstance(a, Tensor)]
        count = tensors[0].shape[dim]
        rows = [
            func(
                *(t.narrow(dim, row, 1) for t in tensors), *rest,
                generator=self.generators[row % len(self.generators)], **kwargs,
            )
            for row in range(count)
        ]  # fmt: skip
        return torch.cat(rows, dim)
