"""The latent-thought language model as a Pyro program (Kong et al. 2025, arXiv 2502.01567).

    z_i        ~ prior                                    (K, D), block l feeds decoder layer l
    x_i | z_i  ~ prod_t Categorical(decoder(x_<t, z_i))   x_0 is BOS, so every token is scored

The length of a sequence is given, not modelled.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import refuse_too_large, whole_number
from ltm_pyro.config import ModelConfig, from_dict, preset, to_dict
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import exclusively
from ltm_pyro.engine.kernels.likelihood import Scored, Scoring
from ltm_pyro.errors import InputError, shown
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel, sequences
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.likelihood import TokenSequence
from ltm_pyro.models.priors import ThoughtPrior, build_prior


class LatentThoughtModel(Scored, LatentModel):
    """Prior and decoder, called as a Pyro model with sites `z` and `x`.

    Args:
        config: Shapes, and which prior.

    Example:
        >>> model = LatentThoughtModel.from_preset("nano", vocab_size=256)
        >>> tokens = model()  # runs forward: one sequence, (1, T)
    """

    def __init__(self, config: ModelConfig) -> None:
        if not isinstance(config, ModelConfig):
            raise InputError(
                f"config is {shown(config)}: must be a ModelConfig, or use from_preset"
            )
        super().__init__()
        self.config, self._thought_shape = config, (config.n_thoughts, config.thought_dim)
        refuse_too_large(
            f"a model of {config.n_weights:,} weights", 4 * config.n_weights, "choose a smaller one"
        )
        with exclusively():  # weights are drawn
            # The decoder first: its initial weights are then the same under every prior.
            self.decoder = Decoder(config)
            self.thought_prior: ThoughtPrior = build_prior(
                config.prior, config.n_thoughts, config.thought_dim, **config.prior_options
            )
        self.scoring = Scoring(self.decoder)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LatentThoughtModel:
        """A freshly initialised model.

        Args:
            name: `nano`, `mixture`, `tiny`, `ltm-small`, `ltm-medium` or `ltm-large`.
            **overrides: Fields of `ModelConfig`, above all `vocab_size`.

        Raises:
            InputError: for an unknown preset or a field out of range.
        """
        return cls(from_dict(ModelConfig, to_dict(preset(name).model) | overrides))

    def _facts(self) -> dict[str, object]:
        """Latents and weights, and the decoder's shape."""
        names = ("n_layers", "width", "window", "vocab_size", "seq_len")
        return super()._facts() | {name: getattr(self.config, name) for name in names}

    @property
    def thought_shape(self) -> tuple[int, int]:
        """(K, D)."""
        return self._thought_shape

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
        return self.thought_prior()

    def forward(
        self, batch: Batch | None = None, *, size: int = 1, length: int | None = None
    ) -> Tensor:
        """The generative story: tokens (B, T).

        Args:
            batch: Sequences to condition on. Without `x` (`batch.unobserved()`), or `None`, the
                program runs forward and writes them.
            size: B when there is no batch.
            length: T when there is no batch; the model's `seq_len` by default.
        """
        batch = self.blank(size, length) if batch is None else batch
        with sequences(batch):
            z = pyro.sample(SITE_Z, self.prior())
            x: Tensor = pyro.sample(SITE_X, self.likelihood(z, batch), obs=batch.x)
        return x

    def blank(self, size: int, length: int | None = None) -> Batch:
        """`size` sequences still to be written, each `length` tokens (T by default)."""
        shape = (
            whole_number("size", size, at_least=1),
            whole_number("length", self.config.seq_len if length is None else length, at_least=1),
        )
        return Batch(None, torch.ones(shape, dtype=torch.bool, device=self.device))

    def likelihood(self, z: Tensor, batch: Batch) -> TokenSequence:
        """p(x | z) for thoughts (..., B, K, D): batch shape (..., B), event shape (T,)."""

        def score(tokens: Tensor, thoughts: Tensor) -> Tensor:
            return self.scoring(batch, thoughts, tokens)

        return TokenSequence(self.decoder, score, z, batch.mask.shape[1])

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x | z) in nats, z (..., B, K, D) to (..., B)."""
        return self.scoring(batch, z)

    def check(self, batch: Batch) -> None:
        """Refuses tokens that the decoder has no row for, and sequences that are too long."""
        x, most = batch.observed, self.config.seq_len
        if x.is_floating_point():
            raise InputError("this batch holds real numbers, the model needs token ids (int64)")
        if x.dim() != 2:
            raise InputError(f"x is {tuple(x.shape)}: must be (B, T); add a batch axis to one text")
        if x.shape[1] > most:
            raise InputError(f"sequences of {x.shape[1]} tokens: the model takes at most {most}")
        for token in (int(x.max()), int(x.min())):
            if not 0 <= token < self.config.vocab_size:
                raise InputError(
                    f"token id {token} is outside the model's vocabulary of "
                    f"{self.config.vocab_size}: build the model with vocab_size=corpus.vocab_size"
                )
