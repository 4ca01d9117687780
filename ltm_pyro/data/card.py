"""What a split can be trusted for: its shares, its repeats, and what it shares with the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ltm_pyro.data.split import SPLITS
from ltm_pyro.data.store import TextStore

N_GRAM = 8
"""Words in a row: shorter ones recur in any text, longer ones miss what was edited."""
_EXAMINED_BYTES = {"train": 2**23, "val": 2**20, "test": 2**20}  # a second or two
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost


def data_card(
    text: TextStore, parts: Mapping[str, NDArray[np.int64]], asked: Mapping[str, float] | None
) -> dict[str, Any]:
    """Shares, repeats and overlaps of the splits, as JSON types.

    Args:
        text: The documents.
        parts: The documents of each split.
        asked: The share of each split that was asked for.

    Returns:
        `shares` of the text and `asked`; `repeats`: documents whose text, or a near form of it
        (Unicode form, case and white space aside), stands in an earlier one; `crossing`: documents
        of val and test with such a twin in another split; and `overlap`: of the `n`-grams of words
        in val and test, the share that occurs in train, or in val, with the bytes of each split
        that were examined.
    """
    total = int(text.lengths.sum())
    shares = {name: float(text.lengths[part].sum() / total) for name, part in parts.items()}
    return {
        "shares": shares,
        "asked": dict(asked) if asked is not None else None,
        "repeats": {"exact": _repeats(text.digests), "near": _repeats(text.near)},
        "crossing": _crossing(text, parts),
        "overlap": _overlap(text, parts),
    }


def _rows(digests: NDArray[np.uint8]) -> NDArray[Any]:
    return np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")[:, 0]


def _repeats(digests: NDArray[np.uint8]) -> int:
    return len(digests) - len(np.unique(_rows(digests)))


def _crossing(text: TextStore, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, int]:
    """Documents of val and test whose near form stands in a split before theirs."""
    _, near = np.unique(_rows(text.near), return_inverse=True)
    seen = np.zeros(len(near), dtype=bool)
    crossing = {}
    for name in SPLITS:
        if name != "train":
            crossing[name] = int(seen[near[parts[name]]].sum())
        seen[near[parts[name]]] = True
    return crossing


def _overlap(text: TextStore, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    found, examined = {}, {}
    for name in SPLITS:
        chosen = _spread(text.lengths, parts[name], _EXAMINED_BYTES[name])
        examined[name] = int(text.lengths[chosen].sum())
        found[name] = _n_grams(text, chosen)
    pairs = {"val_in_train": ("val", "train"), "test_in_train": ("test", "train")}
    pairs["test_in_val"] = ("test", "val")
    shares = {key: _share(found[a], found[b]) for key, (a, b) in pairs.items()}
    return {"n": N_GRAM, **shares, "examined_bytes": examined}


def _share(these: NDArray[np.uint64], those: NDArray[np.uint64]) -> float | None:
    return float(np.isin(these, those).mean()) if len(these) else None


def _spread(
    lengths: NDArray[np.int64], documents: NDArray[np.int64], most: int
) -> NDArray[np.int64]:
    """Documents at even distances, of about `most` bytes together at most."""
    size = int(lengths[documents].sum())
    if size <= most:
        return documents
    count = max(1, len(documents) * most // size)
    return documents[np.linspace(0, len(documents) - 1, count).astype(np.int64)]


def _n_grams(text: TextStore, documents: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The different n-grams of words in some documents, as numbers, rising."""
    parts = [np.zeros(0, dtype=np.uint64)]
    for document in text.documents(documents):
        words = np.array(_WORD.findall(document.casefold()), dtype=object)
        if len(words) < N_GRAM:
            continue
        numbers = pd.util.hash_array(words, categorize=False)
        last = len(numbers) - N_GRAM + 1
        sums = np.zeros(last, dtype=np.uint64)
        for place in range(N_GRAM):
            sums = sums * _FACTOR + numbers[place : place + last]
        parts.append(sums)
    return np.unique(np.concatenate(parts))
