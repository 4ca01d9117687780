"""Sums of one- and two-digit numbers from a few examples, with thoughts and without.

A text is a list of sums, `7+5=12` a line, of as many as fill one sequence. With several secrets
each text adds one of 0 .. S - 1 to all its sums, so that the examples before a sum tell something.
A fifth of all pairs of numbers is never written in a text that is fitted, and is asked.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ltm_pyro.plots.style import BLUE, GREY, INK, house_figure
from ltm_pyro.run import Run
from studies.common import config_of, fitted, over_seeds
from studies.tasks import Task, graded, wilson, writers

LENGTH = 64
"""T: bytes of a text."""
_ANSWER = 4
"""Bytes of the longest answer, `201` and a line end."""


def asked_pairs() -> NDArray[np.bool_]:
    """(100, 100) whether a pair is kept for asking, in either order."""
    drawn = np.random.default_rng(20).random((100, 100)) < 0.2
    kept: NDArray[np.bool_] = np.triu(drawn) | np.triu(drawn).T
    return kept


def sums(rng: np.random.Generator, digits: int, secret: int, asked: bool) -> Iterator[str]:
    """Lines without end, of numbers with `digits` digits; of pairs that are asked, or not."""
    kept, low = asked_pairs(), 0 if digits == 1 else 10
    while True:
        a, b = rng.integers(low, 10**digits, 2)
        if kept[a, b] == asked:
            yield f"{a}+{b}={a + b + secret}\n"


def text(rng: np.random.Generator, secrets: int) -> str:
    """One text, of whole lines."""
    written = ""
    for line in sums(rng, int(rng.integers(1, 3)), int(rng.integers(secrets)), asked=False):
        if len(written) + len(line) > LENGTH:
            break
        written += line
    return written


@contextmanager
def fitted_to_sums(settings: dict[str, Any]) -> Iterator[Run]:
    """A run fitted to such texts, with its control."""
    rng = np.random.default_rng(settings["seed"])
    texts = [text(rng, settings["study.secrets"]) for _ in range(settings["study.texts"])]
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-sums-") as folder:
        file = Path(folder) / "sums.jsonl"
        file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), "utf-8")
        with fitted(config_of({**settings, "model.seq_len": LENGTH}, file)) as run:
            yield run


def problems(seed: int, n: int, digits: int, secrets: int, shots: int) -> list[Task]:
    """Sums to be gone on with, after `shots` examples with the same secret."""
    rng = np.random.default_rng([seed, digits])  # the same sums whatever the shots
    tasks = []
    for _ in range(n):
        secret = int(rng.integers(secrets))
        before = [next(sums(rng, digits, secret, asked=False)) for _ in range(5)][:shots]
        asked, answer = next(sums(rng, digits, secret, asked=True)).split("=")
        tasks.append(Task("".join(before) + f"{asked}=", answer.__eq__))
    return tasks


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit; accuracy of both models by digits and shots."""
    rows = []
    with fitted_to_sums(settings) as run:
        made = writers(run)
        for digits in (1, 2):
            for shots in settings["study.shots"]:
                tasks = problems(
                    settings["seed"], settings["study.problems"], digits,
                    settings["study.secrets"], shots,
                )  # fmt: skip
                scores = graded(
                    made, tasks, settings["study.answers"], _ANSWER, "\n", settings["seed"]
                )
                rows += [{"digits": digits, "shots": shots, **row} for row in scores]
    return rows


