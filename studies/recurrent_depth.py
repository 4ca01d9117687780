"""A looped block (Geiping et al. 2025, arXiv 2502.05171) against fast steps, at equal compute.

    z ~ N(0, I)                                                            (2, 4)
    h = 0;  r times:  h_t = block(h_(t-1), embed(c_t), z)                  the same block each time
    x_t | z, c ~ Categorical(head(h_t)),  truth: x_t = s + c_1 + .. + c_t mod p

Parity is p = 2. The block, two layers, sees one position back, so after r recurrences x_t knows r
terms: what must be computed needs r. In half of the sequences the start s is hidden, and only the
first labels tell it, through q(z): what must be inferred needs fast steps. In the other half it is
0, and c_1 says which half it is. Trained with r drawn from 1 to 6; sequences are longer than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

import ltm_pyro as ltm
from ltm_pyro.course import Metrics
from ltm_pyro.models.priors import StandardNormal
from ltm_pyro.plots.style import INK, house_figure
from studies.common import seeds_interval
from studies.tasks import wilson

THOUGHTS, THOUGHT_DIM = 2, 4


class LoopedSums(ltm.LatentModel):
    """Running sums mod p, computed by a block that is used `recurrences` times."""

    def __init__(self, modulus: int, width: int) -> None:
        super().__init__()
        self.thought_prior = StandardNormal(THOUGHTS, THOUGHT_DIM)
        self.embedding = nn.Embedding(modulus + 2, width)
        self.thought = nn.Linear(THOUGHTS * THOUGHT_DIM, width)
        with torch.no_grad():  # heard from the start, or the block learns to ignore noise
            self.thought.weight.mul_(4.0)
        self.block = nn.Sequential(
            nn.Linear(3 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width),
            nn.RMSNorm(width),
        )  # fmt: skip
        self.head = nn.Linear(width, modulus)
        self.recurrences = 1

    def prior(self) -> TorchDistribution:
        """p(z), event shape (2, 4)."""
        return self.thought_prior()

    def logits(self, z: Tensor, terms: Tensor) -> Tensor:
        """Of x, z (..., B, 2, 4) and terms (B, T) to (..., B, T, p)."""
        lead = z.shape[:-2]
        read = self.embedding(terms).expand(*lead, -1, -1)
        thought = self.thought(z.flatten(-2))[..., None, :].expand_as(read)
        h = torch.zeros_like(read)
        for _ in range(self.recurrences):
            before = nn.functional.pad(h[..., :-1, :], (0, 0, 1, 0))
            h = self.block(torch.cat([before, read, thought], -1))
        return self.head(h)

    def likelihood(self, z: Tensor, batch: ltm.Batch) -> TorchDistribution:
        """p(x | z), (..., B) over (T,)."""
        logits = self.logits(z, batch.covariates["terms"].long())
        return dist.Categorical(logits=logits).mask(batch.mask).to_event(1)


class AnyDepth(ltm.Callback):
    """Draws the recurrences of the next slow step."""

    def __init__(self, model: LoopedSums, most: int, seed: int) -> None:
        self.model, self.most, self.rng = model, most, np.random.default_rng(seed)

    def on_step(self, svi: ltm.DualRateSVI, row: Metrics) -> None:
        """From 1 to the most, all alike."""
        self.model.recurrences = int(self.rng.integers(1, self.most + 1))


def sums(settings: dict[str, Any], hidden: Sequence[bool], seed: int) -> ltm.Batch:
    """Sequences with their true running sums; the first term says whether the start is hidden."""
    p, rng = settings["modulus"], np.random.default_rng([settings["seed"], seed])
    terms = rng.integers(0, p, (len(hidden), settings["length"]))
    terms[:, 0] = np.where(hidden, rng.integers(0, p, len(hidden)), 0)
    x = terms.cumsum(1) % p
    terms[:, 0] = p + np.asarray(hidden)
    return ltm.Batch(torch.tensor(x), covariates={"terms": torch.tensor(terms)})


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One task: a model trained once, then every r with every T_fast."""
    model = LoopedSums(settings["modulus"], settings["width"])
    slow = ltm.Slow(lr=1e-2, kl_start=0.005, kl_hold=0.7, kl_full=0.85, weight_decay=0.01)
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=8), slow, seed=settings["seed"])
    model.recurrences = settings["trained_to"]
    depth = AnyDepth(model, settings["trained_to"], settings["seed"])
    train = sums(settings, [False, True] * 2048, seed=0)
    svi.fit(train, settings["steps"], batch_size=32, progress=False, callbacks=[depth])
    place, rows = torch.arange(settings["length"]), []
    far = place > settings["trained_to"]
    near = ~far & (place >= settings["prefix"])
    for hidden, recurrences, steps in itertools.product(
        (True, False), settings["recurrences"], settings["fast_steps"]
    ):
        model.recurrences = recurrences
        batch = sums(settings, [hidden] * settings["sequences"], seed=1)
        post = svi.infer(batch.prefix(settings["prefix"]), steps)
        scores = ltm.evaluate(model, post, batch, 8, mode="prefix", controls=False)
        with torch.no_grad():
            right = model.logits(post.mean, batch.covariates["terms"]).argmax(-1) == batch.observed
        rows.append(
            {
                "hidden_start": hidden,
                "recurrences": recurrences,
                "fast_steps": steps,
                "blocks": recurrences * (2 * steps + 1),
                "near": int(right[:, near].sum()),
                "n_near": int(near.sum()) * len(batch),
                "far": int(right[:, far].sum()),
                "n_far": int(far.sum()) * len(batch),
                "predictive_loss_per_label": float(
                    -(scores["log_predictive"] / scores["n_tokens"]).mean()
                ),
            }
        )
    return rows


