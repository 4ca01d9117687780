"""Sequences cut from documents, with ids that outlive the split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch, chosen_rows
from ltm_pyro.data.metadata import DocumentTable
from ltm_pyro.data.store import TextStore
from ltm_pyro.data.text_units import TextUnits, has_text, runs
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.errors import InputError
from ltm_pyro.html import show

Order = NDArray[np.unsignedinteger[Any]]
_SHOWN = 5  # rows in a notebook
Positions = Sequence[int] | NDArray[np.integer[Any]] | torch.Tensor | slice | range


class SequenceLayout:
    """Where each sequence of a corpus lies in the flat array of its tokens.

    Document d is cut into ceil(n_d / T) pieces of T tokens; the last may be shorter. Sequences are
    numbered over the documents in source order, so an id depends on the corpus, the tokenizer and
    T, never on the split.

    Args:
        tokens: (n_tokens,) all documents one after another, any unsigned dtype; may be mapped.
        lengths: (n_documents,) tokens of each document, 1 or more.
        seq_len: T.
        corpus: Fingerprint that qualifies the ids: the same documents, tokenizer and T give the
            same one.
        tokenizer: By which they became tokens.
        table: What else is known of the documents.
        text: Their raw text.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        seq_len: int,
        corpus: str,
        tokenizer: Tokenizer | None = None,
        table: DocumentTable | None = None,
        text: TextStore | None = None,
    ) -> None:
        self.tokens, self.lengths, self.seq_len, self.corpus = tokens, lengths, seq_len, corpus
        self.tokenizer, self._table, self._text = tokenizer, table, text
        self._ends = np.cumsum(lengths)
        self._pieces = -(-lengths // seq_len)
        self._first_id = np.concatenate([[0], np.cumsum(self._pieces)])

    def ids_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids, rising, of the sequences in `documents`, which rise too."""
        pieces = self._pieces[documents]
        total = int(pieces.sum())
        piece = np.arange(total) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        return np.repeat(self._first_id[documents], pieces) + piece

    def documents_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document (B,) that each of the sequences `ids` (B,) was cut from."""
        return np.searchsorted(self._first_id, ids, side="right") - 1

    def spans(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token (B,) and number of tokens (B,) of the sequences `ids` (B,)."""
        document = self.documents_of(ids)
        begin = self._ends[document] - self.lengths[document]
        start = begin + (ids - self._first_id[document]) * self.seq_len
        return start, np.minimum(self.seq_len, self._ends[document] - start)

    def batch(self, ids: NDArray[np.int64]) -> Batch:
        """The sequences `ids` (B,) as a batch (B, T), padded with 0 and masked."""
        start, length = self.spans(ids)
        steps = np.arange(self.seq_len)
        mask = steps < length[:, None]
        x = self.tokens[np.where(mask, start[:, None] + steps, 0)].astype(np.int64)
        x[~mask] = 0
        return Batch(
            torch.from_numpy(x),
            torch.from_numpy(mask),
            torch.from_numpy(ids.copy()),
            documents=torch.from_numpy(self.documents_of(ids)),
            corpus=self.corpus,
            origin=self,
        )

    def text_sizes(
        self, ids: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Bytes (B,) and words (B,) of the raw text where `mask` (B, T) is true; see `TextUnits`.

        `None` where tokens stand for no text.
        """
        if self.tokenizer is None or not has_text(self.tokenizer):
            return None
        sizes = np.zeros((2, len(ids)), dtype=np.int64)
        start, _ = self.spans(ids)
        documents, place = np.unique(self.documents_of(ids), return_inverse=True)
        texts: Iterable[str | None] = repeat(None)
        if self._text is not None and getattr(self.tokenizer, "token_bytes", None) is None:
            texts = self._text.documents(documents)  # tokens alone do not tell
        for number, (document, text) in enumerate(zip(documents, texts, strict=False)):
            end = self._ends[document]
            begin = end - self.lengths[document]
            units = TextUnits(self.tokenizer, self.tokens[begin:end], text)
            for row in np.flatnonzero(place == number):
                first = int(start[row] - begin)
                for a, b in runs(mask[row]):
                    sizes[:, row] += units(first + a, first + b)
        return sizes[0], sizes[1]

    def metadata(self, ids: NDArray[np.int64]) -> pd.DataFrame:
        """What is known of the sequences `ids` (B,), one row each; see `SequenceSet.metadata`."""
        documents = self.documents_of(ids)
        if self._table is None:
            frame = pd.DataFrame({"document": documents})
        else:
            unique, place = np.unique(documents, return_inverse=True)
            frame = self._table.frame(unique).take(place)
        position = (ids - self._first_id[documents]) * self.seq_len
        frame.insert(min(3, frame.shape[1]), "position", position)
        frame.index = pd.Index(ids, name="id")
        return frame


class SequenceSet:
    """One split of a corpus: fixed-length sequences, read from disk as they are asked for.

    Attributes:
        ids: (n,) int64, rising: the stable id of the sequence at each position.
        n_documents: Documents that the sequences were cut from.
        n_tokens: Tokens in all sequences, pads not counted.
        tokenizer: Of the corpus that this is a split of; `None` where it is part of none.
    """

    tokenizer: Tokenizer | None = None

    def __init__(self, layout: SequenceLayout, documents: NDArray[np.int64], name: str) -> None:
        self._layout, self._name = layout, name
        self._order_key: tuple[int, ...] = ()
        self._orders: dict[int | None, Order] = {}
        self.ids = layout.ids_of(documents)
        self.ids.setflags(write=False)
        self.n_documents = len(documents)
        self.n_tokens = int(layout.lengths[documents].sum())

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SequenceSet({self._name}: {len(self)} sequences, {self.n_tokens} tokens)"

    def _repr_html_(self) -> str:
        tables = [self._layout.metadata(self.ids[:_SHOWN])] if len(self) else []
        return show(repr(self), {"documents": self.n_documents, "T": self.seq_len}, tables=tables)

    @property
    def seq_len(self) -> int:
        """T."""
        return self._layout.seq_len

    @property
    def documents(self) -> NDArray[np.int64]:
        """(n,) the document that the sequence at each position was cut from, as its index."""
        return self._layout.documents_of(self.ids)

    @cached_property
    def metadata(self) -> pd.DataFrame:
        """What is known of each sequence: one row per sequence, by its stable id.

        Columns `document` (its index), `file`, `offset` (where the document begins in its file: in
        bytes of the text as UTF-8, or, of records, its number), `position` (the sequence's first
        token in the document), every other field of the document's record, and `group` where the
        corpus is split by group. Read from disk when it is first asked for.
        """
        return self._layout.metadata(self.ids)

    @property
    def corpus(self) -> str:
        """Fingerprint of the corpus, which qualifies the ids; see `Batch.corpus`."""
        return self._layout.corpus

    @overload
    def batch(self, positions: Positions) -> Batch: ...
    @overload
    def batch(self, *, ids: ArrayLike) -> Batch: ...
    def batch(self, positions: Positions | None = None, *, ids: ArrayLike | None = None) -> Batch:
        """Chosen sequences in the order given, on the CPU; others than this split's are refused.

        Args:
            positions: From 0 to `len(self) - 1`, as a range, list, array or slice.
            ids: Or stable ids, as a list or array.
        """
        if (positions is None) == (ids is None):
            raise InputError("batch() takes either positions or ids=...")
        self._refuse_empty()
        if ids is not None:
            return self._layout.batch(self._known(_whole_numbers(ids, "ids")))
        if isinstance(positions, slice):
            positions = range(*positions.indices(len(self)))
        chosen = _whole_numbers(positions, "positions")
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if outside.size:
            raise InputError(
                f"position {outside[0]} is not in the {self._name} split: its {len(self)} "
                f"sequences have positions 0 to {len(self) - 1}"
            )
        return self._layout.batch(self.ids[chosen])

    def with_others(self, *others: SequenceSet) -> SequenceSet:
        """These sequences and those of other splits of the same corpus, as one set."""
        documents = np.unique(np.concatenate([each.documents for each in (self, *others)]))
        return SequenceSet(self._layout, documents, "all")

    def batches(self, size: int) -> Iterator[Batch]:
        """All sequences in order, `size` at a time; the last batch holds what is left."""
        whole_number("batch size", size, at_least=1)
        return (
            self._layout.batch(self.ids[start : start + size])
            for start in range(0, len(self), size)
        )

    def training_batch(
        self,
        step: int,
        batch_size: int,
        seed: int = 0,
        *,
        lanes: bool = False,
        rows: slice | None = None,
    ) -> Batch:
        """The batch of one training step: a function of its arguments alone.

        Each epoch is a fresh permutation, cut into batches. What is left over at its end sits that
        epoch out, so that no batch holds a sequence twice: local parameters are kept per id.

        With lanes, row j of every batch comes from the sequences at positions j, j + B, j + 2 B,
        ..., which are permuted anew in each epoch: a sequence keeps its row, and so the process
        that holds its local parameters, whatever the number of processes.

        Args:
            step: 0 or more.
            batch_size: B; a set with fewer sequences gives all of them, permuted.
            seed: 0 or more.
            lanes: Deal the sequences out into B lanes.
            rows: Only these rows of the batch, which are then all that is read from disk.
        """
        self._refuse_empty()
        whole_number("step", step, at_least=0)
        whole_number("batch size", batch_size, at_least=1)
        whole_number("seed", seed, at_least=0)
        size = min(batch_size, len(self))
        epoch, place = divmod(step, len(self) // size)
        chosen = chosen_rows(size, rows)
        if lanes:
            lanes_of = {j: len(range(j, len(self), size)) for j in chosen}
            key = (seed, epoch, size)
            places = [j + size * int(self._order(key, j, n)[place]) for j, n in lanes_of.items()]
            positions = np.array(places)
        else:
            order = self._order((seed, epoch), None, len(self))
            positions = order[place * size : (place + 1) * size][chosen.start : chosen.stop]
        return self._layout.batch(self.ids[positions])

    def _order(self, key: tuple[int, ...], lane: int | None, n: int) -> Order:
        """The permutation (n,) of an epoch, or of one of its lanes, kept while the epoch lasts."""
        if self._order_key != key:
            self._order_key, self._orders = key, {}
        if lane not in self._orders:
            entropy = key if lane is None else (*key, lane)
            # Sorting raw bits instead of `Generator.permutation`, whose stream NumPy may change.
            bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)
            order = np.argsort(bits, kind="stable")
            # 20 bytes per sequence while it is made; 4 of them stay where numbers are that small.
            self._orders[lane] = order.astype(np.min_scalar_type(max(n - 1, 2**16)))
        return self._orders[lane]

    def _refuse_empty(self) -> None:
        if not len(self):
            raise InputError(
                f"the {self._name} split is empty: choose another, or give data for it"
            )

    def _known(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        place = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        unknown = ids[self.ids[place] != ids]
        if unknown.size:
            raise InputError(
                f"sequence id {unknown[0]} is not in the {self._name} split: take ids from its .ids"
            )
        return ids


def _whole_numbers(values: object, name: str) -> NDArray[np.int64]:
    """`values` as (B,) int64, B at least 1."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # ragged lists
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"{name} must be whole numbers in a range, list, array or slice")
    if not array.size:
        raise InputError(f"no {name} given: a batch holds at least one sequence")
    return array.astype(np.int64)
