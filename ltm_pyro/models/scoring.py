"""How log p(x | z) of the language model is computed: with frozen weights, or with learning ones.

A fast loop asks for it T_fast times with weights and tokens that stay. Whatever does not depend on
z is then computed once (`prepare`): the decoder up to its first cross-attention, and its matrices
in the precision and the layout of their products. A slow step learns weights, and needs everything.
Both may be compiled, each as a graph of its own; scores and simulations stay uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from ltm_pyro.config import Precision
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.kernels.compiled import CompiledScore, Score, bucket_length
from ltm_pyro.models.decoder import Decoder


@dataclass(frozen=True)
class PreparedBatch(Batch):
    """A batch with what the fast loop shares between its steps; valid while the weights stay.

    T may be shorter than in the batch it was made from: columns that no row fills are cut off.

    Attributes:
        trunk: The decoder's trunk (B, T, H).
        weights: Matrices of the decoder by name, in the precision of its products and arranged for
            them; the others are the decoder's own.
    """

    trunk: Tensor = None  # type: ignore[assignment]
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class HiddenInputs(Batch):
    """A batch whose decoder inputs are in part hidden: true in `hidden` (B, T), nothing read."""

    hidden: Tensor = None  # type: ignore[assignment]

    def to(self, device: torch.device | str) -> HiddenInputs:
        """The same batch on another device."""
        return self._with(super().to(device), self.hidden.to(device))

    def select(self, index: Tensor | slice | Sequence[int]) -> HiddenInputs:
        """The rows at `index`, in that order."""
        return self._with(super().select(index), self.hidden[index])

    @staticmethod
    def _with(batch: Batch, hidden: Tensor) -> HiddenInputs:
        return HiddenInputs(**batch.plain_fields(), hidden=hidden)


class Scoring:
    """Log p(x | z) by a decoder.

    Args:
        decoder: The decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.precision: Precision = "fp32"
        self._frozen: Score = self._score
        self._learning: Score | None = None

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

    def __call__(self, tokens: Tensor, z: Tensor, batch: Batch) -> Tensor:
        """Log p of any tokens (B, T) under the batch's mask, z (..., B, K, D) to (..., B)."""
        own = tokens is batch.x  # what else the batch knows is about these
        if self.decoder.learning and self._learning is not None and own and z.dim() == 3:
            with self._autocast():
                embedded = self.decoder.embed(tokens, _hidden(batch))
                return self._learning(embedded, tokens, batch.mask, z)
        prepared = batch if isinstance(batch, PreparedBatch) and own else None
        if prepared is None:
            with self._autocast():
                flat = tokens.reshape(-1, tokens.shape[-1])
                trunk = self.decoder.trunk(flat, _hidden(batch) if own else None)
            trunk = trunk.view(*tokens.shape, -1)
        else:
            trunk = prepared.trunk
        lead, mask = z.shape[:-2], batch.mask
        if len(lead) > 1:
            trunk = trunk.expand(*lead, *trunk.shape[-2:]).flatten(0, -3)
            tokens, mask = (
                a.expand(*lead, a.shape[-1]).reshape(-1, a.shape[-1]) for a in (tokens, mask)
            )
        # Only a fast loop differentiates by thoughts alone; one compiled graph serves just that.
        score = self._frozen if z.requires_grad and not self.decoder.learning else self._score
        weights = {} if prepared is None else prepared.weights
        with self._autocast():
            rows = z.reshape(-1, *z.shape[-2:])
            return score(trunk, tokens, mask, rows, weights=weights).view(lead)

    def _score(
        self,
        trunk: Tensor,
        tokens: Tensor,
        mask: Tensor,
        z: Tensor,
        *,
        weights: Mapping[str, Tensor],
    ) -> Tensor:
        """`Decoder.score` with some weights replaced."""
        if not weights:
            return self.decoder.score(trunk, tokens, mask, z)
        score: Tensor = functional_call(self.decoder, dict(weights), (trunk, tokens, mask, z))
        return score

    @torch.no_grad()
    def prepare(self, batch: Batch) -> PreparedBatch:
        """The batch with the part below the first cross-attention computed once.

        Columns that are padding in every row are left out, up to the next bucket's length.
        """
        length = bucket_length(batch)
        hidden = _hidden(batch)
        cut = {"x": batch.observed[:, :length], "mask": batch.mask[:, :length]}
        with self._autocast():
            trunk = self.decoder.trunk(cut["x"], None if hidden is None else hidden[:, :length])
            weights = self.decoder.frozen_weights()
        return PreparedBatch(**{**batch.plain_fields(), **cut}, trunk=trunk, weights=weights)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.decoder.bos.device.type, dtype=torch.bfloat16)


def _hidden(batch: Batch) -> Tensor | None:
    return batch.hidden if isinstance(batch, HiddenInputs) else None
