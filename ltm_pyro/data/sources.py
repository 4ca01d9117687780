"""Documents from files: one, several, those that a pattern names, and folders of them."""

from __future__ import annotations

import glob
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltm_pyro.data.blocks import block_size, blocks
from ltm_pyro.data.files import (
    PACKED_SUFFIXES,
    check_encoding,
    name_of,
    no_regular_file,
    status,
    text_chunks,
    text_size,
    unreadable,
)
from ltm_pyro.data.readers import (
    PARQUET,
    RECORDS,
    SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    number_or_text,
    parquet,
)
from ltm_pyro.data.records import Document, Reading, check_unicode, joined_names
from ltm_pyro.data.split import SPLIT_NAMES
from ltm_pyro.errors import InputError, shown

PATTERN = re.compile(r"[*?\[]")
_WORDS = re.compile(r"[^a-z0-9]+")


class FileSource:
    """Files, and folders of files.

    A .jsonl, .json, .csv, .tsv or .parquet file holds one document per record. A .txt or .md file
    is cut after blank lines into blocks whose size follows that of all the text read (see
    `block_size`); a file shorter than its block is one document. The blocks of a file put together
    give its text. All but .parquet may be packed, as .gz or .zst. A folder is read with all that is
    below it; a warning names the files that are passed over, which `skipped` keeps with the reason.

    Args:
        paths: Files and folders.
        reading: How to read them. With `given` each file belongs to the split that its name, or
            its folder's, tells; those that belong to none are passed over.
    """

    def __init__(self, *paths: Path, reading: Reading | None = None) -> None:
        reading = reading or Reading()
        self.reading = replace(reading, encoding=check_encoding(reading.encoding))
        self.skipped: dict[str, str] = {}
        self._paths: list[Path] = []
        names: list[str] = []
        for path in paths:
            for file, name in self._found(path):
                self._paths.append(file)
                names.append(plain_name(name))
        if not self._paths:
            self._refuse(paths)
        if self.skipped:
            told = [f"{name} ({reason})" for name, reason in self.skipped.items()]
            warnings.warn(f"not read: {joined_names(told)}", stacklevel=2)
        self.files = tuple(names)
        self.name = plain_name(_stem(paths[0]) if len(paths) == 1 else _stem(paths[0].parent))
        self._stats = [status(file) for file in self._paths]
        if not any(info.st_size for info in self._stats):
            raise InputError(f"{name_of(paths[0])} is empty: give a file with text in it")
        self.block = block_size(self._text_size())

    def identity(self) -> Mapping[str, Any]:
        """Path, size and time of change of every file, and how they are read."""
        files = [
            [os.fsencode(file.resolve()).hex(), name, info.st_size, info.st_mtime_ns]
            for file, name, info in zip(self._paths, self.files, self._stats, strict=True)
        ]
        how = {"encoding": self.reading.encoding, "given": self.reading.given}
        return {"source": "files", "files": files, **how, **self.reading.identity()}

    def documents(self) -> Iterator[Document]:
        """The documents, file after file in the order of their paths."""
        for number, (file, name) in enumerate(zip(self._paths, self.files, strict=True)):
            split = (split_of(name) or "") if self.reading.given else ""
            if kind_of(file) in TEXT_SUFFIXES:
                yield from self._blocks(file, number, split)
            else:
                yield from self._records(file, number, split)

    def _blocks(self, file: Path, number: int, split: str) -> Iterator[Document]:
        offset = 0
        for block in blocks(self._text(file), self.block):
            yield Document(block, number, offset, split)
            offset += len(block.encode("utf-8"))

    def _records(self, file: Path, number: int, split: str) -> Iterator[Document]:
        kind = kind_of(file)
        records = parquet(file) if kind == PARQUET else RECORDS[kind](file, self._text(file))
        for place, (where, record) in enumerate(records):
            text, fields = self.reading.take(record, where)
            if kind in TABLE_SUFFIXES:
                fields = {key: number_or_text(value) for key, value in fields.items()}
            yield Document(text, number, place, split, fields)

    def _text(self, file: Path) -> Iterator[str]:
        return text_chunks(file, self.reading.encoding, self.reading.newlines)

    def _text_size(self) -> int:
        texts = [file for file in self._paths if kind_of(file) in TEXT_SUFFIXES]
        return sum(text_size(f, self.reading.encoding, self.reading.newlines) for f in texts)

    def _found(self, path: Path) -> Iterator[tuple[Path, str]]:
        """The files that `path` gives, with their names."""
        mode = status(path).st_mode
        if stat.S_ISDIR(mode):
            for file, name in _below(path):
                reason = self._reason_to_skip(file, name)
                if reason:
                    self.skipped[plain_name(name)] = reason
                else:
                    yield file, name
            return
        if not stat.S_ISREG(mode):
            raise no_regular_file(path)
        if kind_of(path) not in SUFFIXES:
            raise InputError(f"{name_of(path)} cannot be read as text: give a {suffixes()} file")
        if self.reading.given and split_of(path.name) is None:
            raise InputError(
                f'{shown(path.name)} tells no split: with split="given" a file, or its folder, is '
                'called after "train", "val" or "test"'
            )
        yield path, path.name

    def _reason_to_skip(self, file: Path, name: str) -> str:
        if any(part.startswith(".") for part in Path(name).parts):
            return "hidden"
        if kind_of(file) not in SUFFIXES:
            return "of another kind"
        try:
            info = status(file)
        except InputError:
            return "cannot be read"
        if not stat.S_ISREG(info.st_mode):
            return "no regular file"
        if self.reading.given and split_of(name) is None:
            return "of no split"
        return ""

    def _refuse(self, paths: Sequence[Path]) -> None:
        what = f"folder {name_of(paths[0])}" if len(paths) == 1 else f"{len(paths)} folders"
        found = f"; it holds {joined_names(self.skipped)}" if self.skipped else ""
        split = (
            ' that is called after its split ("train", "val", "test")' if self.reading.given else ""
        )
        raise InputError(f"{what} holds no {suffixes()} file{split}{found}: put one there")


