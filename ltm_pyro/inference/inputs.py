"""What `DualRateSVI` may be given, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pyro.infer import ELBO

from ltm_pyro.data.batches import Batch
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.data.training_data import RowsOf, TrainingData
from ltm_pyro.doors import require_model
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import build_guide, guide_families
from ltm_pyro.models.base import LatentModel

T = TypeVar("T")

Sequences = Batch | SequenceSet | str | Sequence[str] | pd.Series | NDArray[Any]
"""What inference takes: a batch, a split of a corpus, a text, or several, also as a column."""


def guide_for(guide: LocalGuide | str, model: LatentModel) -> LocalGuide:
    """A guide for `model`, by name or as it is.

    Raises:
        InputError: if `model` is no model, or `guide` no guide for it.
    """
    require_model(model)
    if model.device.type == "meta":
        raise InputError("model is on the meta device, which holds no numbers: build it on another")
    if isinstance(guide, str):
        return build_guide(guide, model)
    if not isinstance(guide, LocalGuide):
        kind = f"the class {guide.__name__}" if isinstance(guide, type) else shown(guide)
        raise InputError(
            f"guide is {kind}: must be a family's name ({', '.join(guide_families())}) or "
            "build_guide(name, model); Pyro's autoguides run under pyro.infer.SVI"
        )
    if guide.thought_shape != tuple(model.thought_shape):
        raise InputError(
            f"guide is for thoughts {guide.thought_shape} and the model has "
            f"{tuple(model.thought_shape)}: build_guide({guide.family!r}, model)"
        )
    return guide


def settings(name: str, given: object, kind: type[T], example: str = "lr=0.01") -> T:
    """Settings of a kind, its defaults for `None`.

    Raises:
        InputError: if they are of another kind.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise InputError(
            f"{name} is {shown(given)}: must be ltm_pyro.{kind.__name__}(...), e.g. "
            f"{kind.__name__}({example})"
        )
    return given


def objective_name(elbo: object) -> ELBO | str:
    """An objective as `DualRateSVI` takes it.

    Raises:
        InputError: if it is none.
    """
    if elbo is None:
        return "elbo"
    if not isinstance(elbo, str | ELBO):
        raise InputError(
            f"elbo is {shown(elbo)}: must be the name of an objective, e.g. 'elbo', what "
            "build_objective(name) returns, or an instance of a Pyro ELBO"
        )
    return elbo


def batch_of(data: Sequences, tokenizer: Tokenizer | None) -> Batch:
    """Sequences as a batch; texts get the ids 0, 1, ...

    Raises:
        InputError: if there are none, ids repeat, or text has no tokenizer.
    """
    if isinstance(data, SequenceSet):
        return data.batch(range(len(data)))
    if isinstance(data, Batch):
        return data.usable().distinct()
    texts = [data] if isinstance(data, str) else listed(data)
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise InputError(
            f"batch is {_described(data)}: must be a Batch (ltm_pyro.Batch(x), corpus.val.batch), "
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


def _described(data: object) -> str:
    return f"a tensor {tuple(data.shape)}" if isinstance(data, torch.Tensor) else shown(data)


def training_data(data: TrainingData | Batch) -> TrainingData:
    """Where slow steps take their batches; of a single batch, random rows.

    Raises:
        InputError: if it is nothing of the kind.
    """
    if isinstance(data, Batch):
        return RowsOf(data.usable().distinct())
    if not callable(getattr(data, "training_batch", None)):
        raise InputError(
            f"data is {_described(data)}: must be the training split of a corpus "
            "(load_corpus(...).train) or a Batch"
        )
    return data


def tokenizer_of(data: object, known: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that training data came from, or the one that is known already."""
    return cast("Tokenizer | None", getattr(data, "tokenizer", None)) or known
