"""log softmax(h E^T)[y] for many positions, without keeping the (N, V) logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25
"""Logits held at once, 128 MB in float32: beyond it positions are scored chunk by chunk."""


def _chunk_log_prob(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(h @ weight.T, targets, reduction="none")


def token_log_prob(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log probability of each target, in nats.

    Args:
        h: (N, H) hidden states.
        weight: (V, H) output embedding.
        targets: (N,) int64 in 0..V-1, at padded positions too.

    Returns:
        (N,) log probabilities. Memory beyond one chunk of logits does not grow with V, forward or
        backward: each chunk's logits are computed again when its gradient is needed.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if len(h) <= rows:
        return _chunk_log_prob(h, weight, targets)
    parts = zip(h.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [checkpoint(_chunk_log_prob, a, weight, b, use_reentrant=False) for a, b in parts]
    )
