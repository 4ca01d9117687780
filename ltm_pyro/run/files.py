"""Files that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ltm_pyro.errors import InputError

PARTIAL = ".partial"
"""Ending of a file or folder that is still being written; a later write takes its place."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into an `InputError` of one line about `target`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {str(target)!r}: {error.strerror or error}; free some space or choose a "
            "folder that can be written to"
        ) from None


def write_atomic(target: Path, data: bytes | memoryview) -> None:
    """Puts `data` at `target` so that every reader, at any moment, finds the old file or the new.

    `InputError` if it cannot be written; the old file, if any, is then still there.
    """
    refuse_irregular(target)
    partial = partial_of(target)
    with writing(target):
        try:
            partial.unlink(missing_ok=True)  # of a killed process; it may be a link
            with open(partial, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
            sync_folder(target.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def refuse_irregular(target: Path) -> None:
    """Refuses to put a file in the place of what is no regular file."""
    with writing(target):
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            return
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        what = f"a link: name the file that it leads to, {os.path.realpath(target)!r}"
    else:
        kind = next((name for test, name in _KINDS if test(mode)), "no regular file")
        what = f"{kind}, which no file can replace: choose another"
    raise InputError(f"cannot write {str(target)!r}: it is {what}")


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is renamed: on the same file system, and hidden."""
    return target.with_name(f".{target.name}{PARTIAL}")


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a loss of power, where the system offers that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """`value` as JSON for people, the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def refuse_protected(folder: Path) -> None:
    """Refuses a folder that nobody may write to, before any work is lost on it.

    The permission bits count for the superuser too: a folder that was made read-only is meant to
    stay as it is.
    """
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"cannot write {str(folder)!r}: {str(place)!r} is not a folder")
    if not (place.stat().st_mode & 0o222) or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"cannot write {str(folder)!r}: {str(place)!r} is read-only; choose another folder "
            "with --out, or change its permissions"
        )


def followed(folder: Path) -> Path:
    """`folder`, or what it leads to where it is a link: the link stays, whatever is put there."""
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def new_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Makes `folder`, which must not exist or be empty, with `files` by relative path in it.

    Where it cannot be written nothing of it is left, nor of folders above it that had to be made.
    """
    made = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    partial = partial_of(folder)
    with writing(folder):
        try:
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            for name, data in files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, data)
            partial.replace(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise
