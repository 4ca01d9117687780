"""Texts as thoughts: posterior means and scales for whoever wants them, and what lies between."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.inputs import Sequences, batch_of, listed
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.tasks.generation import generate

_MOST = 1000  # texts between two


@door
def embed(
    fitted: object,
    texts: Sequences,
    steps: int | None = None,
    *,
    seed: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Posterior means and standard deviations of texts, e.g. for a classifier.

    A text's numbers depend on the text alone, and not on the others or its place among them.

    Args:
        fitted: A run, or a `DualRateSVI` that knows a tokenizer.
        texts: One or several texts, no longer than the model's sequences, also as the column of a
            frame; or a batch, or a split of a corpus.
        steps: T_fast; the fast clock's own by default. More leave less noise in the numbers.
        seed: Of the fast loop's noise; the fit's own by default.
        progress: Show a progress bar on stderr, if it takes longer than a few seconds.

    Returns:
        A row for each text, in order (of a column by its index, of a batch or split by the
        sequences' stable ids, so that `frame.join(corpus.val.metadata)` adds what is known of
        them); columns `mean_K_D` and
        `sd_K_D` of dimension D of thought K, counted from 0. `frame.filter(like="mean_")` are the
        means alone.

    Raises:
        InputError: if there is nothing to embed, or a text is too long for the model.
    """
    svi = svi_of(fitted)
    batch = batch_of(texts, svi.tokenizer)
    index, place = pd.Index(batch.ids.cpu().numpy(), name="id"), np.arange(len(batch))
    several = listed(texts)
    if isinstance(several, str | list | tuple):
        batch, place = _named_by_text(batch, [several] if isinstance(several, str) else several)
        index = texts.index if isinstance(texts, pd.Series) else pd.RangeIndex(len(place))
    post = svi.infer(batch, steps, seed=seed, progress=progress)
    thoughts, dims = post.distribution.event_shape
    columns = {}
    for name, values in (("mean", post.mean), ("sd", post.sd)):
        flat = values.detach().flatten(1).cpu().numpy()[place]
        for k in range(thoughts):
            for d in range(dims):
                columns[f"{name}_{k}_{d}"] = flat[:, k * dims + d]
    return pd.DataFrame(columns, index=index)


def _named_by_text(batch: Batch, texts: Sequence[str]) -> tuple[Batch, NDArray[np.intp]]:
    """Each text once, under an id made of it; and the row (n,) of each of `texts`.

    Noise belongs to an id, so that a text has the same posterior wherever it comes.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    ids = np.array([int.from_bytes(digest, "little") >> 1 for digest in digests])
    ids, first, place = np.unique(ids, return_index=True, return_inverse=True)
    return replace(batch.select(first.tolist()), ids=torch.from_numpy(ids)), place


def interpolate(
    fitted: object,
    first: str,
    second: str,
    n: int = 5,
    *,
    seed: int = 0,
    steps: int | None = None,
    **options: Any,
) -> list[str]:
    """Texts along the line between the thoughts of two texts.

    The posterior mean of each is inferred, and text i of n is written at (1 - w) a + w b with
    w = i / (n - 1), all from the same random numbers, so that they differ by their thoughts alone.

    Args:
        fitted: A run, or a `DualRateSVI` that knows a tokenizer.
        first: A text.
        second: Another.
        n: Texts, those at both ends included; 2 or more.
        seed: Of the tokens.
        steps: T_fast; the fast clock's own by default.
        **options: Of `generate`: `prompt`, `max_new_tokens`, `greedy`, `temperature`, ...

    Returns:
        `n` texts. The first is written at the thoughts of `first`, and is not `first` itself.

    Raises:
        InputError: if there is no text, or an option cannot be used.
    """
    svi = svi_of(fitted)
    n = whole_number("n", n, 2, _MOST)
    taken = {"z", "n", "svi"} & set(options)
    if taken:
        raise InputError(f"{sorted(taken)[0]} is not for interpolate: it makes its own thoughts")
    model, tokenizer = svi.model, svi.tokenizer
    if not isinstance(model, LatentThoughtModel) or tokenizer is None:
        raise InputError("interpolate needs a language model and its tokenizer: give a run of text")
    ends, place = _named_by_text(batch_of([first, second], tokenizer), [first, second])
    a, b = svi.infer(ends, steps).mean[place]
    line = [torch.lerp(a, b, i / (n - 1)) for i in range(n)]
    return [generate(model, tokenizer, z=z, seed=seed, **options)[0] for z in line]


def svi_of(fitted: object) -> DualRateSVI:
    """The fit of a run, or itself; `InputError` for anything else."""
    svi = getattr(fitted, "svi", fitted)
    if not isinstance(svi, DualRateSVI):
        raise InputError(f"{shown(fitted)} is no fit: give load_run(folder), or a DualRateSVI")
    return svi
