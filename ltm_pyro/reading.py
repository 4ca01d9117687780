"""Files as they are read: regular ones alone, of bounded size and depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from ltm_pyro.errors import InputError, shown

LARGEST_JSON = 2**26
"""Bytes; a tokenizer's vocabulary is the largest there is."""
DEEPEST_JSON = 50


def as_path(what: str, name: str | Path) -> Path:
    """The path `name`, which messages call `what`; `InputError` if no file can have that name."""
    path = Path(name)
    try:
        os.lstat(path)
    except ValueError:
        raise InputError(f"{what} {shown(str(name))} is no name of a file: it holds NUL") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise InputError(
                f"{what} {shown(str(name))} is no name of a file: {error.strerror}"
            ) from None
    return path


def open_regular(path: Path, *, links: bool = False) -> BufferedReader:
    """Opens the regular file `path` for reading, and never waits for anyone.

    `OSError` if it is a pipe, a device, a folder or, without `links`, a link.
    """
    found = os.stat(path) if links else os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is a link" if stat.S_ISLNK(found.st_mode) else "it is no regular file")
    # What the name stands for may have changed since it was looked at.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    stream = open(os.open(path, flags), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError("it is no regular file")
    return stream


def read_bytes(path: Path, owner: str, *, most: int | None = None, cut: bool = False) -> bytes:
    """The bytes in `path`; `InputError` about its `owner` where they cannot be read.

    A file of more than `most` bytes is refused; or, with `cut`, no more of it is read.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if most is not None and size > most and not cut:
                raise damaged(owner, f"{path.name} is larger than {most} bytes")
            return stream.read(-1 if most is None else most)
    except FileNotFoundError:
        raise damaged(owner, f"{path.name} is missing") from None
    except MemoryError:
        raise damaged(owner, f"{path.name} is larger than the memory") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise damaged(owner, f"{path.name} cannot be read ({why})") from None


def read_json(path: Path, owner: str) -> dict[str, Any]:
    """The JSON object in `path`; `InputError` about its `owner` where it cannot be read as one."""
    data = read_bytes(path, owner, most=LARGEST_JSON)
    try:
        value = json.loads(data)
    except RecursionError:
        raise damaged(owner, f"{path.name} is nested too deeply") from None
    except ValueError as error:
        raise damaged(owner, f"{path.name} is not JSON ({str(error).partition(':')[0]})") from None
    if not isinstance(value, dict):
        raise damaged(owner, f"{path.name} holds no JSON object")
    if too_deep(value, DEEPEST_JSON):
        raise damaged(owner, f"{path.name} is nested too deeply")
    return value


def too_deep(value: object, most: int) -> bool:
    """Whether lists and groups lie in each other more than `most` times."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def damaged(owner: str, what: str) -> InputError:
    """The error for a run folder that cannot be used any more."""
    return InputError(
        f"{owner} is damaged: {what}; restore it from a copy, or fit anew with --overwrite"
    )
