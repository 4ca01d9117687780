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

TILE_ELEMENTS = 2**22
"""Logits held at once: 16 MB in float32, so that a tile stays in or near the cache."""
TILE_COLUMNS = 4096
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


def _weigh(logits: Tensor, top: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's share of the sums: the new maximum (N,), exp(logits - maximum), and its sum (N,).

    The sum is of the weights as rounded to `dtype`, so that a mean by them has weights that sum to
    one whatever the precision.
    """
    full = _full(logits.dtype)
    top = torch.maximum(top, logits.amax(1).to(full))
    p = (logits.to(full) - top[:, None]).exp_().to(dtype)
    return top, p, p.sum(1, dtype=full)


def _visit(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    gradient: bool = True,
    weigh: Callable[..., tuple[Tensor, Tensor, Tensor]] = _weigh,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), log normaliser, d log p(y) / d h): (N,), (N,), (N, H).

    Args:
        h: (N, H).
        weight: (V, H), of the same dtype.
        targets: (N,).
        gradient: Whether the last is asked for; it is empty otherwise.
        weigh: Takes a tile's sums.
    """
    full = _full(h.dtype)
    rows, columns = tile_shape(len(weight))
    log_norms, means = [], []
    for block in h.split(rows):
        top = block.new_full((len(block),), -torch.inf, dtype=full)
        total = torch.zeros_like(top)
        mean = torch.zeros(block.shape if gradient else (0,), dtype=full, device=h.device)
        for part in weight.split(columns):
            highest, p, tile_total = weigh(block @ part.T, top, h.dtype)
            shrink = (top - highest).exp()
            total = total * shrink + tile_total
            if gradient:
                mean.mul_(shrink[:, None]).add_(p @ part)
            top = highest
            del p  # before the next tile comes
        log_norms.append(top + total.log())
        means.append(mean / total[:, None] if gradient else mean)
    target, log_norm = weight[targets].to(full), torch.cat(log_norms)
    log_prob = (h.to(full) * target).sum(1) - log_norm
    by_h = (target - torch.cat(means)).to(h.dtype) if gradient else h.new_empty(0)
    return log_prob, log_norm, by_h


def _visit_again(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor
) -> Tensor:
    """sum_n grad_n (1[v = y_n] - p_nv) h_n for every vocabulary entry v, (V, H)."""
    full = _full(h.dtype)
    rows, columns = tile_shape(len(weight))
    by_weight = torch.zeros(weight.shape, dtype=full, device=weight.device)
    by_weight.index_add_(0, targets, grad[:, None].to(full) * h.to(full))
    parts = zip(grad.split(rows), h.split(rows), log_norm.split(rows), strict=True)
    for g, block, norm in parts:
        for part, out in zip(weight.split(columns), by_weight.split(columns), strict=True):
            p = (block @ part.T).to(full).sub_(norm[:, None]).exp_().mul_(g[:, None])
            out.sub_(p.to(h.dtype).T @ block)
    return by_weight.to(weight.dtype)


@cache
def _weigh_compiled() -> Any:
    """`_weigh` as one pass over the tile."""
    return compiled_function(_weigh)


@torch.library.custom_op("ltm_pyro::visit_tiles", mutates_args=())
def _visit_compiled(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_visit` inside a compiled graph."""
    return _visit(h, weight, targets, weigh=_weigh_compiled())


@_visit_compiled.register_fake
def _(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = h.new_empty((len(h),), dtype=_full(h.dtype))
    return sums, torch.empty_like(sums), torch.empty_like(h)


@torch.library.custom_op("ltm_pyro::visit_tiles_again", mutates_args=())
def _visit_again_compiled(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor
) -> Tensor:
    """`_visit_again` inside a compiled graph."""
    return _visit_again(grad, h, weight, targets, log_norm)


@_visit_again_compiled.register_fake
def _(grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor) -> Tensor:
    return torch.empty_like(weight)
