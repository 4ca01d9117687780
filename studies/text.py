"""Do thoughts pay on text, at a short window and at the full context, and which term costs it?

A fit with thoughts and its control are one fit until thoughts join; then each goes on from the same
weights and moments, on the same batches, for as many slow steps.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import ltm_pyro as ltm
from ltm_pyro.diagnostics.collapse import collapse_panel
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.run import create_run
from ltm_pyro.run.scoring import HeldOut, control_scores
from studies.common import (
    against_control,
    clear,
    config_of,
    over_seeds,
    train_both,
    training_gflops,
)
from studies.figures import gains_by_window


def cell(settings: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """A fit and its control on one corpus at one window, scored on the test split."""
    text = settings["study.text"]
    config = config_of({**settings, **settings["study.texts"][text]}, data)
    window = settings["study.window"]
    shape = replace(config.model, window=config.model.seq_len if window == "full" else window)
    config = replace(config, model=shape)
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-study-") as folder:
        run = create_run(Path(folder) / "run", config)
        corpus = run.corpus()
        train_both(run, corpus)
        batch = spread(corpus.test, config.eval_sequences)
        control = control_scores(run, batch)
        assert control is not None
        post = run.svi.infer(batch, config.eval_fast_steps, progress=False)
        scores = ltm.evaluate(run.model, post, batch, config.eval_draws)
        short = run.svi.infer(batch, config.fast.steps, progress=False)
        truncated = ltm.evaluate(run.model, short, batch, config.eval_draws // 4, controls=False)
    panel = collapse_panel(post, scores, n_layers=config.model.n_layers)
    elbo = float(scores["elbo"].mean())
    off = clustered_mean((control["nll_z0"] - scores["nll_z0"]).values, documents_of(scores))
    return {
        "corpus": text,
        **against_control(HeldOut("test", batch, post, None, scores, control)),
        "iw_above_elbo": float(scores["iw_bound"].mean()) - elbo,
        "lost_to_truncation": elbo - float(truncated["elbo"].mean()),
        "nats_of_z0": float((scores["nll_z0"] - scores["nll_given_z"]).mean()),
        "off_gain_per_sequence": off.value,
        "off_gain_error": off.error,
        "active_units": panel.active_units,
        "mutual_information": panel.mutual_information,
        "kl_aggregate": panel.kl_aggregate,
        "documents": scores.attrs["n_documents"],
        "tokens": int(scores["n_tokens"].sum()),
        "weights": run.config.model.n_weights,
        "gflops": training_gflops(run.config),
    }


def figure(table: pd.DataFrame) -> Figure:
    """Gain over the control by corpus and window, one point a seed."""
    caption = (
        "Test text, gain over the control of the same seed, nats per sequence, with two errors "
        "clustered by document; one mark a seed. Orange: ELBO. Blue: importance weights. Black: "
        "the decoder that was trained with thoughts, its thoughts switched off. Right of the line "
        "a model is better than the control; a bound left of it says nothing of the model."
    )
    return gains_by_window(table, "corpus", "study.window", caption)


_COLUMNS = {
    "kl_per_sequence": "KL", "mutual_information": "of it telling apart",
    "kl_aggregate": "of it common to all", "active_units": "active units", "nats_of_z0": "z = 0",
    "nats_of_shuffled_z": "another's z", "iw_above_elbo": "IW - ELBO",
    "lost_to_truncation": "truncation",
}  # fmt: skip
_LEGEND = (
    "Nats per test sequence, means over seeds; ± is the standard error over seeds. A seed pays "
    "where the gain over the control of that seed is above two errors clustered by document. "
    "`off - control`: the decoder that was trained with thoughts, at z = 0, against the control. "
    "`z = 0` and `another's z`: what the text loses without its own z. `IW - ELBO`: what q's shape "
    "costs, from below. The KL is what z tells apart of the sequences (mutual information under q) "
    "and what all q have in common against the prior, which a learned prior could save. "
    "`truncation`: what the fast steps of the training lose against the longer loop that is scored."
)


def paragraph(table: pd.DataFrame) -> str:
    """Every corpus at every window, what pays, and which term costs it."""
    heads = ["corpus", "window", "ELBO - control", "IW - control", "off - control"]
    heads += ["seeds that pay (ELBO, IW)", *_COLUMNS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    verdicts = []
    for (corpus, window), rows in table.groupby(["corpus", "study.window"], sort=False):
        cells = [str(corpus), str(window)]
        for kind in ("elbo", "iw", "off"):
            mean = over_seeds(rows, ["corpus"], f"{kind}_gain_per_sequence").iloc[0]
            cells.append(f"{mean['mean']:+.2f} ± {mean['error']:.2f}")
        paid = [_seeds(rows, kind, above=True) for kind in ("elbo", "iw")]
        cells.append(", ".join(f"{n} of {len(rows)}" for n in paid))
        means = rows.mean(numeric_only=True)
        cells += [f"{means[name]:.2f}" for name in _COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
        verdicts.append(_verdict(f"{corpus}, window {window}", rows, paid))
    first, sizes = table.iloc[0], []
    for name, rows in table.groupby("corpus", sort=False):
        own = first["study.texts"][name]
        length, steps = (own.get(k, first[k]) for k in ("model.seq_len", "steps"))
        weights = rows["weights"].iloc[0] / 1e6
        sizes.append(f"{name}: {weights:.2f} M weights, {steps} slow steps, {length} tokens")
    size = (
        f"{'; '.join(sizes)} a sequence, {first['batch_size']} sequences a step. Thoughts from "
        f"{100 * first['slow.thoughts_start']:.0f} % of the steps on; until then the two are one "
        "fit, and then both go on from the same weights. Equal slow steps, not equal FLOPs: the "
        "fast loops come on top."
    )
    return "\n".join([size, "", *lines, "", _LEGEND, "", "\n\n".join(verdicts)])


def _seeds(rows: pd.DataFrame, kind: str, *, above: bool) -> int:
    """Seeds whose gain is more than two of its errors above the control, or below it."""
    pairs = zip(rows[f"{kind}_gain_per_sequence"], rows[f"{kind}_gain_error"], strict=True)
    return sum((gain > 0) == above and clear(gain, error) for gain, error in pairs)


def _verdict(name: str, rows: pd.DataFrame, paid: list[int]) -> str:
    """What pays in one place, and the terms of what is lost or gained there."""
    means, n = rows.mean(numeric_only=True), len(rows)
    net = means["nats_of_z0"] - means["kl_per_sequence"]
    return (
        f"**{name}.** By the ELBO thoughts pay in {paid[0]} of {n} seeds and cost in "
        f"{_seeds(rows, 'elbo', above=False)}, by importance weights they pay in {paid[1]} and "
        f"cost in {_seeds(rows, 'iw', above=False)}. z gives {means['nats_of_z0']:.2f} nats over "
        f"z = 0 for {means['kl_per_sequence']:.2f} of KL (of which "
        f"{means['kl_aggregate']:.2f} is common to all sequences), {net:+.2f} in all; the decoder "
        f"itself, thoughts switched off, is {means['off_gain_per_sequence']:+.2f} against the "
        f"control; a q of another shape could win back at least {means['iw_above_elbo']:.2f}, a "
        f"longer loop in training up to {means['lost_to_truncation']:.2f}."
    )
