"""log softmax(h E^T)[y] for many positions, without ever holding an (N, V) tensor of logits.

The logits are visited in tiles of positions x vocabulary. One visit serves the value and the
gradient by h, since with p = softmax(h E^T)

    log p(y)          =  h . E[y] - log sum_v exp(h . E[v])
    d log p(y) / d h  =  E[y] - sum_v p_v E[v]

and both sums can be kept up tile by tile against a running maximum, as the attention of Dao et al.
(2022, arXiv 2205.14135) does with keys. The gradient by E needs p, so it visits the tiles again.

In compiled code both visits are operators of their own, which the compiler takes as they are: left
to unroll the loop, it would hold the logits of all tiles at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltm_pyro.models.compiled import compiled_function

TILE_ELEMENTS = 2**21
"""Logits held at once: 8 MB in float32, so that a tile stays in or near the cache."""
TILE_COLUMNS = 1024
"""Vocabulary entries of a tile."""


def tile_shape(vocab_size: int) -> tuple[int, int]:
    """(positions, vocabulary entries) of a tile."""
    columns = min(vocab_size, TILE_COLUMNS)
    return TILE_ELEMENTS // columns, columns


def token_log_prob(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log probability of each target, in nats.

    Under autocast the products are in its lower precision; sums, exponentials and the target's own
    logit are in single precision at least.

    Args:
        h: (N, H) hidden states.
        weight: (V, H) output embedding.
        targets: (N,) int64 in 0..V-1, at padded positions too.

    Returns:
        (N,) log probabilities. Memory beyond one tile does not grow with V, forward or backward,
        except for the gradient by `weight` itself where that is asked for.
    """
    if h.device.type != "meta" and torch.is_autocast_enabled(h.device.type):
        low = torch.get_autocast_dtype(h.device.type)
        h, weight = h.to(low), weight.to(low)
    if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
        log_prob: Tensor = _TokenLogProb.apply(h, weight, targets)  # type: ignore[no-untyped-call]
        return log_prob
    return _visit(h, weight, targets, gradient=False)[0]


class _TokenLogProb(torch.autograd.Function):
    """`token_log_prob` with its gradient by h made on the way, and by `weight` when needed."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        visit = _visit_compiled if torch.compiler.is_compiling() else _visit
        log_prob, log_norm, gradient = visit(h, weight, targets)
        if weight.requires_grad:
            ctx.save_for_backward(gradient, h, weight, targets, log_norm)
        else:
            ctx.save_for_backward(gradient)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gradient, *rest = ctx.saved_tensors
        by_h = grad[:, None].to(gradient.dtype) * gradient if ctx.needs_input_grad[0] else None
        visit = _visit_again_compiled if torch.compiler.is_compiling() else _visit_again
        by_weight = visit(grad, *rest) if ctx.needs_input_grad[1] else None
        return by_h, by_weight, None


def _full(dtype: torch.dtype) -> torch.dtype:
    """Of sums and exponentials."""
    return torch.promote_types(dtype, torch.float32)


def _weigh(tile: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's share of the sums: the new maximum, the factor by which older sums shrink, the sum.

    The weights exp(tile - maximum) replace the logits in `tile`. Summed are the weights as they are
    stored there, so that a mean by them has weights that sum to one whatever the precision. All
    that is returned is (N,).
    """
    full = _full(tile.dtype)
    highest = torch.maximum(top, tile.amax(1).to(full))
    tile.copy_((tile.to(full) - highest[:, None]).exp_())
    return highest, (top - highest).exp(), tile.sum(1, dtype=full)


def _move(mean: Tensor, shrink: Tensor, product: Tensor) -> None:
    """Takes a tile's weighted sum of embeddings (N, H) into `mean`."""
    mean.mul_(shrink[:, None]).add_(product)


def _normalise(tile: Tensor, log_norm: Tensor) -> None:
    """Replaces the logits in `tile` by probabilities, given the log normaliser (N,)."""
    tile.copy_((tile.to(_full(tile.dtype)) - log_norm[:, None]).exp_())


