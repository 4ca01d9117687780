"""GSM8K by its protocol: worked problems before the question, the answer behind `####`, pass@k.

`--data` holds `gsm8k/train.jsonl`, which is fitted and gives the shots, and `gsm8k/test.jsonl`,
which is asked. A line that cannot be used is left out and told; see `studies.tasks`.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.estimates import clustered_ratio
from ltm_pyro.errors import InputError
from ltm_pyro.plots.style import BLUE, GREY, house_figure
from studies.common import config_of, fitted, over_seeds
from studies.tasks import (
    Problem,
    Task,
    Writer,
    answer_nats,
    final_number,
    graded,
    gsm8k_problem,
    read_lines,
    wilson,
    writers,
)

SHOT = 300
"""Bytes of the longest problem that serves as a shot."""
_TOGETHER = 6
"""Problems of one fitted text: as many as a prompt of five shots has."""


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit on the training problems, then both models on the same test problems."""
    assert data is not None
    train, bad_train = read_lines(data / "train.jsonl", gsm8k_problem)
    test, bad_test = read_lines(data / "test.jsonl", gsm8k_problem)
    texts = [p.text for p in train]
    packs = ["".join(texts[i : i + _TOGETHER]) for i in range(0, len(texts), _TOGETHER)]
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-gsm8k-") as folder:
        file = Path(folder) / "problems.jsonl"
        file.write_text("".join(json.dumps({"text": each}) + "\n" for each in packs), "utf-8")
        with fitted(config_of(settings, file)) as run:
            made = writers(run)
            shots = chosen_shots(train, max(settings["study.shots"]), settings["seed"])
            asked = fitting(made["control"], test, shots, settings)
            rows = [
                {"shots": n, **row}
                for n in settings["study.shots"]
                for row in scored(made, asked, shots[:n], settings)
            ]
    left_out = {"bad_train": bad_train, "bad_test": bad_test}
    told = {name: " ".join(map(str, numbers)) for name, numbers in left_out.items()}
    return [{**row, "test_problems": len(test), **told} for row in rows]


def chosen_shots(train: list[Problem], n: int, seed: int) -> list[Problem]:
    """Training problems that are short enough to stand before a question."""
    short = [p for p in train if len(p.text.encode()) <= SHOT]
    if len(short) < n:
        raise InputError(
            f"train.jsonl has {len(short)} problems of at most {SHOT} bytes and {n} are needed as "
            "shots: give more"
        )
    order = np.random.default_rng(seed).permutation(len(short))[:n]
    return [short[i] for i in order]


def fitting(
    write: Writer, test: list[Problem], shots: list[Problem], settings: dict[str, Any]
) -> list[Problem]:
    """Test problems, the same for every number of shots, that fit the model behind all of them."""
    before = "".join(p.text for p in shots)

    def tokens(text: str) -> int:
        return len(write.tokenizer.encode(text))

    def longest(p: Problem) -> int:
        """Tokens of the prompt and of what may follow it, drawn or true."""
        after = max(settings["study.new_tokens"], tokens(p.true_answer))
        return tokens(before + p.prompt) + after

    order = np.random.default_rng(settings["seed"]).permutation(len(test))
    fit = (p for p in (test[i] for i in order) if longest(p) <= write.model.config.seq_len)
    asked = list(itertools.islice(fit, settings["study.problems"]))
    if not asked:
        raise InputError("no problem of test.jsonl fits the model behind its shots: give shorter")
    return asked


