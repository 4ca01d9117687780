"""The last word of a passage, given what precedes it, as LAMBADA asks (Paperno et al. 2016).

Passages are made from held-out text: `--data` holds `wikitext2/train.txt`, of which the first part
is fitted, and `wikitext2/test.txt`, whose lines give a passage each. A line that is no text is left
out and told; see `studies.tasks`. Unlike LAMBADA's, no passage was chosen by readers so that its
last word takes more than one sentence to guess.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.estimates import clustered_mean
from ltm_pyro.errors import InputError
from ltm_pyro.plots.style import BLUE, GREY, house_figure
from studies.common import config_of, fitted, over_seeds
from studies.gsm8k import left_out
from studies.tasks import answer_nats, read_lines, wilson, writers

_WORD = re.compile(r"(?<= )[A-Za-z]{3,}(?= )")
_NEW_BYTES = 16


def plain_line(line: str) -> str:
    """A line of text.

    Raises:
        ValueError: if it holds what no text does.
    """
    if any(c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\t\r") for c in line):
        raise ValueError("it holds control or replacement characters")
    return line


def passage(line: str, n_bytes: int) -> tuple[str, str] | None:
    """The last `n_bytes` before the last word of a line, from a word's beginning, and that word.

    `None` where the line is shorter. The word has a space behind it, so that a longer one that
    begins so is not right.
    """
    words = list(_WORD.finditer(line))
    if not words:
        return None
    before = line[: words[-1].start()].encode()
    if len(before) < n_bytes:
        return None
    kept = before[-n_bytes:].decode("utf-8", "ignore").partition(" ")[2]
    return (kept, f"{words[-1][0]} ") if kept else None


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One fit, then both models on the same passages."""
    assert data is not None
    train, bad_train = read_lines(data / "train.txt", plain_line)
    test, bad_test = read_lines(data / "test.txt", plain_line)
    found = [p for p in (passage(line, settings["study.bytes"]) for line in test) if p]
    if not found:
        raise InputError(f"test.txt has no line of {settings['study.bytes']} bytes: give longer")
    rng = np.random.default_rng(settings["seed"])
    chosen = [found[i] for i in rng.permutation(len(found))[: settings["study.passages"]]]
    prompts, words = zip(*chosen, strict=True)
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-last-word-") as folder:
        file = Path(folder) / "train.txt"
        file.write_text("\n".join(train)[: settings["study.train_bytes"]], "utf-8")
        with fitted(config_of(settings, file)) as run:
            rows = []
            nats, right = {}, {}
            for name, write in writers(run).items():
                made = write(prompts, 1, _NEW_BYTES, " ", greedy=True)
                right[name] = np.array(
                    [texts[0] == word for texts, word in zip(made, words, strict=True)], float
                )
                nats[name] = answer_nats(write, prompts, words)
    gain = clustered_mean(nats["control"] - nats["thoughts"])
    more = clustered_mean(right["thoughts"] - right["control"])
    for name in nats:
        low, high = wilson(float(right[name].sum()), len(words))
        rows.append(
            {
                "model": name, "passages": len(words), "right": float(right[name].mean()),
                "right_low": low, "right_high": high, "nats_per_word": float(nats[name].mean()),
                "gain_nats_per_word": gain.value, "gain_nats_error": gain.error,
                "gain_right": more.value, "gain_right_error": more.error,
                "no_passage": len(test) - len(found),
                "bad_train": " ".join(map(str, bad_train)),
                "bad_test": " ".join(map(str, bad_test)),
            }
        )  # fmt: skip
    return rows


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy and loss, seed by seed."""
    caption = (
        "Left: share of passages whose last word is the likeliest continuation, with Wilson's 95 % "
        "intervals. Right: loss of the true word given the passage; with thoughts q(z | passage)'s "
        "prediction, without them exact. One pair of points a seed."
    )
    with house_figure((6.4, 2.7), caption) as fig:
        left, right = fig.subplots(1, 2)
        for shift, (model, color) in enumerate((("thoughts", BLUE), ("control", GREY))):
            mine = table[table["model"] == model]
            place = np.arange(len(mine)) + 0.2 * shift
            ends = [mine["right"] - mine["right_low"], mine["right_high"] - mine["right"]]
            left.errorbar(
                place, mine["right"], ends, fmt="o", markersize=4, capsize=2, color=color,
                label=model,
            )  # fmt: skip
            right.plot(place, mine["nats_per_word"], "o", markersize=4, color=color, label=model)
        left.set_ylim(bottom=0)
        left.set_ylabel("share right")
        right.set_ylabel("nats per word")
        for axes in (left, right):
            axes.set_xlabel("seed")
            axes.set_xticks(range(table["seed"].nunique()))
        fig.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """Shares, losses and what they leave open."""
    told = []
    for model, mine in table.groupby("model", sort=False):
        n = int(mine["passages"].sum())
        low, high = wilson(float((mine["right"] * mine["passages"]).sum()), n)
        told.append(
            f"{model}: {mine['right'].mean():.3f} right ({low:.3f} to {high:.3f}), "
            f"{mine['nats_per_word'].mean():.3f} nats per word"
        )
    mine = table[table["model"] == "thoughts"].assign(all=0)
    nats = over_seeds(mine, ["all"], "gain_nats_per_word").iloc[0]
    share = over_seeds(mine, ["all"], "gain_right").iloc[0]
    first = table.iloc[0]
    return (
        f"Over {table['seed'].nunique()} seed(s) of {int(first['passages'])} passages each, with "
        f"Wilson's 95 % intervals given these fits: {'; '.join(told)}. Thoughts' gain over the "
        f"control, mean and standard error over seeds: {nats['mean']:+.3f} ± {nats['error']:.3f} "
        f"nats per word, {share['mean']:+.4f} ± {share['error']:.4f} of the share right, after "
        f"{int(first['steps'])} slow steps of {int(first['batch_size'])} texts, which is little. "
        "The passages come from the same kind of text as the fit, and were not chosen to need "
        "their whole context, as LAMBADA's are: the numbers are not comparable with LAMBADA's. "
        f"{int(first['no_passage'])} lines of test.txt are too short for a passage.\n\n"
        f"{left_out(table, ['train', 'test'], '.txt')}"
    )
