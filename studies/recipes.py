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
from ltm_pyro.run import Run
from ltm_pyro.run.scoring import HeldOut
from studies.common import against_control, clear, config_of, fitted, over_seeds
from studies.figures import gains_by_window


def cell(settings: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """One recipe's fit on one seed and window, held against the control of the same."""
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
    """Gain over the control by window and recipe, one point a seed."""
    caption = (
        "Held-out gain over the control of the same seed and window, nats per sequence, with two "
        "errors clustered by document; one mark a seed. Orange: ELBO. Blue: importance weights. "
        "Right of the line thoughts pay."
    )
    return gains_by_window(table, "study.recipe", "model.window", caption)


def paragraph(table: pd.DataFrame) -> str:
    """Every recipe at every window, what pays, and which term costs it."""
    lines = [
        "| window | recipe | ELBO - control | IW - control | seeds that pay (ELBO, IW) | KL "
        "| active units | z = 0 | another's z | IW - ELBO | truncation |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (window, name), rows in table.groupby(["model.window", "study.recipe"], sort=False):
        cells = [str(window), str(name)]
        for bound in ("elbo", "iw"):
            mean = over_seeds(rows, ["study.recipe"], f"{bound}_gain_per_sequence").iloc[0]
            cells.append(f"{mean['mean']:+.2f} ± {mean['error']:.2f}")
        cells.append(", ".join(f"{_pays(rows, bound)} of {len(rows)}" for bound in ("elbo", "iw")))
        means = rows.mean(numeric_only=True)
        cells += [f"{means[c]:.{d}f}" for c, d in _COLUMNS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    windows = [rows for _, rows in table.groupby("model.window", sort=False)]
    verdicts = [_verdict(int(rows["model.window"].iloc[0]), rows) for rows in windows]
    return "\n".join([*lines, "", _LEGEND, "", "\n\n".join(verdicts), "", _LIMITS])


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


def _verdict(window: int, rows: pd.DataFrame) -> str:
    """How many recipes pay at a window, and what the one with the best bound comes to."""
    by_name = {str(name): each for name, each in rows.groupby("study.recipe", sort=False)}
    pay = [
        [name for name, each in by_name.items() if _pays(each, bound) == len(each)]
        for bound in ("elbo", "iw")
    ]
    name = rows.groupby("study.recipe")["iw_gain_per_sequence"].mean().idxmax()
    means = by_name[str(name)].mean(numeric_only=True)
    return (
        f"**Window {window}.** In every seed {len(pay[0])} of {len(by_name)} recipes pay by the "
        f"ELBO ({', '.join(pay[0]) or 'none'}) and {len(pay[1])} by importance weights "
        f"({', '.join(pay[1]) or 'none'}). The best by importance weights is *{name}*: its z takes "
        f"back {means['nats_of_z0']:.1f} nats of the text and costs {means['kl_per_sequence']:.1f} "
        f"of KL; a q of another shape could win back at least {means['iw_above_elbo']:.2f}, a "
        f"longer loop in training up to {means['lost_to_truncation']:.2f}."
    )


_LIMITS = (
    "The best of several recipes looks better than it is, as it was chosen on these very scores. "
    "Not tested: larger models, longer fits, other corpora, persistent q (a fit this short sees "
    "each sequence at most once), recipes in combination."
)
