"""A long text cut into documents at blank lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

_LEAST, _LARGEST = 64, 65536
# Bytes of a text whose blocks are the largest, half of them carriage returns or not.
SURELY_LARGE = 2 * (_LARGEST // 4) ** 2
# Characters that a block may grow to, in units of the block, while it waits for a blank line.
_PATIENCE = 4
# The last line break of a run of blank lines: the block ends after it.
_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n(?=[^\r\n])")
_LINE_END = re.compile(r"\n")


def block_size(text_bytes: int) -> int:
    """Characters of a block where there are `text_bytes` of text in all.

    Blocks grow with the square root (4 kB in 1 MB), so that small corpora still have documents for
    each split and large ones have long documents.
    """
    return max(_LEAST, min(_LARGEST, 4 * math.isqrt(text_bytes)))


def blocks(text: Iterator[str], size: int) -> Iterator[str]:
    """Cuts a stream of text into blocks whose concatenation is the text.

    A block ends at the first blank line after `size` characters; if there is none before
    `4 * size`, at the first line break after `size`; if there is none either, at `4 * size`. Where
    the stream is cut into chunks makes no difference.

    Args:
        text: Chunks of any length.
        size: Characters.
    """
    limit = _PATIENCE * size
    buffer = ""
    for chunk in text:
        buffer += chunk
        start = 0
        while len(buffer) - start > limit:  # one more, to see what follows a blank line
            end = _block_end(buffer, start, size, limit)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    start = 0
    while start < len(buffer):
        end = _block_end(buffer, start, size, limit)
        yield buffer[start:end]
        start = end


def _block_end(buffer: str, start: int, size: int, limit: int) -> int:
    stop = min(start + limit, len(buffer))
    # One character beyond `stop` is for the look-ahead, which the match itself leaves out.
    found = _PARAGRAPH_END.search(buffer, start + size - 1, stop + 1)
    if found is None:
        found = _LINE_END.search(buffer, start + size - 1, stop)
    return stop if found is None else found.end()
