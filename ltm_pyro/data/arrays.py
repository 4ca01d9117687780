"""Documents from arrays of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.data.blocks import block_size
from ltm_pyro.data.records import Document
from ltm_pyro.data.tokenizer import Tokenizer, checked_ids
from ltm_pyro.errors import InputError


class ArraySource:
    """Token ids, and the text that they stand for.

    Args:
        data: (n,), cut into documents of whole sequences as a text file is cut into blocks; or
            (N, n), one document per row.
        tokenizer: By which the ids were made.
        seq_len: T.
        name: For people.

    Attributes:
        tokens: (n_tokens,) the ids, one document after another.
        lengths: (n_documents,) tokens of each document.
    """

    files = ("",)

    def __init__(self, data: object, tokenizer: Tokenizer, seq_len: int, name: str) -> None:
        if getattr(data, "is_meta", False):
            raise InputError("an array on the meta device has no token ids: give one that has")
        array = np.asarray(data.detach().cpu() if hasattr(data, "detach") else data)
        if array.ndim not in (1, 2) or array.dtype.kind not in "iu" or not array.size:
            raise InputError(
                f"an array of {array.dtype} and shape {array.shape} is no corpus: give token ids, "
                "whole numbers of shape (n,) or (documents, n)"
            )
        try:
            ids = checked_ids(array.reshape(-1), tokenizer.vocab_size)
        except InputError as error:
            raise InputError(
                f"{error} of tokenizer {tokenizer.name!r}: give tokenizer=..., with which the ids "
                "were made"
            ) from None
        self.tokens: NDArray[Any] = ids.astype(np.min_scalar_type(tokenizer.vocab_size - 1))
        if array.ndim == 2:
            self.lengths = np.full(len(array), array.shape[1], dtype=np.int64)
        else:
            size = -(-block_size(array.size) // seq_len) * seq_len
            ends = np.append(np.arange(size, array.size, size), array.size)
            self.lengths = np.diff(ends, prepend=0)
        self.name = name
        self.tokenizer = tokenizer

    def identity(self) -> None:
        """Only reading tells what is in it."""

    def documents(self) -> Iterator[Document]:
        """The text of each document; a character cut in two becomes U+FFFD."""
        end = 0
        for number, length in enumerate(self.lengths):
            start, end = end, end + int(length)
            text = self.tokenizer.decode(self.tokens[start:end])
            if not text:
                raise InputError(f"document {number} of the array decodes to no text: leave it out")
            yield Document(text, 0, number)
