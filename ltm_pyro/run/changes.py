"""What differs between two sets of settings: a fit goes on with its own only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltm_pyro.config import FitConfig, to_dict
from ltm_pyro.errors import InputError, shown

SCORING = ("eval_sequences", "eval_draws", "eval_fast_steps")
"""Settings of the scores after a fit, which no step of it depends on."""

_OPEN = ("options", "guide_options", "objective_options", "prior_options")
"""Settings whose keys are free: a key left out is a difference too."""


def refuse_changes(config: FitConfig, other: Mapping[str, Any], here: str, there: str) -> None:
    """Refuses settings that differ from those of a run.

    Args:
        config: The run's.
        other: Settings as plain types; those left out do not differ.
        here: What `config` belongs to, for the message.
        there: What `other` belongs to.

    Raises:
        InputError: naming the first setting that differs, those of the scores aside.
    """
    found = difference(config, other, here, there)
    if found is not None:
        raise InputError(
            f"{found}: a fit goes on with its own settings only; leave them out, or fit anew into "
            "another folder"
        )


def difference(config: FitConfig, other: Mapping[str, Any], here: str, there: str) -> str | None:
    """The first setting in `other` that `config` has otherwise, in words; see `refuse_changes`."""
    mine = to_dict(config)
    name = first_change(mine, other)
    if name is None:
        return None
    return f"{name} is {shown(_at(mine, name))} in {here} and {shown(_at(other, name))} in {there}"


def first_change(config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Dotted name of the first setting in `other` that `config` has otherwise, or `None`."""
    for key, value in other.items():
        mine = config.get(key)
        if key in SCORING:
            continue
        if isinstance(value, Mapping) and isinstance(mine, Mapping) and key not in _OPEN:
            inner = first_change(mine, value)
            if inner is not None:
                return f"{key}.{inner}"
        elif mine != value and not _same_items(mine, value):
            return key
    return None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, those within groups and options too."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def _same_items(mine: object, other: object) -> bool:
    """Whether two sequences hold the same: JSON turns a tuple into a list."""
    if isinstance(mine, list | tuple) and isinstance(other, list | tuple):
        return list(mine) == list(other)
    return False


def _at(values: Mapping[str, Any], name: str) -> object:
    first, _, rest = name.partition(".")
    return _at(values[first], rest) if rest else values[first]