def pooled(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """Share right over all seeds, with Wilson's interval given these fits."""
    by = ["study.secrets", "digits", "shots", "model"]
    out = table.assign(right=table[score] * table["problems"]).groupby(by)[["right", "problems"]]
    made = out.sum().reset_index()
    ends = [wilson(r, int(n)) for r, n in zip(made["right"], made["problems"], strict=True)]
    made["share"] = made["right"] / made["problems"]
    made["low"], made["high"] = zip(*ends, strict=True)
    return made


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy against shots, by digits and secrets."""
    caption = (
        "Share of sums answered right, one answer drawn for each (pass@1), over all seeds; bars: "
        "Wilson's 95 % intervals given these fits. No pair of numbers asked for was in a fitted "
        "text. With a secret (lower row) each text adds one of so many numbers to its sums, which "
        "only the examples tell: without any, the dotted line is the most there is."
    )
    kinds = sorted(table["study.secrets"].unique())
    with house_figure((6.4, 2.4 * len(kinds) + 0.4), caption) as fig:
        grid = fig.subplots(len(kinds), 2, sharey=True, sharex=True, squeeze=False)
        shares = pooled(table, "pass_1")
        for row, secrets in zip(grid, kinds, strict=True):
            for axes, digits in zip(row, (1, 2), strict=True):
                here = shares[(shares["study.secrets"] == secrets) & (shares["digits"] == digits)]
                for model, color in (("thoughts", BLUE), ("control", GREY)):
                    mine = here[here["model"] == model]
                    ends = [mine["share"] - mine["low"], mine["high"] - mine["share"]]
                    axes.errorbar(
                        mine["shots"], mine["share"], ends, marker="o", markersize=4, capsize=2,
                        label=model, color=color,
                    )  # fmt: skip
                axes.axhline(1 / secrets, linestyle=":", linewidth=1.0, color=INK)
                axes.set_ylim(-0.03, 1.05)
                secret = "no secret" if secrets == 1 else f"{secrets} secrets"
                axes.set_title(f"{digits} digit{'s' * (digits > 1)}, {secret}")
        fig.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        for axes in grid[-1]:
            axes.set_xlabel("examples before the sum")
        for axes in grid[:, 0]:
            axes.set_ylabel("share right")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """Accuracies with their intervals, and whether thoughts' differ from the control's."""
    shares = pooled(table, "pass_1")
    last = int(shares["shots"].max())
    lines = []
    for (secrets, digits, shots), rows in shares.groupby(["study.secrets", "digits", "shots"]):
        if shots in (0, last):
            told = [
                f"{model} {row['share']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                for model, row in rows.set_index("model").sort_index(ascending=False).iterrows()
            ]
            kind = "no secret" if secrets == 1 else f"{secrets} secrets"
            lines.append(f"- {digits} digit(s), {kind}, {shots} example(s): {', '.join(told)}")
    by = ["study.secrets", "digits", "shots"]
    mine = table[table["model"] == "thoughts"]
    gains = over_seeds(mine, by, "gain")
    # Of the fits and of the problems: of three seeds alone an error may be small by luck.
    drawn = mine.groupby(by, sort=False)["gain_error"].apply(
        lambda e: np.sqrt((e**2).sum()) / len(e)
    )
    gains["error"] = np.maximum(gains["error"].fillna(np.inf), drawn.to_numpy())
    apart = gains[gains["mean"].abs() > 2 * gains["error"]]
    told = [
        f"{int(r['study.secrets'])} secret(s), {int(r['digits'])} digit(s), {int(r['shots'])} "
        f"example(s): {r['mean']:+.3f} ± {r['error']:.3f}"
        for _, r in apart.iterrows()
    ]
    verdict = (
        "Thoughts' share less the control's is more than two standard errors from 0 (over seeds, "
        "or of having drawn these problems, whichever is larger) in "
        f"{len(apart)} of {len(gains)} places: {'; '.join(told)}; by chance alone one in twenty "
        "would be."
        if told
        else "Thoughts' share is told from the control's in none of "
        f"{len(gains)} places, by two standard errors over seeds, or of having drawn these "
        "problems, whichever is larger."
    )
    return "\n".join(
        [
            f"Share right of sums whose pair of numbers no fit saw, {table['seed'].nunique()} "
            "seed(s), one answer drawn for each (pass@1; `table.csv` also has the likeliest answer "
            "and pass@k), with Wilson's 95 % intervals given these fits:",
            "",
            *lines,
            "",
            f"{verdict} The control is the same decoder without thoughts; it sees the whole text, "
            "as the decoder with thoughts does. Where a text has a secret, more than "
            "1 in as many right takes the examples. All after "
            f"{table['steps'].iloc[0]} slow steps of {table['batch_size'].iloc[0]} texts, which is "
            "little. Not tested: larger models, longer fits, harder sums, and whether thoughts "
            "help where the control cannot see the examples.",
        ]
    )
