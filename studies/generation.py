"""Generated text beside held-out text: by rule of sampling, and by where its thoughts come from.

The texts of one half of what is held out (the test split) give the prompts; the other half (the
validation split) is what all is compared with. Their own distance is the floor: no sample is
expected below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import ltm_pyro as ltm
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.plots.style import BLUE, GREY, INK, ORANGE, house_figure
from studies.common import config_of, fitted, over_seeds
from studies.tasks import writers
from studies.text_quality import distinct, self_bleu, triple_frontier_distance, word_entropy

RULES: dict[str, dict[str, Any]] = {
    "multinomial": {},
    "nucleus 0.9": {"top_p": 0.9},
    "greedy": {"greedy": True},
}
PRIOR, PROMPT_PRIOR, PROMPT_POSTERIOR = (
    "z ~ prior",
    "prompt, z ~ prior",
    "prompt, z ~ q(z given prompt)",
)
CONTROL, PROMPT_CONTROL = "control", "prompt, control"
FLOOR = "held-out text"


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit, then texts of each kind."""
    n, prompt, size = (settings[f"study.{name}"] for name in ("texts", "prompt", "bytes"))
    with fitted(config_of(settings)) as run:
        corpus = run.corpus()
        (_, kept), (prompts, asked) = (
            pieces(split, n, prompt, size) for split in (corpus.val, corpus.test)
        )
        made = writers(run)
        model, control = made["thoughts"].model, made["control"].model
        generator = torch.Generator().manual_seed(settings["seed"])
        drawn = torch.randn(len(prompts), *model.thought_shape, generator=generator)  # nano's prior
        nothing = torch.zeros(model.thought_shape)
        rows = [{"texts_from": FLOOR, "rule": "none", **measured(asked, kept)}]
        for rule, options in RULES.items():
            shared = {"tokenizer": run.tokenizer, "seed": settings["seed"], **options}
            new, after = {"length": size}, {"prompt": prompts, "max_new_tokens": size}
            written = {
                PRIOR: ltm.generate(model, n=len(prompts), **new, **shared),
                PROMPT_PRIOR: ltm.generate(model, z=drawn, n=1, **after, **shared),
                PROMPT_POSTERIOR: ltm.generate(model, svi=run.svi, **after, **shared),
                CONTROL: ltm.generate(control, z=nothing, n=len(prompts), **new, **shared),
                PROMPT_CONTROL: ltm.generate(control, z=nothing, n=1, **after, **shared),
            }
            for name, texts in written.items():
                if "prompt" in name:
                    texts = [t.removeprefix(p) for t, p in zip(texts, prompts, strict=True)]
                rows.append({"texts_from": name, "rule": rule, **measured(texts, kept)})
    return rows


def pieces(split: SequenceSet, n: int, prompt: int, size: int) -> tuple[list[str], list[str]]:
    """The beginnings of `n` held-out sequences that are long enough, and what follows them."""
    batch = split.batch(range(len(split)))
    whole = split.batch(np.flatnonzero(batch.n_tokens.numpy() >= prompt + size))
    rows = whole.observed[np.linspace(0, len(whole) - 1, min(n, len(whole))).astype(int)].numpy()
    tokenizer = split.tokenizer
    assert tokenizer is not None
    return (
        [tokenizer.decode(row[:prompt]) for row in rows],
        [tokenizer.decode(row[prompt : prompt + size]) for row in rows],
    )


def measured(texts: list[str], kept: list[str]) -> dict[str, float]:
    """All that is said of some texts, against what was kept."""
    return {
        "triple_frontier_distance": triple_frontier_distance(texts, kept),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "word_entropy_bits": word_entropy(texts),
        "self_bleu": self_bleu(texts),
    }


