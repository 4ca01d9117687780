"""Word dropout: a decoder that is shown fewer of the words before has to listen to its thoughts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Noise, Stream, derive_seed


@runtime_checkable
class HidesInputs(Protocol):
    """A model whose decoder can be kept from seeing some of its input tokens."""

    def hide_inputs(self, batch: Batch, hidden: Tensor) -> Batch:
        """The same sequences; the decoder reads no token where `hidden` (B, T) is true."""
        ...


class WordDropout:
    """Hides each input token with one probability (Bowman et al. 2016, section 3).

    Every token is still scored, and encoders still read all of them. Which tokens are hidden is a
    function of (seed, slow step, sequence): both clocks of a step see the same ones.

    Args:
        model: The model; need not be able to hide anything where `share` is 0.
        share: Probability that a token is hidden.
        seed: Of the choice.
    """

    def __init__(self, model: LatentModel, share: float, seed: int) -> None:
        if share > 0 and not isinstance(model, HidesInputs):
            raise InputError(
                f"slow.word_dropout is {share} and {type(model).__name__} reads no tokens that "
                "could be hidden: leave it at 0"
            )
        self.model, self.share, self.seed = model, share, seed

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch of slow step `step` with its hidden tokens; itself where none can be."""
        if self.share == 0 or not isinstance(self.model, HidesInputs):
            return batch
        noise = Noise(derive_seed(self.seed, Stream.DROPOUT, step), batch.ids)
        hidden = noise.uniform(batch.mask.shape[1])[0] < self.share
        return self.model.hide_inputs(batch, hidden)
