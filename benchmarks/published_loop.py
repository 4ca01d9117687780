"""The published algorithm, written out in plain eager PyTorch (Kong et al. 2025, algorithm 1).

    repeat T_fast times:            z = mu + sigma * noise
                                    loss = -log p(x | z; beta) + KL(q || p)
                                    loss.backward(); AdamW on mu and log variance
    once:                           loss.backward(); AdamW on beta

It is written as one would from the paper, and it is the yardstick of `fast_loop.py`. Five things
make it slow, each marked below, and none of them changes a number:

1. `backward()` reaches the decoder's weights too: their gradients are computed at each fast step
   and thrown away.
2. The whole decoder runs at each step, also what lies below the first cross-attention and so cannot
   depend on z.
3. Logits of all positions, (B, T, V), are written to memory, and so is their gradient.
4. A window over T positions is a T x T mask, so attention costs T x T however short the window is.
5. Nothing is fused: each operation reads and writes memory.

The weights are those of a `LatentThoughtModel`, whose log-likelihood is the same function: a test
compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from lean_loop import noise_of
from torch import Tensor, nn

import ltm_pyro as ltm
from ltm_pyro.inference.clocks.schedules import learning_rate
from ltm_pyro.models.decoder import (
    CrossAttention,
    Decoder,
    DecoderLayer,
    SelfAttention,
    SwiGLU,
    rotary_angles,
    rotate,
)
from ltm_pyro.models.priors.standard_normal import StandardNormal
from ltm_pyro.random import Stream, derive_seed

Likelihood = Callable[[Tensor], Tensor]
"""Thoughts (B, K, D) to log p(x | z) in nats, (B,)."""


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: position t sees itself and the `window - 1` before it. Slow thing 4."""
    t = torch.arange(length, device=device)
    distance = t[:, None] - t
    return (distance >= 0) & (distance < window)


