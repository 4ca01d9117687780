"""The language model written as plainly as can be: a Pyro program with one site per token.

It shares nothing with `ltm_pyro.models` but the weights. Attention has a full T x T mask and
separate projections for queries, keys and values; all logits stand in memory and are normalised;
every token is a `Categorical` of its own. Padded positions are masked by Pyro.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.models.latent_thought import LatentThoughtModel


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, T, H) to (B, heads, T, head_dim)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _turned(x: Tensor) -> Tensor:
    """Rotary positions: the pair (i, i + half) of position t turned by t * 10000^(-2i/head_dim)."""
    length, head_dim = x.shape[-2:]
    half = head_dim // 2
    rate = 10000.0 ** (-2.0 * torch.arange(half, dtype=torch.float32) / head_dim)
    angle = (torch.arange(length, dtype=torch.float32)[:, None] * rate).to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def _mix(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = torch.where(visible, scores, torch.tensor(-math.inf, dtype=scores.dtype))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


class ReferenceModel:
    """`LatentThoughtModel` with a standard normal prior, from its weights.

    Args:
        model: Has the weights; gradients flow to them.
    """

    def __init__(self, model: LatentThoughtModel) -> None:
        self.config = model.config
        self.weights = dict(model.named_parameters())

    def logits(self, tokens: Tensor, z: Tensor) -> Tensor:
        """(B, T) and (B, K, D) to (B, T, V)."""
        config, w = self.config, {k.removeprefix("decoder."): p for k, p in self.weights.items()}
        rows, length = tokens.shape
        embedding = w["embedding.weight"]
        bos = w["bos"].expand(rows, 1, -1)
        h = torch.cat((bos, embedding[tokens[:, :-1]]), 1)
        query, key = torch.arange(length)[:, None], torch.arange(length)
        visible = (key <= query) & (key > query - config.window)
        blocks = z.split(config.thoughts_per_layer, 1)
        for layer, thoughts in enumerate(blocks):
            name = f"layers.{layer}"
            x = _norm(h, w[f"{name}.norm_self.weight"])
            q, k, v = (
                _heads(x @ part.T, config.n_heads)
                for part in w[f"{name}.self_attention.qkv.weight"].chunk(3)
            )
            mixed = _mix(_turned(q), _turned(k), v, visible)
            h = h + mixed @ w[f"{name}.self_attention.out.weight"].T
            x = _norm(h, w[f"{name}.norm_cross.weight"])
            q = _heads(x @ w[f"{name}.cross_attention.query.weight"].T, config.n_heads)
            k, v = (
                _heads(thoughts @ part.T, config.n_heads)
                for part in w[f"{name}.cross_attention.key_value.weight"].chunk(2)
            )
            h = h + _mix(q, k, v) @ w[f"{name}.cross_attention.out.weight"].T
            x = _norm(h, w[f"{name}.norm_mlp.weight"])
            gate, up = (x @ part.T for part in w[f"{name}.mlp.gate_up.weight"].chunk(2))
            h = h + (gate / (1 + (-gate).exp()) * up) @ w[f"{name}.mlp.down.weight"].T
        return _norm(h, w["norm.weight"]) @ embedding.T

    def __call__(self, batch: Batch) -> None:
        """The generative story, observed: z in the plate of sequences, then each token."""
        config, tokens = self.config, batch.observed
        zero = self.weights["decoder.bos"].new_zeros(config.n_thoughts, config.thought_dim)
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(zero, 1.0 + zero).to_event(2))
            log_prob = self.logits(tokens, z).log_softmax(-1)
            for t in range(tokens.shape[1]):
                with pyro.poutine.mask(mask=batch.mask[:, t]):
                    pyro.sample(f"x_{t}", dist.Categorical(logits=log_prob[:, t]), obs=tokens[:, t])
