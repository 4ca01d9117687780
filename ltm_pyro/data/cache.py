"""Arrays on disk: written once as a stream, published whole, memory-mapped ever after.

An entry is a folder `LABEL-KEY` with one flat file per array and a `meta.json`. It is written under
a temporary name and renamed, so a reader sees all of it or nothing, and two processes that build
the same entry do not disturb each other. An entry that is damaged is built again. Nothing refers to
an entry from outside: to clear the cache, delete the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ltm_pyro.errors import InputError

ENVIRONMENT_VARIABLE = "LTM_PYRO_CACHE"
_FORMAT = 1  # part of every key: raise it when the layout or a text's extraction changes
_META = "meta.json"
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]")
_LABEL_LENGTH = 48
_UNFINISHED = "building-"
_STALE_SECONDS = 24 * 3600.0
_VERIFIED_BYTES = 64 * 2**20  # larger files are checked by length alone: hashing them takes seconds


@dataclass(frozen=True)
class Entry:
    """What the cache gives back.

    Attributes:
        arrays: Memory-mapped, read-only, one-dimensional arrays by name.
        sha256: SHA-256 of each array's bytes, by the same names.
        meta: What the builder returned.
    """

    arrays: Mapping[str, NDArray[Any]]
    sha256: Mapping[str, str]
    meta: Mapping[str, Any]


class EntryWriter:
    """Appends to the arrays of an entry that is being built.

    Args:
        folder: Exists and is empty.
        dtypes: Name and dtype of every array.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, DTypeLike]) -> None:
        self._folder = folder
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._hashes = {name: hashlib.sha256() for name in dtypes}
        self._sizes = dict.fromkeys(dtypes, 0)
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> EntryWriter:
        for name in self._dtypes:
            self._files[name] = self._stack.enter_context(
                open(_array_file(self._folder, name), "wb")
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Adds `values` (n,) to the end of array `name`."""
        data = np.ascontiguousarray(values, dtype=self._dtypes[name]).data
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._sizes[name] += values.size

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Writes `meta.json`, after which the entry is complete."""
        self._stack.close()
        arrays = {
            name: {
                "dtype": self._dtypes[name].str,
                "size": self._sizes[name],
                "sha256": self._hashes[name].hexdigest(),
            }
            for name in self._dtypes
        }
        body = {"arrays": arrays, "meta": dict(meta)}
        text = json.dumps({"sha256": digest_of(body), "body": body})
        (self._folder / _META).write_text(text, encoding="utf-8")


Build = Callable[[EntryWriter], Mapping[str, Any]]
"""Streams an entry's arrays into the writer and returns its metadata."""


class Cache:
    """A folder of entries.

    Args:
        folder: Where to keep them; `None` means `$LTM_PYRO_CACHE`, or else the user's cache folder
            (`~/.cache/ltm_pyro` on Linux). A folder that cannot be written to is replaced by a
            temporary one that goes with this object; arrays that are mapped by then stay readable.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()

    def get(
        self,
        label: str,
        identity: Mapping[str, Any],
        dtypes: Mapping[str, DTypeLike],
        build: Build,
    ) -> Entry:
        """The entry for `identity`, built if it is absent or damaged.

        Args:
            label: Start of the folder's name, for people.
            identity: JSON types that determine the content.
            dtypes: Name and dtype of every array.
            build: Called when there is no good entry; turns its own input's `OSError` into
                `InputError`, so that what is left is the cache's.

        Raises:
            InputError: as `build` does, or if the disk is full. Nothing half-written stays.
        """
        name = f"{_NOT_PLAIN.sub('_', label)[:_LABEL_LENGTH]}-{_key(identity)}"
        final = self.folder / name
        entry = _open_entry(final)
        if entry is not None:
            return entry
        work = self._work_folder()
        final = self.folder / name  # the folder may have been replaced by a temporary one
        try:
            with EntryWriter(work, dtypes) as writer:
                writer.finish(build(writer))
            return _publish(work, final)
        except OSError as error:
            raise InputError(
                f"cannot write the token cache in {str(self.folder)!r}: {error.strerror or error}; "
                f"free some space or point {ENVIRONMENT_VARIABLE} to another folder"
            ) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _work_folder(self) -> Path:
        """A fresh folder on the same file system as the entries, so that renaming is atomic."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
            return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise InputError(
                    f"no space left for the token cache in {str(self.folder)!r}: free some, or "
                    f"point {ENVIRONMENT_VARIABLE} to another folder"
                ) from None
        self.folder = Path(tempfile.mkdtemp(prefix="ltm_pyro-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))


def default_folder() -> Path:
    """`$LTM_PYRO_CACHE`, or the platform's folder for caches."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "ltm_pyro" / "cache"
        )
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "ltm_pyro"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "ltm_pyro"


def digest_of(value: object) -> str:
    """SHA-256 of JSON types, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(identity: Mapping[str, Any]) -> str:
    return digest_of({"format": _FORMAT, "byteorder": sys.byteorder, "identity": identity})[:24]


def _array_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _open_entry(folder: Path) -> Entry | None:
    """The entry in `folder`, or `None` where there is none or it is damaged."""
    try:
        saved = json.loads((folder / _META).read_text(encoding="utf-8"))
        body = saved["body"]
        if saved["sha256"] != digest_of(body):
            return None
        specs = {str(name): spec for name, spec in body["arrays"].items()}
        arrays = {
            name: _open_array(_array_file(folder, name), spec) for name, spec in specs.items()
        }
        hashes = {name: str(spec["sha256"]) for name, spec in specs.items()}
        return Entry(arrays, hashes, dict(body["meta"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open_array(file: Path, spec: Mapping[str, Any]) -> NDArray[Any]:
    """The array in `file`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what was written.
    """
    dtype = np.dtype(spec["dtype"])
    length = file.stat().st_size
    if length != spec["size"] * dtype.itemsize:
        raise ValueError(f"{file} has been cut")
    if length == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    array: NDArray[Any] = np.memmap(file, dtype=dtype, mode="r")
    if length <= _VERIFIED_BYTES and hashlib.sha256(array.data).hexdigest() != spec["sha256"]:
        raise ValueError(f"{file} has been changed")
    return array


def _publish(work: Path, final: Path) -> Entry:
    """Renames the finished `work` to `final`; what another process has published there wins.

    Raises:
        OSError: if the entry cannot be put in place.
    """
    try:
        work.rename(final)
    except OSError:
        entry = _open_entry(final)
        if entry is not None:
            return entry
        # A damaged entry: moved away first, because a reader may still have its files mapped.
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=final.parent) as aside:
            final.rename(Path(aside) / final.name)
        work.rename(final)
    entry = _open_entry(final)
    if entry is None:
        raise OSError(errno.EIO, "what was just written reads back differently")
    return entry


def _sweep(folder: Path) -> None:
    """Removes what killed processes have left behind."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        try:
            stale = time.time() - left.stat().st_mtime > _STALE_SECONDS
        except OSError:
            continue  # another process has just finished with it
        if stale:
            shutil.rmtree(left, ignore_errors=True)
