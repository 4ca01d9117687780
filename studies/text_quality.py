"""How generated text differs from held-out text, without another model's weights.

MAUVE (Pillutla et al. 2021, arXiv 2102.01454) compares clusters of a large model's embeddings.
Here the features are counts of byte triples, so its numbers and these are not comparable: what is
computed of the clusters is the same, and the distance of two halves of held-out text is the floor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

Floats = NDArray[np.float64]
_BINS, _DIMS, _STARTS = 1021, 16, 5
"""Bins of byte triples, dimensions that are kept of them, and starts of the clusters."""
_SCALING = 5.0
"""c of the divergence frontier, as in MAUVE."""


def triples(texts: Sequence[str]) -> Floats:
    """Square roots of the shares of byte triples in each text, (n, bins)."""
    out = np.zeros((len(texts), _BINS))
    for row, text in zip(out, texts, strict=True):
        b = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if len(b) > 2:
            np.add.at(row, (b[:-2] * 65537 + b[1:-1] * 257 + b[2:]) % _BINS, 1.0)
            row /= len(b) - 2
    return np.sqrt(out)


def triple_frontier_distance(one: Sequence[str], other: Sequence[str], seed: int = 0) -> float:
    """1 - the area below the divergence frontier of two sets of texts; 0 to 1, 0 for the same.

    The features of all texts are projected on their first principal components and clustered; each
    set is then a histogram over clusters, half a text added to each (Pillutla et al. 2023).

    Args:
        one: Texts.
        other: As many others.
        seed: Of the clusters' starts, over five of which the mean is taken.
    """
    features = triples([*one, *other])
    features -= features.mean(0)
    left, scale, _ = np.linalg.svd(features, full_matrices=False)
    points = (left * scale)[:, :_DIMS]
    k = max(2, len(points) // 10)
    areas = []
    for start in range(_STARTS):
        _, label = kmeans2(points, k, minit="++", rng=np.random.default_rng([seed, start]))
        p, q = (
            np.bincount(part, minlength=k) + 0.5 for part in (label[: len(one)], label[len(one) :])
        )
        areas.append(frontier_area(p / p.sum(), q / q.sum()))
    return 1.0 - float(np.mean(areas))


def frontier_area(p: Floats, q: Floats) -> float:
    """Area below the divergence frontier of two histograms (MAUVE, equations 2 and 3)."""
    mix = np.linspace(0.0, 1.0, 102)[1:-1, None]
    r = mix * p + (1 - mix) * q
    x = np.exp(-_SCALING * (q * np.log(q / r)).sum(1))
    y = np.exp(-_SCALING * (p * np.log(p / r)).sum(1))
    x, y = np.concatenate([[1.0], x[::-1], [0.0]]), np.concatenate([[0.0], y[::-1], [1.0]])
    order = np.lexsort((-y, x))
    return float(np.trapezoid(y[order], x[order]))


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of n words, parted by white space."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct runs of n words over all of them (Li et al. 2016); falls with the amount of text."""
    every = [gram for text in texts for gram in grams(text, n)]
    return len(set(every)) / len(every) if every else math.nan


def word_entropy(texts: Sequence[str]) -> float:
    """Entropy of the words' shares in bits, plugged in; rises with the amount of text."""
    counts = np.array(list(Counter(word for text in texts for word in text.split()).values()))
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean BLEU of each text with all others as references (Zhu et al. 2018): 1 for copies.

    Precisions of two words and more have 1 added above and below (Lin & Och 2004).
    """
    lengths = np.array([len(text.split()) for text in texts])
    logs = np.zeros(len(texts))
    for n in range(1, order + 1):
        counts = [Counter(grams(text, n)) for text in texts]
        most: dict[tuple[str, ...], list[int]] = {}
        for each in counts:  # the two highest counts of any text: one may be its own
            for gram, count in each.items():
                most[gram] = sorted([*most.get(gram, [0, 0]), count])[-2:]
        more = 0 if n == 1 else 1
        for i, each in enumerate(counts):
            known = sum(
                min(count, most[gram][0] if most[gram][1] == count else most[gram][1])
                for gram, count in each.items()
            )
            share = (known + more) / max(sum(each.values()) + more, 1)
            logs[i] += math.log(max(share, 1e-9)) / order
    for i, length in enumerate(lengths):
        others = np.delete(lengths, i)
        nearest = int(others[np.abs(others - length).argmin()])
        logs[i] += min(0.0, 1.0 - nearest / max(int(length), 1))
    return float(np.exp(logs).mean())
