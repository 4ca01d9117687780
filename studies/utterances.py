"""User turns of Schema-Guided Dialogues as sequences of words, written by a small text decoder.

`dialogues` with the words of a turn in their order: under each turn stands a `LatentThoughtModel`
whose attention sees two words. Thoughts of two levels, one z for the session, or of lone turns; and
the same decoder without thoughts, whose loss is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.diagnostics.control import control
from ltm_pyro.diagnostics.estimates import clustered_mean
from studies.common import seeds_interval, with_errors
from studies.dialogues import Dialogues, commonest, said, simulation
from studies.figures import bars_by_arm
from studies.flat_sessions import build
from studies.telling_apart import two_sample_accuracy

SLOW = ltm.Slow(lr=1e-2, weight_decay=0.01, kl_start=0.02, kl_hold=0.4, kl_full=0.7)
END, RARE = 0, 1
PAIRS = 199
"""Bins of pairs of neighbouring words."""


def read(folder: Path, settings: dict[str, Any]) -> tuple[ltm.Batch, Tensor]:
    """Sessions (n, S * T) of word ids, each turn up to its END, and their services (n,)."""
    kept, services = said(folder, settings)
    turns, length = settings["turns"], settings["words"]
    every = (w for _, turn in kept for words, _ in turn for w in words[:length])
    known = {w: i + 2 for w, i in commonest(every, settings["vocabulary"] - 2).items()}
    x = torch.full((len(kept), turns, length), END)
    for row, (_, each) in enumerate(kept):
        for t, (words, _) in enumerate(each):
            ids = [known.get(w, RARE) for w in words[:length]]
            x[row, t, : len(ids)] = torch.tensor(ids)
    labels = torch.tensor([services[s] for s, _ in kept])
    return ltm.Batch(x.flatten(1), until_end(x).flatten(1)), labels


def until_end(x: Tensor) -> Tensor:
    """Which words of turns (..., T) are said, their END with them."""
    return ((x == END).cumsum(-1) - (x == END).long()) == 0


def bags(x: Tensor, vocabulary: int) -> Tensor:
    """Which words turns (n, S, T) have, (n, S, V - 1); END is none."""
    words = torch.where(until_end(x), x, END)
    has = torch.zeros(*x.shape[:2], vocabulary).scatter_(-1, words, 1.0)
    return has[..., 1:]


def pairs(x: Tensor) -> Tensor:
    """Shares of neighbouring words in sessions (n, S, T), hashed to (n, PAIRS)."""
    words = torch.where(until_end(x), x, END)
    code = (words[..., :-1] * 8191 + words[..., 1:]) % PAIRS
    code = torch.where(words[..., :-1] == END, PAIRS, code).flatten(1)
    return torch.zeros(len(x), PAIRS + 1).scatter_add_(1, code, torch.ones(code.shape))[:, :PAIRS]


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One arm fitted; its bound, and how what it writes is told from the real thing."""
    assert data is not None
    everything, service = read(data, settings)
    n, seed, arm, turns = (settings[k] for k in ("held_out", "seed", "arm", "turns"))
    held, real, train = (
        everything.select(rows) for rows in (slice(n), slice(n, 2 * n), slice(2 * n, None))
    )
    pyro.set_rng_seed(seed)
    emission = ltm.LatentThoughtModel(
        ltm.ModelConfig(
            vocab_size=settings["vocabulary"], seq_len=settings["words"], n_layers=1, width=32,
            n_heads=2, mlp_hidden=64, window=2, thoughts_per_layer=2, thought_dim=4,
        )
    )  # fmt: skip
    steps, fast = settings["slow_steps"], ltm.Fast(steps=settings["fast_steps"])
    size = settings["batch_size"]

    def seen(batch: ltm.Batch) -> Tensor:
        return batch.observed.unflatten(1, (turns, -1))

    if arm == "none":
        each, mask = seen(train).flatten(0, 1), train.mask.unflatten(1, (turns, -1)).flatten(0, 1)
        control(emission, SLOW, steps, seed).fit(
            ltm.Batch(each, mask), steps, batch_size=size * turns, progress=False
        )
        z = torch.zeros(n * turns, *emission.thought_shape)
        rows = ltm.Batch(seen(held).flatten(0, 1), held.mask.reshape(n * turns, -1))
        with torch.no_grad():
            lost = -emission.log_likelihood(z, rows).view(n, turns).sum(1).double().numpy()
            weighted, kl = lost, 0.0
            blank = torch.zeros(n * turns, *emission.thought_shape)
            written = emission.likelihood(blank, rows).sample().view(n, turns, -1)
    else:
        model = build(arm, emission, turns)
        svi = ltm.DualRateSVI(model, "mean_field", fast, SLOW, seed=seed, persistent=True)
        svi.fit(train, steps, batch_size=size, progress=False)
        post = svi.infer(held, steps=settings["last_steps"], progress=False)
        scores = ltm.evaluate(model, post, held, draws=16, controls=False)
        lost, weighted = -scores["elbo"].values, -scores["iw_bound"].values
        kl = float(scores["kl"].mean())
        written = seen(ltm.simulate(model, n, seed=seed).batch)
    loss = clustered_mean(lost, np.arange(n))
    row = {
        "loss_per_session": loss.value, "loss_error": loss.error,
        "loss_per_word": lost.sum() / float(held.mask.sum()),
        "iw_loss_per_session": float(weighted.mean()), "kl_per_session": kl,
    }  # fmt: skip
    vocabulary = settings["vocabulary"]
    known = Dialogues(bags(seen(train), vocabulary), service[2 * n :], service[2 * n :])

    def compared(made: Tensor) -> dict[str, Any]:
        told = simulation(bags(made, vocabulary), bags(seen(real), vocabulary), known, seed)
        by_pairs, error = two_sample_accuracy(pairs(made), pairs(seen(real)), seed)
        return told | {"c2st_pairs": by_pairs, "c2st_pairs_error": error}

    rows_made = [row | compared(written)]
    return rows_made if arm != "none" else [*rows_made, {"arm": "real", **compared(seen(held))}]


