"""A parser whose complaints are one line each, with the nearest name offered."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import NoReturn

import jsonargparse

from ltm_pyro.errors import InputError, nearest

_WRONG_TYPE = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<why>.*)', re.DOTALL)
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)", re.DOTALL)
_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
}


class Parser(jsonargparse.ArgumentParser):
    """Parses the options of one command.

    Args:
        command: Its name.
        usage: What follows it.
        description: What it does.
        examples: One command line per line, with what it does after two spaces.
    """

    def __init__(self, command: str, usage: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"ltm-pyro {command}",
            usage=f"ltm-pyro {command} {usage}",
            description=description,
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            allow_abbrev=False,
            add_help=True,
            formatter_class=_Formatter,
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Complains in one line instead of printing the usage.

        Raises:
            InputError: always.
        """
        del ex
        raise InputError(self._one_line(message))

    def _one_line(self, message: str) -> str:
        help_hint = f"see {self.prog} --help"
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.IGNORECASE | re.DOTALL)
        if unknown:
            return self._unknown(unknown[1].split()[0], help_hint)
        wrong = _WRONG_TYPE.search(message)
        if wrong:
            found = _EXPECTED.match(wrong["why"])
            if found is None:
                return " ".join(f"{wrong['key']}: {wrong['why']}".split())
            kind = _kind(found["type"])
            return f"{wrong['key']} is {' '.join(found['value'].split())!r}: must be {kind}"
        return f"{' '.join(message.split())}; {help_hint}"

    def _unknown(self, given: str, help_hint: str) -> str:
        name = given.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {name!r}: {help_hint}"
        guess = nearest(name, [o for o in self._option_string_actions if o.startswith("--")])
        hint = f"did you mean {guess!r}? " if guess else ""
        return f"unknown option {name!r}: {hint}{help_hint}"


def _kind(expected: str) -> str:
    """What a type expects, in words."""
    if expected.startswith("typing.Literal"):
        names = expected.removeprefix("typing.Literal[").rstrip("]").replace("'", "")
        return f"one of {names}"
    if "tuple" in expected:
        return "two numbers in brackets, e.g. [0.9,0.95]"
    return _KINDS.get(expected, f"of type {expected}")


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples, and tells defaults in words instead of types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told, default = action.help or "", action.default
        if default is False or default in (None, argparse.SUPPRESS, {}):
            return told
        return f"{told} (default: {'true' if default is True else default})"
