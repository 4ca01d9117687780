"""Noise for some rows of a batch, as if the whole batch had been drawn.

A process that holds rows [start, start + b) of B draws at the size B and keeps its own rows. Every
process then uses torch's global generator just as one process does, and a sequence meets the same
noise however many processes share the batch. The price is B / b times the random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ltm_pyro.errors import InputError
from ltm_pyro.models.base import SITE_Z

_IN_PLACE = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_)
_BY_SHAPE = (torch.randn, torch.rand)
_ALIKE = (torch.randn_like, torch.rand_like)
_MULTINOMIAL = (torch.multinomial, torch.Tensor.multinomial)
_REFUSED = (
    torch.bernoulli, torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.poisson,
    torch.binomial, torch._standard_gamma, torch._sample_dirichlet, torch.Tensor.cauchy_,
    torch.Tensor.log_normal_, torch.Tensor.geometric_, torch.Tensor.random_, torch.randint,
    torch.randperm,
)  # fmt: skip


class RowNoise(Messenger):
    """Inside the block the guide's site `z` is drawn for B rows, of which some are kept.

    Blocks may be nested; the inner one counts.

    Args:
        start: The first row that is kept.
        rows: b, rows that are kept; the guide holds as many.
        total: B, rows that are drawn.
    """

    def __init__(self, start: int, rows: int, total: int) -> None:
        super().__init__()
        self.place = (start, rows, total)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != SITE_Z or msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        fn, rows = msg["fn"], self.place[1]
        shape = fn.batch_shape
        if not shape or shape[-1] != rows:
            raise InputError(
                f"a guide whose z has batch shape {tuple(shape)} cannot be split over processes: "
                f"its last dimension must be the {rows} sequences that this process holds"
            )
        with rows_of_draws(len(shape) - 1, *self.place):
            msg["value"] = fn(*msg["args"], **msg["kwargs"])


@contextmanager
def rows_of_draws(dim: int, start: int, rows: int, total: int) -> Iterator[None]:
    """Inside the block, draws of a tensor with `rows` rows in `dim` are made for `total` rows.

    Args:
        dim: Which dimension of what is drawn is that of sequences.
        start: The first row that is kept.
        rows: b.
        total: B.

    Raises:
        InputError: inside the block, for a draw that cannot be split in this way.
    """
    with _Draws(dim, start, rows, total):
        yield


class _Draws(TorchFunctionMode):
    """See `rows_of_draws`. Draws from a generator of their own are left alone."""

    def __init__(self, dim: int, start: int, rows: int, total: int) -> None:
        super().__init__()
        self.dim, self.start, self.rows, self.total = dim, start, rows, total

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in _IN_PLACE:
            target, *rest = args
            whole = target.new_empty(self._widened(target.shape))
            return target.copy_(self._kept(func(whole, *rest, **kwargs)))
        if func in _BY_SHAPE:
            size = kwargs.pop("size") if "size" in kwargs else args
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self._kept(func(self._widened(shape), **kwargs))
        if func in _ALIKE:
            return self._kept(func(self._padded(args[0], 0.0), *args[1:], **kwargs))
        if func is torch.normal:
            return self._normal(*args, **kwargs)
        if func in _MULTINOMIAL:
            return self._multinomial(func, *args, **kwargs)
        if func in _REFUSED:
            raise _unknown_draw(getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)

    def _widened(self, shape: Any) -> list[int]:
        """The shape of the whole batch's draw."""
        out = list(shape)
        if len(out) <= self.dim or out[self.dim] != self.rows:
            raise _unknown_draw(f"a tensor of shape {tuple(out)}")
        out[self.dim] = self.total
        return out

    def _kept(self, whole: Tensor) -> Tensor:
        return whole.narrow(self.dim, self.start, self.rows).contiguous()

    def _padded(self, mine: Tensor, filling: float) -> Tensor:
        """`mine` in its place among rows that are thrown away."""
        whole = mine.new_full(self._widened(mine.shape), filling)
        whole.narrow(self.dim, self.start, self.rows).copy_(mine)
        return whole

    def _normal(self, mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(mean, Tensor) or not isinstance(std, Tensor) or args or kwargs:
            raise _unknown_draw("torch.normal with numbers")
        mean, std = torch.broadcast_tensors(mean, std)
        return self._kept(torch.normal(self._padded(mean, 0.0), self._padded(std, 1.0)))

    def _multinomial(
        self, func: Callable[..., Tensor], chances: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        """Rows of categorical draws come flattened; dimensions before that of sequences lead."""
        if chances.dim() != 2 or len(chances) % self.rows:
            raise _unknown_draw(f"categorical draws of shape {tuple(chances.shape)}")
        grouped = chances.detach().view(-1, self.rows, chances.shape[-1])
        whole = grouped.new_ones((len(grouped), self.total, chances.shape[-1]))
        whole[:, self.start : self.start + self.rows] = grouped
        drawn = func(whole.flatten(0, 1), *args, **kw)
        return drawn.view(len(grouped), self.total, -1)[
            :, self.start : self.start + self.rows
        ].flatten(0, 1)


def _unknown_draw(what: str) -> InputError:
    return InputError(
        f"this guide draws z by {what}, of which no rows can be told apart: fit it in one process"
    )
