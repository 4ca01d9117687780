"""Fast steps in training and at test: what the bound gains by them, and what the own draw says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ltm_pyro as ltm
from ltm_pyro.diagnostics.cost import cost_report
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure
from studies.common import (
    START_LOG_VARIANCE,
    bounds_of,
    clear,
    config_of,
    exact_loss,
    fitted,
    over_seeds,
    own_draw_loss,
    released_loop,
    training_gflops,
    with_errors,
)

RECIPES: dict[str, dict[str, Any]] = {
    "natural": {},
    "released": {
        "fast.optimizer": "adam", "fast.lr": 0.34, "fast.noise": "fixed",
        "guide_options.init_log_variance": START_LOG_VARIANCE,
    },
}  # fmt: skip
"""How the fast loop goes in training: as it does here, or as in the released code."""

MANY = 64
"""T_fast at test by which decoders are compared: enough for the bound to settle."""


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit, and its held-out bounds by the number of fast steps at test."""
    config = config_of({**settings, **RECIPES[settings["study.recipe"]]})
    trained = config.fast.steps
    every = settings["study.recipe"] == "natural" and settings["study.all_tests_at"] == trained
    steps_at_test = settings["study.test_steps"] if every else sorted({trained, MANY})
    with fitted(config) as run:
        model, corpus, seed = run.model, run.corpus(), run.config.seed
        batch = spread(corpus.val, settings["study.sequences"])
        ours = ltm.DualRateSVI(model, "mean_field", seed=seed)
        cost = cost_report(run.config)
        rows = []
        for steps in steps_at_test:
            own = released_loop(model, batch, steps, seed)
            rows.append(
                {
                    "train_steps": trained,
                    "test_steps": steps,
                    "train_gflops": training_gflops(run.config),
                    "test_mflops_per_token": steps * cost.flops_fast_step / 1e6,
                    "truth_loss": exact_loss(corpus, batch),
                    **bounds_of(model, ours.infer(batch, steps, progress=False), batch),
                    "own_draw_loss": own_draw_loss(own),
                    "own_draw_fresh_loss": bounds_of(model, own, batch)["elbo_loss"],
                }
            )
    return rows


def figure(table: pd.DataFrame) -> Figure:
    """Losses against T_fast at training, and against T_fast at test."""
    caption = (
        "Held-out loss, nats per sequence, mean and standard error over seeds. Left: decoders "
        "trained with more and more fast steps, by the natural clock (full lines) and by the "
        "released loop (dotted), all bounds with 64 natural steps at test; the own-draw score is "
        "that of the released loop with as many steps at test as in training. Right: one decoder "
        "by the natural clock, more and more steps at test; crosses: the very q whose own-draw "
        "score is orange, on fresh draws. Dashed: the corpus's own entropy. A fast step is one "
        "evaluation of the decoder and its gradient by z."
    )
    with house_figure((9.0, 3.7), caption) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        for recipe, style in (("natural", "-"), ("released", ":")):
            rows = table[table["study.recipe"] == recipe]
            settled = rows[rows["test_steps"] == MANY]
            own = rows[rows["test_steps"] == rows["train_steps"]]
            _line(left, settled, "train_steps", "elbo_loss", BLUE, f"ELBO, {recipe}", style)
            _line(left, settled, "train_steps", "iw_loss", GREEN, f"IW, {recipe}", style)
            _line(left, own, "train_steps", "own_draw_loss", ORANGE, f"own draw, {recipe}", style)
        tests = _tests(table)
        _line(right, tests, "test_steps", "elbo_loss", BLUE, "ELBO")
        _line(right, tests, "test_steps", "iw_loss", GREEN, "IW")
        _line(right, tests, "test_steps", "own_draw_loss", ORANGE, "own draw")
        _line(right, tests, "test_steps", "own_draw_fresh_loss", INK, "its q, fresh draws", "", "x")
        for axes, name in ((left, "training"), (right, "test")):
            axes.axhline(float(table["truth_loss"].mean()), ls="--", lw=1.0, color=INK)
            axes.set_xscale("log", base=2)
            axes.set_xlabel(f"T_fast at {name}")
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=8)
        left.set_ylabel("loss, nats per sequence")
    return fig


