"""The decoder one position at a time, for writing text: same numbers, little besides the products.

A step is a few matrix-vector products per layer, so what surrounds them decides its cost. Weights
are taken out of their modules once per text, rotary angles come in stretches, and each row's
thoughts are fixed for the whole text, so that cross-attention's query and output projections are
multiplied into their keys and values beforehand:

    score_k = (W_q norm(h)) . key_k = norm(h) . (W_q^T key_k)
    sum_k p_k W_o value_k            = sum_k p_k (W_o value_k)

Two products with (H, H) matrices become two with (heads * K_l, H) ones.

Shapes: B rows, H width, K_l thoughts of a layer, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltm_pyro.models.layers import DecoderLayer, rotary_angles

STRETCH = 256
"""Positions whose rotary angles are computed at once."""

Turn = tuple[Tensor, Tensor]
"""Cosines (3, 1, 1, head_dim / 2) and signed sines (3, 1, 2, head_dim / 2) of one position."""


class Norm:
    """`nn.RMSNorm` of (..., H), taken out of its module."""

    __slots__ = ("eps", "gain", "shape")

    def __init__(self, norm: nn.RMSNorm) -> None:
        self.gain = norm.weight
        self.shape = norm.normalized_shape
        self.eps = norm.eps

    def __call__(self, h: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        return F.rms_norm(h, self.shape, self.gain, self.eps)


class Turns:
    """Rotary angles of queries, keys and values at once; values are turned by an angle of zero."""

    __slots__ = ("cos", "device", "dtype", "head_dim", "sin", "start")

    def __init__(self, head_dim: int, like: Tensor) -> None:
        self.head_dim = head_dim
        self.device, self.dtype = like.device, like.dtype
        self.start = -STRETCH

    def at(self, t: int) -> Turn:
        """The angles of position `t`, counted from 0."""
        index = t - self.start
        if not 0 <= index < STRETCH:
            self._stretch(t)
            index = 0
        return self.cos[index], self.sin[index]

    def _stretch(self, start: int) -> None:
        positions = torch.arange(start, start + STRETCH, device=self.device)
        cos, sin = (a.to(self.dtype) for a in rotary_angles(positions, self.head_dim))
        self.cos = torch.stack((cos, cos, torch.ones_like(cos)), 1)[:, :, None, None]
        signed = torch.stack((-sin, sin), 1)
        self.sin = torch.stack((signed, signed, torch.zeros_like(signed)), 1)[:, :, None]
        self.start = start


class LayerWriter:
    """One decoder layer and its memory of one batch of texts.

    Args:
        layer: The layer.
        thoughts: Its projected thoughts (2, B, heads, K_l, head_dim).
        size: W, positions remembered.
    """

    __slots__ = (
        "down", "gate_up", "heads", "keys", "norm_cross", "norm_mlp", "norm_self", "out", "qkv",
        "reads", "ring", "size", "values", "width", "writes",
    )  # fmt: skip

    def __init__(self, layer: DecoderLayer, thoughts: Tensor, size: int) -> None:
        attention, cross = layer.self_attention, layer.cross_attention
        self.heads = attention.n_heads
        self.width = attention.out.in_features
        self.qkv, self.out = attention.qkv.weight, attention.out.weight.T
        self.gate_up, self.down = layer.mlp.gate_up.weight, layer.mlp.down.weight.T
        self.norm_self, self.norm_cross = Norm(layer.norm_self), Norm(layer.norm_cross)
        self.norm_mlp = Norm(layer.norm_mlp)
        _, rows, heads, _, head_dim = thoughts.shape
        query = cross.query.weight.view(heads, head_dim, self.width)
        out = cross.out.weight.view(self.width, heads, head_dim).permute(1, 2, 0)
        scale = head_dim**-0.5
        # (B, H, heads * K_l) and (B, heads * K_l, H).
        self.reads = (thoughts[0] @ query).mul_(scale).flatten(1, 2).transpose(1, 2)
        self.writes = (thoughts[1] @ out).flatten(1, 2)
        self.size = size
        self.ring = thoughts.new_zeros(rows, 2, heads, size, head_dim)
        self.keys, self.values = self.ring.unbind(1)

    def remember(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """Fills the ring from positions 0..P-1 at once.

        Args:
            h: (B, P, H), the layer's input.
            angles: Rotary angles of these positions, each (P, head_dim / 2).
        """
        length = h.shape[1]
        last = max(0, length - self.size)
        kv = F.linear(self.norm_self(h[:, last:]), self.qkv[self.width :])
        kv = kv.unflatten(-1, (2, self.heads, 2, -1)).permute(0, 2, 3, 1, 4, 5)
        # (B, 2, heads, last positions, 2, head_dim / 2)
        cos, sin = (a[last:].to(h.dtype) for a in angles)
        first, second = kv[:, 0].unbind(-2)
        keys = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
        slots = torch.arange(last, length, device=h.device) % self.size
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = kv[:, 1].flatten(-2)

    def step(self, h: Tensor, turn: Turn, t: int) -> Tensor:
        """Position `t` through the layer, (B, H) to (B, H)."""
        h = self._attend(h, turn, t)
        h = self._think(h)
        gate, up = F.linear(self.norm_mlp(h), self.gate_up).chunk(2, dim=-1)
        return torch.addmm(h, F.silu(gate).mul_(up), self.down)

    def _attend(self, h: Tensor, turn: Turn, t: int) -> Tensor:
        rows, size = len(h), self.size
        qkv = F.linear(self.norm_self(h), self.qkv).view(rows, 3, self.heads, 2, -1)
        cos, sin = turn
        turned = (qkv * cos).addcmul_(qkv.flip(3), sin).flatten(3)
        self.ring[:, :, :, t % size] = turned[:, 1:]
        keys, values = self.keys, self.values
        if t + 1 < size:
            # Until the ring is full only its first t + 1 places are filled; their order is
            # immaterial, because the keys carry their positions.
            keys, values = keys[:, :, : t + 1], values[:, :, : t + 1]
        mixed = F.scaled_dot_product_attention(turned[:, 0].unsqueeze(2), keys, values)
        return torch.addmm(h, mixed.reshape(rows, self.width), self.out)

    def _think(self, h: Tensor) -> Tensor:
        scores = torch.bmm(self.norm_cross(h)[:, None], self.reads)
        shares = scores.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(2)
        return torch.baddbmm(h[:, None], shares, self.writes)[:, 0]
