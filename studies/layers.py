"""What is reconstructed as the thoughts of the lower layers are kept and the others set to 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ltm_pyro.diagnostics.decomposition import reconstruction_by_block
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, GREEN, ORANGE, house_figure
from studies.common import config_of, fitted, over_seeds, with_errors
from studies.window import MIXTURE, TEXT


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit and its control; a row for each number of layers whose thoughts are kept."""
    usual = MIXTURE if settings["corpus.name"] == "mixture" else TEXT
    # On `mixture` thoughts alone can tell what is not in the token before.
    window = 1 if usual is MIXTURE else 16
    usual = {**usual, "model.n_layers": 4, "model.window": window}
    config = config_of({**usual, **settings}, data)
    with fitted(config) as run:
        corpus = run.corpus()
        batch = spread(corpus.val, run.config.eval_sequences)
        post = run.svi.infer(batch, run.config.eval_fast_steps, progress=False)
        part = reconstruction_by_block(run.model, post, batch)
        control = reconstruction_by_block(run.control().model, post, batch, draws=1)
        documents = documents_of(part)
        rows = []
        for kept in part["kept"].values:
            gain = clustered_mean(part["nll"].values[0] - part["nll"].values[kept], documents)
            rows.append(
                {
                    "corpus": corpus.name,
                    "kept": int(kept),
                    "accuracy": 100 * float(part["accuracy"][kept]),
                    "control_accuracy": 100 * float(control["accuracy"][0]),
                    "gain_per_sequence": gain.value,
                    "gain_error": gain.error,
                    "kl_so_far": float(part["kl"].values[:kept].sum(0).mean()),
                }
            )
    return rows


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy, and nats gained and paid, against the layers whose thoughts are kept."""
    corpora = list(table["corpus"].unique())
    caption = (
        "Thoughts of layers 1..l are kept, the others set to 0; held-out sequences, mean and "
        "standard error over seeds. Above: tokens that are the likeliest given the tokens before "
        "and q's mean, against the decoder trained without thoughts (orange). Below: "
        "log p(x | z) gained over z = 0, and the KL that these thoughts cost. q saw the sequence: "
        "accuracy is no prediction, and it pays only where green is above orange below."
    )
    with house_figure((4.3 * len(corpora), 4.8), caption) as fig:
        panels = fig.subplots(2, len(corpora), squeeze=False)
        for (above, below), name in zip(panels.T, corpora, strict=True):
            rows = table[table["corpus"] == name]
            for axes, column, color, label in (
                (above, "accuracy", BLUE, "layers 1..l kept"),
                (above, "control_accuracy", ORANGE, "no thoughts"),
                (below, "gain_per_sequence", GREEN, "reconstruction gained"),
                (below, "kl_so_far", ORANGE, "KL paid"),
            ):
                mean = over_seeds(rows, ["kept"], column)
                axes.errorbar(
                    mean["kept"], mean["mean"], mean["error"].fillna(0.0), color=color, marker="o",
                    ms=4, label=label,
                )  # fmt: skip
            above.yaxis.set_major_formatter(PercentFormatter(100.0))
            for axes in (above, below):
                axes.set_xlabel("layers whose thoughts are kept")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=8)
            above.set_title(name)
        panels[0, 0].set_ylabel("tokens guessed right")
        panels[1, 0].set_ylabel("nats per sequence")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """Which layer's thoughts reconstruct most, and whether they are worth their KL."""
    parts = [_of_corpus(str(name), rows) for name, rows in table.groupby("corpus", sort=False)]
    columns = {
        "accuracy": "guessed right, %", "control_accuracy": "no thoughts, %",
        "gain_per_sequence": "gained, nats", "kl_so_far": "KL paid, nats",
    }  # fmt: skip
    shown = with_errors(table, ["corpus", "kept"], columns)
    return "\n\n".join(
        [
            *parts,
            "A curve that rises with l does not say that later thoughts are of another kind, nor "
            "that thoughts help a language model: q was fitted to the very tokens, the order is "
            "the decoder's alone, and a decoder that has learned with all thoughts meets zeros "
            "that it never saw in training. Not tested: the layers in another order.",
            f"Means ± standard error over seeds, per sequence:\n\n{shown}",
        ]
    )


def _of_corpus(name: str, rows: pd.DataFrame) -> str:
    mean = rows.groupby("kept").mean(numeric_only=True)
    steps = np.diff(mean["accuracy"])
    last = mean.iloc[-1]
    net = last["gain_per_sequence"] - last["kl_so_far"]
    return (
        f"**{name}** ({rows['seed'].nunique()} seeds): accuracy is {mean['accuracy'].iloc[0]:.1f} "
        f"% without thoughts, then "
        + ", ".join(f"{value:.1f}" for value in mean["accuracy"].iloc[1:])
        + f" % as layers 1 to {mean.index[-1]} join (most by layer {1 + int(np.argmax(steps))}); "
        f"the decoder trained without thoughts guesses {last['control_accuracy']:.1f} %. All "
        f"thoughts gain {last['gain_per_sequence']:.1f} nats per sequence over z = 0 and cost "
        f"{last['kl_so_far']:.1f} of KL: {net:+.1f}."
    )
