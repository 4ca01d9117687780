"""A parser whose complaints are one line each, with the nearest name offered."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from typing import Any, NoReturn

import jsonargparse
import yaml

from ltm_pyro.checks import whole_number
from ltm_pyro.cli import yaml_text
from ltm_pyro.errors import InputError, nearest, shown

_WRONG_TYPE = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<why>.*)', re.DOTALL)
_MODE = "yaml of a person"
jsonargparse.set_loader(_MODE, lambda text: yaml_text.load(text, "a value"), (InputError,))
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)", re.DOTALL)
_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'dict'>": "a group of settings, e.g. {width: 64}",
}


class Parser(jsonargparse.ArgumentParser):
    """Parses the options of one command; `usage` follows its name, `examples` are one a line."""

    def __init__(self, command: str, usage: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"ltm-pyro {command}",
            usage=f"ltm-pyro {command} {usage}",
            description=description,
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            allow_abbrev=False,
            add_help=True,
            formatter_class=_Formatter,
            parser_mode=_MODE,
        )

    def option(self, name: str, kind: type, told: str, **more: Any) -> None:
        """An option with a value; `more` as `argparse` takes it."""
        self.add_argument(f"--{name}", type=kind, help=told, **more)

    def switch(self, name: str, told: str) -> None:
        """An option without a value, off by default; `--a-b` is `--a_b`."""
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, action="store_true", help=told)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse does; `InputError` also for what none of its libraries can take."""
        given = args[0] if args else None
        for argument in given or ():
            if len(argument) > yaml_text.LARGEST:
                raise InputError(
                    f"argument {shown(argument)} is too long: put the text into a file"
                )
        try:
            found = super().parse_args(*args, **kwargs)
        except InputError:
            raise
        except (RecursionError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else shown(error)
            raise InputError(f"an option's value cannot be read: {why}; {self._hint}") from None
        if found.get("seed") is not None:
            whole_number("seed", found["seed"], at_least=0)
        return found

    @property
    def _hint(self) -> str:
        return f"see {self.prog} --help"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Complains in one line instead of printing the usage."""
        del ex
        raise InputError(self._one_line(message))

    def _one_line(self, message: str) -> str:
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.IGNORECASE | re.DOTALL)
        if unknown:
            return self._unknown(unknown[1].split()[0])
        wrong = _WRONG_TYPE.search(message)
        if wrong:
            found = _EXPECTED.match(wrong["why"])
            if found is None:
                return shown(f"{wrong['key']}: {wrong['why']}", 500).strip("'\"")
            kind = _kind(found["type"])
            return f"{wrong['key']} is {shown(' '.join(found['value'].split()))}: must be {kind}"
        text = " ".join(message.split())
        return f"{text if len(text) <= 500 else text[:497] + '...'}; {self._hint}"

    def _unknown(self, given: str) -> str:
        name = given.partition("=")[0]
        if name.startswith("-"):
            guess = nearest(name, [o for o in self._option_string_actions if o.startswith("--")])
            hint = f"did you mean {guess!r}? " if guess else ""
            return f"unknown option {name!r}: {hint}{self._hint}"
        # What a shell makes of a pattern without quotes.
        quotes = "several files are a pattern in quotes, as --corpus 'books/*.md'"
        return (
            f"unexpected argument {shown(name)}: {quotes if os.path.exists(given) else self._hint}"
        )


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
        if isinstance(default, str) and not default.isprintable():
            default = ascii(default).strip("'")
        return f"{told} (default: {'true' if default is True else default})"
