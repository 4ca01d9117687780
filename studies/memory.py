"""A memory written by surprise in a text decoder: what windowed attention has lost.

Two kinds of stream, both far longer than the window, and held-out ones eight times as long as
those of the training:

    facts   a Markov chain of filler, and in it pairs (key, value). With probability 0.9 the value
            is that which the key had before in this stream. Every probability is known.
    bytes   documents of `pydoc`

All arms read the same batches, and have as many weights: a decoder without memory and without
thoughts (the control), with a memory or one that lacks a part (`memory_decoder`), with thoughts,
with both. Without thoughts losses are exact; with them they are bounds, KL included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.data.markov import MarkovMixture
from ltm_pyro.diagnostics.control import control
from ltm_pyro.diagnostics.estimates import clustered_ratio
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, PURPLE, RED, house_figure
from studies.common import over_seeds, seeds_interval
from studies.memory_decoder import ARMS, MemoryDecoder, SurpriseMemory, remember
from studies.recall import resident_mb

SLOW = ltm.Slow(lr=1e-2, weight_decay=0.01, kl_start=0.02, kl_hold=0.4, kl_full=0.7)
FILLER, KEYS, VALUES = 8, 12, 8
FIRST_KEY, FIRST_VALUE = FILLER, FILLER + KEYS
VOCABULARY = FILLER + KEYS + VALUES
MENTION, ANEW = 0.15, 0.1
"""Chance that a key comes next, and that its value is drawn anew."""
LAGS = [1, 9, 17, 33, 65, 129, 257, 513, 10**9]
"""Edges of the bins of tokens since a key's last mention; the first is inside the window."""
PLACES = [0, 32, 128, 512, 10**9]
"""Edges of the bins of positions in a stream."""
READERS = ("control", *ARMS, "thoughts", "thoughts and memory")
COLORS = {
    "memory": BLUE, "no surprise": GREEN, "same gates": ORANGE, "no forgetting": PURPLE,
    "no momentum": RED, "control": INK,
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """B streams of T tokens.

    Attributes:
        x: (B, T).
        known: (B, T) the value that the key in front had before; -1 elsewhere, and at first.
        lag: (B, T) tokens since that; 0 where `known` is -1.
        truth: (B, T) log p of each token given all before it, under the process, nats.
    """

    x: Tensor
    known: Tensor
    lag: Tensor
    truth: Tensor


def facts(rows: int, length: int, process: int, seed: int) -> Facts:
    """Streams of the process `process`; rare keys, one in 1 / rank, are far between."""
    rng = np.random.default_rng([process, seed, 7])
    chain = MarkovMixture.random(1, FILLER, 1, 0.3, process).transitions[0]
    often = 1 / np.arange(1, KEYS + 1)
    often /= often.sum()
    x = np.zeros((rows, length), dtype=np.int64)
    known, lag, truth = np.full_like(x, -1), np.zeros_like(x), np.zeros(x.shape)
    at = np.arange(rows)
    filler, key = rng.integers(FILLER, size=rows), np.full(rows, -1)
    value, when = np.full((rows, KEYS), -1), np.zeros((rows, KEYS), dtype=np.int64)
    for t in range(length):
        asked = key >= 0
        old = np.where(asked, value[at, key], -1)
        redrawn = (old < 0) | (rng.random(rows) < ANEW)
        new = np.where(redrawn, rng.integers(VALUES, size=rows), old)
        p_value = np.where(old < 0, 1 / VALUES, ANEW / VALUES + (1 - ANEW) * (new == old))
        named = ~asked & (rng.random(rows) < MENTION)
        next_key = rng.choice(KEYS, size=rows, p=often)
        next_filler = _drawn(chain[filler], rng) if t else filler
        p_filler = (1 - MENTION) * (chain[filler, next_filler] if t else 1 / FILLER)
        p_other = np.where(named, MENTION * often[next_key], p_filler)
        other = np.where(named, FIRST_KEY + next_key, next_filler)
        x[:, t] = np.where(asked, FIRST_VALUE + new, other)
        truth[:, t] = np.log(np.where(asked, p_value, p_other))
        known[:, t] = old
        lag[:, t] = np.where(old >= 0, t - when[at, key], 0)
        value[at[asked], key[asked]] = new[asked]
        when[at[asked], key[asked]] = t
        filler = np.where(asked | named, filler, next_filler)
        key = np.where(named, next_key, -1)
    return Facts(*(torch.from_numpy(a) for a in (x, known, lag, truth)))


def _drawn(rows: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    until = rows.cumsum(-1)
    found: NDArray[np.int64] = (until < rng.random((len(rows), 1)) * until[:, -1:]).sum(-1)
    return found


@dataclass(frozen=True)
class Streams:
    """What the arms read: training rows and held-out ones, and of `facts` the truth of these."""

    train: Any
    held_out: ltm.Batch
    vocabulary: int
    truth: Facts | None


def read(settings: dict[str, Any]) -> Streams:
    """Streams of one kind and seed."""
    seed, length, times = settings["seed"], settings["length"], settings["times"]
    if settings["stream"] == "facts":
        train = facts(settings["train_rows"], length, seed, 0)
        truth = facts(settings["test_rows"], times * length, seed, 1)
        return Streams(ltm.Batch(train.x), ltm.Batch(truth.x), VOCABULARY, truth)
    short, long = (ltm.load_corpus("pydoc", seq_len=t, seed=seed) for t in (length, times * length))
    return Streams(short.train, spread(long.val, settings["test_rows"]), long.vocab_size, None)


def build(arm: str, settings: dict[str, Any], vocabulary: int) -> ltm.LatentThoughtModel:
    """A fresh model; what a memory weighs, a decoder without has in its SwiGLU block."""
    part = arm.removeprefix("thoughts").removeprefix(" and ")
    config = ltm.ModelConfig(
        vocab_size=vocabulary, seq_len=settings["length"] * settings["times"], n_layers=1,
        n_heads=2, width=settings["width"], mlp_hidden=2 * settings["width"],
        window=settings["window"], thoughts_per_layer=2, thought_dim=4,
    )  # fmt: skip
    pyro.set_rng_seed(settings["seed"])
    if part in ("control", ""):
        memory = SurpriseMemory(settings["width"], settings["size"])
        more = round(sum(p.numel() for p in memory.parameters()) / (3 * settings["width"]))
        return ltm.LatentThoughtModel(replace(config, mlp_hidden=config.mlp_hidden + more))
    return remember(ltm.LatentThoughtModel(config), settings["size"], part)


@dataclass(frozen=True)
class Scored:
    """One arm on the held-out streams: losses (n,) in nats, with thoughts bounds.

    Attributes:
        loss: -log p(x), or the negative ELBO on fresh draws.
        iw_loss: The same with importance weights.
        kl: Of q.
        by_token: (n, T) log p of each token, nats, where there are no thoughts.
    """

    loss: NDArray[np.float64]
    iw_loss: NDArray[np.float64]
    kl: float
    by_token: Tensor | None


def scored(
    model: ltm.LatentThoughtModel, arm: str, settings: dict[str, Any], streams: Streams
) -> Scored:
    """An arm learned, and scored on the held-out streams."""
    steps, seed, batch = settings["steps"], settings["seed"], streams.held_out
    if not arm.startswith("thoughts"):
        svi = control(model, SLOW, steps, seed)
        svi.fit(streams.train, steps, batch_size=settings["rows"], progress=False)
        z = torch.zeros(len(batch), *model.thought_shape)
        with torch.no_grad():
            by_token = model.token_log_likelihood(z, batch).double()
        loss = -by_token.sum(-1).numpy()
        return Scored(loss, loss, 0.0, by_token)
    svi = ltm.DualRateSVI(
        model, "mean_field", ltm.Fast(steps=settings["fast_steps"]), SLOW, seed=seed
    )
    svi.fit(streams.train, steps, batch_size=settings["rows"], progress=False)
    post = svi.infer(batch, settings["eval_fast_steps"], progress=False)
    scores = ltm.evaluate(model, post, batch, 16, controls=False)
    kl = float(scores["kl"].mean())
    return Scored(-scores["elbo"].values, -scores["iw_bound"].values, kl, None)


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """All arms on one kind of stream; the first is the control that the others are paired with."""
    streams = read(settings)
    batch, truth = streams.held_out, streams.truth
    bits = batch.mask.sum(-1).double().numpy() * np.log(2)
    documents = None if batch.documents is None else batch.documents.numpy()
    known = float("nan") if truth is None else -float(truth.truth.sum()) / bits.sum()
    rows: list[dict[str, Any]] = []
    least: Scored | None = None
    for arm in READERS:
        model = build(arm, settings, streams.vocabulary)
        found = scored(model, arm, settings, streams)
        least = found if least is None else least
        loss = clustered_ratio(found.loss, bits, documents)
        gain = clustered_ratio(least.loss - found.loss, bits, documents)
        row = {
            "arm": arm, "at": "all", "weights": sum(p.numel() for p in model.parameters()),
            "bits": loss.value, "bits_error": loss.error, "gain": gain.value,
            "gain_error": gain.error, "iw_bits": found.iw_loss.sum() / bits.sum(),
            "kl_nats": found.kl, "above_truth": loss.value - known,
        }  # fmt: skip
        if arm == "memory" and truth is not None:
            row |= long_stream(cast("MemoryDecoder", model.decoder), settings)
        rows.append(row)
        if found.by_token is not None and least.by_token is not None:
            rows += by_place(arm, found.by_token - least.by_token, batch.mask)
            if truth is not None:
                rows += by_lag(arm, model, truth)
    return rows


def by_place(arm: str, gain: Tensor, mask: Tensor) -> list[dict[str, Any]]:
    """What an arm gains over the control, bits a token, by position in the stream."""
    place, rows = torch.arange(gain.shape[1]).expand_as(gain), []
    for low, high in pairwise(PLACES):
        inside = mask & (place >= low) & (place < high)
        if bool(inside.any()):
            bits = float(gain[inside].mean()) / np.log(2)
            rows.append({"arm": arm, "at": "place", "from": low, "gain": bits})
    return rows


@torch.no_grad()
def by_lag(arm: str, model: ltm.LatentThoughtModel, truth: Facts) -> list[dict[str, Any]]:
    """Share of mentions at which the likeliest value is that of the last mention, by lag."""
    z = torch.zeros(len(truth.x), *model.thought_shape)
    logits = model.decoder.logits(truth.x, z)[..., FIRST_VALUE:]
    right, rows = logits.argmax(-1) == truth.known, []
    for low, high in [(1, LAGS[-1]), *pairwise(LAGS)]:
        inside = (truth.known >= 0) & (truth.lag >= low) & (truth.lag < high)
        if bool(inside.any()):
            at = "recall" if high - low > LAGS[-2] and low == 1 else "lag"
            recall = float(right[inside].double().mean())
            rows.append({"arm": arm, "at": at, "from": low, "recall": recall,
                         "of": int(inside.sum())})  # fmt: skip
    return rows


def long_stream(decoder: MemoryDecoder, settings: dict[str, Any]) -> dict[str, float]:
    """One stream read by segments: memory of the process, the loss in its second and last tenth.

    The process is measured after each segment, from the fifth on, when all buffers are there.
    """
    length, size = settings["long"], settings["length"]
    stream = facts(1, length, settings["seed"], 2)
    lost, used = [], []
    for scores, true in zip(
        decoder.stream(stream.x.split(size, 1)), stream.truth.split(size, 1), strict=True
    ):
        lost.append(float((true - scores).mean()) / np.log(2))
        used.append(resident_mb())
    tenth, begun = max(len(lost) // 10, 1), min(5, len(used) - 1)
    return {
        "long_tokens": float(length),
        "mb_at_tenth": max(used[: max(tenth, begun + 1)]),
        "mb_at_end": max(used),
        "mb_grown": max(used) - max(used[: max(tenth, begun + 1)]),
        "above_truth_tenth": float(np.mean(lost[tenth : 2 * tenth])),
        "above_truth_end": float(np.mean(lost[-tenth:])),
    }


def figure(table: pd.DataFrame) -> Figure:
    """Recall by lag, and what the memory gains by position."""
    caption = (
        "Left: mentions of a key at which the likeliest value is that of its last mention, by the "
        "tokens between; the window of attention ends at the dotted line, chance is dashed. "
        "Others: what an arm gains over the control by position in the stream, eight times as "
        "long as in training. Means and standard errors over seeds."
    )
    lags, places = table[table["at"] == "lag"], table[table["at"] == "place"]
    kinds = list(places["stream"].unique())
    with house_figure((3.6 * (1 + len(kinds)), 3.6), caption) as fig:
        recall, *gains = fig.subplots(1, 1 + len(kinds))
        for arm, color in COLORS.items():
            panels = [(recall, lags, "recall")]
            panels += [(axes, places[places["stream"] == kind], "gain")
                       for axes, kind in zip(gains, kinds, strict=True)]  # fmt: skip
            for axes, rows, column in panels:
                mean = over_seeds(rows[rows["arm"] == arm], ["from"], column)
                axes.errorbar(
                    mean["from"].clip(lower=1), mean["mean"], mean["error"].fillna(0.0), marker="o",
                    markersize=3, linewidth=1.2, label=arm, color=color,
                )  # fmt: skip
        recall.axhline(1 / VALUES, linestyle="--", linewidth=1.0, color=INK)
        recall.axvline(table["window"].iloc[0], linestyle=":", linewidth=1.0, color=INK)
        recall.set(xlabel="tokens since the last mention", ylabel="recall", title="facts")
        for axes, kind in zip(gains, kinds, strict=True):
            unit = "byte" if kind == "bytes" else "token"
            axes.set(xlabel="from position", ylabel=f"gain, bits per {unit}", title=kind)
        for axes in (recall, *gains):
            axes.set_xscale("log", base=2)
        fig.legend(*recall.get_legend_handles_labels(), loc="outside upper right", ncols=6)
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """What a memory and each of its parts are worth, and what a long stream costs."""
    whole, parts = table[table["at"] == "all"], []
    for kind, rows in whole.groupby("stream", sort=False):
        unit = "byte" if kind == "bytes" else "token"
        recall = table[(table["stream"] == kind) & (table["at"] == "recall")]
        lines = [
            f"`{kind}`, bits per {unit}:\n",
            "| arm | loss | gain over the control | loss with importance weights | recall |",
            "|---|---|---|---|---|",
        ]
        for arm, each in rows.groupby("arm", sort=False):
            hit = recall[recall["arm"] == arm]["recall"]
            lines.append(
                f"| {arm} | {_interval(each['bits'])} | {_interval(each['gain'])} | "
                f"{each['iw_bits'].mean():.3f} | {_interval(hit) if len(hit) else ''} |"
            )
        gains = rows.pivot(index="seed", columns="arm", values="gain")
        needed = [
            f"{arm} {_interval(gains['memory'] - gains[arm])}"
            for arm in gains.columns
            if arm in COLORS and arm not in ("memory", "control")
        ]
        lines.append(
            f"\nThe whole memory gains more than one with a part changed by: {'; '.join(needed)}."
        )
        both = gains["thoughts and memory"]
        lines[-1] += (
            f" Beside thoughts a memory gains {_interval(both - gains['thoughts'])}, thoughts "
            f"beside a memory {_interval(both - gains['memory'])} (bounds)."
        )
        parts.append("\n".join(lines))
    kept, long = "", whole.dropna(subset=["long_tokens"])
    if len(long):
        kept = (
            f"A stream of {long['long_tokens'].iloc[0]:,.0f} tokens, read in segments of "
            f"{table['length'].iloc[0]}: at its first tenth the process held at most "
            f"{long['mb_at_tenth'].mean():.0f} MB, over all of it {long['mb_at_end'].mean():.0f} "
            f"MB, {long['mb_grown'].max():.1f} MB more at most; the loss is "
            f"{_interval(long['above_truth_tenth'])} bits above the truth in the second tenth, "
            f"{_interval(long['above_truth_end'])} in the last."
        )
    return "\n\n".join(parts) + (
        f"\n\nMeans over {table['seed'].nunique()} seeds, ± half of the 95 % interval over them "
        f"(corpora, weights and streams anew); within a seed the error of a gain over held-out "
        f"documents is at most {whole['gain_error'].max():.3f}. {kept} The process of `facts` "
        f"itself: {whole['bits'].sub(whole['above_truth']).mean():.3f} bits. What does not follow: "
        "anything about larger decoders, whose attention sees farther than "
        f"{table['window'].iloc[0]} tokens, or about memories that are deep networks."
    )


def _interval(values: pd.Series[float]) -> str:
    mean, half = seeds_interval(values)
    return f"{mean:.3f} ± {half:.3f}"
