"""WikiText-2 with its own split: a decoder with thoughts and its control, in bits per byte.

Articles are the documents. Scores are of articles of the test split: with q fitted to the sequence
(oracle: bounds that charge the KL), to its first half (prefix: a prediction of the rest), and with
z from the prior. The fit lies in the cache folder until its scores are kept, so that one that was
stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from ltm_pyro.data.cache import Cache
from ltm_pyro.diagnostics.control import against_control
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.diagnostics.units import score_table
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure
from ltm_pyro.run import create_run, load_run
from ltm_pyro.run.scoring import control_scores, score_run, sequences_of, summary
from studies.common import clear, config_of, train_both, training_gflops

ARTICLE = re.compile(r"(?m)^ \n(?= = [^=\n]+ = \n \n)")
"""The empty line before a heading of the first level."""
PUBLISHED = {"perplexity": 102.26, "weights": 7.3e6, "test words": 245_569}
"""Per word, of the test split with its line ends, closed vocabulary of 33,278; by gluon-nlp's
`standard_lstm_lm_200_wikitext-2` (two layers of 200 LSTM units, tied, 750 epochs, state kept over
the whole text); weights counted here: 33,278 x 200 and two layers of 4 x 200 x 400, biases."""
SCORES = {
    ("oracle", "ppl_elbo"): ("elbo", "oracle, ELBO"),
    ("oracle", "ppl_iw"): ("iw_bound", "oracle, importance weights"),
    ("prefix", "ppl_predictive"): ("log_predictive", "prefix"),
    ("prior", "ppl_iw"): ("iw_bound", "prior"),
}


def articles(text: str) -> list[str]:
    """The text cut before each article's heading, whole."""
    return [part for part in ARTICLE.split(text) if part]


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit and its control; a row for each score, one for all of the test split."""
    assert data is not None
    of_fit = {name: value for name, value in settings.items() if not name.startswith("study.")}
    key = hashlib.sha256(json.dumps(of_fit, sort_keys=True).encode()).hexdigest()[:16]
    home = Cache(None).folder / f"wikitext-{key}"
    texts = home / "text"
    if not texts.exists():
        texts.mkdir(parents=True)
        for name in ("train", "valid", "test"):
            text = (data / f"{name}.txt").read_text("utf-8")
            lines = [json.dumps({"text": each}) + "\n" for each in articles(text)]
            (texts / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    known = (home / "run").exists()
    config = config_of(settings, texts)
    run = load_run(home / "run") if known else create_run(home / "run", config)
    corpus = run.corpus()
    train_both(run, corpus)
    facts = {
        "weights": run.config.model.n_weights,
        "gflops": training_gflops(run.config),
        "control_gflops": training_gflops(
            config_of({**settings, "slow.thoughts_start": 1.0}, texts)
        ),
        "seconds": sum(row["seconds"] for row in run.metrics),
        "control_seconds": sum(row["seconds"] for row in run.control_metrics()),
        "batch": run.config.batch_size,
        "seq_len": corpus.seq_len,
        "tokens_seen": run.config.steps * run.config.batch_size * corpus.seq_len,
        "test_bytes": (data / "test.txt").stat().st_size,
    }
    judged = settings["study.khat"]
    few = score_run(run, corpus, split="test", **judged)
    facts |= {f"khat_{name}": summary(run, few)["khat"][name] for name in ("median", "largest")}
    facts |= {f"khat_{name}": judged[name] for name in judged}
    rows = []
    for mode in ("oracle", "prefix", "prior"):
        held = score_run(
            run, corpus, split="test", mode=mode, sequences=settings["study.sequences"],
            draws=settings["study.draws"][mode],
        )  # fmt: skip
        assert held.control is not None
        gaps = against_control(held.scores, held.control, "byte")
        inside = _inside(summary(run, held)) if mode == "oracle" else {}
        for (its, name), (column, label) in SCORES.items():
            if its == mode:
                gap = gaps[name]
                rows.append(
                    {
                        "score": label, **facts, **_per_unit(held.scores, column), **inside,
                        "control_bits_per_byte": _per_unit(held.control, "nll_z0")["bits_per_byte"],
                        "gain_bits_per_byte": -gap["difference_per_byte"] / _LN2,
                        "gain_error": gap["difference_per_byte_error"] / _LN2,
                    }
                )  # fmt: skip
    more = settings["study.control_sequences"]
    control = control_scores(run, spread(sequences_of(corpus, "test"), more))
    assert control is not None
    rows.append({"score": "control on more text", **facts, **_per_unit(control, "nll_z0")})
    shutil.rmtree(home)
    return rows


_LN2 = math.log(2)


def _per_unit(scores: xr.Dataset, column: str) -> dict[str, Any]:
    """One score per byte and per token, and of how much text."""
    byte = score_table(scores, "byte").loc[column]
    return {
        "bits_per_byte": byte["bits_per_byte"],
        "bits_per_byte_error": byte["nats_per_byte_sampling_se"] / _LN2,
        "nats_per_token": score_table(scores, "token").loc[column]["nats_per_token"],
        "documents": byte["n_clusters"],
        "sequences": byte["n_sequences"],
    }


def _inside(told: dict[str, Any]) -> dict[str, Any]:
    """What q does, of a run's summary in mode oracle; nats per sequence."""
    panel = told["collapse"] or {}
    names = ("active_units", "n_units", "penalty_z0", "penalty_shuffled")
    errors = ("penalty_z0_se", "penalty_shuffled_se", "mutual_information")
    return {
        "kl_per_sequence": told["nats_per_sequence"]["kl"],
        **{name: panel.get(name) for name in (*names, *errors)},
    }


