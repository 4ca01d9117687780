"""Commands in many processes, as `torchrun` starts them: the first one speaks for all.

Nothing heavy is imported here, so that a slip in the options is told at once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from ltm_pyro.errors import InputError

SHARED = ("fit", "evaluate")
"""Commands that many processes can share."""
_PATIENCE = 2.0
"""Seconds that another process gives the first one to tell of an error that both have met."""


def many() -> bool:
    """Whether `torchrun` has started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def number() -> str:
    """This process's number, as it is called in messages; `0` for the one that speaks."""
    return os.environ.get("RANK", "0") if many() else "0"


def refuse_alone(command: str) -> None:
    """Refuses a command that every process would run for itself."""
    if many() and command not in SHARED:
        raise InputError(
            f"{command} runs in one process and {os.environ['WORLD_SIZE']} were started: "
            "start it without torchrun"
        )


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Inside the block only the first process's standard output is seen."""
    if number() == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ends the connections between processes with the block, in whatever way that ends."""
    done = False
    try:
        yield
        done = True
    finally:
        if many():
            from ltm_pyro.engine.processes import leave

            leave(together=done)


def after_the_first(message: str) -> str:
    """An error's message as this process should tell it, if the first one does not do so before.

    Where the first process has met it too, it ends, and `torchrun` ends this one meanwhile.
    """
    if number() == "0":
        return message
    time.sleep(_PATIENCE)
    return f"process {number()}: {message}"
