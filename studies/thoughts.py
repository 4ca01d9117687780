"""Thoughts, their width, depth, decoder width, text seen and fast steps, one at a time and paid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import ltm_pyro as ltm
from ltm_pyro.config import FitConfig
from ltm_pyro.data.corpus import load_corpus
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, PURPLE, house_figure
from studies.common import (
    bounds_of,
    config_of,
    exact_loss,
    fitted,
    over_seeds,
    own_draw_loss,
    released_loop,
    training_gflops,
    with_errors,
)

AXES = {
    "thoughts": "model.thoughts_per_layer",
    "thought width": "model.thought_dim",
    "layers": "model.n_layers",
    "width": "model.width",
    "slow steps": "steps",
    "T_fast": "fast.steps",
}
"""What is varied, one at a time; 0 thoughts, or 0 fast steps, is the decoder without thoughts."""

MANY = 32
"""T_fast at test, for all."""


def cell(settings: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """One fit: `study.change` says what is otherwise, and at which share of the base's FLOPs."""
    axis, value, budget = changed(settings["study.change"])
    config = config_of(settings)
    corpus = load_corpus("mixture", seq_len=config.model.seq_len)
    config = replace(config, model=replace(config.model, vocab_size=corpus.vocab_size))
    base = training_gflops(config)
    config = varied(config, axis, value)
    if budget is not None:
        each = training_gflops(replace(config, steps=1000)) / 1000
        config = replace(config, steps=max(1, round(budget * base / each)))
    with fitted(config) as run:
        model, seed = run.model, run.config.seed
        batch = spread(corpus.val, settings["study.sequences"])
        own = own_q = float("nan")
        post = None
        if config.slow.thoughts_start < 1:
            ours = ltm.DualRateSVI(model, "mean_field", seed=seed)
            post = ours.infer(batch, MANY, progress=False)
            released = released_loop(model, batch, MANY, seed)
            own, own_q = own_draw_loss(released), bounds_of(model, released, batch)["elbo_loss"]
        return {
            "axis": axis,
            "value": value,
            "budget": float("nan") if budget is None else budget,
            "slow_steps": config.steps,
            "train_gflops": training_gflops(run.config),
            "weights": run.config.model.n_weights,
            "truth_loss": exact_loss(corpus, batch),
            **bounds_of(model, post, batch),
            "own_draw_loss": own,
            "own_draw_fresh_loss": own_q,
        }


def changed(text: str) -> tuple[str, int, float | None]:
    """What `width=32` or `width=32 at 0.5` says: axis, value and share of the base's FLOPs."""
    change, _, budget = text.partition(" at ")
    axis, _, value = change.partition("=")
    return axis, int(value), float(budget) if budget else None


def varied(config: FitConfig, axis: str, value: int) -> FitConfig:
    """The base with one thing otherwise."""
    if axis in ("thoughts", "T_fast") and value == 0:
        return replace(config, slow=replace(config.slow, thoughts_start=1.0))
    *groups, name = AXES[axis].split(".")
    changed: dict[str, Any] = {name: value}
    if not groups:
        return replace(config, **changed)
    part = replace(getattr(config, groups[0]), **changed)
    if axis == "width":
        part = replace(part, mlp_hidden=2 * value)
    return replace(config, **{groups[0]: part})


def figure(table: pd.DataFrame) -> Figure:
    """One panel per axis, and below the curves of equal FLOPs."""
    caption = (
        "Held-out loss, nats per sequence, mean and standard error over seeds, all with 32 fast "
        "steps at test. Above: one thing varied, all else as in the base; own draw: the released "
        "loop on that decoder. Below: each curve spends the same FLOPs on training (slow steps "
        "make up for dearer ones). 0 thoughts or 0 fast steps: the decoder without thoughts, "
        "exact. Dashed: the corpus's own entropy."
    )
    free, paid = table[table["budget"].isna()], _paid(table)
    with house_figure((10.0, 6.4), caption) as fig:
        panels = fig.subplots(3, 3).ravel()
        for axes, axis in zip(panels, AXES, strict=False):
            rows = _with_base(free[free["axis"] == axis], free, axis)
            for column, color, label in (
                ("elbo_loss", BLUE, "ELBO"),
                ("iw_loss", GREEN, "IW"),
                ("own_draw_loss", ORANGE, "own draw"),
            ):
                mean = over_seeds(rows, ["value"], column).sort_values("value")
                error = mean["error"].fillna(0.0)
                axes.errorbar(
                    mean["value"], mean["mean"], error, color=color, marker="o", ms=3, label=label
                )
            axes.set_xlabel(axis)
        for axes, axis in zip(panels[len(AXES) :], paid["axis"].unique(), strict=False):
            rows = paid[paid["axis"] == axis]
            budgets = sorted(rows["budget"].unique())
            for budget, color in zip(budgets, (ORANGE, PURPLE, GREEN, BLUE), strict=False):
                mean = over_seeds(rows[rows["budget"] == budget], ["value"], "elbo_loss")
                mean = mean.sort_values("value")
                error, label = mean["error"].fillna(0.0), f"{budget:g} of the base"
                axes.errorbar(
                    mean["value"], mean["mean"], error, color=color, marker="o", ms=3, label=label
                )
            axes.set_xlabel(f"{axis}, at equal FLOPs")
        for axes in panels:
            axes.axhline(float(table["truth_loss"].mean()), ls="--", lw=1.0, color=INK)
            axes.set_xscale("symlog", base=2, linthresh=1)
            values = {int(x) for curve in axes.containers for x in curve[0].get_xdata()}
            axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
        for row in range(3):
            panels[3 * row].set_ylabel("nats per sequence")
        for axes in (panels[0], panels[len(AXES)]):
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize=8)
    return fig


