"""Parts of the decoder. Shapes: B rows, T positions, H width, D thought width, K_l thoughts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltm_pyro.engine.kernels.prepack import linear

SMALL_BLOCK, LARGE_BLOCK = 16, 64
"""Queries per attention block: fewer make slow, small matrix products, more are masked in vain."""


def block_shape(window: int, length: int) -> tuple[int, int, int]:
    """(number of blocks, queries per block, keys per block) of attention over a sliding window."""
    if window >= length:
        return 1, length, length
    block = max(window, min(max(2 * window, SMALL_BLOCK), LARGE_BLOCK))
    return -(-length // block), block, block + window


def fused(window: int, length: int) -> bool:
    """Whether torch's fused attention serves a window; small blocks are faster without."""
    return window >= length or window > LARGE_BLOCK


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


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, its sums in single precision at least."""
    full = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=full).to(scores.dtype)


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
    n_blocks, block, span = block_shape(window, length)
    q, k, v = (
        F.pad(a, (0, 0, 0, n_blocks * block - length)).view(rows, heads, n_blocks, block, head_dim)
        for a in (q, k, v)
    )
    keys, values = (_with_reach(a, span - block) for a in (k, v))
    visible = _visible(n_blocks, block, window, q.device)
    if fused(window, length):
        out = _fused_blocks(q, keys, values, visible)
    else:
        scores = (q @ keys.transpose(-1, -2) * head_dim**-0.5).masked_fill(~visible, -torch.inf)
        out = softmax(scores) @ values
    return out.reshape(rows, heads, n_blocks * block, head_dim)[:, :, :length]


def _with_reach(blocks: Tensor, reach: int) -> Tensor:
    """Each block with the last `reach` positions of the one before it put in front.

    (B, heads, n_blocks, positions, head_dim). Before the first block are zeros. Slices are cheaper
    to differentiate than overlapping views of one tensor, whose gradient is scattered.
    """
    before = F.pad(blocks[:, :, :-1, -reach:], (0, 0, 0, 0, 1, 0))
    return torch.cat((before, blocks), dim=-2)


def _visible(n_blocks: int, block: int, window: int, device: torch.device) -> Tensor:
    """Which of its keys each query of a block sees, (n_blocks, block, keys per block) bool."""
    key = torch.arange(block + window, device=device)
    offset = key - torch.arange(block, device=device)[:, None]
    start = torch.arange(n_blocks, device=device)[:, None, None] * block
    return (offset >= 1) & (offset <= window) & (start + key >= window)


def _fused_blocks(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Fused attention inside each block: (B, heads, n_blocks, queries or keys, head_dim) each."""
    rows, _, n_blocks, *_ = queries.shape
    q, k, v = (a.transpose(1, 2).flatten(0, 1) for a in (queries, keys, values))
    mask = visible.repeat(rows, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(0, (rows, n_blocks)).transpose(1, 2)


class Projection(nn.Linear):
    """A linear map without bias; quicker where its weight is frozen and prepacked."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return linear(x, self.weight)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention over a sliding window, with rotary positions."""

    def __init__(self, width: int, n_heads: int, window: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.window = window
        self.qkv = Projection(width, 3 * width)
        self.out = Projection(width, width)

    def heads(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, T, H), each (B, heads, T, head_dim)."""
        rows, length, _ = h.shape
        q, k, v = self.qkv(h).view(rows, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        return rotate(q, angles), rotate(k, angles), v

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        mixed = windowed_attention(*self.heads(h, angles), self.window)
        return self.out(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from every position to the K_l thought vectors of this layer.

    Without biases: z = 0 gives keys and values of zero, so the layer then adds nothing and the
    decoder is exactly the autoregressive model without thoughts.

    There are few thoughts and many positions, so the projections of the positions are taken to the
    thoughts instead: head a scores position t against thought j by

        (W_q,a h_t) . k_a,j  =  h_t . (W_q,a^T k_a,j)

    and what the heads put out is summed after W_out, which is applied to the values. Products
    H x H per position become products H x (heads * K_l); the function is the same.
    """

    def __init__(self, width: int, n_heads: int, thought_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(thought_dim, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, z: Tensor) -> Tensor:
        """What positions meet of the thoughts (B, K_l, D): (2, B, heads * K_l, H).

        First the scaled keys W_q,a^T k_a,j, then the values W_out,a v_a,j.
        """
        rows, thoughts, _ = z.shape
        key, value = self.key_value(z).view(rows, thoughts, 2, self.n_heads, -1).unbind(2)
        head_dim = key.shape[-1]
        query = self.query.weight.view(self.n_heads, head_dim, -1)
        out = self.out.weight.view(-1, self.n_heads, head_dim)
        keys = torch.einsum("bjad,adh->bajh", key * head_dim**-0.5, query)
        values = torch.einsum("bjad,had->bajh", value, out)
        return torch.stack((keys.flatten(1, 2), values.flatten(1, 2)))

    def forward(self, h: Tensor, thoughts: Tensor) -> Tensor:
        """(B, T, H) and projected thoughts to (B, T, H)."""
        keys, values = thoughts
        scores = (h @ keys.transpose(-1, -2)).unflatten(-1, (self.n_heads, -1))
        return softmax(scores).flatten(-2) @ values


class SwiGLU(nn.Module):
    """Gated feed-forward block (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Projection(width, 2 * hidden)
        self.down = Projection(hidden, width)

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

    def forward(self, h: Tensor, angles: tuple[Tensor, Tensor], thoughts: Tensor) -> Tensor:
        """The whole layer, (B, T, H) to (B, T, H)."""
        return self.think(self.attend(h, angles), thoughts)

    def think(self, h: Tensor, thoughts: Tensor) -> Tensor:
        """Cross-attention to projected thoughts and SwiGLU, (B, T, H) to (B, T, H)."""
        h = h + self.cross_attention(self.norm_cross(h), thoughts)
        return h + self.mlp(self.norm_mlp(h))
