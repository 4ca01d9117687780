"""`sweep`: a grid of settings, a run folder for each of its points."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltm_pyro.config import FitConfig, from_dict, merged, to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.doors import exclusive
from ltm_pyro.errors import InputError, shown
from ltm_pyro.reading import as_path
from ltm_pyro.run.building import absolute_paths, open_corpus
from ltm_pyro.run.changes import SCORING, difference, refuse_change
from ltm_pyro.run.files import sha256
from ltm_pyro.run.fitting import fit_others
from ltm_pyro.run.folder import CONFIG
from ltm_pyro.run.opening import create_run, load_run, recorded_config
from ltm_pyro.run.replacing import undo_new
from ltm_pyro.run.training import train

MOST_FITS = 1000
_LONGEST_NAME = 150  # of the 255 bytes that file systems allow, with room for partial names


@exclusive
def sweep(
    folder: str | Path,
    config: FitConfig,
    grid: Mapping[str, Sequence[Any]],
    *,
    corpus: Corpus | None = None,
    progress: bool = True,
) -> list[Path]:
    """Fits every point of a grid, each in a run folder of its own; goes on where it was stopped.

    Called again with the same arguments it skips the fits that are done, and goes on with one that
    was interrupted from its last checkpoint; so with controls and restarts. Every point is checked
    before the first fit starts.

    Args:
        folder: Where the run folders lie, named by their settings: `guide=low_rank,seed=1`.
        config: The settings that all fits share.
        grid: The values of each setting that is swept over, by its dotted name, e.g.
            `{"guide": ["mean_field", "low_rank"], "fast.steps": [8, 16], "seed": [0, 1, 2]}`.
        corpus: The corpus of all fits, where it is at hand.
        progress: Show progress bars on stderr.

    Returns:
        The run folders, for `compare_runs`.

    Raises:
        InputError: if a point cannot be fitted, or a folder holds a run of other settings; no fit
            has then been started.
    """
    place = as_path("sweep folder", folder)
    shared = to_dict(config)
    fits = {
        place / name: from_dict(FitConfig, merged(shared, settings))
        for name, settings in points(grid)
    }
    prepare(fits, corpus)
    for each in fits:
        run = load_run(each)
        text = run.corpus() if corpus is None else corpus
        train(run, text, progress=progress)
        fit_others(run, text, progress=progress)
    return list(fits)


def points(grid: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The name and the settings, nested, of every point of a grid."""
    count = 1
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"the grid has {shown(values)} for {shown(name)}: give a list")
        if any(value in values[:i] for i, value in enumerate(values)):
            raise InputError(f"the grid gives {shown(name)} a value twice: give each once")
        count *= len(values)
    if not grid:
        raise InputError("no setting has a list of values: give one, e.g. seed: [0, 1, 2]")
    if count > MOST_FITS:
        raise InputError(f"the grid has {count} points: at most {MOST_FITS} in one sweep")
    out = {}
    for chosen in itertools.product(*grid.values()):
        point = dict(zip(grid, chosen, strict=True))
        name = _name(point)
        if name in out:  # values that differ in characters that no name keeps
            name = f"{name},{sha256(repr(point).encode())[:8]}"
        out[name] = nested(point)
    return list(out.items())


def prepare(fits: Mapping[Path, FitConfig], corpus: Corpus | None = None) -> None:
    """Makes the run folders that are not there yet, and checks the others; all or nothing."""
    made: list[Path] = []
    corpora: dict[str, Corpus] = {}
    try:
        for place, config in fits.items():
            if (place / CONFIG).exists():
                _refuse_other(place, config, corpus)
            else:
                key = repr((config.corpus, config.model.seq_len))
                if corpus is None and key not in corpora:
                    corpora[key] = open_corpus(config)
                create_run(place, config, corpus=corpora.get(key, corpus))
                made.append(place)
    except BaseException:
        for place in made:
            undo_new(place)
        raise


def _refuse_other(place: Path, config: FitConfig, corpus: Corpus | None) -> None:
    there = recorded_config(place)
    asked = to_dict(absolute_paths(config))
    del asked["model"]["vocab_size"]  # the corpus decides
    if corpus is not None:
        del asked["corpus"]  # what describes one at hand is the run's own business
        if load_run(place).facts["corpus"].get("fingerprint") != corpus.fingerprint:
            raise InputError(
                f"run folder {str(place)!r} was fitted to another corpus: sweep into another folder"
            )
    refuse_change(difference(there, asked, f"run folder {str(place)!r}", "this sweep"))


def same_scoring(one: FitConfig, other: FitConfig) -> bool:
    """Whether two fits are scored alike."""
    return all(getattr(one, name) == getattr(other, name) for name in SCORING)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name as groups within groups."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        inner = out
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return out


def _name(point: Mapping[str, Any]) -> str:
    """A folder's name that tells the settings: `guide=low_rank,fast.steps=8`."""
    parts = (f"{name}={_value(value)}" for name, value in point.items())
    name = ",".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]},{sha256(name.encode())[:8]}"


def _value(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "-", text.rpartition("/")[2]).strip("-") or "none"
