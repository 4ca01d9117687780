"""Deep and thin against shallow and wide (Liu et al. 2024, MobileLLM, arXiv 2402.14905).

All decoders have as many weights and as many thoughts in total. Shape `2` has 2 layers; `2x2` has
the weights of 2, each used twice in a row (their block-wise sharing). Three arms for each shape:
thoughts in blocks, one block a layer; every layer reads all thoughts; no thoughts at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
from matplotlib.figure import Figure
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.diagnostics.control import control
from ltm_pyro.diagnostics.estimates import clustered_mean
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure, title_and_legend
from studies.common import over_seeds, seeds_interval

SLOW = ltm.Slow(lr=1e-2, kl_start=0.02, kl_hold=0.4, kl_full=0.7)
CORPUS = {"classes": 4, "symbols": 8, "concentration": 0.2}
ARMS = {
    "own": ("each layer its own thoughts", BLUE),
    "all": ("each layer reads all", GREEN),
    "none": ("no thoughts", ORANGE),
}


class ReadsAll(Decoder):
    """Every layer reads all K thoughts, and not a block of its own."""

    def thought_keys(self, z: Tensor) -> list[Tensor]:
        """Per layer, all thoughts as positions meet them; z is (B, K, D)."""
        return [layer.cross_attention.project(z) for layer in self._blocks()]


def depth_of(shape: str) -> tuple[int, int]:
    """(layers with weights of their own, times that each is used)."""
    unique, _, times = shape.partition("x")
    return int(unique), int(times or 1)


def config_for(shape: str, settings: dict[str, Any], vocab_size: int) -> ltm.ModelConfig:
    """Widths for a number of weights: the SwiGLU block, about 8/3 of the width, fills up."""
    unique, times = depth_of(shape)
    base = ltm.ModelConfig(
        vocab_size=vocab_size, seq_len=settings["seq_len"], n_layers=unique, n_heads=2,
        window=settings["window"], thought_dim=settings["thought_dim"],
        thoughts_per_layer=settings["thoughts"] // (unique * times),
    )  # fmt: skip
    width = max(8, 4 * round((settings["weights"] / (14 * unique)) ** 0.5 / 4))
    empty = replace(base, width=width, mlp_hidden=1)
    unit = replace(empty, mlp_hidden=2).n_weights - empty.n_weights
    hidden = 1 + round((settings["weights"] - empty.n_weights) / unit)
    return replace(empty, mlp_hidden=max(hidden, 1))


def build(shape: str, arm: str, settings: dict[str, Any], vocab: int) -> ltm.LatentThoughtModel:
    """A fresh model; the arms of a shape start from the same weights."""
    unique, times = depth_of(shape)
    pyro.set_rng_seed(settings["seed"])
    config = replace(config_for(shape, settings, vocab), n_layers=unique * times)
    model = ltm.LatentThoughtModel(config)
    if arm == "all":
        weights = model.decoder.state_dict()
        model.decoder = ReadsAll(config)
        model.decoder.load_state_dict(weights)
        model.scoring = type(model.scoring)(model.decoder)
    for i, layer in enumerate(model.decoder.layers):
        model.decoder.layers[i] = model.decoder.layers[i - i % times] if times > 1 else layer
    return model


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """The three arms of one shape, on the same batches and held-out sequences."""
    seed = settings["seed"]
    corpus = ltm.load_corpus("mixture", seq_len=settings["seq_len"], seed=seed, **CORPUS)
    batch, steps = spread(corpus.val, settings["sequences"]), settings["steps"]
    truth, losses, rows = -corpus.log_likelihood(batch), {}, []
    for arm in ("none", "own", "all"):
        model = build(settings["shape"], arm, settings, corpus.vocab_size)
        if arm == "none":
            svi = control(model, SLOW, steps, seed)
        else:
            fast = ltm.Fast(steps=settings["fast_steps"])
            svi = ltm.DualRateSVI(model, "mean_field", fast, SLOW, seed=seed)
        svi.fit(corpus.train, steps, progress=False)
        post = None if arm == "none" else svi.infer(batch, settings["eval_fast_steps"])
        if post is None:
            scores = ltm.evaluate(model, None, batch, 2, mode="prior")
        else:
            scores = ltm.evaluate(model, post, batch, 16)
        loss = scores["nll_z0"].values if post is None else -scores["elbo"].values
        losses[arm] = loss
        gain = clustered_mean(losses["none"] - loss)
        above = clustered_mean(loss - truth.numpy())
        rows.append(
            {
                "arm": arm,
                "layers": model.n_layers,
                "width": model.config.width,
                "learned": sum(p.numel() for p in model.parameters()),
                "loss": float(loss.mean()),
                "above_truth": above.value,
                "above_truth_error": above.error,
                "gain": gain.value,
                "gain_error": gain.error,
                "iw_loss": float(-scores["iw_bound"].mean()),
                "kl": float(scores["kl"].mean()),
            }
        )
    return rows


def _unshared(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["shape"].astype(str).str.contains("x")]


def slope(table: pd.DataFrame, arm: str) -> np.ndarray[Any, Any]:
    """Nats per sequence that a doubling of depth saves, by least squares, one for each seed."""
    part = _unshared(table).query("arm == @arm")
    fits = [np.polyfit(np.log2(s["layers"]), s["loss"], 1)[0] for _, s in part.groupby("seed")]
    return -np.array(fits)


def twice(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Nats per sequence, a row a seed, that a second use of layers saves: by shape, on average."""
    part = table[table["arm"] == arm].assign(shape=table["shape"].astype(str))
    loss = part.pivot(index="seed", columns="shape", values="loss")
    tied = [shape for shape in loss.columns if "x" in shape]
    gains = pd.DataFrame({shape: loss[shape.partition("x")[0]] - loss[shape] for shape in tied})
    return gains.assign(**{"on average": gains.mean(axis=1)})


