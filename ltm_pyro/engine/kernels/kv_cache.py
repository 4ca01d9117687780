"""A decoder layer with its KV cache: text one position at a time, little besides the products.

A step is a few matrix-vector products per layer, so what surrounds them decides its cost. Weights
are taken out of their modules once per text, rotary angles come as one table, and each row's
thoughts, which stay, have been projected before (see `CrossAttention`). Same numbers as the layers.

Measured alone (`benchmarks/tricks.py`): a token written by the layers' own modules, with a plain
KV cache, takes 2.1 times as long on `nano` and 2.4 times on `tiny`; in a batch of 8, 1.7 and 1.2.

Shapes: B rows, H width, K_l thoughts of a layer, W window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 2**20
"""Weights of a decoder from which on the nearest caches do not hold them from step to step."""

Angles = tuple[Tensor, Tensor]
"""Cosines (3, 1, 1, head_dim / 2), signed sines (3, 1, 2, head_dim / 2); of a position or of T."""


def halve(weight: Tensor, halved: bool) -> Tensor:
    """The weight (M, N) as `product` takes it; halved, a view of it (2, M / 2, N).

    For one row, MKL's matrix-vector product waits for memory where the weights do not fit into the
    cache; as two products in a batch it reads them about twice as fast (15 instead of 7 GB/s on two
    cores of an AMD EPYC).
    """
    if not halved or len(weight) % 2:
        return weight
    return weight.view(2, len(weight) // 2, -1)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)`, (B, N) to (B, M), for a weight from `halve`."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return torch.bmm(weight, x.T.expand(2, -1, 1)).view(1, -1)


class Norm:
    """`nn.RMSNorm` of (..., H), taken out of its module."""

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


def rotary_table(cos: Tensor, sin: Tensor) -> Angles:
    """Rotary angles, (T, head_dim / 2), of queries, keys and values at once: of values zero."""
    cosines = torch.stack((cos, cos, torch.ones_like(cos)), 1)[:, :, None, None]
    signed = torch.stack((-sin, sin), 1)
    sines = torch.stack((signed, signed, torch.zeros_like(signed)), 1)[:, :, None]
    return cosines, sines


class CachedLayer:
    """One decoder layer and its keys and values of the last W positions of a batch of texts.

    Args:
        layer: A `DecoderLayer`.
        thoughts: Its projected thoughts (2, B, heads * K_l, H).
        size: W, positions remembered.
        halved: How weights are multiplied, see `halve`.
    """

    def __init__(self, layer: Any, thoughts: Tensor, size: int, halved: bool) -> None:
        attention = layer.self_attention
        self.heads = attention.n_heads
        self.width = attention.out.in_features
        self.qkv, self.out, self.gate_up, self.down = (
            halve(linear.weight, halved)
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

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Takes in the keys and values of positions 0..P-1, each (B, heads, P, head_dim)."""
        length = k.shape[2]
        last = max(0, length - self.size)
        slots = torch.arange(last, length, device=k.device) % self.size
        # Under autocast the products come in another dtype than the ring's.
        self.keys[:, :, slots] = k[:, :, last:].to(self.ring.dtype)
        self.values[:, :, slots] = v[:, :, last:].to(self.ring.dtype)

    def step(self, h: Tensor, angles: Angles, t: int) -> Tensor:
        """Position `t` through the layer, (B, H) to (B, H)."""
        h = h + product(self._attend(self.norm_self(h), angles, t), self.out)
        h = self._think(h)
        gate, up = product(self.norm_mlp(h), self.gate_up).chunk(2, dim=-1)
        return h + product(F.silu(gate).mul_(up), self.down)

    def _attend(self, h: Tensor, angles: Angles, t: int) -> Tensor:
        rows, size = len(h), self.size
        qkv = product(h, self.qkv).view(rows, 3, self.heads, 2, -1)
        cos, sin = angles
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


class CachedDecoder:
    """What generation keeps between positions; valid while the decoder's weights stay.

    Args:
        decoder: A `Decoder`.
        z: (B, K, D).

    Attributes:
        t: The next position.
    """

    @torch.no_grad()
    def __init__(self, decoder: Any, z: Tensor) -> None:
        self.decoder, self.t = decoder, 0
        self.thoughts = decoder.thought_keys(z)
        large = sum(p.numel() for p in decoder.parameters()) >= LARGE
        halved = large and len(z) == 1 and z.is_cpu
        size = min(decoder.config.window, decoder.config.seq_len)
        blocks = zip(decoder.layers, self.thoughts, strict=True)
        self.layers = [CachedLayer(layer, kv, size, halved) for layer, kv in blocks]
        self.norm, self.output = Norm(decoder.norm), halve(decoder.embedding.weight, halved)
        self.angles = rotary_table(decoder.cosines.to(z.dtype), decoder.sines.to(z.dtype))

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Takes in the first P tokens (B, P) in one parallel pass, at `t` = 0.

        The logits of the token after them are `step(tokens[:, -1])`, as if `step` had been called P
        times before.
        """
        decoder, self.t = self.decoder, tokens.shape[1]
        h, angles = decoder.embed(tokens), (decoder.cosines[: self.t], decoder.sines[: self.t])
        for i, layer in enumerate(decoder.layers):
            keys_values = layer.self_attention.heads(layer.norm_self(h), angles)[1:]
            self.layers[i].fill(*keys_values)
            if i + 1 < len(self.layers):  # what the last layer would pass on is not asked for
                h = layer.think(layer.attend(h, angles), self.thoughts[i])

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """Logits of the next token, (B, V); `previous` (B,) is the one before, `None` for BOS."""
        if previous is None:
            h = self.decoder.bos.expand(self.thoughts[0].shape[1], -1)
        else:
            h = F.embedding(previous, self.decoder.embedding.weight)
        cosines, sines = self.angles
        angles = cosines[self.t], sines[self.t]
        for layer in self.layers:
            h = layer.step(h, angles, self.t)
        self.t += 1
        return product(self.norm(h), self.output)
