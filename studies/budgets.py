"""Weights x thoughts x fast steps: one grid, and a model of it with interactions.

    y = a + b_w log2 W + b_z log2 Z + b_t log2 T + b_wz log2 W log2 Z + b_wt .. + b_zt ..
          + c_w (log2 W)^2 + c_z .. + c_t ..

W weights, Z latent dimensions, T fast steps in training and at test; logarithms are centred, so a
main effect is that of a doubling in the middle of the grid. The budgets are separate where the
interactions are none. y is the held-out bound, or the few-shot accuracy: the class of a `mixture`
sequence by the nearest centroid of E_q z, from a few labelled sequences a class.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.data.mixture import MixtureCorpus
from ltm_pyro.diagnostics.control import control
from ltm_pyro.diagnostics.estimates import clustered_mean
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import BLUE, GREEN, GREY, INK, ORANGE, house_figure
from studies.tasks import wilson

SLOW = ltm.Slow(lr=1e-2, kl_start=0.02, kl_hold=0.4, kl_full=0.7)
CORPUS = {"classes": 4, "symbols": 8, "concentration": 0.2}
BUDGETS = {"weights": "weights", "latents": "latent dimensions", "fast_steps": "fast steps"}
TERMS = [*[(b,) for b in BUDGETS], *itertools.combinations(BUDGETS, 2)]


def model_of(settings: dict[str, Any], corpus: MixtureCorpus) -> ltm.LatentThoughtModel:
    """One layer with window 1: what class a sequence has, thoughts alone can tell."""
    width = settings["width"]
    pyro.set_rng_seed(settings["seed"])
    return ltm.LatentThoughtModel(
        ltm.ModelConfig(
            vocab_size=corpus.vocab_size, seq_len=corpus.seq_len, n_layers=1, width=width,
            n_heads=2, mlp_hidden=2 * width, window=1, thoughts_per_layer=2,
            thought_dim=settings["latents"] // 2,
        )
    )  # fmt: skip


def few_shot(points: Tensor, classes: Tensor, shots: int) -> tuple[int, int]:
    """Right answers among how many: nearest centroid, of the first `shots` of each class."""
    rank = torch.stack([(classes[:i] == classes[i]).sum() for i in range(len(classes))])
    labelled, names = rank < shots, classes.unique()
    centroids = torch.stack([points[labelled & (classes == c)].mean(0) for c in names])
    found = names[torch.cdist(points[~labelled], centroids).argmin(1)]
    return int((found == classes[~labelled]).sum()), int((~labelled).sum())


def bigrams(x: Tensor, symbols: int) -> Tensor:
    """Shares of pairs of symbols, (B, V * V): what few shots can use without a model."""
    pairs = x[:, :-1] * symbols + x[:, 1:]
    return torch.nn.functional.one_hot(pairs, symbols**2).float().mean(1).sqrt()


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One number of weights and of latents: a control, then a fit for each T_fast."""
    seed = settings["seed"]
    corpus = ltm.load_corpus("mixture", seq_len=settings["seq_len"], seed=seed, **CORPUS)
    batch, steps = spread(corpus.val, settings["sequences"]), settings["steps"]
    classes, shots = corpus.classes_of(batch), settings["shots"]
    without = control(model_of(settings, corpus), SLOW, steps, seed)
    without.fit(corpus.train, steps, progress=False)
    alone = ltm.evaluate(without.model, None, batch, 2, mode="prior")["nll_z0"].values
    truth = -corpus.log_likelihood(batch).numpy()
    counted = few_shot(bigrams(batch.observed, corpus.vocab_size), classes, shots)
    rows = []
    for fast_steps in settings["fast_steps"]:
        model = model_of(settings, corpus)
        fast = ltm.Fast(steps=fast_steps)
        svi = ltm.DualRateSVI(model, "mean_field", fast, SLOW, seed=seed)
        svi.fit(corpus.train, steps, progress=False)
        post = svi.infer(batch)
        scores = ltm.evaluate(model, post, batch, 16)
        loss = -scores["elbo"].values
        above, gain = clustered_mean(loss - truth), clustered_mean(alone - loss)
        right, n = few_shot(post.mean.flatten(1), classes, shots)
        best = int((corpus.class_posterior(batch).argmax(1) == classes).sum())
        rows.append(
            {
                "fast_steps": fast_steps,
                "weights": sum(p.numel() for p in model.parameters()),
                "loss_above_truth": above.value,
                "loss_error": above.error,
                "iw_above_truth": float((-scores["iw_bound"].values - truth).mean()),
                "gain": gain.value,
                "gain_error": gain.error,
                "kl": float(scores["kl"].mean()),
                "right": right,
                "right_by_counts": counted[0],
                "n": n,
                "exact_accuracy": best / len(batch),
            }
        )
    return rows


