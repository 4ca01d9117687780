"""Documents from files: .txt and .md, .jsonl, and folders of them, read as streams."""

from __future__ import annotations

import codecs
import encodings.aliases
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ltm_pyro.errors import InputError, nearest

TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIX = ".jsonl"
SUFFIXES = (*TEXT_SUFFIXES, LINES_SUFFIX)
_CHUNK_BYTES = 2**20
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 65536
# Characters that a block may grow to, in units of the block, while it waits for a blank line.
_PATIENCE = 4
# The last line break of a run of blank lines: the block ends after it.
_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n(?=[^\r\n])")
_LINE_END = re.compile(r"\n")


class Source(Protocol):
    """Where documents come from."""

    @property
    def name(self) -> str:
        """For people and for the name of the cache entry."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """JSON types that change whenever the documents may have changed."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents in source order, one at a time; empty ones are left out by the reader.

        Raises:
            InputError: where the source cannot be read.
        """
        ...


class FileSource:
    """One file, or a folder of files.

    A line of a .jsonl file is one document. A .txt or .md file is cut after blank lines into
    blocks that grow with the square root of all the text read (4 kB in 1 MB, 64 kB at most), so
    that small corpora still have documents for each split and large ones have long documents; a
    file shorter than its block is one document. The blocks of a file put together give its text,
    line endings included. In a folder, files with other suffixes and hidden ones are passed over.

    Args:
        path: The file or folder.
        encoding: Of the files.

    Raises:
        InputError: if there is nothing there to read, or `encoding` is unknown.
    """

    def __init__(self, path: Path, encoding: str = "utf-8") -> None:
        self.path = path
        self.encoding = _check_encoding(encoding)
        self.name = path.resolve().stem or "text"
        mode = _stat(path).st_mode
        self._files = _text_files(path) if stat.S_ISDIR(mode) else [_one_file(path, mode)]
        self._stats = [_stat(file) for file in self._files]
        text_bytes = sum(
            info.st_size
            for file, info in zip(self._files, self._stats, strict=True)
            if file.suffix.lower() in TEXT_SUFFIXES
        )
        self.block = max(_LEAST_BLOCK, min(_LARGEST_BLOCK, 4 * math.isqrt(text_bytes)))
        if not any(info.st_size for info in self._stats):
            raise InputError(f"{str(path)!r} is empty: give a file with text in it")

    def identity(self) -> Mapping[str, Any]:
        """Path, size and time of change of every file, and the encoding."""
        files = [
            [str(file.resolve()), info.st_size, info.st_mtime_ns]
            for file, info in zip(self._files, self._stats, strict=True)
        ]
        return {"source": "files", "files": files, "encoding": self.encoding}

    def documents(self) -> Iterator[str]:
        """The documents, file after file in the order of their paths."""
        for file in self._files:
            text = _decoded(file, self.encoding)
            if file.suffix.lower() == LINES_SUFFIX:
                yield from _json_texts(file, text)
            else:
                yield from blocks(text, self.block)


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


def _json_texts(file: Path, text: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(file)!r}"
        try:
            record = json.loads(line.removeprefix("\ufeff"))
        except ValueError as error:
            raise InputError(
                f"{where} is not JSON ({str(error).partition(':')[0]}): each line must be one JSON "
                'object with a string "text"'
            ) from None
        except RecursionError:
            raise InputError(f"{where} is nested too deeply to be read") from None
        value = record.get("text") if isinstance(record, dict) else None
        if not isinstance(value, str):
            raise InputError(
                f'{where} has no string "text": each line must be a JSON object like '
                '{"text": "..."}'
            )
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{where} holds a lone surrogate (\\uD800 to \\uDFFF), which is not valid Unicode "
                "text: write the file's escapes in pairs"
            ) from None
        yield value


def _lines(text: Iterator[str]) -> Iterator[str]:
    """Lines that end with a line feed only: JSON strings may hold other Unicode line breaks."""
    held: list[str] = []
    for chunk in text:
        *complete, rest = chunk.split("\n")
        for line in complete:
            yield "".join([*held, line])
            held.clear()
        held.append(rest)
    yield "".join(held)


def _decoded(file: Path, encoding: str) -> Iterator[str]:
    """The text of `file` in chunks; no line ending is touched."""
    decoder = codecs.getincrementaldecoder(encoding)()
    consumed = 0
    try:
        with open(file, "rb") as stream:
            while True:
                chunk = stream.read(_CHUNK_BYTES)
                consumed += len(chunk)
                yield decoder.decode(chunk, final=not chunk)
                if not chunk:
                    return
    except UnicodeDecodeError as error:
        # The decoder was given what it had held back before this chunk and the chunk itself.
        offset = consumed - len(error.object) + error.start
        wrong = error.object[error.start]
        other = "latin-1" if encoding == "utf-8" else "utf-8"
        raise InputError(
            f"{str(file)!r} is not {encoding}: byte {offset} is 0x{wrong:02x} ({error.reason}); "
            f"name its encoding, e.g. --encoding {other}"
        ) from None
    except UnicodeError as error:  # e.g. UTF-16 without its byte order mark
        raise InputError(
            f"{str(file)!r} is not {encoding}: {error}; name its encoding, e.g. --encoding utf-8"
        ) from None
    except OSError as error:
        raise _unreadable(file, error) from None


def _check_encoding(encoding: str) -> str:
    """The canonical name of `encoding`."""
    try:
        name = codecs.lookup(encoding).name
        bytes(8).decode(name, "ignore")  # refuses codecs that are not about text, such as hex
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        guess = nearest(encoding, [n.replace("_", "-") for n in encodings.aliases.aliases])
        hint = f"did you mean {guess!r}? " if guess else ""
        raise InputError(
            f"unknown encoding {encoding!r}: {hint}try utf-8, utf-16, latin-1 or cp1252"
        ) from None
    return name


def _one_file(path: Path, mode: int) -> Path:
    if not stat.S_ISREG(mode):
        raise InputError(f"{str(path)!r} is neither a file nor a folder: give a {_suffixes()} file")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{str(path)!r} cannot be read as text: give a {_suffixes()} file")
    return path


def _text_files(folder: Path) -> list[Path]:
    """All text files below `folder`, in the order of their paths."""

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    ]
    inside = [(file.relative_to(folder).parts, file) for file in found]
    files = [file for parts, file in sorted(inside) if not any(p.startswith(".") for p in parts)]
    if not files:
        raise InputError(f"folder {str(folder)!r} holds no {_suffixes()} file: put one there")
    return files


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise InputError(f"there is no file or folder {str(path)!r}: check the path") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot read {str(path)!r}: {error.strerror or error}; check the path and its permissions"
    )


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
