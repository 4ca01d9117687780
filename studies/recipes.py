"""Recipes for thoughts that are used, each against the same decoder without thoughts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

import ltm_pyro as ltm
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.collapse import ACTIVE_VARIANCE
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, INK, ORANGE, house_figure, title_and_legend
from ltm_pyro.run import Run
from ltm_pyro.run.scoring import HeldOut
from studies.common import against_control, clear, config_of, fitted, over_seeds


def cell(settings: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """One recipe's fit on one seed, held against the control of that seed."""
    recipe = dict(settings["study.recipe"])
    plain = {name: value for name, value in settings.items() if name != "study.recipe"}
    row: dict[str, Any] = {"study.recipe": recipe.pop("name")}
    with fitted(config_of({**plain, **recipe}, data)) as run:
        batch = _held_out(run, settings)
        post = run.svi.infer(batch, settings["study.fast_steps"], progress=False)
        scores = ltm.evaluate(run.model, post, batch, settings["study.draws"])
        short = run.svi.infer(batch, run.config.fast.steps, progress=False)
        truncated = ltm.evaluate(run.model, short, batch, settings["study.draws"], controls=False)
        control = _control(json.dumps(plain, sort_keys=True), data)
        row |= against_control(HeldOut("val", batch, post, None, scores, control))
        elbo = float(scores["elbo"].mean())
        return row | {
            "iw_above_elbo": float(scores["iw_bound"].mean()) - elbo,
            "lost_to_truncation": elbo - float(truncated["elbo"].mean()),
            "nats_of_z0": float((scores["nll_z0"] - scores["nll_given_z"]).mean()),
            "active_units": int((post.mean.var(0) >= ACTIVE_VARIANCE).sum()),
        }


@cache
def _control(plain: str, data: Path | None) -> xr.Dataset:
    """Scores of the decoder that never sees thoughts, with none of a recipe's changes."""
    settings = {**json.loads(plain), "slow.thoughts_start": 1.0}
    with fitted(config_of(settings, data)) as run:
        return ltm.evaluate(run.model, None, _held_out(run, settings), draws=2, mode="prior")


def _held_out(run: Run, settings: dict[str, Any]) -> Batch:
    return spread(run.corpus().val, settings["study.sequences"])


def figure(table: pd.DataFrame) -> Figure:
    """Gain over the control by recipe, one point a seed."""
    caption = (
        "Held-out gain over the control of the same seed, nats per sequence, with two errors "
        "clustered by document; one mark a seed. Orange: ELBO. Blue: importance weights. "
        "Right of the line thoughts pay."
    )
    names = list(table["study.recipe"].unique())
    with house_figure((6.4, 0.6 + 0.34 * len(names)), caption) as fig:
        axes = fig.subplots()
        for bound, color, up in (("elbo", ORANGE, 0.12), ("iw", BLUE, -0.12)):
            place = table["study.recipe"].map(names.index) - up + 0.05 * table["seed"]
            axes.errorbar(
                table[f"{bound}_gain_per_sequence"], place,
                xerr=2 * table[f"{bound}_gain_error"].fillna(0.0), fmt="o", markersize=3,
                linewidth=0.8, color=color,
            )  # fmt: skip
        axes.axvline(0.0, color=INK, linewidth=1.0)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("gain over the control, nats per sequence")
        title_and_legend(axes, "")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """Every recipe, what pays, and which term costs it."""
    lines = [
        "| recipe | ELBO - control | IW - control | seeds that pay (ELBO, IW) | KL | active units "
        "| z = 0 | another's z | IW - ELBO | truncation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in table.groupby("study.recipe", sort=False):
        cells = [str(name)]
        for bound in ("elbo", "iw"):
            mean = over_seeds(rows, ["study.recipe"], f"{bound}_gain_per_sequence").iloc[0]
            cells.append(f"{mean['mean']:+.2f} ± {mean['error']:.2f}")
        cells.append(", ".join(f"{_pays(rows, bound)} of {len(rows)}" for bound in ("elbo", "iw")))
        means = rows.mean(numeric_only=True)
        cells += [f"{means[c]:.{d}f}" for c, d in _COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    by_iw = table.groupby("study.recipe")["iw_gain_per_sequence"].mean()
    best = table[table["study.recipe"] == by_iw.idxmax()]
    return "\n".join([*lines, "", _LEGEND, "", _verdict(str(by_iw.idxmax()), best)])


_COLUMNS = {
    "kl_per_sequence": 1, "active_units": 0, "nats_of_z0": 1, "nats_of_shuffled_z": 1,
    "iw_above_elbo": 2, "lost_to_truncation": 2,
}  # fmt: skip
_LEGEND = (
    "Nats per held-out sequence, means over seeds; ± is the standard error over seeds. A seed pays "
    "where the gain over the control of that seed is above two errors clustered by document. "
    "`z = 0` and `another's z`: what the text loses without its own z. `IW - ELBO`: what q's shape "
    "costs, from below. `truncation`: what the fast steps of the training lose against the longer "
    "loop that is scored."
)


def _pays(rows: pd.DataFrame, bound: str) -> int:
    """Seeds whose gain is above two of its errors."""
    pairs = zip(rows[f"{bound}_gain_per_sequence"], rows[f"{bound}_gain_error"], strict=True)
    return sum(gain > 0 and clear(gain, error) for gain, error in pairs)


def _verdict(name: str, rows: pd.DataFrame) -> str:
    """What the recipe with the best bound comes to."""
    means = rows.mean(numeric_only=True)
    elbo, iw = _pays(rows, "elbo"), _pays(rows, "iw")
    paid = "pays" if elbo == len(rows) else "pays by the tighter bound" if iw == len(rows) else ""
    said = f"{paid} in every seed" if paid else "does not pay in every seed"
    return (
        f"The best by importance weights, *{name}*, {said}. Its z takes back "
        f"{means['nats_of_z0']:.1f} nats of the text and costs {means['kl_per_sequence']:.1f} of "
        f"KL; a q of another shape could win back at least {means['iw_above_elbo']:.2f}, a longer "
        f"loop in training up to {means['lost_to_truncation']:.2f}. Not tested: larger models, "
        "longer fits, other corpora, persistent q (a fit this short sees each sequence about once)."
    )
