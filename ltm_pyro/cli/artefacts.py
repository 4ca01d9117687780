"""What a finished fit leaves in its folder beside checkpoint and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltm_pyro.data.base import Corpus
from ltm_pyro.errors import InputError
from ltm_pyro.export import save_datatree, to_datatree, write_datatree
from ltm_pyro.run import Run
from ltm_pyro.run.files import json_bytes, write_atomic
from ltm_pyro.run.fitting import finished_restarts
from ltm_pyro.run.scoring import HeldOut, per_sequence_csv

POSTERIOR, EMBEDDING = "posterior.nc", "embedding.csv"
_BLOCK = 256  # sequences whose draws are held at once while they are written
FILES = {
    "config.json": "settings, versions, and what the corpus was",
    "tokenizer.json": "the tokenizer",
    "checkpoint": "weights and optimiser (safetensors), and how far the fit is (JSON)",
    "metrics.csv": "one row per slow step: elbo or log_joint, nll, kl, rates, gradient norms",
    "best": "the checkpoint where the held-out bound was highest",
    "restarts": "the same fit from other seeds, a run each",
    "tensorboard": "the metrics for TensorBoard",
    "control": "checkpoint and metrics of the same decoder without thoughts",
    "scores.json": "held-out scores with errors, the control's, and the collapse panel",
    "scores.csv": "held-out scores per sequence, in nats",
    POSTERIOR: "posteriors, scores and the fit's course, as ArviZ reads them",
    "training.png": "the two clocks: elbo and its parts, and both learning rates",
    "fast_loop.png": "how q was fitted, sequence by sequence",
    "thoughts.png": "posterior intervals of z",
    "scores.png": "held-out scores sequence by sequence, beside the control's",
    "report.html": "all of it on one page: verdict, scores, pictures, checks made and not made",
    "report.json": "the numbers of that page",
}
"""What is what in a run folder."""


def write_artefacts(run: Run, held_out: HeldOut, scores: Mapping[str, Any]) -> None:
    """Writes scores, posteriors and figures into the run folder."""
    write_atomic(run.folder / "scores.csv", per_sequence_csv(held_out).encode())
    write_posterior(run.folder / POSTERIOR, run, held_out)
    _write_figures(run, held_out)
    write_atomic(run.folder / "scores.json", json_bytes(scores))  # the last: a sweep looks for it


def write_posterior(target: Path, run: Run, held_out: HeldOut) -> None:
    """Writes the posteriors with scores and the fit's course as NetCDF.

    Restarts of the fit are the chains, each with its own decoder; scores are the first one's. As
    many draws are kept as were scored: each costs a pass through the decoder per sequence.
    """
    if held_out.post is None:
        raise InputError("there is no posterior to write in mode 'prior'")
    others = finished_restarts(run)
    steps = run.config.eval_fast_steps
    chains = [held_out.post, *(again.svi.infer(held_out.batch, steps) for again in others)]
    models = [run.model, *(again.model for again in others)]
    blocks = [slice(row, row + _BLOCK) for row in range(0, len(held_out.post), _BLOCK)]
    trees = (
        to_datatree(
            [chain[rows] for chain in chains],
            held_out.batch.select(rows),
            held_out.scores.isel(sequence=rows),
            int(held_out.scores.attrs["draws"]),
            model=models,
            fit_trace=run.metrics,
            seed=run.config.seed,
        )
        for rows in blocks
    )
    if len(blocks) == 1:
        save_datatree(next(trees), target)
    else:
        write_datatree(trees, target)


def _write_figures(run: Run, held_out: HeldOut) -> None:
    # Drawing takes seconds to import: only a finished fit pays for it.
    from ltm_pyro import plots

    control = run.control_metrics() if run.config.control else None
    figures = {"training.png": plots.two_clock_curves(run.metrics, control)}
    if bool(np.isfinite(held_out.scores["elbo"]).all()):  # a point mass has no bound to draw
        figures["scores.png"] = plots.score_panel(held_out.scores, held_out.control)
    if held_out.post is not None:
        figures["thoughts.png"] = plots.thought_intervals(held_out.post)
        if held_out.post.trace is not None:
            figures["fast_loop.png"] = plots.fast_loop_traces(held_out.post)
    for name, figure in figures.items():
        plots.save_figure(figure, run.folder / name)


def write_page(
    run: Run, corpus: Corpus, held_out: HeldOut, texts: Sequence[Mapping[str, str]]
) -> str:
    """Writes the report, but for prefix and prior scores, which take long; returns its verdict."""
    from ltm_pyro.report import make_report, write_report

    report = make_report(run, corpus, held_out=held_out, texts=texts, modes=("oracle",))
    write_report(report, run.folder / "report.html")
    said = report.numbers["verdict"]
    return f"Do thoughts help? {said['answer'].capitalize()}. {said['sentence']} {said['use']}"


def list_files(folder: Path) -> str:
    """The folder's files, one line on what each is."""
    found = [(name, what) for name, what in FILES.items() if (folder / name).exists()]
    return "\n".join(f"  {name:<15} {what}" for name, what in found)
