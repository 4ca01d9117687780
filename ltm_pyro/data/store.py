"""Text and tokens of a corpus on disk, streamed document by document.

The text of every corpus is stored once, as UTF-8; it is also the token array of the byte tokenizer.
Other tokenizers read it from there, so that the source is read in a single pass and what one
tokenizer is trained on is what all of them encode. Memory does not grow with the text, nor, once it
is stored, with the length of a document.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tqdm.auto import tqdm

from ltm_pyro.data.cache import Cache, EntryWriter, digest_of
from ltm_pyro.data.metadata import DocumentTable
from ltm_pyro.data.records import Document, Source, row_of
from ltm_pyro.data.split import SPLITS, near_form
from ltm_pyro.data.tokenizer import Part, StreamTokenizer, Tokenizer, checked_ids, utf8
from ltm_pyro.errors import InputError, shown

# A batch then has enough pieces for many cores, and the hundreds that the library reads ahead when
# it learns are a few megabytes.
_PIECE_BYTES = 2**14
_WRITTEN_BYTES, _WRITTEN_DOCUMENTS = 2**20, 2**12
_MOST_FIELDS = 10_000
_NEAR_BYTES = 16
_SPLIT_CODES = {"": -1, **{name: code for code, name in enumerate(SPLITS)}}
_TEXT_TYPES: dict[str, DTypeLike] = {
    "text": np.uint8,
    "lengths": np.int64,
    "digests": np.uint8,
    "near": np.uint8,
    "file": np.int32,
    "offset": np.int64,
    "given": np.int8,
    "rows": np.uint8,
    "row_lengths": np.int64,
}
_MAPPED_BYTES = 2**24  # read before the mapping is emptied, or the whole text would seem to be held
# White space after a character that is none. GPT-2's expression starts a new word there whatever
# comes before and after. Bytes from 0x80 on are the last of a longer character: those that end one
# of Unicode's own spaces are left out.
_WORD_END = re.compile(rb"(?<=[\x21-\x7e\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf])[ \n]")


@dataclass(frozen=True)
class TextStore:
    """Documents, memory-mapped.

    Attributes:
        text: (n_bytes,) uint8, the documents' UTF-8 one after another.
        lengths: (n,) int64, bytes of each document, 1 or more.
        digests: (n, 32) uint8, SHA-256 of each document.
        near: (n, 16) uint8, a digest of each document's `near_form`.
        given: (n,) int8, the place in `SPLITS` of the split that the source put it in, or -1.
        table: What else is known of the documents.
        sha256: SHA-256 of `text` and of `lengths`, in hexadecimal, by these names.
    """

    text: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint8]
    near: NDArray[np.uint8]
    given: NDArray[np.int8]
    table: DocumentTable
    sha256: Mapping[str, str]

    def documents(self, chosen: NDArray[np.int64] | None = None) -> Iterator[str]:
        """The documents `chosen`, or all, one at a time."""
        return (text for text, _ in self.pieces(chosen))

    def pieces(
        self, chosen: NDArray[np.int64] | None = None, size: int | None = None
    ) -> Iterator[tuple[str, bool]]:
        """The documents `chosen`, or all, in pieces that end before white space.

        Args:
            chosen: Numbers of documents.
            size: Bytes of a piece, or some more up to the next white space; whole documents by
                default.

        Yields:
            Each piece, and whether its document ends there.
        """
        ends = np.cumsum(self.lengths)
        read = 0
        for d in range(len(self.lengths)) if chosen is None else chosen:
            start, end = int(ends[d] - self.lengths[d]), int(ends[d])
            while start < end:
                cut = None
                if size is not None and end - start > size:
                    cut = _WORD_END.search(self.text.data, start + size, end)
                stop = end if cut is None else cut.start()
                yield self.text[start:stop].tobytes().decode("utf-8"), stop == end
                read, start = read + stop - start, stop
                if read > _MAPPED_BYTES:
                    _unmap_pages(self.text)
                    read = 0


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a `TextStore`, memory-mapped, in the same documents."""

    tokens: NDArray[Any]
    """(n_tokens,) unsigned, one document after another."""
    lengths: NDArray[np.int64]
    """(n,) tokens of each document, 1 or more."""
    tokenizer: Mapping[str, Any]
    """What they were made with, as its `to_json` gave it."""


def store_text(cache: Cache, source: Source) -> TextStore:
    """The documents of `source` that are not empty, read once and kept in the cache."""

    def build(writer: EntryWriter) -> dict[str, Any]:
        fields: dict[str, int] = {}
        empty = True
        with _progress("read", None) as bar:
            for held in _chunks(source.documents(), fields):
                empty = False
                for name, values in _columns(held).items():
                    writer.append(name, np.asarray(values))
                bar.update(sum(len(data) for _, data, _ in held))
        if empty:
            raise InputError(f"corpus {shown(source.name)} is empty: give a source with text in it")
        return {"files": list(source.files), "fields": list(fields)}

    entry = cache.get(f"{source.name}-text", source.identity(), _TEXT_TYPES, build)
    arrays = dict(entry.arrays)
    own: dict[str, Any] = {
        name: arrays.pop(name) for name in ("file", "offset", "rows", "row_lengths")
    }
    table = DocumentTable(tuple(entry.meta["files"]), tuple(entry.meta["fields"]), **own)
    for name, width in (("digests", hashlib.sha256().digest_size), ("near", _NEAR_BYTES)):
        arrays[name] = arrays[name].reshape(-1, width)
    sha256 = {k: entry.sha256[k] for k in ("text", "lengths")}
    return TextStore(**arrays, table=table, sha256=sha256)


