"""A fit's settings from three layers: preset, then YAML file, then options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import docstring_parser

from ltm_pyro.cli import yaml_text
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.config import SCHEDULES, CorpusConfig, FitConfig, from_dict, merged, preset, to_dict
from ltm_pyro.errors import InputError, shown, unknown_name
from ltm_pyro.reading import as_path, open_regular

_GROUPS = ("corpus", "model", "fast", "slow", "held_out")
_FROM_CORPUS = "model.vocab_size"
"""Not a choice: the corpus has the vocabulary that it has."""
_SHORTCUTS = {
    "--corpus": "--corpus.name",
    "--tokenizer": "--corpus.tokenizer",
    "--encoding": "--corpus.encoding",
}
_SWITCHES = ("control", "compile", "checkpointing", "persistent")
_OPEN = ("corpus.options", "guide_options", "objective_options", "model.prior_options")

Settings = dict[str, Any]
"""Nested plain values by field name, as in a YAML file."""


def add_settings(parser: Parser, defaults: FitConfig) -> None:
    """Adds one option per field of `FitConfig`, with the field's own description and default."""
    for name, hint, what, value in _fields(FitConfig, to_dict(defaults)):
        parser.add_argument(f"--{name}", type=hint, help=what, default=value)
    for group in _GROUPS:
        add_group(parser, group, defaults)


def add_group(
    parser: Parser, group: str, defaults: FitConfig, leave_out: Sequence[str] = ()
) -> None:
    """Adds the options of one group of settings, without those that are left out."""
    cls = get_type_hints(FitConfig)[group]
    section = parser.add_argument_group(f"{group} ({_summary(cls)})")
    for name, hint, what, value in _fields(cls, to_dict(getattr(defaults, group)), f"{group}."):
        if name not in (_FROM_CORPUS, *leave_out):
            section.add_argument(f"--{name}", type=hint, help=what, default=value)


def expand_shortcuts(arguments: list[str]) -> list[str]:
    """Writes `--corpus X` as `--corpus.name X`, `--no-control` as `--control=false`, and so on.

    A switch that is followed by its value, `--control false`, is written out already.
    """
    switches = {f"--{name}": f"--{name}=true" for name in _SWITCHES}
    switches |= {f"--no-{name}": f"--{name}=false" for name in _SWITCHES}
    out = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        full = _SHORTCUTS.get(name, name) + equals + value
        told = argument.removeprefix("--") in _SWITCHES and following.lower() in ("true", "false")
        out.append(full if told else switches.get(argument, full))
    return out


def given_settings(parser: Parser, options: Settings, file: str | None) -> Settings:
    """What was asked for: the settings of the YAML `file`, overridden by the `options`."""
    return merged({} if file is None else typed(parser, *read_yaml(Path(file))), options)


def build_config(given: Settings) -> FitConfig:
    """The configuration for what was asked for, the rest from the preset."""
    base = _starting_point(given)
    chosen = given.get("corpus", {})
    # A preset's corpus options are its tokenizer's: with another tokenizer they mean nothing.
    tokenizer = base["corpus"]["tokenizer"]
    if chosen.get("tokenizer", tokenizer) != tokenizer or chosen.get("name") == "mixture":
        base["corpus"]["options"] = {}
    return from_dict(FitConfig, merged(base, given))


def _starting_point(given: Settings) -> Settings:
    """The settings of the preset; of a run that is started from, its own."""
    start = given.get("init_from")
    base = to_dict(preset(given.get("preset", "nano")))
    if not start:
        return base
    from ltm_pyro.run.opening import recorded_config  # only then: it takes seconds

    its = to_dict(recorded_config(as_path("init_from", start)))
    if "name" in given.get("corpus", {}):  # another text, in the tokens of the first
        its["corpus"] = to_dict(CorpusConfig(tokenizer=its["corpus"]["tokenizer"]))
    base = {**base, "corpus": its["corpus"]} if "preset" in given else its
    return {**base, "init_from": "", "restarts": 1}


def _fields(
    cls: type[Any], defaults: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, str, Any]]:
    """(name, type, description, default) of the fields of `cls` that are no groups."""
    hints = get_type_hints(cls)
    told = {p.arg_name: p.description or "" for p in _documented(cls).params}
    return [
        (f"{prefix}{f.name}", _hint(f.name, hints[f.name]), _plain(told[f.name]), defaults[f.name])
        for f in dataclasses.fields(cls)
        if f.name not in _GROUPS
    ]


def _hint(name: str, hint: Any) -> Any:
    """The type that an option has."""
    if name == "schedule":
        return Literal[SCHEDULES]  # a function cannot be written on a command line
    return dict[str, Any] if name == "options" or name.endswith("_options") else hint


def _documented(cls: type[Any]) -> docstring_parser.Docstring:
    return docstring_parser.parse_from_object(cls)


def _summary(cls: type[Any]) -> str:
    return (_documented(cls).short_description or "").rstrip(".").replace("`", "")


def _plain(text: str) -> str:
    """A field's description for the terminal."""
    return " ".join(text.split()).replace("`", "").replace("%", "%%").rstrip(".")


def read_yaml(file: Path, option: str = "--config") -> tuple[Settings, str]:
    """The values that a YAML file holds, not checked yet, and what to call it in messages."""
    name = shown(str(file), 200)
    try:
        with open_regular(file, links=True) as stream:
            values = yaml_text.load(stream.read(4 * yaml_text.LARGEST).decode(), name)
    except FileNotFoundError:
        raise InputError(f"there is no file {name}: check the path after {option}") from None
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text: save it as such") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name with NUL is a `ValueError`
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {name}: {why}") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} holds no settings: write lines like 'steps: 300'")
    return values, name


def typed(parser: Parser, values: Settings, name: str) -> Settings:
    """The values of the YAML file `name`, known to be settings of the types that `parser` knows."""
    if isinstance(values.get("corpus"), str):
        values = {**values, "corpus": {"name": values["corpus"]}}
    try:
        _check_keys(FitConfig, values)
        parsed: Settings = parser.parse_object(values, defaults=False).as_dict()
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return parsed


def _check_keys(cls: type[Any], values: Mapping[Any, Any], prefix: str = "") -> None:
    """Refuses keys that are no settings, offering the nearest, and groups that are no mappings."""
    names = [f.name for f in dataclasses.fields(cls) if f"{prefix}{f.name}" != _FROM_CORPUS]
    for key, value in values.items():
        if key not in names:
            raise unknown_name("key", f"{prefix}{key}", [f"{prefix}{name}" for name in names])
        if value is None:
            raise InputError(f"{prefix}{key} has no value: give one, or leave it out")
        group = f"{prefix}{key}" in _GROUPS
        if (group or f"{prefix}{key}" in _OPEN) and not isinstance(value, Mapping):
            raise InputError(f"{prefix}{key} is {shown(value)}: must be a group of settings")
        if group:
            _check_keys(get_type_hints(cls)[key], value, f"{key}.")
