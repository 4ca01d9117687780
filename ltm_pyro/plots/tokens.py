"""Texts in pictures: tokens by their surprise, and texts between two texts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.plots import style

_TOKENS = 160  # that can be told apart at 800 pixels
_LETTERS = 60  # tokens that get their text
_WIDTH, _LINES = 88, 4  # characters of a line; lines of each text
_LARGEST = 10.5  # points, of a short text


def token_surprise(
    surprise: xr.Dataset, batch: Batch | None = None, *, row: int = 0, tokens: int = _TOKENS
) -> Figure:
    """Surprise of the tokens of one sequence, with its thoughts and without.

    Args:
        surprise: Of `ltm_pyro.diagnostics.decomposition.token_surprise`.
        batch: The sequences, for their text below the axis.
        row: Which sequence.
        tokens: How many of its tokens, from the first.

    Raises:
        InputError: if there is no such sequence.
    """
    style.require(surprise, "nll_without", "token_surprise")
    whole_number("row", row, at_least=0, at_most=surprise.sizes["sequence"] - 1)
    one = surprise.isel(sequence=row, token=slice(tokens)).dropna("token")
    nll, without = one["nll"].values, one["nll_without"].values
    gain = without - nll
    place = np.arange(len(nll))
    best = int(np.argmax(gain))
    caption = (
        f"Sequence {int(one['sequence'])}, {len(nll)} tokens: -log p of each, given those before "
        f"it. Blue: thoughts make a token less surprising than {surprise.attrs['without']} does; "
        f"orange: more. Together {gain.sum():+.1f} nats, most at token {best} ({gain[best]:+.1f}). "
        "The thoughts have seen the text: this shows where they say something, and is no score."
    )
    with style.house_figure((8.6, 3.2), caption) as figure:
        axes = figure.subplots()
        axes.bar(
            place, np.maximum(gain, 0), 1.0, nll, color=style.BLUE, alpha=0.55, label="taken away"
        )
        axes.bar(
            place, np.maximum(-gain, 0), 1.0, without, color=style.ORANGE, alpha=0.6, label="added"
        )
        axes.step(place, without, where="mid", color=style.GREY, lw=1.1, label="without thoughts")
        axes.step(place, nll, where="mid", color=style.INK, lw=1.2, label="with thoughts")
        axes.set(ylabel="surprise (nats)", xlabel="token", xlim=(-0.6, len(nll) - 0.4))
        axes.set_ylim(0.0, 1.06 * max(float(nll.max()), float(without.max()), 0.1))
        tokenizer = batch.origin.tokenizer if batch is not None and batch.origin else None
        if batch is not None and tokenizer is not None and len(nll) <= _LETTERS:
            ids = batch.observed[row, : len(nll)].tolist()
            texts = [_letter(tokenizer.decode([i])) for i in ids]
            axes.set_xticks(place, texts, fontsize=8, family="monospace")
        axes.grid(visible=False, axis="x")
        style.title_and_legend(axes, "")
    return figure


def _letter(text: str) -> str:
    """A token as a tick: what cannot be seen has a sign."""
    known = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"}
    return style.drawable("".join(known.get(c, c) for c in text[:6]), "monospace")


def interpolation_strip(texts: Sequence[str]) -> Figure:
    """Texts of `interpolate`, from one end to the other, and how far each is from the first.

    Raises:
        InputError: if there are fewer than 2 texts.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise InputError("an interpolation has 2 texts or more: give those of interpolate")
    distances = [_differs(texts[0], text) for text in texts]
    jumps = np.diff(distances)
    place = int(np.argmax(np.abs(jumps)))
    caption = (
        "Texts written at equal distances on the line between the thoughts of two texts, all from "
        "the same random numbers: they differ by their thoughts alone. Bars: the share of "
        f"characters that differ from the first. The largest change is between {place + 1} and "
        f"{place + 2}; where all are alike, these thoughts do not steer the decoder."
    )
    plain = (" ".join(text.split()) for text in texts)
    wrapped = [textwrap.wrap(text, _WIDTH)[:_LINES] or ["(empty)"] for text in plain]
    weights = np.linspace(0, 1, len(texts))
    longest = max(len(line) for lines in wrapped for line in lines)
    size = min(_LARGEST, 8 * _WIDTH / longest)  # points; `_WIDTH` characters fill the strip at 8
    with style.house_figure((8.6, 0.5 + 0.72 * len(texts)), caption) as figure:
        axes = figure.subplots()
        for row, (lines, distance) in enumerate(zip(wrapped, distances, strict=True)):
            weight = weights[row]
            color = np.array(style.BLUE) * (1 - weight) + np.array(style.ORANGE) * weight
            axes.add_patch(Rectangle((-0.16, row - 0.38), 0.14 * distance, 0.76, color=color))
            shown = style.drawable("\n".join(lines), "monospace")
            axes.text(
                0.01, row, shown, va="center", fontsize=size,
                family="monospace", linespacing=1.15,
            )  # fmt: skip
        axes.set(xlim=(-0.17, 1.0), ylim=(len(texts) - 0.5, -0.5), ylabel="weight of the second")
        axes.set_yticks(range(len(texts)), [f"{weight:.2f}" for weight in weights])
        axes.set_xticks([-0.16, -0.02], ["0", "1"])
        axes.set_xlabel("share of characters that differ", loc="left")
        axes.grid(visible=False)
    return figure


def _differs(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    same = sum(a == b for a, b in zip(one, other, strict=False))
    return 1.0 - same / longest if longest else math.nan
