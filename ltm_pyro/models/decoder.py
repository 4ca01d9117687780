"""The decoder p(x | z): a Transformer that reads thoughts by cross-attention in every layer.

    h = embed(BOS, x_1 .. x_{T-1})
    for layer l:  h += self-attention(window);  h += cross-attention(z block l);  h += SwiGLU
    x_t | x_<t, z ~ Categorical(softmax(norm(h_t) . embedding))

Kong et al. (2025), section 3.1. A plain `nn.Module`: which weights learn is the business of the
clocks in `inference`, not of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from ltm_pyro.config import ModelConfig, Precision
from ltm_pyro.engine.kernels.compiled import CompiledScore, Score
from ltm_pyro.engine.kernels.cross_entropy import token_log_prob
from ltm_pyro.engine.kernels.kv_cache import LARGE, CachedLayer, Norm, RotaryTable, halve, product
from ltm_pyro.engine.kernels.prepack import can_prepack, prepack
from ltm_pyro.models.layers import DecoderLayer, Projection, rotary_angles


@dataclass
class DecoderState:
    """What generation keeps between positions; valid while the decoder's weights stay.

    Attributes:
        layers: The layers, each with its KV cache.
        norm: The norm after the last layer.
        output: The output embedding, as `product` takes it.
        angles: Of all positions.
        t: The next position.
    """

    thoughts: list[Tensor]
    layers: list[CachedLayer]
    norm: Norm
    output: Tensor
    angles: RotaryTable
    t: int = 0


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
        for name, angles in zip(
            ("cosines", "sines"),
            rotary_angles(positions, config.width // config.n_heads),
            strict=True,
        ):
            self.register_buffer(name, angles, persistent=False)
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
        """Log p(x | z) per row, in nats, without ever holding all logits.

        Args:
            trunk: `self.trunk(tokens)`, (B, T, H).
            tokens: (B, T).
            mask: (B, T) bool; only true positions count.
            z: (B, K, D).

        Returns:
            (B,).
        """
        return torch.where(mask, self.score_tokens(trunk, tokens, z), 0.0).sum(-1)

    def score_tokens(self, trunk: Tensor, tokens: Tensor, z: Tensor) -> Tensor:
        """Log p of each token given those before it and z, (B, T)."""
        h = self.above(trunk, z)
        log_prob = token_log_prob(h.flatten(0, 1), self.embedding.weight, tokens.flatten())
        return log_prob.view_as(tokens)

    def frozen_weights(self) -> dict[str, Tensor]:
        """Matrices that `score` multiplies by, for `functional_call`, while the weights stay.

        They are rounded as autocast would round them, again and again, at every step; those of the
        layers are prepacked.
        """
        device = self.bos.device.type
        low = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if low else self.bos.dtype
        out: dict[str, Tensor] = {}
        if not low and not can_prepack(self.bos):
            return out
        for name, module in self.named_modules():
            if name.startswith("layers.0.self_attention"):  # in the trunk, which is computed
                continue
            if isinstance(module, Projection):
                out[f"{name}.weight"] = prepack(module.weight.to(dtype))
            elif low and isinstance(module, nn.Linear | nn.Embedding):
                out[f"{name}.weight"] = module.weight.detach().to(dtype)
        return out

    forward = score
    """So that `torch.func.functional_call` can score with other weights."""

    def score_embedded(self, embedded: Tensor, tokens: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """`score` from `self.embed(tokens)` on, (B,), as a slow step compiles it.

        The embedding itself stays uncompiled: a compiler adds up its gradient in whatever order
        threads come, and two runs would no longer agree to the bit.
        """
        return self.score(self._trunk(embedded), tokens, mask, z)

    @torch.no_grad()
    def start(self, z: Tensor) -> DecoderState:
        """An empty KV cache for generating B rows guided by z (B, K, D)."""
        size = min(self.config.window, self.config.seq_len)
        thoughts = self.thought_keys(z)
        large = sum(p.numel() for p in self.parameters()) >= LARGE
        halved = large and len(z) == 1 and z.is_cpu
        layers = [
            CachedLayer(layer, kv, size, halved)
            for layer, kv in zip(self._blocks(), thoughts, strict=True)
        ]
        angles = RotaryTable(self.cosines.to(z.dtype), self.sines.to(z.dtype))
        output = halve(self.embedding.weight, halved)
        return DecoderState(thoughts, layers, Norm(self.norm), output, angles)

    @torch.no_grad()
    def read(self, tokens: Tensor, state: DecoderState) -> None:
        """Takes in the first P tokens (B, P) in one parallel pass, at `state.t` = 0.

        The logits of the token after them are `step(tokens[:, -1], state)`, as if `step` had been
        called P times before.
        """
        h = self.embed(tokens)
        angles = self._angles(tokens.shape[1])
        blocks = self._blocks()
        for layer, cached, thoughts in zip(blocks, state.layers, state.thoughts, strict=True):
            cached.fill(*layer.self_attention.heads(layer.norm_self(h), angles)[1:])
            if layer is not blocks[-1]:  # what the last layer would pass on is not asked for
                h = layer.think(layer.attend(h, angles), thoughts)
        state.t = tokens.shape[1]

    @torch.no_grad()
    def step(self, previous: Tensor | None, state: DecoderState) -> Tensor:
        """Logits of the next token, advancing `state` by one position.

        Args:
            previous: (B,) the token before, or `None` at the first position (BOS).
            state: From `start`.

        Returns:
            (B, V).
        """
        if previous is None:
            h = self.bos.expand(state.thoughts[0].shape[1], -1)
        else:
            h = F.embedding(previous, self.embedding.weight)
        angles = state.angles.at(state.t)
        for layer in state.layers:
            h = layer.step(h, angles, state.t)
        state.t += 1
        return product(state.norm(h), state.output)


class Scoring:
    """Log p(x | z) by a decoder, with frozen weights or with learning ones.

    A fast loop asks for it T_fast times with weights and tokens that stay: what does not depend on
    z is then computed once (`prepare`). Both clocks may be compiled, each to a graph of its own;
    scores and simulations stay uncompiled.

    Args:
        decoder: The decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.precision: Precision = "fp32"
        self._frozen: Score = self._score
        self._learning: Score | None = None
        self._weights = WeakTensorKeyDictionary()  # of a trunk, while it lives

    def compile(self) -> None:
        """Compiles the likelihood where the two clocks ask for it; falls back, with a warning."""
        if self._learning is None:
            self._frozen = CompiledScore(self._score)
            self._learning = CompiledScore(self.decoder.score_embedded)

    @contextmanager
    def computing(self, precision: Precision, checkpointing: bool) -> Iterator[None]:
        """Inside the block the decoder computes in this way; see `LatentThoughtModel.computing`."""
        before = self.precision, self.decoder.checkpointing
        self.precision, self.decoder.checkpointing = precision, checkpointing
        try:
            yield
        finally:
            self.precision, self.decoder.checkpointing = before

    @torch.no_grad()
    def prepare(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """The trunk (B, T, H); with it, while it lives, go the matrices in their products' form."""
        with self._autocast():
            trunk = self.decoder.trunk(tokens, hidden)
            self._weights[trunk] = self.decoder.frozen_weights()
        return trunk

    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor,
        z: Tensor,
        hidden: Tensor | None = None,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """Log p(tokens | z) in nats, (..., B).

        Args:
            tokens: (..., B, T).
            mask: (B, T).
            z: (..., B, K, D).
            hidden: (B, T) bool, tokens that are not read.
            trunk: From `prepare`.
        """
        learning, plain = self.decoder.learning, tokens.dim() == 2 and z.dim() == 3
        if learning and self._learning is not None and plain:
            with self._autocast():
                return self._learning(self.decoder.embed(tokens, hidden), tokens, mask, z)
        weights = {} if trunk is None else self._weights.get(trunk, {})
        if trunk is None:
            unread = None if hidden is None else hidden.expand_as(tokens).flatten(0, -2)
            with self._autocast():
                trunk = self.decoder.trunk(tokens.flatten(0, -2), unread)
            trunk = trunk.view(*tokens.shape, -1)
        draws = z.shape[:-2]
        if len(draws) > 1:
            trunk = trunk.expand(*draws, *trunk.shape[-2:]).flatten(0, -3)
            tokens, mask = (a.expand(*draws, a.shape[-1]).flatten(0, -2) for a in (tokens, mask))
        # Only a fast loop differentiates by thoughts alone; one compiled graph serves just that.
        score = self._frozen if z.requires_grad and not learning else self._score
        with self._autocast():
            return score(trunk, tokens, mask, z.flatten(0, -3), weights=weights).view(draws)

    def _score(self, *inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """`Decoder.score` with some weights replaced."""
        if not weights:
            return self.decoder.score(*inputs)
        score: Tensor = functional_call(self.decoder, dict(weights), inputs)
        return score

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.decoder.bos.device.type, dtype=torch.bfloat16)
