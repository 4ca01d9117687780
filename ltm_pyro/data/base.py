"""A corpus: sequences in three splits, and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ltm_pyro.data.cache import digest_of
from ltm_pyro.data.card import data_card
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.data.split import SPLITS
from ltm_pyro.data.store import TextStore
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.errors import InputError, shown
from ltm_pyro.html import show


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Corpus:
    """Text or symbols, cut into sequences of T tokens; split into train, val and test by document.

    Attributes:
        name: What was loaded.
        seq_len: T.
        tokenizer: Between text and ids.
        train: Sequences to fit on.
        val: Sequences to choose settings on.
        test: Sequences to report.
        sha256: Of the text, as UTF-8, its documents one after another; of the symbols where the
            corpus is synthetic. It tells whether two scores are about the same data.
        n_tokens: Tokens in all.
        n_bytes: Bytes of the text, by which scores of different tokenizers can be compared; one
            per symbol where the corpus is synthetic.
        settings: What else determines sequences and split, as JSON types.
        recipe: The settings, by the names in `CorpusConfig`, with which it can be loaded again;
            `None` where it cannot, since a program held the data.
        text: The documents; `None` where the corpus is synthetic.
        parts: The documents of each split, as indices.
        skipped: Files that were not read, with the reason.
        notes: Warnings about the splits.
    """

    name: str
    seq_len: int
    tokenizer: Tokenizer
    train: SequenceSet
    val: SequenceSet
    test: SequenceSet
    sha256: str
    n_tokens: int
    n_bytes: int
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None
    text: TextStore | None = None
    parts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SPLITS:
            getattr(self, name).tokenizer = self.tokenizer

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Qualifies the ids of sequences: see `Batch.corpus`."""
        return self.train.corpus

    def held_out(self) -> str:
        """The split to score a fit on: `val`, or `test` where there is none; one must be there."""
        for name in ("val", "test"):
            if len(getattr(self, name)):
                return name
        raise InputError(
            f"corpus {shown(self.name)} has neither a val nor a test split, so that no fit to it "
            'could be scored: give one of them, or split="document" (--corpus.split document)'
        )

    def card(self) -> dict[str, Any]:
        """What the splits can be trusted for, as JSON types: see `data_card`; and warnings."""
        found: dict[str, Any] = dict(self._data_card)
        return {**found, "not_read": dict(self.skipped), "warnings": list(self.notes)}

    @cached_property
    def _data_card(self) -> dict[str, Any]:
        if self.text is None:
            return {}
        given = self.settings.get("split") == "given"
        asked = None if given else dict(zip(SPLITS, self.settings["fractions"], strict=True))
        return data_card(self.text, self.parts, asked)

    def describe(self) -> dict[str, Any]:
        """The facts about the corpus, as JSON types."""
        splits = {name: getattr(self, name) for name in SPLITS}
        return {
            "name": self.name,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
            "seq_len": self.seq_len,
            "tokenizer": self.tokenizer.name,
            "unit": self.tokenizer.unit,
            "vocab_size": self.vocab_size,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "splits": {
                name: {
                    "documents": split.n_documents,
                    "sequences": len(split),
                    "tokens": split.n_tokens,
                }
                for name, split in splits.items()
            },
            "settings": dict(self.settings),
            "recipe": None if self.recipe is None else dict(self.recipe),
            "card": self.card(),
        }

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(getattr(self, name))}" for name in SPLITS)
        return (
            f"{type(self).__name__}({self.name}: {self.n_tokens} tokens by {self.tokenizer.name}, "
            f"sequences of {self.seq_len}: {sizes})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "tokens": f"{self.n_tokens:,} by {self.tokenizer.name}, {self.vocab_size:,} kinds",
            "bytes": f"{self.n_bytes:,}",
            "T": self.seq_len,
            "SHA-256": self.sha256[:12],
        }
        splits = [getattr(self, name) for name in SPLITS]
        table = pd.DataFrame(
            [(len(s), s.n_documents, s.n_tokens) for s in splits],
            index=list(SPLITS),
            columns=["sequences", "documents", "tokens"],
        )
        return show(f"Corpus {shown(self.name)}", facts, tables=[table], notes=self.notes)


def fingerprint_of(documents: Mapping[str, str], tokenizer: Tokenizer, seq_len: int) -> str:
    """What qualifies the ids of a corpus's sequences: 16 hexadecimal digits.

    Of `documents` these are checksums, which determine them and where they end.
    """
    facts = {"documents": dict(documents), "tokenizer": tokenizer.to_json(), "seq_len": seq_len}
    return digest_of(facts)[:16]