def _with_base(rows: pd.DataFrame, free: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The rows of an axis, those of the base among them."""
    usual = int(free[AXES["thoughts"]].iloc[0])
    if axis == "thoughts" and (rows["budget"].isna() & (rows["value"] == usual)).any():
        return rows
    base = free[(free["axis"] == "thoughts") & (free["value"] == usual)]
    return pd.concat([rows, base.assign(axis=axis, value=int(free[AXES[axis]].iloc[0]))])


def _paid(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at equal FLOPs, the base's among them wherever its whole budget is spent."""
    free, paid = table[table["budget"].isna()], table[table["budget"].notna()]
    parts = [
        _with_base(rows, free, str(axis)).fillna({"budget": 1.0})
        for axis, rows in paid.groupby("axis", sort=False)
    ]
    return pd.concat(parts) if parts else paid


def paragraph(table: pd.DataFrame) -> str:
    """Which of them pays, at equal slow steps and at equal FLOPs."""
    free, paid = table[table["budget"].isna()], _paid(table)
    lines = []
    for axis in AXES:
        rows = _with_base(free[free["axis"] == axis], free, axis)
        by = rows.pivot(index="seed", columns="value", values="elbo_loss")
        if by.shape[1] < 2:
            continue
        least, most = int(by.columns.min()), int(by.columns.max())
        best = int(by.columns[int(by.mean().argmin())])
        own = rows.groupby("value")["own_draw_loss"].mean()
        gain, error = _paired(by, least, most)
        lines.append(
            f"- {axis} from {least} to {most}: the bound gains {gain:.1f} ± {error:.1f} nats per "
            f"sequence (paired by seed) and is best at {best} ({by.mean()[best]:.1f}); the "
            f"own-draw score goes from {own.dropna().iloc[0]:.1f} to {own[most]:.1f}."
        )
    for axis in paid["axis"].unique():
        found = [
            f"{rows.groupby('value')['elbo_loss'].mean().idxmin()} at {budget:g}"
            for budget, rows in paid[paid["axis"] == axis].groupby("budget")
        ]
        lines.append(
            f"- At equal training FLOPs the best {axis} is {', '.join(found)} of the base's FLOPs."
        )
    truth = float(table["truth_loss"].mean())
    below = table["own_draw_loss"].min()
    columns = {
        "elbo_loss": "ELBO", "iw_loss": "IW", "own_draw_loss": "own draw",
        "own_draw_fresh_loss": "its q, fresh draws", "kl_per_sequence": "KL",
        "slow_steps": "slow steps", "train_gflops": "GFLOP of the fit",
    }  # fmt: skip
    shown = with_errors(
        table.assign(budget=table["budget"].fillna(0)), ["axis", "value", "budget"], columns
    )
    return (
        f"On a text whose only structure beyond one token is its class (entropy {truth:.1f} nats "
        "per sequence), all decoders seeing one token:\n\n" + "\n".join(lines) + "\n\nThe lowest "
        f"own-draw score of all is {below:.1f}. Not tested: real text, other sizes of the base, "
        "other learning rates for other sizes (one rate for all favours those near the base), and "
        "combinations.\n\nNats per sequence, ± standard error over seeds; budget 0: as many slow "
        f"steps as the base, else a share of its FLOPs:\n\n{shown}"
    )


def _paired(by: pd.DataFrame, least: int, most: int) -> tuple[float, float]:
    """What a loss falls from one column to another, by seed, with its standard error."""
    gains = by[least] - by[most]
    return float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