def _told(gain: pd.Series[float], name: str) -> str:
    mean, half = seeds_interval(gain)
    return f"{name} {mean:+.2f} ± {half:.2f}"


def figure(table: pd.DataFrame) -> Figure:
    """What each arm loses above the truth, against depth."""
    learned = table["learned"]
    caption = (
        "Held-out loss above the corpus's own entropy, nats per sequence, mean and standard error "
        f"over seeds; {learned.min():,} to {learned.max():,} weights in all shapes, the same "
        "number of thoughts in all, and for thoughts the ELBO on fresh draws. Open marks: half of "
        "the layers, each used twice."
    )
    with house_figure((6.4, 3.6), caption) as fig:
        axes = fig.subplots()
        for arm, (label, color) in ARMS.items():
            part = table[table["arm"] == arm]
            plain = over_seeds(_unshared(part), ["layers"], "above_truth")
            axes.errorbar(
                plain["layers"], plain["mean"], plain["error"].fillna(0.0), marker="o",
                markersize=4, label=label, color=color,
            )  # fmt: skip
            tied = part.drop(_unshared(part).index)
            mean = over_seeds(tied, ["layers"], "above_truth")
            axes.errorbar(
                mean["layers"] * 1.08, mean["mean"], mean["error"].fillna(0.0), marker="o",
                markersize=5, markerfacecolor="white", color=color, linestyle="none",
            )  # fmt: skip
        axes.axhline(0.0, linestyle="--", linewidth=1.0, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("decoder layers, at matched weights")
        axes.set_ylabel("loss above the truth, nats per sequence")
        title_and_legend(axes, "")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """What depth saves in each arm, and whether own thoughts change that."""
    saves = {arm: slope(table, arm) for arm in ARMS}
    told = {arm: "{:+.2f} ± {:.2f}".format(*seeds_interval(each)) for arm, each in saves.items()}
    more, half = seeds_interval(saves["own"] - saves["none"])
    than_all, half_all = seeds_interval(saves["own"] - saves["all"])
    supported = more - half > 0 and than_all - half_all > 0
    again = {arm: twice(table, arm) for arm in ARMS}
    shared = "Using layers twice saves against using them once: " + "; ".join(
        f"{ARMS[arm][0]} " + ", ".join(_told(gain, str(shape)) for shape, gain in gains.items())
        for arm, gains in again.items()
    )
    return (
        "A doubling of depth at matched weights saves, in nats per sequence (slope by least "
        f"squares, 95 % intervals over {table['seed'].nunique()} seeds): {told['own']} where each "
        f"layer has its own thoughts, {told['all']} where each reads all, {told['none']} without "
        f"thoughts. Own thoughts against none: {more:+.2f} ± {half:.2f}; own against all: "
        f"{than_all:+.2f} ± {half_all:.2f}. That depth helps more when each layer has its own "
        f"thoughts is {'supported' if supported else 'not supported'} here. {shared}. "
        "One synthetic corpus whose classes thoughts "
        f"can tell, {int(table['learned'].median()):,} weights, {table['steps'].iloc[0]} slow "
        "steps: MobileLLM's claim is about 125 M weights, real text and far longer training, and "
        "is not tested."
    )