def scored(
    made: dict[str, Writer], asked: list[Problem], shots: list[Problem], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Accuracy of each model, and its nats per token of the true answers."""
    before = "".join(p.text for p in shots)
    tasks = [
        Task(before + p.prompt, lambda text, p=p: final_number(text) == final_number(p.answer))  # type: ignore[misc]
        for p in asked
    ]
    answers = settings["study.answers"], settings["study.new_tokens"]
    rows = graded(made, tasks, *answers, "\n\n", settings["seed"])
    truths = [p.true_answer for p in asked]
    sizes = [len(text.encode()) for text in truths]
    nats = {name: answer_nats(w, [t.prompt for t in tasks], truths) for name, w in made.items()}
    gap = clustered_ratio((nats["control"] - nats["thoughts"]) / np.log(2), sizes)
    return [
        {
            **row,
            "answer_bits_per_byte": float(nats[row["model"]].sum() / sum(sizes) / np.log(2)),
            "answer_gain_bits_per_byte": gap.value,
            "answer_gain_error": gap.error,
        }
        for row in rows
    ]


def figure(table: pd.DataFrame) -> Figure:
    """pass@1 and the true answer's loss against shots."""
    caption = (
        "Left: share of test problems whose drawn answer has the right number behind #### (pass@1) "
        "over all seeds, with Wilson's 95 % intervals given these fits. Right: loss of the true, "
        "worked answer given the prompt, mean and standard error over seeds."
    )
    with house_figure((6.4, 2.9), caption) as fig:
        left, right = fig.subplots(1, 2)
        for model, color in (("thoughts", BLUE), ("control", GREY)):
            mine = table[table["model"] == model]
            shares = pooled(mine)
            ends = [shares["share"] - shares["low"], shares["high"] - shares["share"]]
            left.errorbar(
                shares["shots"], shares["share"], ends, marker="o", markersize=4, capsize=2,
                color=color, label=model,
            )  # fmt: skip
            mean = over_seeds(mine, ["shots"], "answer_bits_per_byte")
            right.errorbar(
                mean["shots"], mean["mean"], mean["error"].fillna(0.0), marker="o", markersize=4,
                color=color, label=model,
            )  # fmt: skip
        left.set_ylim(bottom=0)
        left.set_ylabel("share right")
        right.set_ylabel("bits per byte of the answer")
        for axes in (left, right):
            axes.set_xlabel("shots")
        fig.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return fig


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """pass@1 of all seeds by shots, with Wilson's interval."""
    rows = []
    for shots, mine in table.groupby("shots"):
        right, n = float((mine["pass_1"] * mine["problems"]).sum()), int(mine["problems"].sum())
        low, high = wilson(right, n)
        rows.append({"shots": shots, "share": right / n, "low": low, "high": high})
    return pd.DataFrame(rows)


def paragraph(table: pd.DataFrame) -> str:
    """What is right, what was left out, and what that says."""
    lines = []
    for model, mine in table.groupby("model", sort=False):
        for _, row in pooled(mine).iterrows():
            bits = mine.loc[mine["shots"] == row["shots"], "answer_bits_per_byte"].mean()
            lines.append(
                f"- {model}, {int(row['shots'])} shot(s): {row['share']:.4f} right "
                f"({row['low']:.4f} to {row['high']:.4f}), {bits:.3f} bits per byte of the true "
                "answer"
            )
    gains = over_seeds(table[table["model"] == "thoughts"], ["shots"], "answer_gain_bits_per_byte")
    told = ", ".join(
        f"{r['mean']:+.4f} ± {r['error']:.4f} at {int(r['shots'])}" for _, r in gains.iterrows()
    )
    return "\n".join(
        [
            "Share of problems with the right number behind ####, one answer drawn for each "
            "(pass@1; `table.csv` has the likeliest answer and pass@k too), over "
            f"{table['seed'].nunique()} seed(s) and {int(table['problems'].iloc[0])} problems "
            f"each of {int(table['test_problems'].iloc[0])}:",
            "",
            *lines,
            "",
            "What thoughts gain on the true answer, in bits per byte, mean and standard error over "
            f"seeds, by shots: {told}. After {table['steps'].iloc[0]} slow steps of "
            f"{table['batch_size'].iloc[0]} texts neither model has learned to calculate: a right "
            "number is a guess. The protocol runs end to end; "
            "the paper's claim, of models five hundred times as large and trained on far more, is "
            "not tested.",
            "",
            left_out(table, ["train", "test"], ".jsonl"),
        ]
    )


def left_out(table: pd.DataFrame, files: list[str], suffix: str) -> str:
    """Lines that could not be used, file by file."""
    told = []
    for name in files:
        numbers = str(table[f"bad_{name}"].iloc[0]).split()
        which = f" (line {', '.join(numbers[:20])})" if numbers else ""
        told.append(f"{len(numbers)} lines of {name}{suffix}{which}")
    return f"Left out because they could not be used: {' and '.join(told)}."