Via = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Takes one of the passes above and returns it, compiled or as it is."""


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _visit(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    gradient: bool = True,
    via: Via = _plain,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), log normaliser, d log p(y) / d h): (N,), (N,), (N, H).

    Args:
        h: (N, H).
        weight: (V, H), of the same dtype.
        targets: (N,).
        gradient: Whether the last is asked for; it is empty otherwise.
        via: For the passes between the matrix products.
    """
    full = _full(h.dtype)
    rows, columns = tile_shape(len(weight))
    logits = _Tiles(h, min(rows, len(h)) * columns)
    log_norm = h.new_empty((len(h),), dtype=full)
    by_h = torch.empty_like(h) if gradient else h.new_empty(0)
    target = weight[targets].to(full)
    first, *others = weight.split(columns)
    for i in range(0, len(h), rows):
        block, norm = h[i : i + rows], log_norm[i : i + rows]
        tile = logits(block, first)
        top, _, total = via(_weigh)(tile, torch.full_like(norm, -torch.inf))
        mean = (tile @ first).to(full) if gradient else norm.new_empty(0)
        for part in others:
            tile = logits(block, part)
            top, shrink, tile_total = via(_weigh)(tile, top)
            total.mul_(shrink).add_(tile_total)
            if gradient:
                via(_move)(mean, shrink, tile @ part)
        norm.copy_(top + total.log())
        if gradient:
            by_h[i : i + rows] = target[i : i + rows] - mean.div_(total[:, None])
    return (h.to(full) * target).sum(1) - log_norm, log_norm, by_h


def _visit_again(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_norm: Tensor,
    via: Via = _plain,
) -> Tensor:
    """sum_n grad_n (1[v = y_n] - p_nv) h_n for every vocabulary entry v, (V, H)."""
    full = _full(h.dtype)
    rows, columns = tile_shape(len(weight))
    logits = _Tiles(h, min(rows, len(h)) * columns)
    by_weight = torch.zeros(weight.shape, dtype=full, device=weight.device)
    weighted = grad[:, None].to(full) * h.to(full)
    by_weight.index_add_(0, targets, weighted)
    weighted = weighted.to(h.dtype)
    for i in range(0, len(h), rows):
        block, norm, addend = (a[i : i + rows] for a in (h, log_norm, weighted))
        for part, out in zip(weight.split(columns), by_weight.split(columns), strict=True):
            tile = logits(block, part)
            via(_normalise)(tile, norm)
            out.sub_(tile.T @ addend)
    return by_weight.to(weight.dtype)


class _Tiles:
    """Tiles of logits, one after the other in the same memory: fresh memory is slow to touch."""

    def __init__(self, h: Tensor, size: int) -> None:
        self._memory = h.new_empty(size)

    def __call__(self, block: Tensor, part: Tensor) -> Tensor:
        """The product block @ part.T, valid until the next call."""
        shape = len(block), len(part)
        return torch.mm(block, part.T, out=self._memory[: shape[0] * shape[1]].view(shape))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in one or two passes over memory, for tiles of any size.

    Tiles at the edges are smaller, differently for each length of batch and vocabulary: a graph for
    each would soon be more than torch keeps.
    """
    return compiled_function(function, dynamic=True)


@torch.library.custom_op("ltm_pyro::visit_tiles", mutates_args=())
def _visit_compiled(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_visit` inside a compiled graph."""
    return _visit(h, weight, targets, via=_compiled)


@_visit_compiled.register_fake
def _(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = h.new_empty((len(h),), dtype=_full(h.dtype))
    return sums, torch.empty_like(sums), torch.empty_like(h)


@torch.library.custom_op("ltm_pyro::visit_tiles_again", mutates_args=())
def _visit_again_compiled(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor
) -> Tensor:
    """`_visit_again` inside a compiled graph."""
    return _visit_again(grad, h, weight, targets, log_norm, via=_compiled)


@_visit_again_compiled.register_fake
def _(grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor) -> Tensor:
    return torch.empty_like(weight)