def self_attention(
    part: SelfAttention, h: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention over all T positions under a mask, (B, T, H) to (B, T, H)."""
    rows, length, _ = h.shape
    qkv = F.linear(h, part.qkv.weight).view(rows, length, 3, part.n_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = rotate(q, angles), rotate(k, angles)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(mixed.transpose(1, 2).flatten(2), part.out.weight)


def cross_attention(part: CrossAttention, h: Tensor, thoughts: Tensor) -> Tensor:
    """Attention to this layer's thoughts (B, K_l, D), (B, T, H) to (B, T, H)."""
    rows, length, _ = h.shape
    q = F.linear(h, part.query.weight).view(rows, length, part.n_heads, -1).transpose(1, 2)
    kv = F.linear(thoughts, part.key_value.weight).view(rows, -1, 2, part.n_heads, q.shape[-1])
    k, v = kv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return F.linear(mixed.transpose(1, 2).flatten(2), part.out.weight)


def swiglu(part: SwiGLU, h: Tensor) -> Tensor:
    """The gated feed-forward block, (B, T, H) to (B, T, H)."""
    gate, up = F.linear(h, part.gate_up.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, part.down.weight)


def published_likelihood(decoder: Decoder, tokens: Tensor, mask: Tensor) -> Likelihood:
    """Log p(x | z) of fixed tokens as a function of z.

    Args:
        decoder: Gives the weights.
        tokens: (B, T).
        mask: (B, T) bool; only true positions count.

    Returns:
        A function of z (B, K, D). Mask and rotary angles are made once, as buffers would be.
    """
    config = decoder.config
    rows, length = tokens.shape
    visible = window_mask(length, config.window, tokens.device)
    positions = torch.arange(length, device=tokens.device)
    angles = rotary_angles(positions, config.width // config.n_heads)

    def log_likelihood(z: Tensor) -> Tensor:
        h = torch.cat((decoder.bos.expand(rows, 1, -1), decoder.embedding(tokens[:, :-1])), dim=1)
        thoughts = z.unflatten(1, (config.n_layers, config.thoughts_per_layer))
        for i, module in enumerate(decoder.layers):  # Slow thing 2: from the bottom, every time.
            layer = cast("DecoderLayer", module)
            h = h + self_attention(layer.self_attention, layer.norm_self(h), visible, angles)
            h = h + cross_attention(layer.cross_attention, layer.norm_cross(h), thoughts[:, i])
            h = h + swiglu(layer.mlp, layer.norm_mlp(h))
        logits = F.linear(decoder.norm(h), decoder.embedding.weight)  # Slow thing 3: (B, T, V).
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return -torch.where(mask, losses.view(rows, length), 0.0).sum(-1)

    return log_likelihood


class PublishedLoop:
    """Algorithm 1 on the weights of a model, with the call names of `DualRateSVI`.

    Noise, schedules and starts are those that `DualRateSVI` uses with the same seed, so that the
    same optimisation problem is solved.

    Args:
        model: Its decoder is read, and trained by `step`. The KL to a prior that is no standard
            normal is taken on the draw.
        fast: The fast clock.
        slow: The slow clock.
        seed: Of the noise.
        autocast: Run the decoder under bf16 autocast. The published numbers are fp32 eager on the
            CPU; this is the stronger yardstick for bf16 rows.
    """

    def __init__(
        self,
        model: ltm.LatentThoughtModel,
        fast: ltm.Fast,
        slow: ltm.Slow,
        seed: int = 0,
        *,
        autocast: bool = False,
    ) -> None:
        self.model, self.fast, self.slow, self.seed = model, fast, slow, seed
        self.autocast = autocast
        self.slow_step = 0
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() >= 2]},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=slow.lr, betas=slow.betas, weight_decay=slow.weight_decay
        )

    def infer(self, batch: ltm.Batch) -> tuple[Tensor, Tensor]:
        """The fast loop: mean and log variance of q(z), each (B, K, D)."""
        return self._fast_loop(batch, derive_seed(self.seed, Stream.FAST))

    def step(self, batch: ltm.Batch) -> float:
        """The fast loop, then one step of AdamW on the decoder; returns -ELBO per token, nats."""
        mu, log_variance = self._fast_loop(
            batch, derive_seed(self.seed, Stream.FAST, self.slow_step)
        )
        likelihood = published_likelihood(self.model.decoder, batch.observed, batch.mask)
        noise = noise_of(batch, mu, derive_seed(self.seed, Stream.SLOW, self.slow_step), 1)[0]
        loss = self._loss(likelihood, mu, log_variance, noise) / batch.n_tokens.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.slow.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.slow_step += 1
        return float(loss.detach())

    def _fast_loop(self, batch: ltm.Batch, seed: int) -> tuple[Tensor, Tensor]:
        """T_fast steps of AdamW on q's parameters, from the prior."""
        shape = (len(batch), *self.model.thought_shape)
        like = self.model.decoder.bos
        mu, log_variance = (like.new_zeros(shape).requires_grad_() for _ in range(2))
        likelihood = published_likelihood(self.model.decoder, batch.observed, batch.mask)
        optimizer = torch.optim.AdamW(
            [mu, log_variance], lr=self.fast.lr, betas=self.fast.betas, weight_decay=0.0
        )
        fixed = self.fast.noise == "fixed"
        noise = noise_of(batch, mu.detach(), seed, 1 if fixed else self.fast.steps)
        for step in range(self.fast.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.fast, step, self.fast.steps)
            loss = self._loss(likelihood, mu, log_variance, noise[step % len(noise)])
            loss.backward()  # Slow thing 1: gradients of all weights,
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.model.zero_grad(set_to_none=True)  # thrown away.
        return mu.detach(), log_variance.detach()

    def _loss(
        self, likelihood: Likelihood, mu: Tensor, log_variance: Tensor, noise: Tensor
    ) -> Tensor:
        """-ELBO summed over the batch, in nats."""
        z = mu + (0.5 * log_variance).exp() * noise
        with torch.autocast(mu.device.type, torch.bfloat16, enabled=self.autocast):
            log_likelihood = likelihood(z)
        if isinstance(self.model.thought_prior, StandardNormal):
            kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum()
        else:
            log_q = -0.5 * (noise.square() + log_variance + math.log(2 * math.pi)).sum()
            kl = log_q - self.model.prior().log_prob(z).sum()
        return kl - log_likelihood.sum()
