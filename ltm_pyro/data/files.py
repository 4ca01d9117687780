"""Files as they lie on disk: regular ones only, unpacked and decoded by their first bytes.

A packed file (gzip, zstandard) and a text in UTF-16 or UTF-32 are recognised by what they begin
with, whatever they are called; the byte order mark is no text and is removed. Nothing is read
beyond a size that the file itself sets.
"""

from __future__ import annotations

import codecs
import encodings.aliases
import gzip
import importlib
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from ltm_pyro.data.blocks import SURELY_LARGE
from ltm_pyro.errors import InputError, did_you_mean, shown
from ltm_pyro.reading import open_regular

Newlines = Literal["lf", "keep"] | None
PACKED_SUFFIXES = (".gz", ".zst")
CHUNK_BYTES = 2**20
_LONGEST_NAME = 200
_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# Text shrinks to a fifth, a very repetitive one to a fiftieth; 64 MB for short files of one word.
_LARGEST_RATIO, _ALWAYS_BYTES = 200, 2**26
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Where the zeros lie in the Latin letters of a text in UTF-16 or UTF-32 that has no mark.
_ZEROS = (
    (4, {1, 2, 3}, "utf-32-le"),
    (4, {0, 1, 2}, "utf-32-be"),
    (2, {1}, "utf-16-le"),
    (2, {0}, "utf-16-be"),
)
_OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\xfd7zXZ\x00", "packed by xz"),
    (b"%PDF-", "a PDF"),
    (b"PAR1", "a parquet table (call it .parquet)"),
    (b"ARROW1", "an Arrow table"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3\x00", "a database"),
)
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
_MOST_CONTROLS = 0.05
"""Share of a text's characters; random bytes read as Latin-1 have a quarter."""
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def status(path: Path) -> os.stat_result:
    """What the system tells about `path`, links followed."""
    try:
        return path.stat()
    except FileNotFoundError:
        raise InputError(f"there is no file or folder {name_of(path)}: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise unreadable(path, error) from None


def name_of(path: Path | str) -> str:
    """The path for one line of a message: not endless, and nothing in it that a terminal obeys."""
    name = str(path)
    name = name if len(name) <= _LONGEST_NAME else f"...{name[-_LONGEST_NAME:]}"
    return repr(name) if name.isprintable() else ascii(name)


def unreadable(path: Path | str, error: Exception) -> InputError:
    """The error of a path that cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot read {name_of(path)}: {reason}; check the path and its permissions")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of the regular file `path`, unpacked where it is packed."""
    try:
        with open_regular(path, links=True) as raw:
            size, first = os.fstat(raw.fileno()).st_size, raw.peek(8)
            largest = max(_ALWAYS_BYTES, _LARGEST_RATIO * size)
            if first.startswith(_GZIP):
                packed = gzip.GzipFile(fileobj=raw)
                yield _limited(cast("BinaryIO", packed), largest, path)
            elif first.startswith(_ZSTANDARD):
                library = _zstandard(path).ZstdDecompressor()
                yield _limited(library.stream_reader(raw, read_across_frames=True), largest, path)
            elif first and path.suffix.lower() in PACKED_SUFFIXES:
                raise InputError(
                    f"{name_of(path)} is packed neither by gzip nor by zstandard: take "
                    f"{path.suffix} off its name if it is plain"
                )
            else:
                yield _limited(raw, size, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise _damaged(path, error) from None
        raise


def no_regular_file(path: Path) -> InputError:
    """The error of a device, a FIFO, a socket."""
    return InputError(
        f"{name_of(path)} is neither a file nor a folder: give a regular file or a folder"
    )


def text_chunks(path: Path, encoding: str, newlines: Newlines = None) -> Iterator[str]:
    """The text of `path`, packed or not, in chunks without its byte order mark.

    `encoding` is for one without a mark; `keep` leaves line ends, which else become line feeds.
    """
    with opened(path) as stream:
        chunk = stream.read(CHUNK_BYTES)
        _refuse_other_kinds(path, chunk)
        encoding, skipped = _recognised(chunk, encoding)
        decoder = codecs.getincrementaldecoder(encoding)()
        # The library's own translation of line ends, over any decoder.
        text = io.IncrementalNewlineDecoder(decoder, True) if newlines != "keep" else decoder
        chunk, consumed = chunk[skipped:], skipped
        while True:
            consumed += len(chunk)
            try:
                decoded = text.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_text(path, encoding, error, consumed) from None
            except UnicodeError as error:  # e.g. UTF-16 without its byte order mark
                raise InputError(
                    f"{name_of(path)} is not {encoding}: {error}; name its encoding, e.g. "
                    "--encoding utf-8"
                ) from None
            _refuse_controls(path, encoding, decoded)
            yield decoded
            if not chunk:
                return
            chunk = stream.read(CHUNK_BYTES)


def text_size(path: Path, encoding: str, newlines: Newlines = None) -> int:
    """Bytes that the text of `path` has as UTF-8: the same for all files that hold one text.

    But for those whose size can tell `block_size` no more: they are not read.
    """
    with opened(path) as stream:
        chunk = stream.read(CHUNK_BYTES)
        found, skipped = _recognised(chunk, encoding)
        if isinstance(stream, _Limited) and stream.plain and found in ("utf-8", "ascii"):
            size = status(path).st_size - skipped
            counts = newlines != "keep" and size < SURELY_LARGE
            return max(0, size - _carriages(chunk, stream) if counts else size)
    # A surrogate cannot come out of a decoder, so that every chunk can be encoded.
    return sum(len(chunk.encode("utf-8")) for chunk in text_chunks(path, encoding, newlines))


def _carriages(chunk: bytes, stream: BinaryIO) -> int:
    """How many line ends of `chunk` and what follows it are CR LF: bytes that `lf` takes away."""
    count = 0
    while chunk:
        count += chunk.count(b"\r\n")
        following = stream.read(CHUNK_BYTES)
        count += chunk.endswith(b"\r") and following.startswith(b"\n")
        chunk = following
    return count


def check_encoding(encoding: str) -> str:
    """The canonical name of `encoding`."""
    try:
        name = codecs.lookup(encoding).name
        bytes(8).decode(name, "ignore")  # refuses codecs that are not about text, such as hex
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError, TypeError):
        names = [n.replace("_", "-") for n in encodings.aliases.aliases]
        hint = did_you_mean(encoding, names)
        raise InputError(
            f"unknown encoding {shown(encoding)}: {hint}try utf-8, utf-16, latin-1 or cp1252"
        ) from None
    return name


class _Limited(io.RawIOBase):
    """A stream that ends in an error rather than beyond `largest` bytes."""

    def __init__(self, stream: BinaryIO, largest: int, path: Path) -> None:
        self._stream, self._left, self._path = stream, largest, path
        self.plain = isinstance(stream, io.BufferedReader)

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data = self._stream.read(-1 if size is None else size)
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{name_of(self._path)} unpacks to far more than text would, or grows while it is "
                "read: unpack or copy it first"
            )
        return data