def _tests(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the one decoder per seed that is tested at every T_fast."""
    rows = table[table["study.recipe"] == "natural"]
    return rows[rows["train_steps"] == rows["study.all_tests_at"]]


def _line(
    axes: Axes, rows: pd.DataFrame, x: str, y: str, color: Any, label: str, style: str = "-",
    marker: str = "o",
) -> None:  # fmt: skip
    mean = over_seeds(rows, [x], y)
    axes.errorbar(
        mean[x], mean["mean"], mean["error"].fillna(0.0), color=color, label=label, ls=style,
        marker=marker, markersize=4,
    )  # fmt: skip


def paragraph(table: pd.DataFrame) -> str:
    """What more steps buy, at training and at test."""
    settled = table[table["test_steps"] == MANY]
    parts = []
    for recipe in RECIPES:
        rows = settled[settled["study.recipe"] == recipe]
        own = table[(table["study.recipe"] == recipe) & (table.train_steps == table.test_steps)]
        few, many = rows["train_steps"].min(), rows["train_steps"].max()
        best = rows.groupby("train_steps")["elbo_loss"].mean()
        gain = _paired(rows, few, many, "elbo_loss")
        parts.append(
            f"Trained by the {recipe} loop, the bound (64 natural steps at test) goes from "
            f"{best[few]:.1f} nats per sequence at T_fast {few} to {best[many]:.1f} at {many} and "
            f"is best at {best.idxmin()} ({best.min():.1f}); the gain from {few} to {many}, paired "
            f"by seed, is {gain[0]:.1f} ± {gain[1]:.1f}, "
            f"{'clear' if clear(*gain) else 'not clear'}. The own-draw score of these decoders "
            f"goes from {_mean(own, few, 'own_draw_loss'):.1f} to "
            f"{_mean(own, many, 'own_draw_loss'):.1f}, while the same q on fresh draws is worth "
            f"{_mean(own, few, 'own_draw_fresh_loss'):.1f} and "
            f"{_mean(own, many, 'own_draw_fresh_loss'):.1f}."
        )
    tests = _tests(table).groupby("test_steps").mean(numeric_only=True)
    parts.append(
        f"At test, on one decoder, the bound goes from {tests['elbo_loss'].iloc[0]:.1f} with "
        f"{tests.index[0]} step to {tests['elbo_loss'].iloc[-1]:.1f} with {tests.index[-1]} "
        f"(importance weights: {tests['iw_loss'].iloc[-1]:.1f}); the own-draw score to "
        f"{tests['own_draw_loss'].iloc[-1]:.1f}, the corpus's own entropy being "
        f"{table['truth_loss'].mean():.1f}, below which no model's mean loss is but by luck. The "
        "released start, log variance -5, costs KL that few steps cannot take back, so its "
        "own-draw score falls with T_fast even where the bound hardly moves. Not tested: larger "
        "models, real text, and longer fits, where a decoder may need "
        "its fast loop less or more."
    )
    columns = {
        "elbo_loss": "ELBO", "iw_loss": "IW", "own_draw_loss": "own draw",
        "own_draw_fresh_loss": "its q, fresh draws", "kl_per_sequence": "KL",
        "train_gflops": "GFLOP of the fit",
    }  # fmt: skip
    shown = with_errors(table, ["study.recipe", "train_steps", "test_steps"], columns)
    return "\n\n".join(
        [*parts, f"Losses in nats per sequence, ± standard error over seeds:\n\n{shown}"]
    )


def _mean(rows: pd.DataFrame, steps: int, column: str) -> float:
    return float(rows.loc[rows["train_steps"] == steps, column].mean())


def _paired(rows: pd.DataFrame, few: int, many: int, column: str) -> tuple[float, float]:
    """Loss at `few` less that at `many`, paired by seed, with its standard error."""
    by = rows.pivot(index="seed", columns="train_steps", values=column)
    gains = by[few] - by[many]
    return float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
