"""Random numbers that belong to a sequence: functions of (seed, purpose, step, id, draw, index).

A generator that is read in turn gives a sequence other numbers whenever another stands before it.
Here every number is computed from its place instead (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"): a counter, mixed until nothing of its pattern is left. So a sequence meets the
same noise alone, in any batch, in any place of it and in any process; a resumed fit needs no saved
state; and families that are fitted to one sequence are compared on common noise.

A distribution says how many standard normal numbers a draw takes (`noise_size`) and makes draws of
them (`from_noise`): our own do as methods, torch's normals here. Any other one draws from a
generator that is seeded by the row (`_drawn_by_rows`), which is slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Protocol, cast

import numpy as np
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

from ltm_pyro.doors import exclusively


class Stream(IntEnum):
    """What random numbers are used for; streams of one seed do not overlap."""

    FAST = 1
    SLOW = 2
    SCORE = 3
    SAMPLE = 4
    INITIAL = 5
    BATCH = 6
    MCMC = 7
    CALIBRATE = 8
    DROPOUT = 9
    TOKENS = 10
    HELD_OUT = 11


def derive_seed(seed: int, stream: Stream, step: int = 0) -> int:
    """A seed for one purpose at one step, well mixed, the same on every machine."""
    state = np.random.SeedSequence([seed, int(stream), step]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # 0xBF58476D1CE4E5B9, 0x94D0...11EB


def _mixed(counter: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), in place, int64 to int64."""
    for shift, factor in _MIX:
        counter ^= (counter >> shift) & ((1 << (64 - shift)) - 1)  # `>>` keeps the sign
        counter *= factor
    counter ^= (counter >> 31) & ((1 << 33) - 1)
    return counter