def _limited(stream: BinaryIO, largest: int, path: Path) -> BinaryIO:
    return cast("BinaryIO", _Limited(stream, largest, path))


def _zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ModuleNotFoundError:
        raise InputError(
            f"{name_of(path)} is packed by zstandard, and to read it an optional package is "
            'needed: pip install "ltm-pyro[data]"'
        ) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{name_of(path)} is packed and damaged ({error}): unpack or copy it again")


def _recognised(first: bytes, encoding: str) -> tuple[str, int]:
    """The encoding that a text beginning with `first` is in, and the bytes of its mark."""
    for mark, name in _MARKS:
        if first.startswith(mark):
            return name, len(mark)
    start = first[:16]
    if b"\0" in start and not encoding.startswith(("utf-16", "utf-32")):
        for width, zeros, name in _ZEROS:
            whole = start[: len(start) // width * width]
            if len(whole) >= 4 and all(
                (b == 0) == (i % width in zeros) for i, b in enumerate(whole)
            ):
                return name, 0
    return encoding, 0


def _refuse_other_kinds(path: Path, first: bytes) -> None:
    for start, kind in _OTHER_KINDS:
        if first.startswith(start):
            raise InputError(f"{name_of(path)} is {kind}, not text: give the text that is in it")
    if _BZIP2.match(first):
        raise InputError(f"{name_of(path)} is packed by bzip2, not text: unpack it")


def _refuse_controls(path: Path, encoding: str, decoded: str) -> None:
    # Encodings of one byte a character take anything, random bytes too; Unicode's refuse those.
    if encoding.startswith("utf"):
        return
    controls = len(_NO_TEXT.findall(decoded))
    if controls > _MOST_CONTROLS * len(decoded):
        raise InputError(
            f"{name_of(path)} is no text in {encoding}: {controls / len(decoded):.0%} of its "
            "characters are control characters; give text, or name its encoding"
        )


def _not_text(path: Path, encoding: str, error: UnicodeDecodeError, consumed: int) -> InputError:
    # The decoder was given what it had held back before this chunk and the chunk itself.
    offset = consumed - len(error.object) + error.start
    wrong = f"byte {offset} is 0x{error.object[error.start]:02x} ({error.reason})"
    if _CONTROL.search(error.object):
        return InputError(
            f"{name_of(path)} is not {encoding}: {wrong}, and control characters among the rest; "
            "it is no text, or in another encoding such as utf-16"
        )
    other = "latin-1" if encoding == "utf-8" else "utf-8"
    return InputError(
        f"{name_of(path)} is not {encoding}: {wrong}; name its encoding, e.g. --encoding {other}"
    )
