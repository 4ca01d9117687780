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
    """What of `given` a run takes over; the rest must be as it is.

    Args:
        config: The run's.
        given: Settings as plain types; those left out do not change.
        here: What `config` belongs to, for the message.

    Raises:
        InputError: naming the first setting that a run cannot change.
    """
    # Bounds on another set of sequences could not be told from those before.
    free = CHANGEABLE if config.held_out.every else (*CHANGEABLE, "held_out")
    refuse_changes(config, given, here, "what was asked for", free)
    names = {name.partition(".")[0] for name in CHANGEABLE}
    return {name: value for name, value in given.items() if name in names}


def refuse_changes(
    config: FitConfig,
    other: Mapping[str, Any],
    here: str,
    there: str,
    free: Collection[str] = SCORING,
) -> None:
    """Refuses settings that differ from those of a run; arguments as in `difference`.

    Raises:
        InputError: naming the first setting that differs.
    """
    found = difference(config, other, here, there, free)
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
    """The first setting in `other` that `config` has otherwise, in words.

    Args:
        config: Of `here`.
        other: Settings of `there`.
        here: What `config` belongs to.
        there: What `other` belongs to.
        free: Dotted names of settings that may differ.
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
    """Where a checkpoint's settings differ, if they are none that its run has or has had.

    Args:
        config: The run's.
        earlier: What it had instead, as `clocks_of` tells.
        found: The checkpoint's.
        here: What `config` belongs to.
        there: What `found` belongs to.
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
        elif mine != value and not _same_items(mine, value):
            return name
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
