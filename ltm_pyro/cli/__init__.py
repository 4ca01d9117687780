"""The command line: `ltm-pyro COMMAND`, one module per command.

Exit status: 0 done; 1 the fit met NaN, or what nobody has thought of (its last good checkpoint is
kept); 2 something given cannot be used, told in one line on stderr; 3 another process of the same
fit is gone (the checkpoint is kept); 130 and 143 stopped by Ctrl-C or SIGTERM, 141 since nobody
reads the output any more (the checkpoint is kept). Nothing heavy is imported before a command needs
it, so that help comes at once.
"""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import ltm_pyro
from ltm_pyro.cli import processes, streams
from ltm_pyro.cli.out_of_memory import explain, is_out_of_memory
from ltm_pyro.errors import (
    InputError,
    NonFiniteError,
    ProcessLostError,
    ToldElsewhereError,
    unknown_name,
)
from ltm_pyro.registry import load_plugins

COMMANDS = {
    "fit": "fit a model to text, score it, and write some",
    "evaluate": "score a fitted run on held-out text",
    "compare": "compare runs, or guide families on the text of one",
    "generate": "write text with a fitted run",
    "report": "write a page on what a run has come to",
    "watch": "follow a fit, whichever process it runs in",
    "share": "write a run's model card, and put it on the Hugging Face Hub",
    "export": "write posteriors and scores for ArviZ",
    "cost": "what a preset costs, before it is run",
}
HELP = f"""\
usage: ltm-pyro COMMAND [OPTIONS]

Latent-thought language models as Bayesian models: fit them to text, score them with bounds that
hold, and look at the posterior of every sequence.

commands:
{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

  ltm-pyro COMMAND --help   options and examples of a command
  ltm-pyro COMMAND --import MODULE ...   with guides, priors and objectives of one's own
  ltm-pyro --version        the version

examples:
  ltm-pyro fit --preset nano --out runs/first       fit on Python's own documentation, minutes
  ltm-pyro evaluate runs/first                      its scores again, on held-out text
  ltm-pyro compare runs/first --guides mean_field,full_rank
  ltm-pyro generate runs/first --prompt "The with statement" --n 3
"""
_LONGEST = 200  # characters of an error that nobody has thought of
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with `argv`, the process's own by default; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        streams.refuse_closed()
    except InputError as error:
        return _fail(str(error), 2)
    with warnings.catch_warnings(), streams.any_text():
        warnings.showwarning = _show_warning
        try:
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:
            streams.hush()  # the reader has seen enough
            return 0
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            return _told(error, arguments[0] if arguments else "")


def _told(error: Exception, command: str) -> int:
    """Tells of what has ended a command, in one line; the exit status."""
    match error:
        case InputError():
            return _fail(processes.after_the_first(_with_notes(error)), 2)
        case NonFiniteError():
            # All processes of a fit raise it together.
            return _fail(_with_notes(error), 1) if processes.number() == "0" else 1
        case ProcessLostError():
            return _fail(_with_notes(error), 3) if error.tells else 3
        case ToldElsewhereError():
            return 3
        case OSError():
            where = f" {error.filename!r}" if error.filename else ""
            why = error.strerror or str(error)
            if error.errno in _FULL:
                return _fail(_with_notes(error, f"cannot write{where}: {why}; free some space"), 2)
            return _fail(_with_notes(error, f"cannot use{where}: {why}; check the path"), 2)
        case _ if is_out_of_memory(error):
            return _fail(_with_notes(error, explain(error, command)), 2)
        case _:
            lines = str(error).strip().splitlines() or ["no more is known"]
            what = f"unexpected {type(error).__name__}: {lines[0][:_LONGEST]}"
            return _fail(_with_notes(error, f"{what} (python -X dev shows where)"), 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(f"ltm-pyro {ltm_pyro.__version__}")
        return 0
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    processes.refuse_alone(command)
    modules, rest = _imports(rest)
    load_plugins(modules)
    with processes.one_voice(), processes.connected():
        status: int = importlib.import_module(f"ltm_pyro.cli.{command}").run(rest)
    return status


def _imports(rest: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The modules of `--import MODULE`, given once or more, and the other arguments."""
    modules, others = [], []
    words = iter(rest)
    for word in words:
        if word == "--import":
            module = next(words, "")
            if not module or module.startswith("-"):
                raise InputError("--import needs the name of a module, e.g. --import my_guides")
            modules.append(module)
        elif word.startswith("--import="):
            modules.append(word.removeprefix("--import="))
        else:
            others.append(word)
    return tuple(modules), others


def _with_notes(error: Exception, message: str = "") -> str:
    return "; ".join([message or str(error), *getattr(error, "__notes__", ())])


def _fail(message: str, status: int) -> int:
    streams.tell(f"error: {message}")
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line, without the place in the code that raised it."""
    if processes.number() != "0":
        return
    streams.tell(f"warning: {message}")
