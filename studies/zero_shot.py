"""A model of WikiText-2 on text of other kinds: per byte, in each mode, beside its control.

oracle   q saw the sequence; its bounds charge the KL: ELBO and importance-weighted
prefix   q saw the first half; its prediction of the rest, which is no bound
prior    no posterior: log of the mean of p(x | z) over draws from the prior, a bound
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.control import against_control
from ltm_pyro.diagnostics.estimates import PERPLEXITIES
from ltm_pyro.diagnostics.units import score_table
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, PURPLE, house_figure
from ltm_pyro.run.scoring import other_corpus, score_run
from studies.common import clear, config_of, fitted, over_seeds

TEXTS = {
    "wikitext2, test": "wikitext2/test.txt",
    "tinyshakespeare": "tinyshakespeare/input.txt",
    "novels": "novels",
    "gsm8k questions": "gsm8k/test.jsonl",
    "pydoc": "pydoc",
}
SCORES = {
    ("oracle", "ppl_elbo"): ("oracle, ELBO", BLUE),
    ("oracle", "ppl_iw"): ("oracle, importance weights", PURPLE),
    ("prefix", "ppl_predictive"): ("prefix", GREEN),
    ("prior", "ppl_iw"): ("prior", ORANGE),
}


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit, scored on every text in every mode."""
    assert data is not None
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-zero-shot-") as folder:
        file = Path(folder) / "train.txt"
        text = (data / "wikitext2" / "train.txt").read_text("utf-8")
        file.write_text(text[: settings["study.train_bytes"]], "utf-8")
        with fitted(config_of(settings, file)) as run:
            rows = []
            for name, place in TEXTS.items():
                options = {"text_field": "question"} if place.endswith(".jsonl") else {}
                path = place if place == "pydoc" else str(data / place)
                corpus = other_corpus(run, path, **options)
                for mode in ("oracle", "prefix", "prior"):
                    held = score_run(
                        run, corpus, mode=mode, sequences=settings["study.sequences"],
                        draws=settings["study.draws"], seed=settings["seed"],
                    )  # fmt: skip
                    assert held.control is not None
                    table, exact = (score_table(d, "byte") for d in (held.scores, held.control))
                    for score, gap in against_control(held.scores, held.control, "byte").items():
                        if (mode, score) not in SCORES:
                            continue
                        own = table.loc[PERPLEXITIES[score][0]]
                        rows.append(
                            {
                                "text": name, "mode": mode, "score": score,
                                "bits_per_byte": own["bits_per_byte"],
                                "control_bits_per_byte": exact.loc["nll_z0", "bits_per_byte"],
                                "gain_bits_per_byte": -gap["difference_per_byte"] / math.log(2),
                                "gain_error": gap["difference_per_byte_error"] / math.log(2),
                                "documents": gap["documents"], "bytes": own["n_bytes"],
                            }
                        )  # fmt: skip
    return rows


def figure(table: pd.DataFrame) -> Figure:
    """Gain over the control by text and mode."""
    caption = (
        "Bits per byte gained over the same decoder without thoughts, on text that the fit has not "
        "seen; right of the dashed line thoughts help. Each point a seed, bars two errors "
        "clustered by document. Bounds (oracle, prior) may be loose: left of the line says nothing "
        "of the model. Prefix scores the second half alone."
    )
    names = list(TEXTS)
    with house_figure((6.4, 3.8), caption) as fig:
        axes = fig.subplots()
        for shift, ((mode, score), (label, color)) in enumerate(SCORES.items()):
            mine = table[(table["mode"] == mode) & (table["score"] == score)]
            place = [
                names.index(row["text"]) + 0.2 * (shift - 1.5) + 0.05 * (row["seed"] - 1)
                for _, row in mine.iterrows()
            ]
            axes.errorbar(
                mine["gain_bits_per_byte"], place, xerr=2 * mine["gain_error"], fmt="o",
                markersize=3, linewidth=0.9, color=color, label=label,
            )  # fmt: skip
        axes.axvline(0.0, linestyle="--", linewidth=1.0, color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("gain over the control, bits per byte")
        fig.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """The table over seeds, and where thoughts are told from the control."""
    lines = ["| text | " + " | ".join(label for label, _ in SCORES.values()) + " | control |"]
    lines.append("|---" * (len(SCORES) + 2) + "|")
    better: list[str] = []
    worse: list[str] = []
    places = 0
    for name in TEXTS:
        cells = []
        for (mode, score), (label, _) in SCORES.items():
            here = (table["text"] == name) & (table["mode"] == mode) & (table["score"] == score)
            mine = table[here].assign(all=0)
            bits = over_seeds(mine, ["all"], "bits_per_byte").iloc[0]
            gain = over_seeds(mine, ["all"], "gain_bits_per_byte").iloc[0]
            cells.append(f"{bits['mean']:.3f} ({gain['mean']:+.4f} ± {gain['error']:.4f})")
            places += 1
            all_clear = all(
                clear(g, e)
                for g, e in zip(mine["gain_bits_per_byte"], mine["gain_error"], strict=True)
            )
            signs = set((mine["gain_bits_per_byte"] > 0).tolist())
            if all_clear and len(signs) == 1:
                (better if True in signs else worse).append(f"{name} ({label})")
        whole = table[(table["text"] == name) & (table["mode"] == "oracle")]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {whole['control_bits_per_byte'].mean():.3f} |"
        )
    return "\n".join(
        [
            "Bits per byte, lower is better; in brackets the gain over the control on the same "
            f"bytes, paired, mean and standard error over {table['seed'].nunique()} seed(s) "
            "(`table.csv` has each seed's error clustered by document). The control's number is "
            "that of whole sequences; prefix scores their second half.",
            "",
            *lines,
            "",
            f"In every seed by more than two of its errors, thoughts' score is better than the "
            f"control's in {len(better)} of {places} places ({', '.join(better) or 'none'}) and "
            f"worse in {len(worse)} ({', '.join(worse) or 'none'}); a bound that is worse does not "
            "say that the model is. The released procedure of the paper scores on the draw that "
            "fitted q (docs/published_perplexity.md), which none of these does. All "
            f"after {table['steps'].iloc[0]} slow steps, which is little. Not tested: the paper's "
            "corpora, sizes and training budget.",
        ]
    )