def expand_paths(given: str) -> list[Path]:
    """The files and folders that a path or pattern names, one at least."""
    path = as_path(given)
    if os.path.lexists(path) or not PATTERN.search(given):
        return [path]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise InputError(f"no file matches the pattern {shown(given, 200)}: check it")
    paths = [Path(name) for name in found]
    readable = [path for path in paths if kind_of(path) in SUFFIXES or os.path.isdir(path)]
    passed = [plain_name(str(path)) for path in paths if path not in readable]
    if readable and passed:
        warnings.warn(f"not read: {joined_names(passed)} (of another kind)", stacklevel=2)
    return readable or paths


def as_path(given: str | os.PathLike[str]) -> Path:
    """`given` as a path, `~` expanded; `InputError` if no file can have that name."""
    name = os.fspath(given)
    try:
        check_unicode(name, "a path")
        usable = "\0" not in name
    except (InputError, AttributeError):  # AttributeError: of bytes
        usable = False
    if not usable:
        raise InputError(
            f"{shown(name)} cannot be the path of a corpus: rename the file, with plain characters"
        )
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise InputError(
            f"{shown(name)} begins with the home folder of a user that is not known here: check "
            "the path"
        ) from None


def kind_of(file: Path) -> str:
    """The suffix that tells how to read `file`, that of its packing left off."""
    suffix = file.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        inner = file.with_suffix("").suffix.lower()
        return suffix if inner == PARQUET else inner
    return suffix


def split_of(name: str) -> str | None:
    """The split that a file's name, or else its folder's, tells; `None` where none does."""
    for part in reversed(Path(name).parts):
        words = _WORDS.split(part.lower())
        told = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if len(told) > 1:
            raise InputError(f"file {shown(name)} is called after two splits: rename it")
        if told:
            return told.pop()
    return None


def plain_name(name: str) -> str:
    """A file's name as Unicode text, whatever bytes it is made of."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def suffixes() -> str:
    """The kinds of file, for a message."""
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _below(folder: Path) -> list[tuple[Path, str]]:
    """All files below `folder` with their names there, in order; a hidden folder counts as one."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(os.fsdecode(error.filename)), error)

    found: list[Path] = []
    for parent, inner, names in os.walk(folder, onerror=refuse):
        hidden = [name for name in inner if name.startswith(".")]
        inner[:] = [name for name in inner if name not in hidden]
        found += [Path(parent, name) for name in (*names, *hidden)]
    return sorted(
        ((file, str(file.relative_to(folder))) for file in found), key=lambda pair: pair[0].parts
    )


def _stem(path: Path) -> str:
    """The name of a corpus in `path`."""
    name = path.resolve()
    packed = name.suffix.lower() in PACKED_SUFFIXES
    return (name.with_suffix("") if packed else name).stem or "text"
