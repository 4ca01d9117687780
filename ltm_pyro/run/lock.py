"""One writer per run folder: a lock that the system lets go of when its process ends."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from ltm_pyro.engine.processes.group import alive
from ltm_pyro.errors import InputError
from ltm_pyro.run.files import writing

_LONGEST = 100  # characters of a command that are told


@contextmanager
def sole_writer(place: str | Path) -> Iterator[None]:
    """Inside the block no other process, and no other thread of this one, writes to `place`.

    The lock file lies beside `place`, a run folder or a file, under whatever name that is called,
    so it can be taken before a folder is there and stays while one takes another's place. Reading
    needs no lock. The same thread may take it again. `InputError` says who holds the lock.
    """
    lock, made = _lock_of(Path(place))
    try:
        _acquire(lock, Path(place))
        try:
            yield
        finally:
            _release(lock)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _lock_of(place: Path) -> tuple[BaseFileLock, list[Path]]:
    """The lock, and the folders above it that had to be made."""
    with writing(place):
        try:
            real = Path(os.path.realpath(place))
        except ValueError as error:  # a NUL character
            raise OSError(0, str(error)) from None
        parent = real.parent
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
    beside = real.name and os.access(parent, os.W_OK)
    # Where nothing can be put beside it, it cannot be replaced either.
    file = parent / f".{real.name}.lock" if beside else real / ".lock"
    return FileLock(file, timeout=0, is_singleton=True), made


def _acquire(lock: BaseFileLock, place: Path) -> None:
    held = lock.is_locked
    with writing(place):
        try:
            lock.acquire()
        except Timeout:
            raise InputError(_in_use(place, Path(lock.lock_file))) from None
    # A soft lock, where the file system has no other, keeps its own notes in the file.
    if not held and not isinstance(lock, SoftFileLock):
        with suppress(OSError):
            Path(lock.lock_file).write_text(json.dumps(_myself()), encoding="utf-8")


def _release(lock: BaseFileLock) -> None:
    """Removes the file while it is held: who takes a lock without a name tries again."""
    if lock.lock_counter == 1 and not isinstance(lock, SoftFileLock):
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def _myself() -> dict[str, str | int]:
    program = Path(sys.argv[0] if sys.argv else "")
    name = "ltm-pyro" if program.parent.name == "ltm_pyro" else program.name
    command = [name, *sys.argv[1:]]
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(command)[:_LONGEST],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def writer_of(place: str | Path) -> str | None:
    """Who writes to `place`, as far as its lock tells; `None` if nobody does.

    Nothing is locked to find out: whoever asks must not be in the way of a writer.
    """
    real = Path(os.path.realpath(place))
    told = _told(real.parent / f".{real.name}.lock") or _told(real / ".lock")
    if told is None:
        return None
    who, pid, host = told
    return who if host != socket.gethostname() or alive(pid) else None


def _told(file: Path) -> tuple[str, int, str] | None:
    """Whom a lock file names, in words; and its process and machine."""
    try:
        told = json.loads(file.read_text(encoding="utf-8") if file.is_file() else "")
        what = "".join(c if c.isprintable() else "?" for c in str(told["command"])[:_LONGEST])
        pid, host = int(told["pid"]), str(told["host"])[:_LONGEST]
        return f"process {pid} on {host!r} since {str(told['since'])[:19]!r} ({what})", pid, host
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_use(place: Path, file: Path) -> str:
    """Who holds the lock, as far as the file tells."""
    told = _told(file)
    who = "another process" if told is None else told[0]
    return f"{str(place)!r} is being written by {who}: wait for its end, or use another folder"
