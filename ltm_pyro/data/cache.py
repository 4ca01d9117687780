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
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ltm_pyro.errors import InputError, shown

ENVIRONMENT_VARIABLE = "LTM_PYRO_CACHE"
_FORMAT = 2  # part of every key: raise it when the layout or a text's extraction changes
_META = "meta.json"
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]")
_LABEL_LENGTH = 48
_UNFINISHED = "building-"
_STALE_SECONDS = 24 * 3600.0
_STAMPS = "verified.json"
# Larger files are hashed when they are first met and whenever the system says that they changed
# since: 1 GB takes a second.
_ALWAYS_VERIFIED_BYTES = 2**28


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
    """Appends to the arrays of an entry, by name, that is being built in an empty `folder`."""

    def __init__(self, folder: Path, dtypes: Mapping[str, DTypeLike]) -> None:
        self._folder = folder
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._hashes = {name: hashlib.sha256() for name in dtypes}
        self._sizes = dict.fromkeys(dtypes, 0)
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> EntryWriter:
        for name in self._dtypes:
            file = _file(self._folder, name)
            self._files[name] = self._stack.enter_context(open(file, "wb"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Adds `values` (n,) to the end of array `name`."""
        data = np.ascontiguousarray(values, dtype=self._dtypes[name]).data
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._sizes[name] += values.size

    def finish(self, meta: Mapping[str, Any]) -> str:
        """Writes `meta.json`, after which the entry is complete; returns the checksum of it all."""
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
        saved = {"sha256": digest_of(body), "body": body}
        (self._folder / _META).write_text(json.dumps(saved), encoding="utf-8")
        return str(saved["sha256"])


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
        self.folder = default_folder() if folder is None else _expanded(folder)

    def get(
        self,
        label: str,
        identity: Mapping[str, Any] | None,
        dtypes: Mapping[str, DTypeLike],
        build: Build,
    ) -> Entry:
        """The entry for `identity`, built if it is absent or damaged.

        Args:
            label: Start of the folder's name, for people.
            identity: JSON types that determine the content. `None` where only building tells: it
                is then built each time, and kept once under its own checksums.
            dtypes: Name and dtype of every array.
            build: Called when there is no good entry; turns its own input's `OSError` into
                `InputError`, so that what is left is the cache's.

        Raises:
            InputError: as `build` does, or if the disk is full. Nothing half-written stays.
        """
        label = _NOT_PLAIN.sub("_", label)[:_LABEL_LENGTH]
        if identity is not None:
            entry = _open_entry(self.folder / f"{label}-{_key(identity)}")
            if entry is not None:
                return entry
        work = self._work_folder()
        try:
            with EntryWriter(work, dtypes) as writer:
                made = writer.finish(build(writer))
            key = _key(identity if identity is not None else {"content": made})
            return _publish(work, self.folder / f"{label}-{key}")
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
        return _expanded(chosen)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "ltm_pyro" / "cache"
        )
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "ltm_pyro"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "ltm_pyro"


def _expanded(folder: object) -> Path:
    """A folder's path; an `InputError` where it cannot be one."""
    try:
        name = os.fspath(folder)  # type: ignore[call-overload]
        name = name if isinstance(name, str) else ""
        usable = bool(name) and b"\0" not in os.fsencode(name)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise InputError(f"cache folder is {shown(folder)}: must be the path of a folder")
    # Unlike `Path.expanduser`, this leaves the home folder of an unknown user as it is written.
    return Path(os.path.expanduser(name))


def digest_of(value: object) -> str:
    """SHA-256 of JSON types, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(identity: Mapping[str, Any]) -> str:
    return digest_of({"format": _FORMAT, "byteorder": sys.byteorder, "identity": identity})[:24]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _open_entry(folder: Path) -> Entry | None:
    """The entry in `folder`, or `None` where there is none or it is damaged."""
    try:
        saved = json.loads((folder / _META).read_text(encoding="utf-8"))
        body = saved["body"]
        if saved["sha256"] != digest_of(body):
            return None
        specs = {str(name): spec for name, spec in body["arrays"].items()}
        before = _read_stamps(folder)
        stamps = dict(before)
        arrays = {n: _open_array(_file(folder, n), spec, stamps) for n, spec in specs.items()}
        if stamps != before:
            with suppress(OSError):  # where it cannot be written to, the next reader verifies again
                (folder / _STAMPS).write_text(json.dumps(stamps), encoding="utf-8")
        hashes = {name: str(spec["sha256"]) for name, spec in specs.items()}
        return Entry(arrays, hashes, dict(body["meta"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open_array(file: Path, spec: Mapping[str, Any], stamps: dict[str, str]) -> NDArray[Any]:
    """The array in `file`, which must be what was written; `OSError` or `ValueError` otherwise.

    `spec` is what was written, `stamps` what the system told of large files when they were
    verified, which gets new ones.
    """
    dtype = np.dtype(spec["dtype"])
    info = file.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{file} is no regular file")
    length = info.st_size
    if length != spec["size"] * dtype.itemsize:
        raise ValueError(f"{file} has been cut")
    if length == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    # No program can set the time of the last change of a file's state (ctime).
    stamp = f"{spec['sha256']} {info.st_ino} {length} {info.st_mtime_ns} {info.st_ctime_ns}"
    if length <= _ALWAYS_VERIFIED_BYTES or stamps.get(file.name) != stamp:
        with open(file, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != spec["sha256"]:
                raise ValueError(f"{file} has been changed")
        if length > _ALWAYS_VERIFIED_BYTES:
            stamps[file.name] = stamp
    return np.memmap(file, dtype=dtype, mode="r")


def _read_stamps(folder: Path) -> dict[str, str]:
    try:
        stamps = json.loads((folder / _STAMPS).read_text(encoding="utf-8"))
        return {str(name): str(stamp) for name, stamp in stamps.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _publish(work: Path, final: Path) -> Entry:
    """Renames the finished `work` to `final`; what another process has published there wins."""
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
