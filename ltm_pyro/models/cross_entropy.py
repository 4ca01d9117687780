"""log softmax(h E^T)[y] for many positions, without ever holding an (N, V) tensor of logits.

The logits are visited in tiles of positions x vocabulary. One visit serves the value and the
gradient by h, since with p = softmax(h E^T)

    log p(y)          =  h . E[y] - log sum_v exp(h . E[v])
    d log p(y) / d h  =  E[y] - sum_v p_v E[v]

and both sums can be kept up tile by tile against a running maximum, as the attention of Dao et al.
(2022, arXiv 2205.14135) does with keys. The gradient by E needs p, so it visits the tiles again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 2**23
"""Logits held at once: 32 MB in float32, so that a tile stays in or near the cache."""
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
    blocks = [_visit(a, weight, y, gradient=False) for a, y in _rows(h, targets, len(weight))]
    return torch.cat([log_prob for log_prob, _, _ in blocks])


class _TokenLogProb(torch.autograd.Function):
    """`token_log_prob` with its gradient by h made on the way, and by `weight` when needed."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        blocks = [_visit(a, weight, y, gradient=True) for a, y in _rows(h, targets, len(weight))]
        log_prob, log_norm, gradient = (torch.cat(part) for part in zip(*blocks, strict=True))
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
        by_weight = _weight_gradient(grad, *rest) if ctx.needs_input_grad[1] else None
        return by_h, by_weight, None


def _rows(h: Tensor, targets: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows, _ = tile_shape(vocab_size)
    return zip(h.split(rows), targets.split(rows), strict=True)


def _visit(
    h: Tensor, weight: Tensor, targets: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), log normaliser, d log p(y) / d h) of one tile's positions, (N,), (N,), (N, H).

    Without `gradient` the last is empty.
    """
    full = torch.promote_types(h.dtype, torch.float32)
    _, columns = tile_shape(len(weight))
    top = total = mean = None
    for part in weight.split(columns):
        logits = (h @ part.T).to(full)
        highest = logits.amax(1) if top is None else torch.maximum(top, logits.amax(1))
        # Summed as rounded, so that the weights of the mean sum to one whatever the precision.
        # In place: a tile is the largest thing that a fast step holds.
        p = logits.sub_(highest[:, None]).exp_().to(h.dtype)
        del logits
        tile_total = p.sum(1, dtype=full)
        tile_mean = (p @ part).to(full) if gradient else h[:0]
        if top is None or total is None or mean is None:
            total, mean = tile_total, tile_mean
        else:
            shrink = (top - highest).exp()
            total = total * shrink + tile_total
            mean = mean * shrink[:, None] + tile_mean if gradient else mean
        top = highest
        del p  # before the next tile comes
    assert top is not None
    assert total is not None
    assert mean is not None
    target = weight[targets].to(full)
    log_norm = top + total.log()
    log_prob = (h.to(full) * target).sum(1) - log_norm
    if gradient:
        mean = (target - mean / total[:, None]).to(h.dtype)
    return log_prob, log_norm, mean


def _weight_gradient(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor
) -> Tensor:
    """sum_n grad_n (1[v = y_n] - p_nv) h_n for every vocabulary entry v, (V, H)."""
    full = torch.promote_types(h.dtype, torch.float32)
    rows, columns = tile_shape(len(weight))
    by_weight = torch.zeros(weight.shape, dtype=full, device=weight.device)
    by_weight.index_add_(0, targets, grad[:, None].to(full) * h.to(full))
    parts = zip(grad.split(rows), h.split(rows), log_norm.split(rows), strict=True)
    for g, a, norm in parts:
        for start in range(0, len(weight), columns):
            part = weight[start : start + columns]
            p = (a @ part.T).to(full).sub_(norm[:, None]).exp_().mul_(g[:, None])
            by_weight[start : start + columns] -= (p.to(h.dtype).T @ a).to(full)
            del p
    return by_weight.to(weight.dtype)
