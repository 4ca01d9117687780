"""Text and tokens of a corpus on disk, streamed document by document.

The text of every corpus is stored once, as UTF-8; it is also the token array of the byte tokenizer.
Other tokenizers read it from there, so that the source is read in a single pass and what one
tokenizer is trained on is what all of them encode. Memory does not grow with the text, nor, once it
is stored, with the length of a document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tqdm.auto import tqdm

from ltm_pyro.data.cache import Cache, EntryWriter, digest_of
from ltm_pyro.data.sources import Source
from ltm_pyro.data.tokenizer import Part, StreamTokenizer, Tokenizer, utf8
from ltm_pyro.errors import InputError

# A batch then has enough pieces for many cores, and the hundreds that the library reads ahead when
# it learns are a few megabytes.
_PIECE_BYTES = 2**14
_WRITTEN_BYTES = 2**20
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
        sha256: SHA-256 of `text` and of `lengths`, in hexadecimal, by these names.
    """

    text: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint8]
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
        for d in range(len(self.lengths)) if chosen is None else chosen:
            start, end = int(ends[d] - self.lengths[d]), int(ends[d])
            while start < end:
                cut = None
                if size is not None and end - start > size:
                    cut = _WORD_END.search(self.text.data, start + size, end)
                stop = end if cut is None else cut.start()
                yield self.text[start:stop].tobytes().decode("utf-8"), stop == end
                start = stop


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a `TextStore`, memory-mapped, in the same documents.

    Attributes:
        tokens: (n_tokens,) unsigned, one document after another.
        lengths: (n,) int64, tokens of each document, 1 or more.
        tokenizer: What they were made with, as its `to_json` gave it.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    tokenizer: Mapping[str, Any]


def store_text(cache: Cache, source: Source) -> TextStore:
    """The documents of `source` that are not empty, read once and kept in the cache.

    Raises:
        InputError: if the source cannot be read or holds no text.
    """

    def build(writer: EntryWriter) -> dict[str, Any]:
        held: list[bytes] = []
        size, empty = 0, True

        def write() -> None:
            writer.append("text", np.frombuffer(b"".join(held), dtype=np.uint8))
            writer.append("lengths", np.array([len(data) for data in held]))
            digests = b"".join(hashlib.sha256(data).digest() for data in held)
            writer.append("digests", np.frombuffer(digests, dtype=np.uint8))
            held.clear()

        with _progress("read", None) as bar:
            for document in source.documents():
                data = utf8(document)
                if not data:
                    continue
                held.append(data)
                size, empty = size + len(data), False
                if size >= _WRITTEN_BYTES:
                    write()
                    bar.update(size)
                    size = 0
            if held:
                write()
        if empty:
            raise InputError(f"corpus {source.name!r} is empty: give a source with text in it")
        return {}

    dtypes = {"text": np.uint8, "lengths": np.int64, "digests": np.uint8}
    entry = cache.get(f"{source.name}-text", source.identity(), dtypes, build)
    text, lengths = entry.arrays["text"], entry.arrays["lengths"]
    digests = entry.arrays["digests"].reshape(-1, hashlib.sha256().digest_size)
    return TextStore(text, lengths, digests, {k: entry.sha256[k] for k in ("text", "lengths")})


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

    Raises:
        InputError: as `make` does.
    """

    def build(writer: EntryWriter) -> dict[str, Any]:
        tokenizer = make()
        for tokens, lengths in _encoded(tokenizer, text):
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
                ids = tokenizer.encode(document)
                bar.update(len(document))
                yield ids, np.array([len(ids)])
            return

        def pieces() -> Iterator[tuple[str, bool]]:
            size = _PIECE_BYTES if tokenizer.cuts_between_words else None
            for piece, last in text.pieces(size=size):
                yield piece, last
                bar.update(len(piece))

        yield from tokenizer.encode_pieces(pieces())


def _progress(what: str, total: int | None) -> Any:
    """A bar on stderr, where that is a terminal and the work takes more than a moment."""
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, disable=None, delay=1.0, leave=False
    )