def published_bits(n_bytes: int) -> float:
    """The published figure per byte of the same text."""
    return PUBLISHED["test words"] * math.log2(PUBLISHED["perplexity"]) / n_bytes


def figure(table: pd.DataFrame) -> Figure:
    """Bits per byte of each score, and what each gains over the control on the same text."""
    caption = (
        "WikiText-2, own test split, bits per byte; bars are two errors clustered by article. "
        "Left: scores with thoughts (blue: bounds; green: q saw the first half and the second is "
        "scored) and the control on the same text (orange). Dashed: a published LSTM of that size, "
        "which was trained for hundreds of epochs. Right: gain over the control, paired."
    )
    rows = table[table["control_bits_per_byte"].notna()].reset_index(drop=True)
    with house_figure((7.6, 2.8), caption) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        for place, row in rows.iterrows():
            color = GREEN if row["score"] == "prefix" else BLUE
            left.plot([row["control_bits_per_byte"]], [place], "|", ms=14, color=ORANGE)
            for axes, name, error in (
                (left, "bits_per_byte", "bits_per_byte_error"),
                (right, "gain_bits_per_byte", "gain_error"),
            ):
                axes.errorbar(row[name], place, xerr=2 * row[error], fmt="o", ms=4, color=color)
        left.axvline(published_bits(int(table["test_bytes"].iloc[0])), color=INK, ls="--", lw=1.0)
        right.axvline(0.0, color=INK, lw=1.0)
        left.set_yticks(rows.index, rows["score"])
        left.invert_yaxis()
        left.set_xlabel("bits per byte")
        right.set_xlabel("gain over the control, bits per byte")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """Both models, what q does, and the published figure."""
    lines = [
        "| score | bits per byte | nats per token | control, bits per byte | gain over it |",
        "|---|---|---|---|---|",
    ]
    for _, row in table.iterrows():
        cells = [
            row["score"],
            f"{row['bits_per_byte']:.4f} ± {row['bits_per_byte_error']:.4f}",
            f"{row['nats_per_token']:.4f}",
            *(["", ""] if math.isnan(row["gain_bits_per_byte"]) else [
                f"{row['control_bits_per_byte']:.4f}",
                f"{row['gain_bits_per_byte']:+.4f} ± {row['gain_error']:.4f}",
            ]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    first = table.iloc[0]
    gain, error = first["gain_bits_per_byte"], first["gain_error"]
    verdict = "not told apart from" if not clear(gain, error) else (
        "better than" if gain > 0 else "worse than"
    )  # fmt: skip
    bits = published_bits(int(first["test_bytes"]))
    return "\n".join(
        [
            f"A decoder of {first['weights'] / 1e6:.2f} M weights, {first['steps']} slow steps of "
            f"{first['batch']} sequences ({first['tokens_seen'] / 1e6:.1f} M tokens), thoughts "
            f"from {100 * first['slow.thoughts_start']:.0f} % of them; {first['gflops']:,.0f} "
            f"GFLOP with thoughts and {first['control_gflops']:,.0f} without, at equal slow steps "
            "(until thoughts join the two are one fit, done once). The control's own number on the "
            "same text stands beside each score; errors are clustered by article. The fit with "
            f"thoughts took {first['seconds'] / 60:.0f} minutes and the control "
            f"{first['control_seconds'] / 60:.0f}, the shared start counted in both, on one thread "
            "of a busy machine.",
            "",
            *lines,
            "",
            f"By its ELBO the model with thoughts is {verdict} the control. Of "
            f"{first['sequences']:.0f} test sequences of {first['documents']:.0f} articles: KL "
            f"{first['kl_per_sequence']:.2f} nats per sequence, {first['active_units']:.0f} of "
            f"{first['n_units']:.0f} units active, {first['penalty_z0']:.2f} ± "
            f"{first['penalty_z0_se']:.2f} nats lost with z = 0 and "
            f"{first['penalty_shuffled']:.2f} ± {first['penalty_shuffled_se']:.2f} with another "
            f"article's z. k-hat, which needs many draws ({first['khat_draws']} of "
            f"{first['khat_sequences']} sequences), has median {first['khat_median']:.2f} and is "
            f"at most {first['khat_largest']:.2f}: below 0.7 the importance weights' error can be "
            "trusted. Prefix is a prediction of "
            "each sequence's second half by a q that saw the first, beside the control's number on "
            "those halves; prior is the bound with z from the prior.",
            "",
            f"**Published.** An LSTM of about {PUBLISHED['weights'] / 1e6:.1f} M weights has "
            f"{PUBLISHED['perplexity']:g} per word on this test split (gluon-nlp, "
            "`standard_lstm_lm_200`, 750 epochs), which is "
            f"{bits:.3f} bits per byte of the same text. Both are codes of the same bytes, so the "
            "unit compares; the conditions do not: it knows the closed vocabulary of 33,278 words "
            "and spends nothing on other spellings, keeps its state over the whole text where a "
            f"sequence here starts anew every {first['seq_len']} tokens, and was trained for "
            f"hundreds of epochs with dropout, not for {first['tokens_seen'] / 2.7e6:.1f}. It says "
            "what a model of this size can reach, not what thoughts are worth: for that the "
            "control stands here.",
        ]
    )