class Noise:
    """The random numbers of B sequences for one purpose.

    A number's place is (row id, draw, index); rows with the same id have the same numbers.

    Args:
        seed: From `derive_seed`.
        ids: (B,) int64, the stable ids of the sequences.
    """

    def __init__(self, seed: int, ids: Tensor) -> None:
        self.seed, self.ids = seed, ids
        start = _mixed(torch.full_like(ids, seed).mul_(_GOLDEN))
        self._rows = _mixed(ids * _GOLDEN + start)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: slice | Tensor) -> Noise:
        """That of the rows at `index`."""
        return Noise(self.seed, self.ids[index])

    def _draws(self, draws: int, first: int) -> Tensor:
        """A number for each draw and row, (S, B)."""
        draw = torch.arange(first + 1, first + draws + 1, device=self.ids.device)
        return _mixed(self._rows + (draw * _GOLDEN)[:, None])

    def _bits(self, size: int, draws: int, first: int) -> Tensor:
        """(S, B, size) numbers of 64 bits."""
        index = torch.arange(1, size + 1, device=self.ids.device)
        return _mixed(self._draws(draws, first)[..., None] + index * _GOLDEN)

    def uniform(self, size: int, draws: int = 1, first: int = 0) -> Tensor:
        """Numbers from the open interval (0, 1), (S, B, size) float64, from draw `first` on.

        What the numbers of a draw are does not depend on how many are asked for.
        """
        bits = self._bits(size, draws, first)
        return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53

    def normal(self, size: int, draws: int = 1, first: int = 0) -> Tensor:
        """Standard normal numbers, (S, B, size) float64, none beyond 6.7; arguments as above.

        Two from every 64 bits (Box & Muller 1958), computed in double precision whatever they are
        for, so that devices differ in the last digits alone.
        """
        bits = self._bits((size + 1) // 2, draws, first)
        high, low = ((bits >> 32) & 0xFFFFFFFF).double(), (bits & 0xFFFFFFFF).double()
        radius = high.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = low.add_(0.5).mul_(2.0**-32 * 2.0 * math.pi)
        pairs = torch.stack((angle.cos() * radius, angle.sin() * radius), dim=-1)
        return pairs.flatten(-2)[..., :size]

    def generators(self, draw: int) -> list[torch.Generator]:
        """A generator for each row, for what has to be drawn by one."""
        seeds = self._draws(1, draw)[0].tolist()
        return [torch.Generator(self.ids.device).manual_seed(seed & (2**63 - 1)) for seed in seeds]


def fresh_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**62, ()))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded inside the block and put back afterwards.

    Other threads wait for the block's end: they draw from the same generators.

    Raises:
        RuntimeError: if something else seeded the generator meanwhile, e.g. `torch.manual_seed` in
            another thread: the numbers drawn are not those of `seed` then.
    """
    # `torch.manual_seed` would seed an accelerator's generator too, which a program on the CPU has
    # no business with, and is slow where there is none: it notes down who asked, for later.
    if device.type in ("cpu", "meta"):
        fork, seeding = torch.random.fork_rng(devices=[]), torch.default_generator.manual_seed
    else:
        fork = torch.random.fork_rng(devices=[device], device_type=device.type)
        seeding = torch.manual_seed
    with exclusively(), fork:
        seeding(seed)
        yield
        # The C++ generator wraps negative seeds round.
        if torch.default_generator.initial_seed() != seed % 2**64:
            raise RuntimeError(
                "torch's global generator was seeded by something else while numbers were drawn "
                "from it: in threads, call torch.manual_seed and build models inside "
                "`with ltm_pyro.exclusively():`"
            )


AHEAD = 2**20
"""Numbers that are made ahead at most, of draws to come: 8 MiB of them."""


class TakesNoise(Protocol):
    """A distribution with batch shape (..., B) whose draws can be made of normal numbers."""

    @property
    def noise_size(self) -> int | None:
        """N: standard normal numbers that a draw of one row takes; `None` where none will do."""
        ...

    def from_noise(self, noise: Tensor) -> Tensor:
        """A draw of each row, with a path to its parameters: (..., B, N) to (..., B, *event)."""
        ...


def noise_size(q: Distribution) -> int | None:
    """Standard normal numbers that a draw of one row takes; `None` where none will do."""
    if hasattr(q, "from_noise"):
        return cast("TakesNoise", q).noise_size
    if isinstance(q, Delta):
        return 0
    inner, size = _inner(q), q.event_shape.numel()
    if isinstance(inner, LowRankMultivariateNormal):
        return size + size // inner.event_shape[0] * inner.cov_factor.shape[-1]
    return size if isinstance(inner, Normal | MultivariateNormal) else None


def from_noise(q: Distribution, noise: Tensor) -> Tensor:
    """A draw of each row, with a path to q's parameters: (..., B, N) to (..., B, *event).

    `TypeError` for a distribution without a `noise_size`.
    """
    if hasattr(q, "from_noise"):
        return cast("TakesNoise", q).from_noise(noise)
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

        Q's batch shape is (B,), or (S, B) for one draw of each.
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
    """S = `draws` draws (S, B, *event_shape) from q of batch shape (B,), by the noise of B rows."""
    return Drawing(noise)(q, draws)


def _drawn_by_rows(q: TorchDistribution, noise: Noise, draw: int) -> Tensor:
    """A draw from any q of batch shape (..., B), row by row from the rows' own generators."""
    with _RowGenerators(noise.generators(draw), len(q.batch_shape) - 1):
        drawn: Tensor = q.rsample() if q.has_rsample else q.sample()
    return drawn


_IN_PLACE = (
    "normal_", "uniform_", "exponential_", "cauchy_", "log_normal_", "geometric_", "random_",
    "bernoulli_",
)  # fmt: skip
_MADE = {"randn": "normal_", "rand": "uniform_"}
_BY_PARAMETERS = (
    "normal", "bernoulli", "poisson", "binomial", "multinomial", "_standard_gamma",
    "_sample_dirichlet",
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
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if name in _IN_PLACE:
            return self._fill(name, *args, **kwargs)
        if name in _MADE:
            size = kwargs.pop("size") if "size" in kwargs else args
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self._fill(_MADE[name], torch.empty(shape, **kwargs))
        if (made := _MADE.get(name.removesuffix("_like"))) is not None:
            return self._fill(made, torch.empty_like(args[0], **kwargs))
        if name in _BY_PARAMETERS:
            return self._draw(func, 0 if name == "multinomial" else self.dim, args, kwargs)
        return func(*args, **kwargs)

    def _fill(self, name: str, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for row, generator in enumerate(self.generators):
            getattr(target.select(self.dim, row), name)(*args, generator=generator, **kwargs)
        return target

    def _draw(self, func: Any, dim: int, args: Any, kwargs: Any) -> Tensor:
        tensors = torch.broadcast_tensors(*(a for a in args if isinstance(a, Tensor)))
        rest = [a for a in args if not isinstance(a, Tensor)]
        rows = []
        for row in range(tensors[0].shape[dim]):
            generator = self.generators[row % len(self.generators)]
            one = [t.narrow(dim, row, 1) for t in tensors]
            rows.append(func(*one, *rest, generator=generator, **kwargs))
        return torch.cat(rows, dim)
