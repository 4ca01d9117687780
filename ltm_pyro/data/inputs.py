"""What fits and inference may be given as data, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ltm_pyro.data.batches import Batch, TrainingData
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.doors import described
from ltm_pyro.errors import InputError

Sequences = Batch | SequenceSet | str | Sequence[str] | pd.Series | NDArray[Any]
"""What inference takes: a batch, a split of a corpus, a text, or several, also as a column."""


def batch_of(data: Sequences, tokenizer: Tokenizer | None) -> Batch:
    """Sequences as a batch, with ids that do not repeat; texts get 0, 1, ..."""
    if isinstance(data, SequenceSet):
        return data.batch(range(len(data)))
    if isinstance(data, Batch):
        return data.usable().distinct()
    texts = [data] if isinstance(data, str) else listed(data)
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise InputError(
            f"batch is {described(data)}: must be a Batch (ltm_pyro.Batch(x), corpus.val.batch), "
            "a split of a corpus, a text, or a list of texts"
        )
    if tokenizer is None:
        raise InputError(
            "batch is text, and this DualRateSVI knows no tokenizer: fit it on a corpus, load a "
            "run, or set svi.tokenizer = corpus.tokenizer"
        )
    return _tokens(list(texts), tokenizer)


def listed(data: object) -> object:
    """The list of a frame's column or an array; anything else as it is."""
    return data.tolist() if isinstance(data, pd.Series | pd.Index | np.ndarray) else data


def _tokens(texts: list[str], tokenizer: Tokenizer) -> Batch:
    encoded = [torch.as_tensor(tokenizer.encode(text)).long() for text in texts]
    empty = [i for i, tokens in enumerate(encoded) if not len(tokens)]
    if empty or not encoded:
        which = f"text {empty[0]} of batch" if len(encoded) > 1 else "batch"
        raise InputError(f"{which} is empty: give text with at least one token")
    x = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in encoded])
    return Batch(x, torch.arange(x.shape[1]) < lengths[:, None])


def training_data(data: TrainingData) -> TrainingData:
    """Where slow steps take their batches, known to be such; of a single batch, random rows."""
    if isinstance(data, Batch):
        return data.usable().distinct()
    if not callable(getattr(data, "training_batch", None)):
        raise InputError(
            f"data is {described(data)}: must be the training split of a corpus "
            "(load_corpus(...).train) or a Batch"
        )
    return data
