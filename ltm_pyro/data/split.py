"""Which document goes into which split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.errors import InputError

SPLITS = ("train", "val", "test")
FRACTIONS = (0.9, 0.05, 0.05)


def split_documents(
    digests: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    corpus: str = "",
) -> dict[str, NDArray[np.int64]]:
    """Deals whole documents out to train, val and test.

    Texts are put in the order of SHA-256(seed, SHA-256(text)) and cut where the shares come closest
    to `fractions`, every split getting at least one. Documents with the same text move as one, so
    no text is on two sides. The order of the source plays no part, nor does the tokenizer: sizes
    are bytes, so that the scores of two tokenizers are about the same held-out text.

    Args:
        digests: (n, 32) SHA-256 of each document's text.
        sizes: (n,) bytes of each document's text.
        fractions: Shares of train, val and test: above 0, with sum 1.
        seed: 0 or more.
        corpus: Its name, for messages.

    Returns:
        For each split, its documents: indices from 0 to n - 1, rising.

    Raises:
        InputError: if there are fewer than three different texts, or `fractions` are no shares.
    """
    shares = check_fractions(fractions)
    raw = np.ascontiguousarray(digests).view("V32")[:, 0]
    texts, text_of = np.unique(raw, return_inverse=True)
    if len(texts) < len(SPLITS):
        raise InputError(
            f"corpus {corpus!r} has {len(texts)} different texts in {len(digests)} documents: "
            "train, val and test need one each, since they may share none; give more text"
        )
    salt = f"{seed}:".encode()
    order = np.argsort(
        np.array([hashlib.sha256(salt + t.tobytes()).digest() for t in texts], "V32")
    )
    reached = np.cumsum(np.bincount(text_of, weights=sizes)[order], dtype=np.float64)
    first = _nearest(reached, shares[0], 1, len(texts) - 2)
    second = _nearest(reached, shares[0] + shares[1], first + 1, len(texts) - 1)
    split_of_text = np.empty(len(texts), dtype=np.int64)
    split_of_text[order] = np.repeat([0, 1, 2], [first, second - first, len(texts) - second])
    split_of = split_of_text[text_of]
    return {name: np.flatnonzero(split_of == i) for i, name in enumerate(SPLITS)}


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """`fractions`, known to be three positive shares of one whole.

    Raises:
        InputError: if they are not.
    """
    try:
        train, val, test = (float(share) for share in fractions)
    except (TypeError, ValueError):
        train = val = test = math.nan
    if not (min(train, val, test) > 0 and math.isclose(train + val + test, 1, abs_tol=1e-6)):
        raise InputError(
            f"fractions are {fractions!r}: must be three numbers above 0 with sum 1, the shares of "
            "train, val and test"
        )
    return train, val, test


def _nearest(reached: NDArray[np.float64], share: float, least: int, most: int) -> int:
    """How many texts to take, from `least` to `most`, to come closest to `share` of the whole."""
    candidates = np.arange(least, most + 1)
    gap = np.abs(reached[candidates - 1] - share * reached[-1])
    return int(candidates[np.argmin(gap)])
