"""The built-in corpus `mixture`: synthetic sequences whose likelihood is known exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.data.base import Corpus, fingerprint_of
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.markov import Array, MarkovMixture
from ltm_pyro.data.metadata import DocumentTable
from ltm_pyro.data.sequences import SequenceLayout, SequenceSet
from ltm_pyro.data.split import FRACTIONS, split_documents
from ltm_pyro.data.tokenizer import SymbolTokenizer
from ltm_pyro.errors import InputError

# With 8 classes, order 1, 16 symbols and T = 64, the exact log-likelihood exceeds that of the best
# predictor with a window of 1 by 45 nats per sequence, give or take 3 over seeds.
CONCENTRATION = 0.3


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MixtureCorpus(Corpus):
    """Sequences of a `MarkovMixture`, each a document of its own."""

    process: MarkovMixture
    """What generated them, and scores them."""
    labels: NDArray[np.int64]
    """(n,) class of the sequence with each id."""

    @property
    def weights(self) -> Array:
        """Class probabilities (C,)."""
        return self.process.weights

    @property
    def initial(self) -> Array:
        """Probabilities (C, V^k) of the first k-tuple: the stationary law of each chain."""
        return self.process.initial

    @property
    def transitions(self) -> Array:
        """Probabilities (C, V^k, V) of the next symbol after each k-tuple."""
        return self.process.transitions

    def log_likelihood(self, batch: Batch) -> Tensor:
        """Exact log p(x), (B,) float64; see `MarkovMixture.log_likelihood`."""
        return self.process.log_likelihood(batch)

    def window_log_likelihood(self, batch: Batch, window: int = 1) -> Tensor:
        """The best that a window allows, (B,); see `MarkovMixture.window_log_likelihood`."""
        return self.process.window_log_likelihood(batch, window)

    def class_posterior(self, batch: Batch) -> Tensor:
        """Exact p(c | x), (B, C); see `MarkovMixture.class_posterior`."""
        return self.process.class_posterior(batch)

    def classes_of(self, batch: Batch) -> Tensor:
        """The class (B,), int64, that each sequence of this corpus was drawn from."""
        ids = batch.ids.cpu().numpy()
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.labels)):
            raise InputError(f"the batch has ids outside 0 .. {len(self.labels) - 1}")
        return torch.from_numpy(self.labels[ids]).to(batch.device)


def make_mixture(
    *,
    seq_len: int = 64,
    seed: int = 0,
    classes: int = 8,
    symbols: int = 16,
    order: int = 1,
    n_sequences: int = 16384,
    concentration: float = CONCENTRATION,
    fractions: Sequence[float] = FRACTIONS,
) -> MixtureCorpus:
    """Draws the chains, then the sequences.

    Args:
        seq_len: T.
        seed: Of chains, sequences and split.
        classes: C.
        symbols: V; V^k is at most 4096.
        order: k.
        n_sequences: In all three splits, 3 or more.
        concentration: Of the Dirichlet that rows of the transition matrices are drawn from.
        fractions: Shares of train, val and test.
    """
    n_sequences = whole_number("n_sequences", n_sequences, at_least=3)
    process = MarkovMixture.random(classes, symbols, order, concentration, seed)
    x, labels = process.simulate(n_sequences, seq_len, seed)
    tokens = x.astype(np.min_scalar_type(process.symbols - 1))
    digests = np.frombuffer(
        b"".join(hashlib.sha256(row.tobytes()).digest() for row in tokens), dtype=np.uint8
    ).reshape(n_sequences, -1)
    lengths = np.full(n_sequences, seq_len)
    split = split_documents(digests, lengths, fractions, seed, corpus="mixture")
    tokenizer = SymbolTokenizer(process.symbols)
    sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
    fingerprint = fingerprint_of({"symbols": sha256}, tokenizer, seq_len)
    table = _truth(labels)
    layout = SequenceLayout(tokens.ravel(), lengths, seq_len, fingerprint, tokenizer, table)
    parts: dict[str, Any] = {k: SequenceSet(layout, part, k) for k, part in split.items()}
    options = {
        "classes": process.classes,
        "symbols": process.symbols,
        "order": process.order,
        "n_sequences": n_sequences,
        "concentration": float(concentration),
        "fractions": [float(share) for share in fractions],
    }
    return MixtureCorpus(
        name="mixture",
        seq_len=seq_len,
        tokenizer=tokenizer,
        **parts,
        sha256=sha256,
        n_tokens=tokens.size,
        n_bytes=tokens.size,
        settings={"seed": seed, **options},
        recipe={"name": "mixture", "seed": seed, "options": options},
        process=process,
        labels=labels,
    )


def _truth(labels: NDArray[np.int64]) -> DocumentTable:
    """Metadata `class`: what each sequence was drawn from."""
    rows = [json.dumps({"0": int(label)}).encode() for label in labels]
    return DocumentTable(
        files=("",),
        fields=("class",),
        file=np.zeros(len(labels), dtype=np.int32),
        offset=np.arange(len(labels)),
        rows=np.frombuffer(b"".join(rows), dtype=np.uint8),
        row_lengths=np.array([len(row) for row in rows]),
    )
