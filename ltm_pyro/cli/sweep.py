"""`ltm-pyro fit --sweep`: a grid of fits, one after another, that goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ltm_pyro.cli.parsing import Parser
from ltm_pyro.cli.processes import many
from ltm_pyro.cli.settings import Settings, build_config, read_yaml, typed
from ltm_pyro.cli.streams import tell
from ltm_pyro.config import FitConfig, merged
from ltm_pyro.errors import InputError, NonFiniteError, printable, shown
from ltm_pyro.reading import as_path

_LISTS = ("fast.betas", "slow.betas", "corpus.options.fractions")
"""Settings that are lists themselves: of these, a list of lists is swept over."""


def run_sweep(
    parser: Parser, given: Settings, options: Settings, file: str, out: str | None
) -> int:
    """Runs all fits of the sweep in a YAML `file` that are not done yet; returns the exit status.

    `given` are settings of all fits, from a configuration file; `options`, from the command line,
    override the sweep's. The status is 1 if a fit met NaN, where the others are done all the same.
    """
    if many():
        raise InputError("--sweep runs one fit after another: start it without torchrun")
    folder = as_path("out", f"runs/{Path(file).stem}" if out is None else out)
    fits = _plan(parser, given, options, file, folder)
    from ltm_pyro.cli.printing import shell_quoted
    from ltm_pyro.run.sweeping import prepare

    if (folder / "config.json").exists():
        raise InputError(f"{str(folder)!r} is a run folder: give --out a folder for many runs")
    prepare(fits)
    failed = []
    for number, (place, config) in enumerate(fits.items(), start=1):
        head = f"\nFit {number} of {len(fits)}  {printable(place.name)}"
        if _is_done(place, config):
            print(f"{head}: done", flush=True)
            continue
        print(head, flush=True)
        try:
            status = _fit_one(place, config)
        except NonFiniteError as error:
            tell(f"error: {error}")
            failed.append(place.name)
            continue
        if status:
            tell("the sweep goes on with the same command")
            return status
    if failed:
        tell(f"error: {len(failed)} of {len(fits)} fits met NaN: {shown(', '.join(failed), 200)}")
    elif len(fits) > 1:
        print(f"\nCompare them with: ltm-pyro compare {shell_quoted(folder)}")
    return 1 if failed else 0


def _plan(
    parser: Parser, given: Settings, options: Settings, file: str, folder: Path
) -> dict[Path, FitConfig]:
    """The settings of every fit by its folder."""
    values, name = read_yaml(Path(file), "--sweep")
    fixed, grid = _split(values)
    from ltm_pyro.run.changes import flat
    from ltm_pyro.run.sweeping import nested, points

    overridden = next((axis for axis in grid if axis in flat(options)), None)
    if overridden:
        raise InputError(f"{name} sweeps over {overridden}: leave --{overridden} out")

    try:
        found = points(grid)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    fits = {}
    for folder_name, point in found:
        settings = typed(parser, _with_guide(merged(nested(fixed), point)), name)
        fits[folder / folder_name] = build_config(merged(merged(given, settings), options))
    return fits


def _split(values: Mapping[str, Any]) -> tuple[Settings, dict[str, list[Any]]]:
    """Settings by dotted name: those with one value, and those with a list of them."""
    from ltm_pyro.run.changes import flat

    fixed: Settings = {}
    grid: dict[str, list[Any]] = {}
    for name, value in flat(values).items():
        swept = isinstance(value, list)
        if name in _LISTS and swept:
            swept = bool(value) and all(isinstance(each, list) for each in value)
        (grid if swept else fixed)["corpus.name" if name == "corpus" else name] = value
    return fixed, grid


def _with_guide(settings: Settings) -> Settings:
    """`guide: low_rank:rank=4`, as `compare` takes it, written out as family and options."""
    guide = settings.get("guide")
    if not isinstance(guide, str) or ":" not in guide:
        return settings
    from ltm_pyro.cli.compare import parse_guides

    [(family, given)] = parse_guides(guide).items()
    return merged(settings, {"guide": family, "guide_options": given})


def _is_done(place: Path, config: FitConfig) -> bool:
    """Whether a fit is at its end, and scored as asked: scores and page are written last."""
    from ltm_pyro.run.opening import recorded_config
    from ltm_pyro.run.sweeping import same_scoring
    from ltm_pyro.run.watching import last_step

    with suppress(OSError, ValueError):
        scores = json.loads((place / "scores.json").read_bytes())
        ended = scores["step"] == last_step(place) and (place / "report.html").exists()
        return ended and same_scoring(recorded_config(place), config)
    return False


def _fit_one(place: Path, config: FitConfig) -> int:
    """Fits and scores one run, from where it is."""
    from ltm_pyro.cli.fit import fit_and_report
    from ltm_pyro.run import load_run
    from ltm_pyro.run.changes import SCORING
    from ltm_pyro.run.extending import extend
    from ltm_pyro.run.lock import sole_writer

    with sole_writer(place):
        fitted = load_run(place)
        extend(fitted, {name: getattr(config, name) for name in SCORING})
        return fit_and_report(fitted, fitted.corpus(), new=not fitted.svi.slow_step)
