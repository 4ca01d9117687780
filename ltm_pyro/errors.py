"""Errors that a person can act on: one line that names the input and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the caller gave cannot be used.

    The message is one line: what was given, why it cannot be used, what to do. The command line
    prints it on stderr and exits with status 2; from Python it is an ordinary `ValueError`.
    """


class ContractError(InputError, AssertionError):
    """A model or guide of someone's own breaks its contract: what was found and what was expected.

    An `AssertionError` too, so that a test which holds a class to its contract fails by it.
    """


class NonFiniteError(RuntimeError):
    """A fit met NaN or infinity.

    Raised before any weight is changed by the offending step, so the model still holds the last
    good values.

    Attributes:
        ids: Stable ids of the sequences whose objective was not finite (empty when only a slow
            gradient overflowed).
        step: The slow step at which it happened, or -1 for a fast loop alone.
        reason: What was met before there was an objective to look at; empty otherwise.
    """

    def __init__(self, ids: list[int], step: int, reason: str = "") -> None:
        self.ids = ids
        self.step = step
        self.reason = reason
        where = f"slow step {step}" if step >= 0 else "the fast loop"
        if ids:
            shown = ", ".join(str(i) for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
            what = f"the objective of sequence ids {shown} is not finite"
            what += f" ({reason})" if reason else ""
        elif reason:
            what = f"the objective of sequences that are not known is not finite ({reason})"
        else:
            what = "the gradient of the slow parameters is not finite"
        super().__init__(f"{what} at {where}; lower the learning rates or look at these sequences")

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[list[int], int], dict[str, object]]:
        """Pickled by what it was made from, and not by its message, so that process pools live."""
        return type(self), (self.ids, self.step), self.__dict__


class ProcessLostError(RuntimeError):
    """A process that shares a fit is gone: killed, out of memory, or ended by an error of its own.

    Raised in the processes that are left, before any weight is changed by the step under way.

    Attributes:
        lost: Numbers (ranks) of the processes known to be gone; empty where that cannot be told.
        size: Processes that the fit began with.
        tells: Whether this process is the one that tells of it.
    """

    def __init__(self, lost: list[int], size: int, tells: bool = True) -> None:
        self.lost = lost
        self.size = size
        self.tells = tells
        numbers = ", ".join(str(rank) for rank in lost)
        if len(lost) == 1:
            what = f"process {numbers} (of {size}, numbered from 0) is"
        elif lost:
            what = f"processes {numbers} (of {size}, numbered from 0) are"
        else:
            what = f"one of the {size} processes, which one is not known, is"
        super().__init__(f"{what} gone: killed, out of memory, or ended by an error")

    def __reduce__(
        self,
    ) -> tuple[type[ProcessLostError], tuple[list[int], int, bool], dict[str, object]]:
        """Pickled by what it was made from, see `NonFiniteError`."""
        return type(self), (self.lost, self.size, self.tells), self.__dict__


class ToldElsewhereError(RuntimeError):
    """Another process of this fit has failed, and says why; this one ends without a word."""


def shown(value: object, longest: int = 60) -> str:
    """What a person gave, for one line of a message: short, quoted, nothing a terminal obeys."""
    try:
        text = ascii(value) if isinstance(value, str) else repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def printable(text: str) -> str:
    """`text` without characters that a terminal would act upon: a model may write any byte."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or `None` when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The question in a message, where a known name is close; else nothing."""
    guess = nearest(name, known) if isinstance(name, str) else None
    return f"did you mean {guess!r}? " if guess else ""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """An `InputError` for a misspelt name of a kind (`"preset"`); the nearest known is offered."""
    names = sorted(known)
    hint = did_you_mean(name, names)
    return InputError(f"unknown {kind} {shown(name)}: {hint}choose one of {', '.join(names)}")