_Written = tuple[Document, bytes, bytes]
"""A document, its text as UTF-8, and its fields as `row_of` writes them."""


def _chunks(documents: Iterable[Document], fields: dict[str, int]) -> Iterator[list[_Written]]:
    """Documents that are not empty, some at a time; `fields` gets to know the fields' names."""
    held: list[_Written] = []
    size = number = 0
    for document in documents:
        data = utf8(document.text)
        if not data:
            continue
        row = row_of(document.fields, fields, f"document {number}")
        if len(fields) > _MOST_FIELDS:
            raise InputError(
                f"the records have more than {_MOST_FIELDS} different fields: leave out what "
                "differs from record to record"
            )
        held.append((document, data, row))
        size, number = size + len(data) + len(row), number + 1
        if size >= _WRITTEN_BYTES or len(held) >= _WRITTEN_DOCUMENTS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _columns(held: Sequence[_Written]) -> dict[str, Any]:
    """What is written of some documents, by the names in `_TEXT_TYPES`."""
    documents, texts, rows = zip(*held, strict=True)
    return {
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "lengths": [len(data) for data in texts],
        "digests": np.frombuffer(b"".join(map(_sha256, texts)), np.uint8),
        "near": np.frombuffer(b"".join(_near(d.text) for d in documents), np.uint8),
        "file": [document.file for document in documents],
        "offset": [document.offset for document in documents],
        "given": [_SPLIT_CODES[document.split] for document in documents],
        "rows": np.frombuffer(b"".join(rows), np.uint8),
        "row_lengths": [len(row) for row in rows],
    }


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _near(text: str) -> bytes:
    return hashlib.blake2b(near_form(text).encode(), digest_size=_NEAR_BYTES).digest()


def store_tokens(
    cache: Cache,
    text: TextStore,
    label: str,
    recipe: Mapping[str, Any],
    make: Callable[[], Tokenizer],
    largest_vocabulary: int,
) -> TokenStore:
    """The documents in `text` as tokens, kept in the cache.

    Args:
        cache: Where to keep them.
        text: The documents.
        label: Start of the entry's name.
        recipe: JSON types that, with the text, determine the tokenizer.
        make: Gives the tokenizer; called only if the tokens are not in the cache yet.
        largest_vocabulary: An upper limit of V, for the smallest dtype that holds the ids.
    """

    def build(writer: EntryWriter) -> dict[str, Any]:
        tokenizer = make()
        done = 0
        for tokens, lengths in _encoded(tokenizer, text):
            if not np.all(lengths):
                number = done + int(np.flatnonzero(lengths == 0)[0])
                raise InputError(
                    f"tokenizer {tokenizer.name!r} makes no token of document {number}: leave the "
                    "document out, or choose a tokenizer that can write it"
                )
            done += len(lengths)
            writer.append("tokens", tokens)
            writer.append("lengths", lengths)
        return {"tokenizer": tokenizer.to_json()}

    identity = {"documents": dict(text.sha256), "recipe": digest_of(recipe)}
    dtypes: dict[str, DTypeLike] = {
        "tokens": np.min_scalar_type(largest_vocabulary - 1),
        "lengths": np.int64,
    }
    entry = cache.get(f"{label}-tokens", identity, dtypes, build)
    return TokenStore(entry.arrays["tokens"], entry.arrays["lengths"], entry.meta["tokenizer"])


def training_texts(text: TextStore, chosen: NDArray[np.int64]) -> Iterator[str]:
    """The documents `chosen` for a tokenizer that learns from words: long ones come in pieces."""
    with _progress("learn", int(text.lengths[chosen].sum())) as bar:
        for piece, _ in text.pieces(chosen, _PIECE_BYTES):
            yield piece
            bar.update(len(piece))


def _encoded(tokenizer: Tokenizer, text: TextStore) -> Iterator[Part]:
    """The tokens of all documents, part by part."""
    with _progress("encode", len(text.text)) as bar:
        if not isinstance(tokenizer, StreamTokenizer):
            for document in text.documents():
                ids = checked_ids(tokenizer.encode(document), tokenizer.vocab_size)
                bar.update(len(document))
                yield ids, np.array([len(ids)])
            return

        def pieces() -> Iterator[tuple[str, bool]]:
            size = _PIECE_BYTES if tokenizer.cuts_between_words else None
            for piece, last in text.pieces(size=size):
                yield piece, last
                bar.update(len(piece))

        yield from tokenizer.encode_pieces(pieces())


def _unmap_pages(array: NDArray[np.uint8]) -> None:
    """Lets go of the pages of a mapped array; they are mapped again when they are read."""
    if isinstance(array.base, mmap.mmap) and hasattr(array.base, "madvise"):
        array.base.madvise(mmap.MADV_DONTNEED)


def _progress(what: str, total: int | None) -> Any:
    """A bar on stderr, where that is a terminal and the work takes more than a moment."""
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, disable=None, delay=1.0, leave=False
    )
