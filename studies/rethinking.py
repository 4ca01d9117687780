"""Rethinking: text and thoughts in turns (arXiv 2602.06584), against as many answers side by side.

    rethink     z ~ q(z | prompt, last answer), answer ~ p(answer | prompt, z), again and again
    best of n   z ~ q(z | prompt), answer ~ p(answer | prompt, z), n times

An answer of either costs the same: one draw of text, one fast loop on prompt and answer, and one
bound of their log p on fresh draws, by which the best so far is kept. The control, a decoder
without thoughts, has its exact log p and no fast loop, so its best of n is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.data.inputs import batch_of
from ltm_pyro.plots.style import BLUE, GREY, ORANGE, house_figure
from studies.arithmetic import fitted_to_sums, problems
from studies.common import over_seeds
from studies.tasks import Writer, answer_nats, writers

_ANSWER = 4
Scores = NDArray[np.float64]


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit; the three ways on one- and two-digit sums."""
    rows = []
    with fitted_to_sums(settings) as run:
        made = writers(run)
        for digits in (1, 2):
            tasks = problems(
                settings["seed"], settings["study.problems"], digits, settings["study.secrets"],
                settings["study.shots"],
            )  # fmt: skip
            prompts = [task.prompt for task in tasks]
            for way in ("rethink", "best of n", "control, best of n"):
                write = made["control" if way.startswith("control") else "thoughts"]
                found = rounds(write, prompts, settings, again=way == "rethink")
                right = np.array(
                    [[t.right(a) for t, a in zip(tasks, answers, strict=True)]
                     for answers, _ in found], float,
                )  # fmt: skip
                scores = np.array([score for _, score in found])
                best = np.maximum.accumulate(scores)
                chosen = [scores[: r + 1].argmax(0) for r in range(len(scores))]
                rows += [
                    {
                        "digits": digits,
                        "way": way,
                        "round": r + 1,
                        "right": float(right[r].mean()),
                        "right_best": float(right[chosen[r], np.arange(len(tasks))].mean()),
                        "log_p": float(scores[r].mean()),
                        "log_p_best": float(best[r].mean()),
                    }
                    for r in range(len(scores))
                ]
    return rows


def rounds(
    write: Writer, prompts: Sequence[str], settings: dict[str, Any], again: bool
) -> list[tuple[list[str], Scores]]:
    """Answers to each prompt and the bound of log p of the whole text, round by round."""
    out, z = [], None
    for turn in range(settings["study.rounds"]):
        seed = 1000 * settings["seed"] + turn
        made = write(prompts, 1, _ANSWER, "\n", seed=seed, z=z if again else None)
        answers = [each[0] for each in made]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        if write.svi is None:
            out.append((answers, -answer_nats(write, [""] * len(texts), texts)))
            continue
        score, z = bound(write, texts, settings["study.draws"], seed)
        out.append((answers, score))
    return out


def bound(write: Writer, texts: Sequence[str], draws: int, seed: int) -> tuple[Scores, Tensor]:
    """The importance-weighted bound of each text's log p on fresh draws, and a draw of q."""
    assert write.svi is not None
    batch = batch_of(list(texts), write.tokenizer)
    post = write.svi.infer(batch, seed=seed, progress=False)
    scores = ltm.evaluate(write.model, post, batch, draws, controls=False, seed=seed + 1)
    return scores["iw_bound"].values.astype(np.float64), post.sample(1, seed + 2)[0]


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy and log p against rounds."""
    caption = (
        "Against rounds, or answers drawn, at equal cost: share right of the answer with the "
        "highest log p so far (full lines) and of the last one (dotted), and that log p of prompt "
        "and answer (a bound with thoughts, exact for the control). Mean and standard error over "
        "seeds."
    )
    ways = {"rethink": ORANGE, "best of n": BLUE, "control, best of n": GREY}
    with house_figure((6.4, 5.0), caption) as fig:
        grid = fig.subplots(2, 2, sharex=True)
        for column, digits in zip(grid.T, (1, 2), strict=True):
            here = table[table["digits"] == digits]
            for way, color in ways.items():
                mine = here[here["way"] == way]
                for axes, name in zip(column, ("right_best", "log_p_best"), strict=True):
                    mean = over_seeds(mine, ["round"], name)
                    axes.errorbar(
                        mean["round"], mean["mean"], mean["error"].fillna(0.0), color=color,
                        label=way, marker="o", markersize=3,
                    )  # fmt: skip
                last = over_seeds(mine, ["round"], "right")
                column[0].plot(last["round"], last["mean"], ":", color=color, linewidth=1.0)
            column[0].set_title(f"{digits} digit{'s' * (digits > 1)}")
            column[1].set_xlabel("rounds")
        grid[0, 0].set_ylabel("share right")
        grid[1, 0].set_ylabel("log p, nats")
        fig.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """Whether turns beat answers side by side."""
    last = int(table["round"].max())
    lines = []
    ends = table[table["round"].isin([1, last])]
    for (digits, way), mine in ends.groupby(["digits", "way"], sort=False):
        best = over_seeds(mine, ["round"], "right_best").set_index("round")
        plain = over_seeds(mine, ["round"], "right").set_index("round")
        score = over_seeds(mine, ["round"], "log_p_best").set_index("round")
        lines.append(
            f"- {digits} digit(s), {way}: right {plain['mean'][1]:.3f} at first, "
            f"{plain['mean'][last]:.3f} ± {plain['error'][last]:.3f} in round {last}; of the best "
            f"by log p {best['mean'][last]:.3f} ± {best['error'][last]:.3f}; its log p "
            f"{score['mean'][1]:.2f} to {score['mean'][last]:.2f}"
        )
    wide = table[table["round"] == last].pivot_table(
        index=["digits", "seed"], columns="way", values="right_best"
    )
    gap = (wide["rethink"] - wide["best of n"]).rename("gap").reset_index()
    told = [
        f"{int(row['digits'])} digit(s): {row['mean']:+.3f} ± {row['error']:.3f}"
        for _, row in over_seeds(gap, ["digits"], "gap").iterrows()
    ]
    return "\n".join(
        [
            f"Sums of `studies/arithmetic.py` with {table['study.secrets'].iloc[0]} secret(s) and "
            f"{table['study.shots'].iloc[0]} example(s), {table['study.problems'].iloc[0]} of each "
            f"kind and seed; mean and standard error over {table['seed'].nunique()} seed(s):",
            "",
            *lines,
            "",
            f"Rethinking less best of n after {last} rounds, paired by seed, share right of the "
            f"best by log p: {'; '.join(told)}. Both draw and score as many answers. The log p "
            "that chooses is a valid bound on draws that inference has not seen, of prompt and "
            "answer; a likelier answer is not always a right one. Not tested: a learned prior, as "
            "the paper has, and problems of many steps.",
        ]
    )
