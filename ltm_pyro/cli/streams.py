"""Standard streams as they come: closed, of a small alphabet, or with a reader who has left."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from ltm_pyro.errors import InputError, printable


def refuse_closed() -> None:
    """Refuses to work where standard output is closed; a closed standard error shares it.

    A number that is free would go to the next file that is opened, and what the system's libraries
    print into it would land in that file: so each gets something.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stdout is None:
        raise InputError("standard output is closed: send it to a file or to /dev/null")
    if sys.stderr is None:
        os.dup2(1, 2)
        sys.stderr = sys.stdout


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """Inside the block characters that a stream's encoding lacks are written as escapes."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def tell(message: str) -> None:
    """Says one line on standard error, if anybody listens; never fails.

    Control characters, which a file's name may hold, do not reach the terminal.
    """
    line = printable(" ".join(message.split()))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"ltm-pyro: {line}", file=sys.stderr, flush=True)


def hush() -> None:
    """Sends what is still to be printed nowhere: the reader has gone.

    Python would complain once more when it closes standard output.
    """
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