def figure(table: pd.DataFrame) -> Figure:
    """Told from real by words and by pairs of words, and coherence, by arm."""
    caption = (
        "Simulated user turns as sequences of words, and real ones held against real ones. Left: "
        "how often a classifier of a session's words tells them from real ones (0.5: it cannot). "
        "Middle: the same by pairs of neighbouring words. Right: how often two turns of a session "
        "are about one service, to classifiers of real turns. Means and standard errors over seeds."
    )
    panels = {"c2st": "told by words", "c2st_pairs": "told by pairs", "turns_agree": "turns agree"}
    return bars_by_arm(table, panels, caption)


def paragraph(table: pd.DataFrame) -> str:
    """Whether thoughts of two levels help a decoder of text, and make its dialogues more alike."""
    columns = {
        "loss_per_session": "loss, nats per session", "loss_per_word": "per word",
        "iw_loss_per_session": "with 16 weights", "kl_per_session": "KL",
        "c2st": "told by words", "c2st_pairs": "told by pairs", "turns_agree": "turns agree",
        "service_distance": "distance of services",
    }  # fmt: skip
    wide = table.pivot_table(index="seed", columns="arm", values=["loss_per_session", "c2st",
                                                                  "c2st_pairs"])  # fmt: skip
    claims = []
    for name, column in (
        ("its held-out bound is better, in nats per session,", "loss_per_session"),
        ("its simulations are told by words less often", "c2st"),
        ("its simulations are told by pairs of words less often", "c2st_pairs"),
    ):
        for arm in ("flat", "turns_only", "none"):
            mean, half = seeds_interval(wide[column][arm] - wide[column]["nested"])
            verdict = "supported" if mean > half else "not supported"
            claims.append(f"{name} than of `{arm}`: {mean:.3f} ± {half:.3f}, {verdict}")
    return (
        with_errors(table, ["arm"], columns)
        + f"\n\nOf the claims for two levels ({table['seed'].nunique()} seeds, ± half of the 95 % "
        "interval of differences within a seed): " + "; ".join(claims) + ". `none` is the same "
        "decoder without thoughts; row `real` holds real dialogues against others. What does not "
        "follow: anything about the order of turns, or about decoders that see more than two words."
    )
