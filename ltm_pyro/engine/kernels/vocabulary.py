"""Log softmax(h E^T)[y] for many positions, whatever the size of the vocabulary.

An (N, V) tensor of logits is never held: rows are visited in chunks, and one visit serves the value
and the gradient by h, since with p = softmax(h E^T)

    log p(y)          =  h . E[y] - log sum_v exp(h . E[v])
    d log p(y) / d h  =  E[y] - sum_v p_v E[v]

The gradient by E needs p, so it visits the rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MOST_LOGITS = 2**21
"""Logits held at once: 8 MB in float32, so that they stay in or near the cache."""


def _full(like: Tensor) -> torch.dtype:
    """Of sums and exponentials."""
    return torch.promote_types(like.dtype, torch.float32)


def _chunks(h: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, MOST_LOGITS // len(weight))
    return [slice(i, i + size) for i in range(0, len(h), size)]


def _logits(h: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """The product h weight^T, in the same memory each time: fresh memory is slow to touch."""
    shape = len(h), len(weight)
    room = memory if memory.numel() >= shape[0] * shape[1] else h.new_empty(shape[0] * shape[1])
    return torch.mm(h, weight.T, out=room[: shape[0] * shape[1]].view(shape))


@torch.library.custom_op("ltm_pyro::token_log_prob", mutates_args=())
def by_chunks(
    h: Tensor, weight: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), log normaliser, d log p(y) / d h): (N,), (N,), (N, H); the last empty if unasked.

    An operator, because a compiler would unroll the chunks and hold the logits of all.
    """
    log_prob, log_norm = (h.new_empty(len(h), dtype=_full(h)) for _ in range(2))
    by_h = h.new_empty(h.shape if gradient else 0)
    memory = h.new_empty(min(MOST_LOGITS, h.shape[0] * weight.shape[0]))
    for rows in _chunks(h, weight):
        logits = _logits(h[rows], weight, memory)
        full, target = logits.to(_full(h)), targets[rows, None]
        of_target, top = full.gather(1, target), full.amax(1, keepdim=True)
        p = full.sub_(top).exp_()
        total = p.sum(1, keepdim=True)
        norm = top + total.log()
        log_norm[rows], log_prob[rows] = norm[:, 0], (of_target - norm)[:, 0]
        if gradient:
            mean = (p.to(weight.dtype) @ weight).to(p.dtype).div_(total)
            by_h[rows] = weight[target[:, 0]] - mean
    return log_prob, log_norm, by_h


@by_chunks.register_fake
def _(h: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    sums = h.new_empty(len(h), dtype=_full(h))
    return sums, torch.empty_like(sums), h.new_empty(h.shape if gradient else 0)


@torch.library.custom_op("ltm_pyro::token_log_prob_by_weight", mutates_args=())
def _by_weight(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor
) -> Tensor:
    """sum_n grad_n (1[v = y_n] - p_nv) h_n for every vocabulary entry v, (V, H)."""
    weighted = grad[:, None] * h.to(grad.dtype)
    out = torch.zeros_like(weight, dtype=grad.dtype).index_add_(0, targets, weighted)
    memory = h.new_empty(min(MOST_LOGITS, h.shape[0] * weight.shape[0]))
    for rows in _chunks(h, weight):
        logits = _logits(h[rows], weight, memory).to(grad.dtype)
        p = logits.sub_(log_norm[rows, None]).exp_().to(h.dtype)
        out.sub_(p.T @ weighted[rows].to(h.dtype))
    return out.to(weight.dtype)


@_by_weight.register_fake
def _(grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, log_norm: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Any) -> None:
    h, weight, targets, _ = inputs
    _, log_norm, by_h = output
    ctx.save_for_backward(h, weight, targets, log_norm, by_h)


def _backward(
    ctx: Any, grad: Tensor, *_: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None]:
    h, weight, targets, log_norm, gradient = ctx.saved_tensors
    by_h = grad[:, None].to(h.dtype) * gradient if ctx.needs_input_grad[0] else None
    by_weight = _by_weight(grad, h, weight, targets, log_norm) if ctx.needs_input_grad[1] else None
    return by_h, by_weight, None, None


by_chunks.register_autograd(_backward, setup_context=_keep)


@register_flop_formula([torch.ops.ltm_pyro.token_log_prob])
def _flops(h: Sequence[int], weight: Sequence[int], targets: Any, gradient: bool, **_: Any) -> int:
    """For `torch.utils.flop_counter`."""
    return (2 if gradient else 1) * 2 * h[0] * h[1] * weight[0]


@register_flop_formula([torch.ops.ltm_pyro.token_log_prob_by_weight])
def _flops_by_weight(grad: Any, h: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 2 * h[0] * h[1] * weight[0]
