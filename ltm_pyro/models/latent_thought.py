"""The latent-thought language model as a Pyro program (Kong et al. 2025, arXiv 2502.01567).

    z_i        ~ prior                                    (K, D), block l feeds decoder layer l
    x_i | z_i  ~ prod_t Categorical(decoder(x_<t, z_i))   x_0 is BOS, so every token is scored

The length of a sequence is given, not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.func import functional_call

from ltm_pyro.capacity import refuse_too_large
from ltm_pyro.config import ModelConfig, Precision, preset
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.exclusive import exclusively
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel, sequences
from ltm_pyro.models.compiled import CompiledScore, Score, bucket_length
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.likelihood import TokenSequence
from ltm_pyro.models.priors import ThoughtPrior, build_prior


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

    def select(self, index: Tensor | slice) -> HiddenInputs:
        """The rows at `index`, in that order."""
        return self._with(super().select(index), self.hidden[index])

    @staticmethod
    def _with(batch: Batch, hidden: Tensor) -> HiddenInputs:
        return HiddenInputs(**batch.plain_fields(), hidden=hidden)


class LatentThoughtModel(LatentModel):
    """Prior and decoder, called as a Pyro model with sites `z` and `x`.

    Args:
        config: Shapes, and which prior.

    Example:
        >>> model = LatentThoughtModel.from_preset("nano", vocab_size=256)
        >>> tokens = model()  # runs forward: one sequence, (1, T)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        refuse_too_large(
            f"a model of {config.n_weights:,} weights", 4 * config.n_weights, "choose a smaller one"
        )
        with exclusively():  # weights are drawn
            # The decoder first: its initial weights are then the same under every prior.
            self.decoder = Decoder(config)
            self.thought_prior: ThoughtPrior = build_prior(
                config.prior, config.n_thoughts, config.thought_dim, **config.prior_options
            )
        self._fast_score: Score = self._score_by
        self._slow_score: Score | None = None
        self._precision: Precision = "fp32"
        self._in_halves = False

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LatentThoughtModel:
        """A freshly initialised model.

        Args:
            name: `nano`, `tiny`, `ltm-small`, `ltm-medium` or `ltm-large`.
            **overrides: Fields of `ModelConfig`, above all `vocab_size`.

        Raises:
            InputError: for an unknown preset or a field out of range.
        """
        base = preset(name).model
        unknown = set(overrides) - set(base.__dataclass_fields__)
        if unknown:
            raise unknown_name("model setting", sorted(unknown)[0], base.__dataclass_fields__)
        return cls(replace(base, **overrides))

    @property
    def thought_shape(self) -> tuple[int, int]:
        """(K, D)."""
        return self.config.n_thoughts, self.config.thought_dim

    @property
    def n_layers(self) -> int:
        """L: block l of the thoughts feeds decoder layer l."""
        return self.config.n_layers

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.decoder.bos.device

    def prior(self) -> TorchDistribution:
        """p(z) of one sequence: event shape (K, D)."""
        prior: TorchDistribution = self.thought_prior()
        return prior

    def forward(
        self, batch: Batch | None = None, *, size: int = 1, length: int | None = None
    ) -> Tensor:
        """The generative story.

        Args:
            batch: Sequences to condition on. Without `x` (`batch.unobserved()`), or `None`, the
                program runs forward and writes them.
            size: B when there is no batch.
            length: T when there is no batch; the model's `seq_len` by default.

        Returns:
            Tokens (B, T).
        """
        if batch is None:
            shape = (size, length or self.config.seq_len)
            batch = Batch(None, torch.ones(shape, dtype=torch.bool, device=self.device))
        with sequences(batch):
            z = pyro.sample(SITE_Z, self.prior())
            x: Tensor = pyro.sample(SITE_X, self.likelihood(z, batch), obs=batch.x)
        return x

    def likelihood(self, z: Tensor, batch: Batch) -> TokenSequence:
        """p(x | z) for thoughts (..., B, K, D): batch shape (..., B), event shape (T,)."""

        def score(tokens: Tensor, thoughts: Tensor) -> Tensor:
            return self._score(tokens, thoughts, batch)

        return TokenSequence(self.decoder, score, z, batch.mask.shape[1])

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x | z) in nats, z (..., B, K, D) to (..., B)."""
        return self._score(batch.observed, z, batch)

    def _score(self, tokens: Tensor, z: Tensor, batch: Batch) -> Tensor:
        """`log_likelihood` of any tokens under the batch's mask, (..., B)."""
        n = len(batch)
        learning = torch.is_grad_enabled() and self.decoder.bos.requires_grad
        if not (self._in_halves and learning and n > 1 and tokens is batch.x):
            return self._score_rows(tokens, z, batch)
        halves = [(batch.select(rows), rows) for rows in (slice(0, n // 2), slice(n // 2, n))]
        # The embedding is read at both ends. Through a view of its own each half adds up its two
        # gradients first, as a process does before it sends their sum.
        table = self.decoder.embedding.weight
        return torch.cat(
            [
                self._score_rows(half.observed, z[..., rows, :, :], half, table.view_as(table))
                for half, rows in halves
            ],
            dim=-1,
        )

    def _score_rows(
        self, tokens: Tensor, z: Tensor, batch: Batch, table: Tensor | None = None
    ) -> Tensor:
        """`_score` of rows taken together; flattens leading dims.

        `table` (V, H) is read in place of the embedding's weight, where weights learn.
        """
        lead = z.shape[:-2]
        rows = z.reshape(-1, *z.shape[-2:])
        learning = torch.is_grad_enabled() and self.decoder.bos.requires_grad
        if learning and self._slow_score is not None and len(lead) == 1 and tokens is batch.x:
            hidden = batch.hidden if isinstance(batch, HiddenInputs) else None
            with self._autocast():
                embedded = self.decoder.embed(tokens, hidden, table)
                return self._slow_score(embedded, tokens, batch.mask, rows, table=table)
        # Only the fast loop differentiates by thoughts alone; one compiled graph serves just that.
        only_thoughts = z.requires_grad and not self.decoder.bos.requires_grad
        scorer = self._fast_score if only_thoughts else self._score_by
        mask = batch.mask
        weights: Mapping[str, Tensor] = {}
        if isinstance(batch, PreparedBatch) and tokens is batch.x:
            trunk, weights = batch.trunk, batch.weights
        else:
            shown = batch if tokens is batch.x else None
            trunk = self._trunk(tokens.reshape(-1, tokens.shape[-1]), shown, table)
            trunk = trunk.view(*tokens.shape, -1)
        if len(lead) > 1:
            trunk = trunk.expand(*lead, *trunk.shape[-2:]).flatten(0, -3)
            tokens, mask = (
                a.expand(*lead, a.shape[-1]).reshape(-1, a.shape[-1]) for a in (tokens, mask)
            )
        with self._autocast():
            return scorer(trunk, tokens, mask, rows, weights=weights, table=table).view(lead)

    def _score_by(
        self,
        trunk: Tensor,
        tokens: Tensor,
        mask: Tensor,
        z: Tensor,
        *,
        weights: Mapping[str, Tensor],
        table: Tensor | None,
    ) -> Tensor:
        """`Decoder.score` with some weights replaced."""
        if not weights:
            return self.decoder.score(trunk, tokens, mask, z, table)
        score: Tensor = functional_call(self.decoder, dict(weights), (trunk, tokens, mask, z))
        return score

    @contextmanager
    def computing(
        self,
        precision: Precision = "fp32",
        checkpointing: bool = False,
        in_halves: bool = False,
    ) -> Iterator[None]:
        """Inside the block the decoder computes in this way.

        Args:
            precision: Of matrix products. With `bf16` weights, thoughts, residuals, norms, sums and
                log probabilities stay in their own precision; so do prior, guide and KL, which the
                decoder has no part in.
            checkpointing: Where weights learn, keep the inputs of layers alone and compute the rest
                again in the backward pass: less memory, a third more work in the slow step.
            in_halves: Where weights learn, take the two halves of a batch one after the other, so
                that the sums in their gradients round as those of two processes do.
        """
        before = self._precision, self.decoder.checkpointing, self._in_halves
        self._precision, self.decoder.checkpointing = precision, checkpointing
        self._in_halves = in_halves
        try:
            yield
        finally:
            self._precision, self.decoder.checkpointing, self._in_halves = before

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """The batch with the part below the first cross-attention computed once.

        Columns that are padding in every row are left out, up to the next bucket's length.
        """
        length = bucket_length(batch)
        trunk = self._trunk(batch.observed[:, :length], batch)
        cut = {"x": batch.observed[:, :length], "mask": batch.mask[:, :length]}
        with self._autocast():
            weights = self.decoder.frozen_weights()
        return PreparedBatch(**{**batch.plain_fields(), **cut}, trunk=trunk, weights=weights)

    def _trunk(self, tokens: Tensor, batch: Batch | None, table: Tensor | None = None) -> Tensor:
        """The decoder's trunk, with the inputs hidden that `batch` hides."""
        hidden = batch.hidden[:, : tokens.shape[1]] if isinstance(batch, HiddenInputs) else None
        with self._autocast():
            return self.decoder.trunk(tokens, hidden, table)

    def hide_inputs(self, batch: Batch, hidden: Tensor) -> Batch:
        """The same sequences, of which the decoder reads no token where `hidden` (B, T) is true.

        Every token is still scored.
        """
        return HiddenInputs(**batch.plain_fields(), hidden=hidden)

    def check(self, batch: Batch) -> None:
        """Refuses tokens that the decoder has no row for, and sequences that are too long.

        Raises:
            InputError: naming what does not fit.
        """
        x = batch.observed
        if x.is_floating_point():
            raise InputError("this batch holds real numbers, the model needs token ids (int64)")
        if x.shape[1] > self.config.seq_len:
            raise InputError(
                f"sequences of {x.shape[1]} tokens: the model takes at most {self.config.seq_len}"
            )
        top = int(x.max()) if x.numel() else 0
        if top >= self.config.vocab_size or (x.numel() and int(x.min()) < 0):
            raise InputError(
                f"token id {top} is outside the model's vocabulary of {self.config.vocab_size}: "
                "build the model with vocab_size=corpus.vocab_size"
            )

    def compile_fast_loop(self) -> None:
        """Compiles the likelihood where the two clocks call it; falls back, with a warning.

        Two graphs for a shape: thoughts learning with the weights frozen, called T_fast times, and
        weights learning. Scores and simulations stay uncompiled.
        """
        if not isinstance(self._fast_score, CompiledScore):
            self._fast_score = CompiledScore(self._score_by)
            self._slow_score = CompiledScore(self.decoder.score_embedded)