def effects(table: pd.DataFrame, y: str) -> pd.DataFrame:
    """Least squares on each seed's grid: `effect` and its 95 % `half` over seeds, by term.

    A main effect is that of a doubling in the middle of the grid; curvature is in the fit, so that
    it is not taken for an interaction. `joint` is the half for three terms at once (Bonferroni);
    `r2` what each seed's fit explains, on average.
    """
    names, found, explained = [" x ".join(BUDGETS[name] for name in term) for term in TERMS], [], []
    for _, part in table.groupby("seed"):
        logs = {name: np.log2(part[name].to_numpy(float)) for name in BUDGETS}
        logs = {name: value - value.mean() for name, value in logs.items()}
        terms = [*TERMS, *((name, name) for name in BUDGETS), ()]
        design = np.stack([np.prod([logs[n] for n in term], 0) * np.ones(len(part))
                           for term in terms], 1)  # fmt: skip
        outcome = part[y].to_numpy(float)
        fit, _, _, _ = np.linalg.lstsq(design, outcome, rcond=None)
        residual, around = outcome - design @ fit, outcome - outcome.mean()
        found.append(fit[: len(TERMS)])
        explained.append(1 - residual @ residual / (around @ around))
    by_seed = np.stack(found)
    n = len(by_seed)
    error = by_seed.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(TERMS), np.nan)
    half, joint = (stats.t.ppf(1 - p, max(n - 1, 1)) * error for p in (0.025, 0.025 / 3))
    out = {"effect": by_seed.mean(0), "half": half, "joint": joint, "r2": np.mean(explained)}
    return pd.DataFrame(out, index=names)


def with_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the few-shot accuracy in per cent."""
    return table.assign(accuracy=100 * table["right"] / table["n"])


def figure(table: pd.DataFrame) -> Figure:
    """The bound over the grid, and the fitted effects of both outcomes."""
    table = with_accuracy(table)
    caption = (
        "Left: held-out loss above the corpus's own entropy, nats per sequence, mean over seeds; "
        "a column of panels for each number of weights. Right: what a doubling of a budget "
        "changes, and their interactions, by least squares, with 95 % intervals over seeds. "
        "Budgets would be separate if the last three were 0."
    )
    widths = sorted(table["width"].unique())
    with house_figure((10.5, 3.6), caption) as fig:
        panels = fig.subplots(1, len(widths) + 2, width_ratios=[1] * len(widths) + [1.3, 1.3])
        for axes, width in zip(panels, widths, strict=False):
            part = table[table["width"] == width]
            for latents, color in zip(
                sorted(part["latents"].unique()), (ORANGE, GREEN, BLUE, INK), strict=False
            ):
                mean = part[part["latents"] == latents].groupby("fast_steps")["loss_above_truth"]
                axes.errorbar(
                    mean.mean().index, mean.mean(), mean.sem().fillna(0), marker="o", markersize=3,
                    color=color, label=f"{latents} latents",
                )  # fmt: skip
            axes.set(xlabel="T_fast", title=f"{part['weights'].mean():,.0f} weights")
            axes.set_xscale("log", base=2)
            axes.set_ylim(0, 1.2 * table["loss_above_truth"].max())
        panels[0].set_ylabel("nats above the truth")
        panels[0].legend(fontsize=7)
        for axes, (y, unit) in zip(
            panels[-2:], (("loss_above_truth", "nats"), ("accuracy", "points")), strict=True
        ):
            fit = effects(table, y)[::-1]
            axes.errorbar(fit["effect"], range(len(fit)), xerr=fit["half"], fmt="o", color=BLUE)
            axes.axvline(0, color=GREY, linewidth=1)
            labels = [name.replace(" x ", "\n x ") for name in fit.index]
            axes.set_yticks(range(len(fit)), labels if axes is panels[-2] else [], fontsize=7)
            axes.set(xlabel=f"{unit} per doubling", title=y.split("_")[0])
    return fig


def _told(fit: pd.DataFrame, digits: int) -> str:
    return ", ".join(
        f"{name} {row['effect']:+.{digits}f} ± {row['half']:.{digits}f}"
        for name, row in fit.iterrows()
    )


def paragraph(table: pd.DataFrame) -> str:
    """Main effects, interactions, and the verdict."""
    table = with_accuracy(table)
    bound, accuracy = effects(table, "loss_above_truth"), effects(table, "accuracy")
    verdicts = []
    for name, fit in (("bound", bound), ("few-shot accuracy", accuracy)):
        pairs = fit[fit.index.str.contains(" x ")]
        clear = pairs[pairs["effect"].abs() > pairs["joint"]]
        verdicts.append(
            f"for the {name} separate budgets are not told from interacting ones"
            if clear.empty
            else f"for the {name} they are not separate ({', '.join(clear.index)})"
        )
    one = table[table["weights"] == table["weights"].max()]
    top = one[(one["latents"] == one["latents"].max())]
    top = top[top["fast_steps"] == top["fast_steps"].max()]
    low, high = wilson(top["right"].sum(), top["n"].sum())
    counts = table.drop_duplicates("seed")
    counted = counts["right_by_counts"].sum() / counts["n"].sum()
    low_c, high_c = wilson(counts["right_by_counts"].sum(), int(counts["n"].sum()))
    return (
        f"What a doubling changes, 95 % intervals over {table['seed'].nunique()} seeds. Loss "
        f"above the truth, nats per sequence (R2 {bound['r2'].iloc[0]:.2f}): {_told(bound, 2)}. "
        f"Few-shot accuracy, percentage points (R2 {accuracy['r2'].iloc[0]:.2f}): "
        f"{_told(accuracy, 1)}. With three interactions looked at, {'; '.join(verdicts)}. In the "
        f"largest corner {table['shots'].iloc[0]} shots a class find the class in "
        f"{top['accuracy'].mean():.0f} % ({low:.0%} to {high:.0%}, Wilson); by counts "
        f"of pairs of symbols without a model {counted:.0%} "
        f"({low_c:.0%} to {high_c:.0%}), by the exact posterior of the process "
        f"{table['exact_accuracy'].mean():.0%}. Over the control without thoughts the gain is "
        f"{table['gain'].min():.1f} to {table['gain'].max():.1f} nats per sequence. The fit is a "
        "second-order one over a small grid of one synthetic corpus: it says whether budgets "
        "interact there, and no scaling law."
    )
