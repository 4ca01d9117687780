"""From a run and its scores to the numbers of a page, and the page.

Whatever the page shows comes from one dictionary, which is `report.json`; pictures alone are drawn
from the scores themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from ltm_pyro import plots
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.compare import Comparison
from ltm_pyro.diagnostics.control import gains_by_document
from ltm_pyro.diagnostics.held_out import held_out_bounds
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.reading import read_json
from ltm_pyro.report.checks import checks_made
from ltm_pyro.report.drawing import Picture, picture
from ltm_pyro.report.identity import files, identity
from ltm_pyro.report.page import render
from ltm_pyro.report.table import QUANTITIES, held_out_rows
from ltm_pyro.report.text import samples, surprise, visible
from ltm_pyro.report.verdict import verdict
from ltm_pyro.run.comparing import compare_runs
from ltm_pyro.run.files import json_bytes, write_atomic
from ltm_pyro.run.folder import Run
from ltm_pyro.run.run_comparison import RunComparison
from ltm_pyro.run.scoring import HeldOut, json_value, score_run, summary

FORMAT = 1
"""Raised when the layout of `report.json` changes."""
PAGE, NUMBERS = "report.html", "report.json"
MODES = ("oracle", "prefix", "prior")
_LAST_STEPS = 20  # that the end of the course is averaged over
_NAMED = (20, 8)  # distinct values that are worth colours: of a field, of documents


@dataclass(frozen=True)
class Report:
    """A page, and its numbers in JSON types: what `report.json` holds."""

    numbers: dict[str, Any]
    html: str


@door
def make_report(
    run: Run,
    corpus: Corpus,
    *,
    held_out: HeldOut | None = None,
    texts: Sequence[Mapping[str, str]] | None = None,
    modes: Sequence[str] = MODES,
    against: Sequence[Run] = (),
    split: str | None = None,
    sequences: int | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> Report:
    """Scores a run in every mode, and says on a page what it has come to.

    Args:
        run: The run.
        corpus: Its corpus.
        held_out: Its scores in mode `oracle`, where they are at hand.
        texts: Of `text.samples`, where they are at hand.
        modes: To score in, `oracle` always.
        against: Other runs on the same corpus, scored on the same sequences.
        split: As in `score_run`; the corpus's own held-out split by default.
        sequences: As in `score_run`.
        draws: As in `score_run`.
        seed: Of the draws.

    Raises:
        InputError: if an argument is out of range, or another run is of another corpus.
    """
    split = corpus.held_out() if split is None else split
    given: dict[str, Any] = {"split": split, "sequences": sequences, "draws": draws, "seed": seed}
    runs = _against(run, corpus, against, given)
    if held_out is None:
        held_out = score_run(run, corpus, **given)
    scored = {"oracle": held_out}
    for mode in modes:
        short = int(held_out.batch.n_tokens.max()) <= corpus.seq_len // 2
        if mode != "oracle" and not (mode == "prefix" and short):
            scored[mode] = score_run(run, corpus, mode=mode, **given)  # type: ignore[arg-type]
    pictures = _pictures(run, held_out)
    if runs is not None:
        pictures["runs"] = picture(runs.plot(), "runs")
    texts = samples(run, corpus) if texts is None else texts
    numbers = _numbers(run, scored, runs, pictures, texts)
    return Report(numbers, render(numbers, {name: p.panels for name, p in pictures.items()}))


def write_report(report: Report, page: Path) -> None:
    """Writes the page, and its numbers beside it with the ending `.json`.

    Raises:
        InputError: if they cannot be written.
    """
    write_atomic(page.with_suffix(".json"), json_bytes(report.numbers))
    write_atomic(page, report.html.encode())


def _numbers(
    run: Run,
    modes: dict[str, HeldOut],
    runs: RunComparison | None,
    pictures: dict[str, Picture],
    texts: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    held_out = modes["oracle"]
    scores = summary(run, held_out)
    comparison = recorded_comparison(run.folder)
    recorded = run.folder / "scores.json"
    seeds = 1  # fits of these settings, each from a seed of its own
    if runs is not None:
        seeds = int((runs.dataset["group"] == runs.dataset.attrs["baseline"]).sum())
    numbers = {
        "format": FORMAT,
        "verdict": verdict(held_out, scores),
        "identity": identity(run),
        "data": run.facts["corpus"],
        "course": _course(run),
        "held_out": {
            "scores": scores,
            **_table(modes, run.tokenizer.unit),
            "against": None if runs is None else runs.as_dict(),
        },
        "documents": _documents(held_out),
        "khat": scores["khat"],
        "collapse": scores["collapse"],
        "comparison": None if comparison is None else comparison.as_dict(),
        "surprise": surprise(held_out, run, run.config.seed),
        "samples": [{name: visible(value) for name, value in sample.items()} for sample in texts],
        "checks": checks_made(
            run,
            scores,
            recorded=read_json(recorded, run.label) if recorded.exists() else None,
            comparison=comparison,
            seeds=seeds,
        ),
        "files": files(run.folder, (PAGE, NUMBERS)),
        "captions": {name: found.caption for name, found in pictures.items()},
    }
    return json_value(numbers)


def _table(modes: dict[str, HeldOut], unit: str) -> dict[str, Any]:
    """The rows of the table of scores, and what is not in it."""
    rows = held_out_rows(modes, unit)
    return {
        "unknown": [n for n in QUANTITIES if all(row[n] is None for row in rows)],
        "modes_not_made": [mode for mode in MODES if mode not in modes],
        "rows": rows,
    }


def _against(
    run: Run, corpus: Corpus, others: Sequence[Run], given: Mapping[str, Any]
) -> RunComparison | None:
    if not others:
        return None
    # One that was in memory cannot be loaded again; others may have tokenizers of their own.
    return compare_runs([run, *others], corpus=corpus if corpus.recipe is None else None, **given)


def _course(run: Run) -> dict[str, Any]:
    """How the fit began and ended: means over a few steps of every column."""
    rows = run.metrics
    course, n = pd.DataFrame(rows), min(_LAST_STEPS, len(rows))  # some are not of every step
    return {
        "steps": len(rows),
        "averaged": n,
        "first": course.head(n).mean().to_dict(),
        "last": course.tail(n).mean().to_dict(),
        "held_out": [
            {"step": step, "nats_per_sequence": b} for step, b in held_out_bounds(rows).items()
        ],
    }


def _documents(held_out: HeldOut) -> dict[str, Any] | None:
    """Gain over the control by document, the largest first."""
    if held_out.control is None or "document" not in held_out.scores.coords:
        return None
    gains = gains_by_document(held_out.scores, held_out.control)
    known, first = held_out.batch.metadata, pd.DataFrame()
    if "document" in known and "file" in known:
        first = known.groupby("document").first()
    table = gains.to_dataframe().sort_values("iw_bound_gain", ascending=False, kind="stable")
    rows: Any = table.reset_index().to_dict("records")
    for row in rows:
        if row["document"] in first.index:
            its = first.loc[row["document"]]
            row |= {"file": visible(str(its["file"])), "offset": int(its["offset"])}
    return {"rows": rows, "above": sum(row["iw_bound_gain"] > 0 for row in rows)}


def recorded_comparison(folder: Path) -> Comparison | None:
    """What `ltm-pyro compare` has left in the folder."""
    path = folder / "comparison.nc"
    if not path.exists():
        return None
    try:
        with xr.open_dataset(path, engine="h5netcdf") as data:
            found = Comparison(data.load())
            found.as_dict()
            return found
    except (OSError, ValueError, LookupError):
        raise InputError(
            f"cannot read {str(path)!r}: make it again with ltm-pyro compare, or remove it"
        ) from None


def _pictures(run: Run, held_out: HeldOut) -> dict[str, Picture]:
    figures: dict[str, Figure] = {}
    if run.metrics:
        control = run.control_metrics() if run.config.control else None
        figures["course"] = plots.two_clock_curves(run.metrics, control)
    bounds = bool(np.isfinite(held_out.scores["elbo"]).all())  # a point mass has none
    if held_out.control is not None and bounds:
        figures["documents"] = plots.document_gains(held_out.scores, held_out.control)
    if bool(held_out.scores["khat"].notnull().any()):
        figures["khat"] = plots.khat_histogram(held_out.scores)
    panel = held_out.panel(run.config.model.n_layers)
    if panel is not None:
        figures["collapse"] = plots.collapse_bars(panel)
    if held_out.post is not None and len(held_out.post) > 2:
        figures["map"] = plots.thought_map(held_out.post, *_colour(held_out))
    if (compared := recorded_comparison(run.folder)) is not None:
        figures["comparison"] = plots.guide_comparison(compared)
    return {name: picture(f, name, whole=name == "map") for name, f in figures.items()}


def _colour(held_out: HeldOut) -> tuple[Any, ...]:
    """The first thing known of the sequences that tells groups of them apart."""
    known = held_out.batch.metadata
    names = ["group", *(c for c in known if c not in ("group", "offset", "position", "document"))]
    for name in (*names, "document", "position"):
        values = known[name].astype(str).nunique() if name in known else 0
        if values > 1 and (name == "position" or values <= _NAMED[name == "document"]):
            return (known[name],)
    return ()
