"""The decoder p(x | z): a Transformer that reads thoughts by cross-attention in every layer.

    h = embed(BOS, x_1 .. x_{T-1})
    for layer l:  h += self-attention(window);  h += cross-attention(z block l);  h += SwiGLU
    x_t | x_<t, z ~ Categorical(softmax(norm(h_t) . embedding))

Kong et al. (2025), section 3.1. A plain `nn.Module`: which weights learn is the business of the
clocks in `inference`, not of the network.

Shapes: B rows, T positions, H width, D thought width, K_l thoughts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltm_pyro.config import ModelConfig
from ltm_pyro.engine.kernels.kv_cache import CachedDecoder
from ltm_pyro.engine.kernels.likelihood import Projection, token_log_prob

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
    """Cosines and sines, (T, head_dim / 2) each, of rotary embeddings (Su et al. 2021, eq. 34).

    Args:
        positions: (T,) counted from 0.
        head_dim: Width of one attention head, even.
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

    Queries `q`, keys `k`, values `v` and what comes out are (B, heads, T, head_dim) each.
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


class Decoder(nn.Module):
    """Causal decoder over V tokens, guided by K = L * K_l thoughts of D dimensions.

    Attributes:
        checkpointing: While weights learn, keep the layers' inputs alone for the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.bos = nn.Parameter(torch.empty(config.width))
        self.layers = nn.ModuleList(
            DecoderLayer(
                config.width, config.n_heads, config.mlp_hidden, config.window, config.thought_dim
            )
            for _ in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(config.width)
        self.checkpointing = False
        positions = torch.arange(config.seq_len)
        self.cosines: Tensor
        self.sines: Tensor
        cosines, sines = rotary_angles(positions, config.width // config.n_heads)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale-aware start: unit variance through products, residual branches shrunk by depth.

        Cross-attention's output projection starts at zero, so the first slow steps train the
        autoregressive model and thoughts enter as they become useful.
        """
        config = self.config
        # Tied weights serve as input and as output: rows of unit length make the first logits O(1)
        # and let the layers' contributions, not the token just read, fill the residual stream.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        nn.init.normal_(self.bos, std=config.width**-0.5)
        branches = 3 * config.n_layers
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
            for residual in (layer.self_attention.out, layer.mlp.down):
                with torch.no_grad():
                    residual.weight.mul_(branches**-0.5)
            nn.init.zeros_(layer.cross_attention.out.weight)

    def _blocks(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of the first positions; kept, or compiled code would make them anew."""
        return self.cosines[:length], self.sines[:length]

    @property
    def learning(self) -> bool:
        """Whether a gradient is asked for by any weight."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def embed(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Inputs for positions 1..T: BOS, then all tokens but the last; (B, T) to (B, T, H).

        Where `hidden` (B, T) is true the next position reads BOS instead of the token: a vector of
        the right size that tells nothing. Zeros would meet the norms at their singular point.
        """
        start = torch.arange(tokens.shape[1], device=tokens.device) == 0
        if hidden is not None:
            start = start | hidden.roll(1, dims=1)
        read = self.embedding(tokens.roll(1, dims=1))
        return torch.where(start[..., None], self.bos, read)

    def trunk(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Everything below the first cross-attention, (B, T) to (B, T, H); free of z."""
        return self._trunk(self.embed(tokens, hidden))

    def _trunk(self, embedded: Tensor) -> Tensor:
        return self._blocks()[0].attend(embedded, self._angles(embedded.shape[1]))

    def thought_keys(self, z: Tensor) -> list[Tensor]:
        """Per layer, its block of thoughts as positions meet it; z is (B, K, D)."""
        blocks = z.unflatten(1, (self.config.n_layers, self.config.thoughts_per_layer))
        return [
            layer.cross_attention.project(blocks[:, i]) for i, layer in enumerate(self._blocks())
        ]

    def above(self, trunk: Tensor, z: Tensor) -> Tensor:
        """From the first cross-attention to the final norm: (B, T, H), (B, K, D) to (B, T, H)."""
        h = trunk
        angles = self._angles(trunk.shape[1])
        recompute = self.checkpointing and self.learning
        first, *others = zip(self._blocks(), self.thought_keys(z), strict=True)
        calls: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = [(first[0].think, first[1:])]
        calls += [(layer, (angles, thoughts)) for layer, thoughts in others]
        for layer, inputs in calls:
            h = (
                checkpoint(layer, h, *inputs, use_reentrant=False)
                if recompute
                else layer(h, *inputs)
            )
        return self.norm(h)

    def logits(self, tokens: Tensor, z: Tensor) -> Tensor:
        """All logits, (B, T) and (B, K, D) to (B, T, V): the plain reference, for short texts."""
        return self.above(self.trunk(tokens), z) @ self.embedding.weight.T

    def score(self, trunk: Tensor, tokens: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """Log p(x | z) per row, (B,), in nats, without ever holding all logits.

        Args:
            trunk: `self.trunk(tokens)`, (B, T, H).
            tokens: (B, T).
            mask: (B, T) bool; only true positions count.
            z: (B, K, D).
        """
        return torch.where(mask, self.score_tokens(trunk, tokens, z), 0.0).sum(-1)

    def score_tokens(self, trunk: Tensor, tokens: Tensor, z: Tensor) -> Tensor:
        """Log p of each token given those before it and z, (B, T)."""
        h = self.above(trunk, z)
        log_prob = token_log_prob(h.flatten(0, 1), self.embedding.weight, tokens.flatten())
        return log_prob.view_as(tokens)

    forward = score
    """So that `torch.func.functional_call` can score with other weights."""

    def score_embedded(self, embedded: Tensor, tokens: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """`score` from `self.embed(tokens)` on, (B,), as a slow step compiles it.

        The embedding itself stays uncompiled: a compiler adds up its gradient in whatever order
        threads come, and two runs would no longer agree to the bit.
        """
        return self.score(self._trunk(embedded), tokens, mask, z)

    def start(self, z: Tensor) -> CachedDecoder:
        """An empty KV cache for generating B rows guided by z (B, K, D)."""
        return CachedDecoder(self, z)

    def read(self, tokens: Tensor, state: CachedDecoder) -> None:
        """Takes in the first tokens (B, P) of a fresh cache in one parallel pass."""
        state.read(tokens)

    def step(self, previous: Tensor | None, state: CachedDecoder) -> Tensor:
        """Logits of the next token, (B, V); `previous` (B,) is the one before, `None` for BOS."""
        return state.step(previous)