def figure(table: pd.DataFrame) -> Figure:
    """Distance and repetition, by rule."""
    caption = (
        "Left: distance to held-out text (1 - area below the divergence frontier of clusters of "
        "byte triples: like MAUVE, not comparable with it). Right: self-BLEU, 1 where all texts "
        "are copies. Mean and standard error over seeds; dashed: one half of the held-out text "
        "against the other."
    )
    names = [PRIOR, PROMPT_PRIOR, PROMPT_POSTERIOR, CONTROL, PROMPT_CONTROL]
    colors = [ORANGE, ORANGE, BLUE, GREY, GREY]
    with house_figure((6.4, 3.6), caption) as fig:
        both = fig.subplots(1, 2, sharey=True)
        scores = {"triple_frontier_distance": "distance", "self_bleu": "self-BLEU"}
        for axes, (score, label) in zip(both, scores.items(), strict=True):
            for shift, (rule, marker) in enumerate(zip(RULES, "os^", strict=True)):
                mean = over_seeds(table[table["rule"] == rule], ["texts_from"], score)
                mean = mean.set_index("texts_from").loc[names]
                for place, (value, error, color) in enumerate(
                    zip(mean["mean"], mean["error"].fillna(0.0), colors, strict=True)
                ):
                    axes.errorbar(
                        value, place + 0.2 * (shift - 1), xerr=error, fmt=marker, markersize=5,
                        color=color, label=rule if place == len(names) - 1 else None,
                    )  # fmt: skip
            floor = float(table.loc[table["texts_from"] == FLOOR, score].mean())
            axes.axvline(floor, linestyle="--", linewidth=1.0, color=INK)
            axes.set_xlabel(label)
        both[0].set_yticks(range(len(names)), names)
        both[0].invert_yaxis()
        fig.legend(*both[1].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """The table over seeds, then what it allows to say."""
    columns = {
        "triple_frontier_distance": "distance", "distinct_1": "distinct-1",
        "distinct_2": "distinct-2", "word_entropy_bits": "entropy, bits",
        "self_bleu": "self-BLEU",
    }  # fmt: skip
    by = ["texts_from", "rule"]
    means = {name: over_seeds(table, by, name).set_index(by) for name in columns}
    lines = [f"| texts from | rule | {' | '.join(columns.values())} |", "|---" * 7 + "|"]
    for key in means["self_bleu"].index:
        values = [f"{m['mean'][key]:.3f} ± {m['error'][key]:.3f}" for m in means.values()]
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(values)} |")
    said = []
    for one, other in ((PROMPT_POSTERIOR, PROMPT_PRIOR), (PROMPT_POSTERIOR, PROMPT_CONTROL)):
        gap = _paired(table, one, other, "multinomial")
        said.append(f"{one} less {other}: {gap['mean']:+.3f} ± {gap['error']:.3f}")
    return "\n".join(
        [
            f"Mean and standard error over {table['seed'].nunique()} seed(s), "
            f"{table['study.texts'].iloc[0]} texts of {table['study.bytes'].iloc[0]} bytes of "
            "each kind, on `pydoc`:",
            "",
            *lines,
            "",
            "The distance is 1 - the area below the divergence frontier of clusters of byte "
            "triples, the features of this project and not MAUVE's: the held-out row is its floor, "
            "0 is never reached with so few texts. Distance of multinomial texts, paired by seed: "
            f"{'; '.join(said)}. Greedy texts of one prompt-free decoder are copies of each "
            "other unless thoughts tell them apart; variety from thoughts is no sign of quality, "
            "and the byte triples see neither sense nor grammar beyond a few letters. Not tested: "
            "human judgement, long texts, and the paper's MAUVE of 0.97.",
        ]
    )


def _paired(table: pd.DataFrame, one: str, other: str, rule: str) -> pd.Series:
    """Mean and error over seeds of the difference of two kinds' distances."""
    here = table[table["rule"] == rule]
    wide = here.pivot_table(index="seed", columns="texts_from", values="triple_frontier_distance")
    gap = (wide[one] - wide[other]).rename("gap").reset_index().assign(all=0)
    return over_seeds(gap, ["all"], "gap").iloc[0]
