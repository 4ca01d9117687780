"""Parts of the decoder. Shapes: B rows, T positions, H width, D thought width, K_l thoughts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
"""Queries per attention block at least: smaller blocks make slow, small matrix products."""


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, eq. 34).

    Args:
        positions: (T,) positions counted from 0.
        head_dim: Width of one attention head, even.

    Returns:
        Two tensors (T, head_dim / 2).
    """
    rates = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * torch.pow(10000.0, -rates)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of dimensions of `x` (..., T, head_dim) by its position's angle."""
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention in which a position sees itself and the `window - 1` before it.

    Queries are cut into blocks, and each block meets only the keys that it can see, so time and
    memory grow with T * window and not with T * T.

    Args:
        q: Queries (B, heads, T, head_dim); `k` and `v` likewise.
        k: Keys.
        v: Values.
        window: Positions seen, at least 1.

    Returns:
        (B, heads, T, head_dim).
    """
    rows, heads, length, head_dim = q.shape
    if window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if window == 1:
        return v
    block = max(window, BLOCK)
    n_blocks = -(-length // block)
    reach = window - 1
    pad = n_blocks * block - length
    span = block + reach
    queries = F.pad(q, (0, 0, 0, pad)).view(rows, heads, n_blocks, block, head_dim)
    # Each block's keys are its own and the `reach` before it: overlapping stretches of one tensor.
    keys = F.pad(k, (0, 0, reach, pad)).unfold(2, span, block).transpose(-1, -2)
    values = F.pad(v, (0, 0, reach, pad)).unfold(2, span, block).transpose(-1, -2)
    offset = torch.arange(span, device=q.device) - torch.arange(block, device=q.device)[:, None]
    visible = (offset >= 0) & (offset <= reach)
    start = torch.arange(n_blocks, device=q.device)[:, None, None] * block
    visible = visible & (start + torch.arange(span, device=q.device) >= reach)
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2).reshape(rows * n_blocks, heads, block, head_dim),
        keys.transpose(1, 2).reshape(rows * n_blocks, heads, span, head_dim),
        values.transpose(1, 2).reshape(rows * n_blocks, heads, span, head_dim),
        attn_mask=visible.repeat(rows, 1, 1)[:, None],
    )
    out = out.view(rows, n_blocks, heads, block, head_dim).transpose(1, 2)
    return out.reshape(rows, heads, n_blocks * block, head_dim)[:, :, :length]


class SelfAttention(nn.Module):
    """Multi-head causal self-attention over a sliding window, with rotary positions."""

    def __init__(self, width: int, n_heads: int, window: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, _ = h.shape
        q, k, v = self.qkv(h).view(rows, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        q, k, v = self._heads(h)
        mixed = windowed_attention(rotate(q, angles), rotate(k, angles), v, self.window)
        return self.out(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from every position to the K_l thought vectors of this layer.

    Without biases: z = 0 gives keys and values of zero, so the layer then adds nothing and the
    decoder is exactly the autoregressive model without thoughts.
    """

    def __init__(self, width: int, n_heads: int, thought_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(thought_dim, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, z: Tensor) -> Tensor:
        """Keys and values of the thoughts (B, K_l, D): (2, B, heads, K_l, head_dim)."""
        rows, thoughts, _ = z.shape
        kv: Tensor = self.key_value(z).view(rows, thoughts, 2, self.n_heads, -1)
        return kv.permute(2, 0, 3, 1, 4)

    def forward(self, h: Tensor, key_value: Tensor) -> Tensor:
        """(B, T, H) and projected thoughts to (B, T, H)."""
        rows, length, _ = h.shape
        q = self.query(h).view(rows, length, self.n_heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, key_value[0], key_value[1])
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward block (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to thoughts, SwiGLU; each after RMSNorm, each residual."""

    def __init__(
        self, width: int, n_heads: int, mlp_hidden: int, window: int, thought_dim: int
    ) -> None:
        super().__init__()
        self.norm_self = nn.RMSNorm(width)
        self.self_attention = SelfAttention(width, n_heads, window)
        self.norm_cross = nn.RMSNorm(width)
        self.cross_attention = CrossAttention(width, n_heads, thought_dim)
        self.norm_mlp = nn.RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_hidden)

    def attend(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The part below cross-attention, (B, T, H) to (B, T, H): it does not depend on z."""
        return h + self.self_attention(self.norm_self(h), angles)

    def think(self, h: Tensor, key_value: Tensor) -> Tensor:
        """Cross-attention and SwiGLU, (B, T, H) to (B, T, H)."""
        h = h + self.cross_attention(self.norm_cross(h), key_value)
        return h + self.mlp(self.norm_mlp(h))
