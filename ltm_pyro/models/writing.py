"""The decoder one position at a time, for writing text: same numbers, little besides the products.

A step is a few matrix-vector products per layer, so what surrounds them decides its cost. Weights
are taken out of their modules once per text, rotary angles come in stretches, and each row's
thoughts, which stay, have been projected before (see `CrossAttention`).

Shapes: B rows, H width, K_l thoughts of a layer, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltm_pyro.models.layers import DecoderLayer, rotary_angles, rotate

STRETCH = 256
"""Positions whose rotary angles are computed at once."""

LARGE = 2**20
"""Weights of a decoder from which on the nearest caches do not hold them from step to step."""

Turn = tuple[Tensor, Tensor]
"""Cosines (3, 1, 1, head_dim / 2) and signed sines (3, 1, 2, head_dim / 2) of one position."""


def arrange(weight: Tensor, halved: bool) -> Tensor:
    """The weight (M, N) as `product` takes it; halved, a view of it (2, M / 2, N).

    For one row, MKL's matrix-vector product waits for memory where the weights do not fit into the
    cache; as two products in a batch it reads them about twice as fast (15 instead of 7 GB/s on two
    cores of an AMD EPYC).
    """
    if not halved or len(weight) % 2:
        return weight
    return weight.view(2, len(weight) // 2, -1)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)`, (B, N) to (B, M), for a weight from `arrange`."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return torch.bmm(weight, x.T.expand(2, -1, 1)).view(1, -1)


class Norm:
    """`nn.RMSNorm` of (..., H), taken out of its module."""

    __slots__ = ("eps", "floor", "gain", "long_gain", "shape")

    def __init__(self, norm: nn.RMSNorm) -> None:
        self.gain, self.shape, self.eps = norm.weight, norm.normalized_shape, norm.eps
        width = self.gain.numel()
        eps = torch.finfo(self.gain.dtype).eps if norm.eps is None else norm.eps
        # h / sqrt(|h|^2 / H + eps) = sqrt(H) h / hypot(|h|, sqrt(H eps)): on the CPU half the time
        # of torch's own, which is made of small operations. Half precision needs its upcasts.
        self.long_gain = self.gain * width**0.5 if self.gain.dtype.itemsize >= 4 else None
        self.floor = self.gain.new_tensor((width * eps) ** 0.5)

    def __call__(self, h: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        if self.long_gain is None or not h.is_cpu:
            return F.rms_norm(h, self.shape, self.gain, self.eps)
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        return (h / torch.hypot(length, self.floor)).mul_(self.long_gain)


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
        thoughts: Its projected thoughts (2, B, heads * K_l, H).
        size: W, positions remembered.
        halved: How weights are multiplied, see `arrange`.
    """

    __slots__ = (
        "down", "gate_up", "heads", "key_value", "keys", "norm_cross", "norm_mlp", "norm_self",
        "out", "qkv", "reads", "ring", "size", "values", "width", "writes",
    )  # fmt: skip

    def __init__(self, layer: DecoderLayer, thoughts: Tensor, size: int, halved: bool) -> None:
        attention = layer.self_attention
        self.heads = attention.n_heads
        self.width = attention.out.in_features
        self.key_value = attention.qkv.weight[self.width :]
        self.qkv, self.out, self.gate_up, self.down = (
            arrange(linear.weight, halved)
            for linear in (attention.qkv, attention.out, layer.mlp.gate_up, layer.mlp.down)
        )
        self.norm_self, self.norm_cross = Norm(layer.norm_self), Norm(layer.norm_cross)
        self.norm_mlp = Norm(layer.norm_mlp)
        keys, self.writes = thoughts
        self.reads = keys.transpose(1, 2)
        self.size = size
        shape = (len(keys), 2, self.heads, size, self.width // self.heads)
        self.ring = thoughts.new_zeros(shape)
        self.keys, self.values = self.ring.unbind(1)

    def remember(self, h: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """Fills the ring from positions 0..P-1 at once.

        Args:
            h: (B, P, H), the layer's input.
            angles: Rotary angles of these positions, each (P, head_dim / 2).
        """
        length = h.shape[1]
        last = max(0, length - self.size)
        kv = F.linear(self.norm_self(h[:, last:]), self.key_value)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k = rotate(k, (angles[0][last:], angles[1][last:]))
        slots = torch.arange(last, length, device=h.device) % self.size
        # Under autocast the products come in another dtype than the ring's.
        self.keys[:, :, slots] = k.to(self.ring.dtype)
        self.values[:, :, slots] = v.to(self.ring.dtype)

    def step(self, h: Tensor, turn: Turn, t: int) -> Tensor:
        """Position `t` through the layer, (B, H) to (B, H)."""
        h = h + product(self._attend(self.norm_self(h), turn, t), self.out)
        h = self._think(h)
        gate, up = product(self.norm_mlp(h), self.gate_up).chunk(2, dim=-1)
        return h + product(F.silu(gate).mul_(up), self.down)

    def _attend(self, h: Tensor, turn: Turn, t: int) -> Tensor:
        rows, size = len(h), self.size
        qkv = product(h, self.qkv).view(rows, 3, self.heads, 2, -1)
        cos, sin = turn
        turned = (qkv * cos).addcmul_(qkv.flip(3), sin).view(rows, 3, self.heads, 1, -1)
        q, k, v = turned.unbind(1)
        keys, values, slot = self.keys, self.values, t % size
        keys.narrow(2, slot, 1).copy_(k)
        values.narrow(2, slot, 1).copy_(v)
        if t + 1 < size:
            # Until the ring is full only its first t + 1 places are filled; their order is
            # immaterial, because the keys carry their positions.
            keys, values = keys[:, :, : t + 1], values[:, :, : t + 1]
        return F.scaled_dot_product_attention(q, keys, values).reshape(rows, self.width)

    def _think(self, h: Tensor) -> Tensor:
        rows = len(h)
        scores = torch.bmm(self.norm_cross(h).unsqueeze(1), self.reads)
        shares = scores.view(rows, self.heads, -1).softmax(-1).view(rows, 1, -1)
        return torch.baddbmm(h.unsqueeze(1), shares, self.writes).squeeze(1)
