"""What differs between two sets of settings: a fit goes on with its own only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ltm_pyro.config import FitConfig, from_dict, to_dict
from ltm_pyro.errors import InputError, shown

SCORING = ("eval_sequences", "eval_draws", "eval_fast_steps")
"""Settings of the scores after a fit."""
CHANGEABLE = (
    *SCORING,
    *("steps", "restarts", "checkpoint_every", "held_out.every", "held_out.patience"),
)
"""Settings that a run may change: no step that is done depends on them."""
UNBOUND = (*CHANGEABLE, "held_out")
"""Settings in which a checkpoint may be older than its run."""

_OPEN = ("options", "guide_options", "objective_options", "prior_options")
"""Settings whose keys are free: a key left out is a difference too."""


def changes_in(config: FitConfig, given: Mapping[str, Any], here: str) -> dict[str, Any]:
    """What of `given`, as plain types, a run takes over; the rest must be as in `config`."""
    # Bounds on another set of sequences could not be told from those before.
    free = CHANGEABLE if config.held_out.every else (*CHANGEABLE, "held_out")
    refuse_change(difference(config, given, here, "what was asked for", free))
    names = {name.partition(".")[0] for name in CHANGEABLE}
    return {name: value for name, value in given.items() if name in names}


def refuse_change(found: str | None) -> None:
    """Refuses what `difference` has found."""
    if found is not None:
        raise InputError(
            f"{found}: a fit goes on with its own settings only; leave them out, or fit anew into "
            "another folder"
        )


def difference(
    config: FitConfig,
    other: Mapping[str, Any],
    here: str,
    there: str,
    free: Collection[str] = SCORING,
) -> str | None:
    """The first setting in `other`, of `there`, that `config`, of `here`, has otherwise, in words.

    Those in `free`, by dotted names, may differ.
    """
    mine = to_dict(config)
    name = first_change(mine, other, free)
    if name is None:
        return None
    return f"{name} is {shown(_at(mine, name))} in {here} and {shown(_at(other, name))} in {there}"


def clocks_of(config: FitConfig) -> dict[str, Any]:
    """The settings that a fit which goes on may change, and its earlier checkpoints have."""
    return {k: v for k, v in to_dict(config).items() if k in ("steps", "fast", "slow")}


def difference_from_all(
    config: FitConfig,
    earlier: Iterable[Mapping[str, Any]],
    found: Mapping[str, Any],
    here: str,
    there: str,
) -> str | None:
    """Where a checkpoint's settings `found` differ, if they are none that its run has or has had.

    `earlier` is what the run had instead of `config`, as `clocks_of` tells.
    """
    other = difference(config, found, here, there, UNBOUND)
    for record in earlier:
        clocks = {name: record[name] for name in clocks_of(config)}
        was = from_dict(FitConfig, {**to_dict(config), **clocks})
        other = other and difference(was, found, here, there, UNBOUND)
    return other


def first_change(
    config: Mapping[str, Any],
    other: Mapping[str, Any],
    free: Collection[str] = SCORING,
    prefix: str = "",
) -> str | None:
    """Dotted name of the first setting in `other` that `config` has otherwise, or `None`."""
    for key, value in other.items():
        mine, name = config.get(key), f"{prefix}{key}"
        if name in free:
            continue
        if isinstance(value, Mapping) and isinstance(mine, Mapping) and key not in _OPEN:
            inner = first_change(mine, value, free, f"{name}.")
            if inner is not None:
                return inner
        elif _plain(mine) != _plain(value):
            return name
    return None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, those within groups and options too."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = _plain(value)
    return out


def _plain(value: object) -> object:
    """JSON turns a tuple into a list."""
    return list(value) if isinstance(value, tuple) else value


def _at(values: Mapping[str, Any], name: str) -> object:
    first, _, rest = name.partition(".")
    return _at(values[first], rest) if rest else values[first]
