"""Bytes and words of the raw text that tokens stand for: by these, tokenizers can be compared.

A byte belongs to the token that writes it, and a word (white space parts words, as in `str.split`)
to the token in which it begins. So the pieces of a document have as many bytes and words together
as its text, however it was tokenised and cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.data.tokenizer import SymbolTokenizer, Tokenizer

_REACH = 4  # tokens that hold a character whole: the longest of UTF-8 has four bytes


class TextUnits:
    """Counts the bytes and words of runs of one document's tokens.

    How they are found depends on the tokenizer: from the bytes of each token, exactly, where every
    token stands for bytes (bytes, GPT-2's and every learned vocabulary); from the raw text and the
    tokens' places in it, exactly, for other pipelines of the library `tokenizers`; and from what
    `decode` gives where neither is known.

    Args:
        tokenizer: Of the tokens.
        tokens: (n,) all tokens of the document.
        text: Its raw text, if known.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: NDArray[Any], text: str | None) -> None:
        self._decode = tokenizer.decode
        self._tokens = tokens
        self._table: Sequence[bytes] | None = getattr(tokenizer, "token_bytes", None)
        starts = getattr(tokenizer, "starts", None)
        self._text, self._starts = text, None
        if self._table is None and starts is not None and text is not None:
            places = starts(text)
            if len(places) == len(tokens):  # else it was cut where this tokenizer sees a difference
                self._starts = np.append(places, len(text))
                self._starts[0] = 0

    def __call__(self, begin: int, end: int) -> tuple[int, int]:
        """Bytes and words of the tokens from `begin` to `end`."""
        if self._table is not None:
            return self._of_bytes(self._table, begin, end)
        if self._starts is not None and self._text is not None:
            first, last = int(self._starts[begin]), int(self._starts[end])
            before, piece = self._text[max(first - 1, 0) : first], self._text[first:last]
        else:
            before = self._decode(self._tokens[max(begin - _REACH, 0) : begin])[-1:]
            piece = self._decode(self._tokens[begin:end])
        return len(piece.encode("utf-8", errors="replace")), _words(before, piece)

    def _of_bytes(self, table: Sequence[bytes], begin: int, end: int) -> tuple[int, int]:
        first = max(begin - _REACH, 0)
        before, piece, after = (
            b"".join(table[i] for i in self._tokens[a:b].tolist())
            for a, b in ((first, begin), (begin, end), (end, end + _REACH))
        )
        whole = before + piece + after
        # A character that is cut in two belongs to where it begins.
        start = _next_character(whole, len(before))
        stop = _next_character(whole, len(before) + len(piece))
        last = whole[:start].decode("utf-8", errors="replace")[-1:]
        words = _words(last, whole[start:stop].decode("utf-8", errors="replace"))
        return len(piece), words


def _next_character(data: bytes, place: int) -> int:
    """The first place from `place` on where a character of UTF-8 begins."""
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def _words(before: str, piece: str) -> int:
    """Words that begin in `piece`, which follows the character `before`."""
    goes_on = bool(before) and not before.isspace() and bool(piece) and not piece[0].isspace()
    return len(piece.split()) - goes_on


def runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where `mask` (T,) is true, as places (begin, end)."""
    out, place = [], 0
    for value, group in groupby(mask.tolist()):
        size = sum(1 for _ in group)
        if value:
            out.append((place, place + size))
        place += size
    return out


def has_text(tokenizer: Tokenizer | None) -> bool:
    """Whether tokens stand for text: the symbols of a synthetic corpus do not."""
    return tokenizer is not None and not isinstance(tokenizer, SymbolTokenizer)
