"""Which document goes into which split."""

from __future__ import annotations

import hashlib
import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ltm_pyro.errors import InputError, shown

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What files, folders and published data sets call the splits."""
FRACTIONS = (0.9, 0.05, 0.05)
LEAST_OF_ASKED = 0.1  # of the share asked for; less is no split to score on


def split_documents(
    digests: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    corpus: str = "",
    together: Sequence[NDArray[Any]] = (),
) -> dict[str, NDArray[np.int64]]:
    """Deals whole documents out to train, val and test.

    Texts are put in the order of SHA-256(seed, SHA-256(text)) and cut where the shares come closest
    to `fractions`, every split getting at least one. Documents with the same text move as one, so
    no text is on two sides, and so do those that `together` joins: they have the place of the
    first of their SHA-256. The order of the source plays no part, nor does the tokenizer: sizes are
    bytes, so that the scores of two tokenizers are about the same held-out text.

    Args:
        digests: (n, 32) SHA-256 of each document's text.
        sizes: (n,) bytes of each document's text.
        fractions: Shares of train, val and test: above 0, with sum 1.
        seed: 0 or more.
        corpus: Its name, for messages.
        together: Arrays (n,) of labels: documents with an equal label move as one.

    Returns:
        For each split, its documents: indices from 0 to n - 1, rising.
    """
    shares = check_fractions(fractions)
    group_of, firsts = _groups(digests, together)
    n = len(firsts)
    if n < len(SPLITS):
        what, other = ("groups", ", or another split_by") if len(together) > 1 else ("texts", "")
        raise InputError(
            f"corpus {shown(corpus, 200)} has {n} different {what} in {len(digests)} documents: "
            f"train, val and test need one each, since they may share none; give more text{other}"
        )
    salt = f"{seed}:".encode()
    salted = np.empty((n, 32), dtype=np.uint8)
    for i, digest in enumerate(firsts):
        salted[i] = np.frombuffer(hashlib.sha256(salt + digest.tobytes()).digest(), np.uint8)
    order = np.argsort(salted.view("V32")[:, 0])
    reached = np.cumsum(np.bincount(group_of, weights=sizes)[order], dtype=np.float64)
    first = _nearest(reached, shares[0], 1, n - 2)
    second = _nearest(reached, shares[0] + shares[1], first + 1, n - 1)
    split_of_group = np.empty(n, dtype=np.int64)
    split_of_group[order] = np.repeat([0, 1, 2], [first, second - first, n - second])
    split_of = split_of_group[group_of]
    return {name: np.flatnonzero(split_of == i) for i, name in enumerate(SPLITS)}


def given_splits(codes: NDArray[np.int8], corpus: str) -> dict[str, NDArray[np.int64]]:
    """The documents of each split as their source has them, all in one and some in `train`.

    `codes` (n,) is the place in `SPLITS` of each document's split, -1 for none.
    """
    if (codes < 0).any():
        raise InputError(
            f"corpus {shown(corpus, 200)} has no splits of its own: give files called after train, "
            'val and test, a dict of them or a data set that has them, or split="document"'
        )
    parts = {name: np.flatnonzero(codes == i) for i, name in enumerate(SPLITS)}
    if not len(parts["train"]):
        raise InputError(f"corpus {shown(corpus, 200)} has no split train: give one of that name")
    return parts


def warn_of_shares(
    parts: Mapping[str, NDArray[np.int64]],
    sizes: NDArray[np.int64],
    asked: Mapping[str, float] | None,
    corpus: str,
) -> list[str]:
    """Warns of a split that is empty, or has less than a tenth of what was asked for; the lines.

    Args:
        parts: Documents of each split.
        sizes: (n,) bytes of each document's text.
        asked: The share of each split; `None` where splits are as they were given.
        corpus: Its name.
    """
    total = int(sizes.sum())
    told = []
    for name, documents in parts.items():
        share = float(sizes[documents].sum() / total)
        if not len(documents):
            told.append(f"split {name} of corpus {corpus} is empty: nothing can be scored on it")
        elif asked is not None and share < asked[name] * LEAST_OF_ASKED:
            told.append(
                f"split {name} of corpus {corpus} has a share of {share:.2g} where "
                f"{asked[name]:g} was asked for: its documents repeat one another, or a few hold "
                "most of the text"
            )
    for line in told:
        warnings.warn(line, stacklevel=2)
    return told


def near_form(text: str) -> str:
    """The same for texts that differ by Unicode form, case or white space alone."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(folded.split())


def _groups(
    digests: NDArray[np.uint8], together: Sequence[NDArray[Any]]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The group (n,) of each document, and the first SHA-256 (g,) of each group."""
    raw = np.ascontiguousarray(digests).view("V32")[:, 0]
    texts, text_of = np.unique(raw, return_inverse=True)
    for labels in together:
        _, label_of = np.unique(labels, return_inverse=True)
        n, m = len(texts), int(label_of.max()) + 1
        links = coo_array((np.ones(len(raw), np.int64), (text_of, n + label_of)), (n + m, n + m))
        joined = connected_components(links, directed=False)[1][:n]
        # Texts are in order, so that the first of a group has its least SHA-256.
        _, firsts, group_of_text = np.unique(joined, return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        place = np.argsort(order)
        texts, text_of = texts[firsts[order]], place[group_of_text][text_of]
    return text_of, texts


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """`fractions`, known to be three positive shares of one whole."""
    try:
        train, val, test = (float(share) for share in fractions)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        train = val = test = math.nan
    if not (min(train, val, test) > 0 and math.isclose(train + val + test, 1, abs_tol=1e-6)):
        raise InputError(
            f"fractions are {shown(fractions)}: must be three numbers above 0 with sum 1, the "
            "shares of train, val and test"
        )
    return train, val, test


def _nearest(reached: NDArray[np.float64], share: float, least: int, most: int) -> int:
    """How many texts to take, from `least` to `most`, to come closest to `share` of the whole."""
    candidates = np.arange(least, most + 1)
    gap = np.abs(reached[candidates - 1] - share * reached[-1])
    return int(candidates[np.argmin(gap)])
