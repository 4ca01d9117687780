"""Text and tokens of a corpus on disk, streamed document by document.

The text of every corpus is stored once, as UTF-8; it is also the token array of the byte tokenizer.
Other tokenizers read it from there, so that the source is read in a single pass and what one
tokenizer is trained on is what all of them encode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ltm_pyro.data.cache import Cache, EntryWriter, digest_of
from ltm_pyro.data.sources import Source
from ltm_pyro.data.tokenizer import Tokenizer, utf8
from ltm_pyro.errors import InputError


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
        ends = np.cumsum(self.lengths)
        for d in range(len(self.lengths)) if chosen is None else chosen:
            yield self.text[ends[d] - self.lengths[d] : ends[d]].tobytes().decode("utf-8")


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
        empty = True
        for document in source.documents():
            data = utf8(document)
            if not data:
                continue
            empty = False
            writer.append("text", np.frombuffer(data, dtype=np.uint8))
            writer.append("lengths", np.array([len(data)]))
            digest = hashlib.sha256(data).digest()
            writer.append("digests", np.frombuffer(digest, dtype=np.uint8))
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
        for document in text.documents():
            ids = tokenizer.encode(document)
            writer.append("tokens", ids)
            writer.append("lengths", np.array([len(ids)]))
        return {"tokenizer": tokenizer.to_json()}

    identity = {"documents": dict(text.sha256), "recipe": digest_of(recipe)}
    dtypes: dict[str, DTypeLike] = {
        "tokens": np.min_scalar_type(largest_vocabulary - 1),
        "lengths": np.int64,
    }
    entry = cache.get(f"{label}-tokens", identity, dtypes, build)
    return TokenStore(entry.arrays["tokens"], entry.arrays["lengths"], entry.meta["tokenizer"])