def shares(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Accuracies over all seeds together, near (trained r reaches it) and far."""
    out = table.groupby(by)[["near", "n_near", "far", "n_far"]].sum()
    out["accuracy"] = (out["near"] + out["far"]) / (out["n_near"] + out["n_far"])
    return out.assign(near=out["near"] / out["n_near"], far=out["far"] / out["n_far"])


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy over both knobs, with lines of equal compute."""
    tasks = list(table.groupby(["modulus", "hidden_start"], sort=False))
    caption = (
        "Share of right labels after the first ones, all seeds, by recurrences r and fast steps; "
        "dashed: equal compute, r (2 T_fast + 1) block applications. Right of the line r was not "
        "seen in training. Where the start is known, fast steps have nothing to find."
    )
    with house_figure((3.2 * len(tasks), 3.4), caption) as fig:
        panels = fig.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for axes, ((p, hidden), part) in zip(panels, tasks, strict=True):
            grid = shares(part, ["fast_steps", "recurrences"])["accuracy"].unstack()
            image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
            for (i, j), value in np.ndenumerate(grid.to_numpy()):
                shade = "white" if value < 0.6 else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=8)
            r, t = np.meshgrid(grid.columns, grid.index)
            if min(grid.shape) > 1:
                axes.contour(
                    np.log2(r * (2 * t + 1)), levels=range(1, 12, 2), colors="white",
                    linestyles="--", linewidths=0.8,
                )  # fmt: skip
            axes.axvline(
                sum(grid.columns <= part["trained_to"].iloc[0]) - 0.5, color="white", linewidth=1.5
            )
            axes.set_xticks(range(len(grid.columns)), grid.columns)
            axes.set_yticks(range(len(grid.index)), grid.index)
            name = "parity" if p == 2 else f"sums mod {p}"
            axes.set(title=f"{name}, start {'hidden' if hidden else 'known'}", xlabel="r")
            axes.grid(visible=False)
        panels[0].set_ylabel("T_fast")
        fig.colorbar(image, ax=panels[-1], label="accuracy")
    return fig


def _told(part: pd.DataFrame, which: str = "all") -> str:
    """An accuracy with its interval."""
    groups = ["near", "far"] if which == "all" else [which]
    hits = sum(int(part[name].sum()) for name in groups)
    n = sum(int(part[f"n_{name}"].sum()) for name in groups)
    low, high = wilson(hits, n)
    return f"{hits / n:.1%} ({low:.1%} to {high:.1%})"


def _gain(table: pd.DataFrame, knob: str, other: str) -> tuple[float, float]:
    """What the largest of a knob adds in accuracy to its smallest, the other at its best."""
    acc = shares(table, ["seed", knob, other])["accuracy"].unstack(other)
    best = acc.groupby(knob).mean().loc[table[knob].max()].idxmax()
    by_seed = acc[best].unstack(knob)
    return seeds_interval(by_seed[table[knob].max()] - by_seed[table[knob].min()])


def paragraph(table: pd.DataFrame) -> str:
    """Each task: what either knob gains, the best split of equal compute, r beyond training."""
    trained, lines, apart = table["trained_to"].iloc[0], [], True
    for (_, hidden), part in table.groupby(["modulus", "hidden_start"], sort=False):
        p = int(part["modulus"].iloc[0])
        task = f"{'parity' if p == 2 else f'sums mod {p}'}, start {'hidden' if hidden else 'known'}"
        deeper = _gain(part, "recurrences", "fast_steps")
        longer = _gain(part, "fast_steps", "recurrences")
        apart &= deeper[0] > deeper[1] and (longer[0] > longer[1]) == hidden
        seen = part[part["recurrences"] <= trained]
        beyond = part[part["recurrences"] == part["recurrences"].max()]
        steps = part["fast_steps"].max()
        within = seen[seen["recurrences"] == seen["recurrences"].max()]
        far = [_told(each[each["fast_steps"] == steps], "far") for each in (within, beyond)]
        at_most = part[part["blocks"] <= trained * 5]
        both = shares(at_most, ["recurrences", "fast_steps"])["accuracy"]
        r, t = both.index[int(both.argmax())]
        alone = at_most[at_most["fast_steps"] == 0]
        deepest = part.query("fast_steps == 0 and recurrences == recurrences.max()")
        depth_only = alone[alone["recurrences"] == alone["recurrences"].max()]
        chosen = at_most[(at_most["recurrences"] == r) & (at_most["fast_steps"] == t)]
        lines.append(
            f"* {task} (chance {1 / p:.1%}): more recurrences add {deeper[0]:+.3f} ± "
            f"{deeper[1]:.3f} to the accuracy, more fast steps {longer[0]:+.3f} ± {longer[1]:.3f}. "
            f"For at most {trained * 5} block applications the best split is r = {r}, T_fast = "
            f"{t}: {_told(chosen)}; all of it in r, no fast steps: {_told(depth_only)}; no "
            f"fast steps at r = {deepest['recurrences'].max()}: {_told(deepest)}. Labels "
            f"farther than any trained r: {far[0]} at r = {within['recurrences'].max()}, {far[1]} "
            f"at r = {beyond['recurrences'].max()}."
        )
    verdict = (
        "\n\nThe two knobs do different work: what must be computed needs recurrences, what is "
        "hidden needs fast steps, and no amount of one replaces the other."
        if apart
        else "\n\nThat recurrences compute and fast steps infer is not supported in every task."
    )
    return (
        f"Accuracies are over all {table['seed'].nunique()} seeds with Wilson intervals, which "
        "take labels for independent; gains of a knob are from its smallest to its largest value, "
        "± 95 % intervals over seeds.\n\n"
        + "\n".join(lines)
        + verdict
        + " These are tasks made for it; that either improves reasoning in language is not "
        "tested."
    )
