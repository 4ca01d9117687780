"""Windows from short to full, with thoughts and without: does z replace context?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure
from studies.common import (
    against_control,
    clear,
    config_of,
    exact_loss,
    fitted,
    over_seeds,
    scored,
    with_errors,
)

MIXTURE: dict[str, Any] = {
    "preset": "mixture", "model.prior": "standard_normal", "model.seq_len": 64,
    "model.width": 32, "model.mlp_hidden": 64, "fast.steps": 4, "fast.lr": 0.4, "steps": 100,
    "batch_size": 32, "slow.lr": 0.02, "eval_sequences": 128,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "preset": "nano", "model.seq_len": 128, "model.n_layers": 2, "model.width": 64,
    "model.mlp_hidden": 128, "fast.steps": 4, "steps": 200, "eval_sequences": 128,
    "slow.thoughts_start": 0.3, "slow.kl_hold": 0.5, "slow.kl_full": 0.75, "eval_draws": 64,
}  # fmt: skip
"""Small models, as a cell's own settings leave them."""


def cell(settings: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """A fit and its control at one window; on `mixture` the best that the window allows too."""
    usual = MIXTURE if settings["corpus.name"] == "mixture" else TEXT
    window = min(settings["model.window"], usual["model.seq_len"])
    config = config_of({**usual, **settings, "model.window": window}, data)
    with fitted(config) as run:
        corpus = run.corpus()
        held_out = scored(run)
        scores, model = held_out.scores, run.config.model
        batch = spread(corpus.val, run.config.eval_sequences)
        best = getattr(corpus, "window_log_likelihood", None)
        # A layer hands on what its window sees, so L layers see L (window - 1) more tokens.
        field = min(model.n_layers * (model.window - 1) + 1, model.seq_len)
        found = against_control(held_out)
        control = found["control_nats_per_token"] * float(scores["n_tokens"].mean())
        return {
            "corpus": corpus.name,
            "window": model.window,
            "sees": field,
            "control_loss": control,
            "elbo_loss": control - found["elbo_gain_per_sequence"],
            "iw_loss": control - found["iw_gain_per_sequence"],
            **{name: value for name, value in found.items() if not name.startswith("control")},
            "truth_loss": exact_loss(corpus, batch),
            "window_truth_loss": np.nan if best is None else -float(best(batch, field).mean()),
            "documents": scores.attrs["n_documents"],
        }


def figure(table: pd.DataFrame) -> Figure:
    """Losses against the window, and what thoughts gain there."""
    corpora = list(table["corpus"].unique())
    caption = (
        "Above: held-out loss, nats per sequence, mean and standard error over seeds, with "
        "thoughts (blue, green: bounds) and of the same decoder without (orange, exact). Dotted: "
        "the best that any model can do with what all layers together see; dashed: with the whole "
        "sequence. Below: what thoughts gain over the control, paired by sequence; above 0 they "
        "pay, KL included. If thoughts replaced context, the blue curve above would be flat."
    )
    with house_figure((4.3 * len(corpora), 5.2), caption) as fig:
        panels = fig.subplots(2, len(corpora), squeeze=False)
        for (above, below), name in zip(panels.T, corpora, strict=True):
            rows = table[table["corpus"] == name]
            for axes, column, color, label in (
                (above, "control_loss", ORANGE, "no thoughts"),
                (above, "elbo_loss", BLUE, "ELBO"),
                (above, "iw_loss", GREEN, "IW"),
                (below, "elbo_gain_per_sequence", BLUE, "ELBO"),
                (below, "iw_gain_per_sequence", GREEN, "IW"),
            ):
                mean = over_seeds(rows, ["window"], column)
                axes.errorbar(
                    mean["window"], mean["mean"], mean["error"].fillna(0.0), color=color,
                    marker="o", ms=4, label=label,
                )  # fmt: skip
            truth = rows.groupby("window")[["window_truth_loss", "truth_loss"]].mean()
            if truth.notna().all(axis=None):
                above.plot(truth.index, truth["window_truth_loss"], ls=":", color=INK)
                above.plot(truth.index, truth["truth_loss"], ls="--", lw=1.0, color=INK)
            below.axhline(0.0, color=INK, lw=1.0)
            above.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=8)
            above.set_title(name)
            for axes in (above, below):
                axes.set_xscale("log", base=2)
                axes.set_xticks(truth.index, [str(window) for window in truth.index])
                axes.set_xlabel("window, tokens")
        panels[0, 0].set_ylabel("loss, nats per sequence")
        panels[1, 0].set_ylabel("nats gained by thoughts")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """By corpus: what context gains, and what thoughts gain."""
    parts = [_of_corpus(str(name), rows) for name, rows in table.groupby("corpus", sort=False)]
    columns = {
        "control_loss": "no thoughts", "elbo_loss": "ELBO", "iw_loss": "IW",
        "elbo_gain_per_sequence": "gain, ELBO", "iw_gain_per_sequence": "gain, IW",
        "kl_per_sequence": "KL", "nats_of_shuffled_z": "loss with another's z",
        "window_truth_loss": "best with what is seen",
    }  # fmt: skip
    shown = with_errors(table, ["corpus", "window"], columns)
    return "\n\n".join(
        [
            *parts,
            "Not tested: longer fits, larger models, and other schedules of the KL weight, each of "
            "which may change what thoughts carry; where a bound is not above the control, the "
            "model itself may still be.",
            f"Nats per sequence, ± standard error over seeds:\n\n{shown}",
        ]
    )


def _of_corpus(name: str, rows: pd.DataFrame) -> str:
    least, most = rows["window"].min(), rows["window"].max()
    mean = rows.groupby("window").mean(numeric_only=True)
    context = mean["control_loss"][least] - mean["control_loss"][most]
    gains = over_seeds(rows, ["window"], "iw_gain_per_sequence").set_index("window")
    pays = [str(w) for w, g in gains.iterrows() if g["mean"] > 0 and clear(g["mean"], g["error"])]
    costs = [str(w) for w, g in gains.iterrows() if g["mean"] < 0 and clear(g["mean"], g["error"])]
    share = gains["mean"][least] / context
    above = mean["control_loss"][most] - mean["window_truth_loss"][most]
    short = ""
    if above > 1:
        short = (
            f" At window {most} the control is {above:.1f} above the best that its window allows: "
            "a fit this short has not learned to use the context that it sees."
        )
    return (
        f"**{name}** ({rows['seed'].nunique()} seeds): without thoughts a window of {most} instead "
        f"of {least} gains {context:.1f} nats per sequence; at window {least} thoughts gain "
        f"{gains['mean'][least]:.1f} ± {gains['error'][least]:.1f} by the importance-weighted "
        f"bound, {100 * share:.0f} % of that; at window {most} they gain "
        f"{gains['mean'][most]:.1f} ± {gains['error'][most]:.1f}. More than two errors above the "
        f"control at windows {', '.join(pays) or 'none'}; below it at {', '.join(costs) or 'none'}."
        f"{short}"
    )
