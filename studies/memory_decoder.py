"""A small text decoder with a memory that is written by surprise while it reads.

Behrouz, Zhong, Mirrokni (2024), Titans, arXiv 2501.00663, with a linear memory M (d, d), as a layer
before the windowed attention (their "memory as a layer", section 4.3). At position t, from the
tokens up to there:

    k_t, v_t, q_t = convolved projections of the embedding, k and q of length 1     section 4.4
    loss          = |M k_t - v_t|^2 / 2 at M_{t-1}                                  eq. 12
    S_t = eta_t S_{t-1} - theta_t (M k_t - v_t) k_t'      surprise, with momentum   eq. 10
    M_t = (1 - alpha_t) M_{t-1} + S_t                     forgetting                eq. 13
    read = W_out M_t q_t                                                            eq. 15

theta, eta and alpha are sigmoids of the embedding. Of a linear memory the gradients inside a chunk
of positions solve a triangular system, so that the recurrence is followed exactly and what is
inside a chunk is matrix products. (Section 3.2 takes all of a chunk's gradients at the M that it
begins with; where a text repeats a token, that overshoots.) Shapes: B rows, T positions, H width, d
size of the memory, C positions of a chunk, n chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltm_pyro as ltm
from ltm_pyro.engine.kernels.kv_cache import CachedDecoder
from ltm_pyro.engine.kernels.likelihood import token_log_prob
from ltm_pyro.models.decoder import Decoder

CHUNK = 16
"""Positions that are computed at once; it changes nothing but the time."""
TAPS = 4
"""Positions that a convolution sees."""
OFF = 60.0
"""A gate that is closed has the logit -OFF."""
ARMS = ("memory", "no surprise", "same gates", "no forgetting", "no momentum")
"""The whole memory, or without a part of it."""


class State(NamedTuple):
    """What is kept of a stream: M and S (B, d, d), and for the convolutions the last projections.

    These are (B, TAPS - 1, 3 d).
    """

    memory: Tensor
    momentum: Tensor
    before: Tensor


class SurpriseMemory(nn.Module):
    """What M_t holds of a text, (B, T, H) embeddings to (B, T, H).

    Args:
        width: H.
        size: The size d.
        arm: One of `ARMS`. "no surprise" writes v_t k_t' whatever M holds already; "same gates" has
            gates that learn, but do not see the text.
    """

    def __init__(self, width: int, size: int, arm: str = "memory") -> None:
        super().__init__()
        self.arm, self.size = arm, size
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, 3 * size, bias=False)
        self.taps = nn.Parameter(torch.zeros(TAPS, 3 * size))
        self.gates = nn.Linear(width, 3)
        self.out = nn.Linear(size, width, bias=False)
        with torch.no_grad():
            # At first M goes from a token to the one after it, and is written and kept by halves.
            key, value, query = self.taps.chunk(3, 1)
            key[1], value[0], query[0] = 1.0, 1.0, 1.0
            same, _, as_well = self.project.weight.chunk(3)
            as_well.copy_(same)
            self.gates.weight.zero_()
            self.gates.bias.copy_(torch.tensor([0.0, -2.0, -4.0]))
        self.gates.weight.requires_grad_(arm != "same gates")

    def empty(self, like: Tensor) -> State:
        """Of a text that has not begun, for rows as those of `like` (B, T, H)."""
        zero = like.new_zeros(len(like), self.size, self.size)
        return State(zero, zero, like.new_zeros(len(like), TAPS - 1, 3 * self.size))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What is read at each position, (B, T, H), and the state after the last."""
        length, state = x.shape[1], self.empty(x) if state is None else state
        x = self.norm(x)
        flat = torch.cat([state.before, self.project(x)], 1)
        mixed = sum(
            tap * flat[:, TAPS - 1 - i : TAPS - 1 - i + length] for i, tap in enumerate(self.taps)
        )
        key, value, query = mixed.chunk(3, -1)
        theta, eta, alpha = self.gates(x).unbind(-1)
        if self.arm == "no forgetting":
            alpha = torch.full_like(alpha, -OFF)
        if self.arm == "no momentum":
            eta = torch.full_like(eta, -OFF)
        pad = -length % CHUNK
        k, v, q = (
            F.pad(a, (0, 0, 0, pad)).unflatten(1, (-1, CHUNK))
            for a in (_unit(key), value, _unit(query))
        )
        write, hold, keep = (
            F.pad(a, (0, pad)).unflatten(1, (-1, CHUNK))
            for a in (theta.sigmoid(), F.logsigmoid(eta), F.logsigmoid(-alpha))
        )
        last = (length - 1) % CHUNK
        read, memory, momentum = self._scan(k, v, q, (write, hold, keep), state, last)
        after = State(memory, momentum, flat[:, -(TAPS - 1) :])
        return self.out(read[:, :length]), after

    def _scan(
        self,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        gates: tuple[Tensor, Tensor, Tensor],
        state: State,
        last: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reads (B, n C, d), M and S after position `last` of the last chunk.

        Keys, values and queries are (B, n, C, d); gates (B, n, C): theta, log eta, log (1 - alpha).

        Inside a chunk, with products of gates after s up to t in matrices E (eta) and F (1 - alpha)
        and U_s the gradient at s: S_t = e_t S_0 - (E theta U)_t and M_t = f_t M_0 + (F S)_t. What
        M_{t-1} holds of k_t makes U_t, so (I + L) U is known, with L strictly lower.
        """
        write, hold, keep = gates
        held, kept = _products(hold), _products(keep)
        start_s, start_m = hold.cumsum(-1).exp(), keep.cumsum(-1).exp()
        through = kept @ held * write[..., None, :]
        of_s = (kept @ start_s[..., None]).squeeze(-1)
        near = through * (q @ k.mT)  # what s wrote, as t reads it
        own = F.pad(through[..., :-1, :], (0, 0, 1, 0)) * (k @ k.mT)
        eye = torch.eye(CHUNK, dtype=k.dtype, device=k.device)
        solve = torch.linalg.solve_triangular(eye + own, eye, upper=False, unitriangular=True)
        before_m, before_s = (
            F.pad(start_m[..., :-1], (1, 0), value=1.0),
            F.pad(of_s[..., :-1], (1, 0)),
        )
        memory, momentum, reads = state.memory, state.momentum, []
        for c in range(k.shape[1]):
            error = -v[:, c]
            if self.arm != "no surprise":
                held_before = _held(k[:, c], before_m[:, c], memory, before_s[:, c], momentum)
                error = solve[:, c] @ (error + held_before)
            read = _held(q[:, c], start_m[:, c], memory, of_s[:, c], momentum)
            reads.append(read - near[:, c] @ error)
            t = last if c == k.shape[1] - 1 else CHUNK - 1
            memory = (
                start_m[:, c, t, None, None] * memory
                + of_s[:, c, t, None, None] * momentum
                - error.mT @ (through[:, c, t, :, None] * k[:, c])
            )
            momentum = start_s[:, c, t, None, None] * momentum - error.mT @ (
                (held[:, c, t] * write[:, c])[..., None] * k[:, c]
            )
        return torch.cat(reads, 1), memory, momentum


def _held(x: Tensor, of_m: Tensor, memory: Tensor, of_s: Tensor, momentum: Tensor) -> Tensor:
    """What M and S hold of x (B, C, d), by shares of each (B, C): (B, C, d)."""
    return of_m[..., None] * (x @ memory.mT) + of_s[..., None] * (x @ momentum.mT)


def _unit(x: Tensor) -> Tensor:
    """Of length 1, or less near 0, where there is no direction."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-2).rsqrt()


def _products(log_gates: Tensor) -> Tensor:
    """Products of gates after s up to t, (..., C) logs to (..., C, C) at [t, s]; 0 for s > t."""
    upto = log_gates.cumsum(-1)
    # Of sums, and not of the gates' quotients, of which small ones would be lost.
    apart = upto[..., :, None] - upto[..., None, :]
    later = torch.ones(apart.shape[-2:], dtype=torch.bool, device=apart.device).triu(1)
    return apart.masked_fill(later, -torch.inf).exp()


class Reread(CachedDecoder):
    """Generation without a cache: each step reads the whole text again."""

    def __init__(self, decoder: Decoder, z: Tensor) -> None:
        super().__init__(decoder, z)
        self.z, self.tokens = z, torch.empty(len(z), 0, dtype=torch.long, device=z.device)

    def read(self, tokens: Tensor) -> None:
        """Takes in the first P tokens (B, P); the last comes again with `step`."""
        self.tokens = tokens[:, :-1]

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """Logits of the next token, (B, V)."""
        if previous is not None:
            self.tokens = torch.cat([self.tokens, previous[:, None]], 1)
        out: Tensor = self.decoder.logits(F.pad(self.tokens, (0, 1)), self.z)[:, -1]
        return out


class MemoryDecoder(Decoder):
    """A `Decoder` whose embeddings have what the memory holds added to them."""

    def __init__(self, config: ltm.ModelConfig, size: int, arm: str) -> None:
        super().__init__(config)
        self.memory = SurpriseMemory(config.width, size, arm)

    def embed(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Of BOS and all tokens but the last, with the memory of all before: (B, T) to (B, T, H).

        Tokens that are not read are not remembered either.
        """
        read = super().embed(tokens, hidden)
        return read + self.memory(read)[0]

    def start(self, z: Tensor) -> CachedDecoder:
        """For generating B rows guided by z (B, K, D)."""
        return Reread(self, z)

    @torch.no_grad()
    def stream(self, segments: Iterable[Tensor]) -> Iterator[Tensor]:
        """Log p of each token given all before it, at z = 0: segments (B, T) to (B, T) each.

        The same as in one pass. Between segments stay the memory's state, and as many embeddings as
        the attention of all layers reaches back; so any number of them takes the same room.
        """
        config, state, before = self.config, None, None
        reach = config.n_layers * (config.window - 1)
        last: Tensor | None = None
        for tokens in segments:
            if last is None:
                new = super().embed(tokens)
            else:
                new = super().embed(torch.cat([last, tokens], 1))[:, 1:]
            read, state = self.memory(new, state)
            new = new + read
            whole = new if before is None else torch.cat([before, new], 1)
            z = new.new_zeros(len(new), config.n_thoughts, config.thought_dim)
            h = self.above(self._trunk(whole), z)[:, -tokens.shape[1] :]
            scores = token_log_prob(h.flatten(0, 1), self.embedding.weight, tokens.flatten())
            before, last = whole[:, whole.shape[1] - min(reach, whole.shape[1]) :], tokens[:, -1:]
            yield scores.view_as(tokens)


def remember(model: ltm.LatentThoughtModel, size: int, arm: str) -> ltm.LatentThoughtModel:
    """The model itself, with a memory put below its decoder's layers.

    Args:
        model: Its other weights stay.
        size: The size d.
        arm: One of `ARMS`.
    """
    weights: dict[str, Any] = model.decoder.state_dict()
    model.decoder = MemoryDecoder(model.config, size, arm)
    model.decoder.load_state_dict(weights, strict=False)
    model.scoring = type(model.scoring)(model.decoder)
    return model
