"""Emulated fine-tuning (Mitchell et al. 2023, arXiv 2310.12962) with shared thoughts.

    log p(x_t | x_<t, z) = large_pre + (small_ft - small_pre) + const      of logits, the same z

The small model learns at the large one's thoughts, z ~ q_large(z | x), so that a z means the same
to both; then each is fine-tuned by itself on few sequences of another corpus. `mixture`: from the
chains of one seed to those of another. `text`: from pydoc to --data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

import ltm_pyro as ltm
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.estimates import clustered_mean, clustered_ratio, documents_of
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, house_figure
from studies.common import over_seeds, seeds_interval

SLOW = ltm.Slow(lr=1e-2, kl_start=0.02, kl_hold=0.4, kl_full=0.7)
CORPUS = {"classes": 4, "symbols": 8, "concentration": 0.2}
TUNE = ltm.Slow(lr=3e-3)
MODELS = {
    "large_pre": ("large, pre-trained", GREY),
    "small_pre": ("small, pre-trained", GREY),
    "small_ft": ("small, fine-tuned", ORANGE),
    "emulated": ("emulated", BLUE),
    "large_ft": ("large, fine-tuned", GREEN),
}


class CombinedTokens(TorchDistribution):
    """Token by token the softmax of a sum of several decoders' logits, all at the same z."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's interface
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, model: Emulated, z: Tensor, mask: Tensor) -> None:
        self.model, self.z, self.scored = model, z, mask
        super().__init__(z.shape[:-2], mask.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CombinedTokens:
        """The same with leading dimensions of z repeated."""
        return CombinedTokens(
            self.model, self.z.expand(*batch_shape, *self.z.shape[-2:]), self.scored
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(value | z), (..., B)."""
        log_p = self.model.log_probs(self.z, value)
        read = value.expand(log_p.shape[:-1])[..., None]
        return torch.where(self.scored, log_p.gather(-1, read)[..., 0], 0.0).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Tokens one after another, (*sample_shape, ..., B, T)."""
        z = self.z.expand(*sample_shape, *self.z.shape)
        x = torch.zeros(*z.shape[:-2], *self.event_shape, dtype=torch.long)
        for t in range(x.shape[-1]):
            now = self.model.log_probs(z, x)[..., t, :]
            x[..., t] = torch.distributions.Categorical(logits=now).sample()
        return x


class Emulated(ltm.LatentModel):
    """A weighted sum of several language models' logits, each at the same thoughts."""

    def __init__(self, models: Sequence[ltm.LatentThoughtModel], weights: Sequence[float]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(model.decoder for model in models)
        self.weights = tuple(weights)
        self.thought_prior = models[0].thought_prior
        self.x_shape = (models[0].config.seq_len,)

    def prior(self) -> TorchDistribution:
        """p(z), the one that all models share."""
        return self.thought_prior()

    def log_probs(self, z: Tensor, x: Tensor) -> Tensor:
        """Log p(. | x_<t, z), z (..., B, K, D) and x (..., B, T) to (..., B, T, V)."""
        lead = z.shape[:-2]
        tokens, flat = x.expand(*lead, -1).flatten(0, -2), z.flatten(0, len(lead) - 1)
        total = torch.zeros(())
        for weight, decoder in zip(self.weights, self.decoders, strict=True):
            assert isinstance(decoder, Decoder)
            total = total + weight * decoder.logits(tokens, flat)
        return total.log_softmax(-1).unflatten(0, lead)

    def likelihood(self, z: Tensor, batch: ltm.Batch) -> TorchDistribution:
        """p(x | z): batch shape (..., B), event shape (T,)."""
        return CombinedTokens(self, z, batch.mask)


def corpora(settings: dict[str, Any], data: Path | None) -> tuple[Corpus, Corpus]:
    """What is pre-trained on, and what is fine-tuned on."""
    length, seed = settings["seq_len"], settings["seed"]
    if settings["corpus"] == "mixture":
        old, new = (
            ltm.load_corpus("mixture", seq_len=length, seed=s, **CORPUS) for s in (seed, seed + 100)
        )
        return old, new
    second = ltm.load_corpus(str(data), seq_len=length)
    return ltm.load_corpus("pydoc", seq_len=length), second


def config_of(width: int, vocab_size: int, settings: dict[str, Any]) -> ltm.ModelConfig:
    """A decoder of some width; thoughts are the same for all, (2 L, 4)."""
    return ltm.ModelConfig(
        vocab_size=vocab_size, seq_len=settings["seq_len"], n_layers=settings["layers"],
        width=width, n_heads=2, mlp_hidden=2 * width, thought_dim=4, thoughts_per_layer=2,
        window=settings["window"][settings["corpus"]],
    )  # fmt: skip


def taught(
    large: ltm.DualRateSVI, corpus: Corpus, settings: dict[str, Any]
) -> ltm.LatentThoughtModel:
    """A small model that learns at the large one's thoughts, on the slow clock alone."""
    config = config_of(settings["width_small"], corpus.vocab_size, settings)
    small = ltm.LatentThoughtModel(config)
    optimizer = torch.optim.AdamW(small.parameters(), lr=SLOW.lr, betas=SLOW.betas)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["steps"])
    rng = np.random.default_rng(settings["seed"])
    for step in range(settings["steps"]):
        batch = corpus.train.batch(rng.choice(len(corpus.train), 16, replace=False).tolist())
        z = large.infer(batch, settings["fast_steps"], progress=False).sample(1, seed=step)[0]
        loss = -small.log_likelihood(z, batch).sum() / batch.n_tokens.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(small.parameters(), SLOW.clip_norm)
        optimizer.step()
        rate.step()
    return small


def tuned(
    model: ltm.LatentThoughtModel, batch: ltm.Batch, settings: dict[str, Any]
) -> ltm.LatentThoughtModel:
    """A copy, fine-tuned by both clocks on a few sequences."""
    model = copy.deepcopy(model)
    fast = ltm.Fast(steps=settings["fast_steps"])
    svi = ltm.DualRateSVI(model, "mean_field", fast, TUNE, seed=settings["seed"])
    svi.fit(batch, settings["tune_steps"], progress=False)
    return model


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """Five models of one pair of corpora, and what each layer's thoughts tell of the style."""
    first, second = corpora(settings, data)
    pyro.set_rng_seed(settings["seed"])
    config = config_of(settings["width_large"], first.vocab_size, settings)
    fast = ltm.Fast(steps=settings["fast_steps"])
    large = ltm.DualRateSVI(
        ltm.LatentThoughtModel(config), "mean_field", fast, SLOW, seed=settings["seed"]
    )
    large.fit(first.train, settings["steps"], progress=False)
    models: dict[str, Any] = {"large_pre": large.model, "small_pre": taught(large, first, settings)}
    few = spread(second.train, settings["tune_sequences"])
    for size in ("large", "small"):
        models[f"{size}_ft"] = tuned(models[f"{size}_pre"], few, settings)
    parts = [models[name] for name in ("large_pre", "small_ft", "small_pre")]
    models["emulated"] = Emulated(parts, (1.0, 1.0, -1.0))
    held_out = {"old": spread(first.val, settings["sequences"])}
    held_out["new"] = spread(second.val, settings["sequences"])
    rows: list[dict[str, Any]] = []
    for text, batch in held_out.items():
        known: dict[str, tuple[Any, np.ndarray[Any, Any]]] = {}
        for name in ("large_ft", *(other for other in MODELS if other != "large_ft")):
            rows.append({"what": "score", "text": text, "model": name})
            rows[-1] |= scores_of(models[name], batch, settings, name, known)
    rows += swaps(models, held_out, first, settings)
    return rows


def scores_of(
    model: Any, batch: ltm.Batch, settings: dict[str, Any], name: str, known: dict[str, Any]
) -> dict[str, float]:
    """Bounds of one model, paired with the fine-tuned large one's, which comes first."""
    svi = ltm.DualRateSVI(model, "mean_field", seed=settings["seed"])
    post = svi.infer(batch, settings["eval_fast_steps"])
    scores = ltm.evaluate(model, post, batch, 16, controls=False)
    all_logits = model if isinstance(model, Emulated) else Emulated([model], [1.0])
    with torch.no_grad():
        log_p = all_logits.log_probs(post.mean, batch.observed)
    loss, documents, tokens = (
        -scores["elbo"].values,
        documents_of(scores),
        scores["n_tokens"].values,
    )
    own, truth = known.setdefault("large_ft", (log_p, loss))
    apart = (own.exp() * (own - log_p)).sum(-1) * batch.mask
    kl = clustered_ratio(apart.sum(-1).numpy(), tokens, documents)
    gap = clustered_ratio(loss - truth, tokens, documents)
    bound = clustered_ratio(loss, tokens, documents)
    iw = clustered_ratio(-scores["iw_bound"].values, tokens, documents)
    given_z = clustered_ratio(scores["nll_given_z"].values, tokens, documents)
    return {
        "loss_per_token": bound.value, "loss_error": bound.error, "iw_loss_per_token": iw.value,
        "nll_given_z_per_token": given_z.value, "over_large_ft": gap.value,
        "over_large_ft_error": gap.error, "kl_from_large_ft_per_token": kl.value,
        "kl_error": kl.error, "kl_z_per_sequence": float(scores["kl"].mean()),
    }  # fmt: skip


def swaps(
    models: dict[str, Any], held_out: dict[str, ltm.Batch], first: Corpus, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Nats lost where one layer reads thoughts of another style, and of another text of the same.

    Styles: the classes of `mixture` under the pre-trained large model, the two corpora of `text`
    under the fine-tuned one.
    """
    if settings["corpus"] == "mixture":
        model, batch = models["large_pre"], held_out["old"]
        style = first.classes_of(batch)  # type: ignore[attr-defined]
    else:
        model, both = models["large_ft"], [held_out["old"], held_out["new"]]
        batch = ltm.Batch(torch.cat([b.observed for b in both]), torch.cat([b.mask for b in both]))
        style = torch.arange(2).repeat_interleave(len(both[0]))
    post = ltm.DualRateSVI(model, "mean_field", seed=settings["seed"]).infer(
        batch, settings["eval_fast_steps"]
    )
    z = post.sample(8, seed=1)
    noise = torch.Generator().manual_seed(settings["seed"])
    order = torch.rand(len(batch), len(batch), generator=noise).fill_diagonal_(-1.0)
    donors = {
        "same": torch.where(style[:, None] == style, order, -1.0).argmax(1),
        "other": torch.where(style[:, None] != style, order, -1.0).argmax(1),
    }
    each, rows = model.config.thoughts_per_layer, []
    with torch.no_grad():
        base = model.log_likelihood(z, batch).mean(0)
        for layer in range(model.n_layers):
            block, lost = slice(layer * each, (layer + 1) * each), {}
            for kind, donor in donors.items():
                changed = z.clone()
                changed[:, :, block] = z[:, donor][:, :, block]
                lost[kind] = (base - model.log_likelihood(changed, batch).mean(0)).numpy()
            estimates = {kind: clustered_mean(value) for kind, value in lost.items()}
            estimates["style"] = clustered_mean(lost["other"] - lost["same"])
            row = {f"lost_{kind}": found.value for kind, found in estimates.items()}
            row |= {f"lost_{kind}_error": found.error for kind, found in estimates.items()}
            rows.append({"what": "swap", "layer": layer + 1, **row})
    return rows


def figure(table: pd.DataFrame) -> Figure:
    """Bounds of the five models on the new text, and what each layer's thoughts carry."""
    pairs = list(table["corpus"].unique())
    caption = (
        "Above: held-out bound on the new corpus, nats per token, mean and standard error over "
        "seeds (ELBO on fresh draws, q fitted under each model). Below: nats per sequence lost "
        "where one layer reads the thoughts of another text, of the same style or of another."
    )
    with house_figure((3.4 * len(pairs), 4.6), caption) as fig:
        panels = fig.subplots(2, len(pairs), squeeze=False)
        for pair, (above, below) in zip(pairs, panels.T, strict=True):
            part = table[table["corpus"] == pair]
            new = over_seeds(part[part["text"] == "new"], ["model"], "loss_per_token")
            new = new.set_index("model").loc[list(MODELS)]
            for place, (name, row) in enumerate(new.iterrows()):
                error = row.fillna(0)["error"]
                color = MODELS[str(name)][1]
                above.errorbar(place, row["mean"], error, marker="o", color=color)
            above.set_xticks(range(len(new)), [name.replace("_", "\n") for name in new.index])
            above.set(title=pair, ylabel="nats per token")
            for kind, color, shift in (("same", GREY, -0.2), ("other", PURPLE, 0.2)):
                mean = over_seeds(part[part["what"] == "swap"], ["layer"], f"lost_{kind}")
                below.bar(
                    mean["layer"] + shift, mean["mean"], 0.4, yerr=mean["error"].fillna(0),
                    color=color, label=f"{kind} style",
                )  # fmt: skip
            below.set(xlabel="layer whose thoughts are swapped", ylabel="nats per sequence")
            below.set_xticks(mean["layer"])
            below.legend(fontsize=8)
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """How near the emulated model comes, and where the style is."""
    lines = []
    for pair in table["corpus"].unique():
        part = table[table["corpus"] == pair]
        new = part[part["text"] == "new"].set_index(["model", "seed"])
        loss, kl = new["loss_per_token"], new["kl_from_large_ft_per_token"]
        told = ", ".join(f"{MODELS[m][0]} {loss[m].mean():.3f}" for m in MODELS)
        best_part = min(("large_pre", "small_ft"), key=lambda m: loss[m].mean())
        gain, half = seeds_interval(loss[best_part] - loss["emulated"])
        short, half_short = seeds_interval(loss["emulated"] - loss["large_ft"])
        verdict = "supported" if gain > half else "not supported"
        swapped = part[part["what"] == "swap"]
        costs = {layer: seeds_interval(r["lost_style"]) for layer, r in swapped.groupby("layer")}
        style = ", ".join(
            f"layer {layer:.0f} {value:.2f} ± {width:.2f}"
            for layer, (value, width) in costs.items()
        )
        lines.append(
            f"* `{pair}`: bounds in nats per token: {told}. The emulated model against the better "
            f"of its parts ({MODELS[best_part][0]}): {gain:+.3f} ± {half:.3f} saved, so that it "
            f"beats its parts is {verdict}; it loses {short:+.3f} ± {half_short:.3f} against the "
            "really fine-tuned large one. Next-token distributions are "
            f"{kl['emulated'].mean():.3f} nats of KL per token from the fine-tuned large model's "
            f"(pre-trained large: {kl['large_pre'].mean():.3f}, fine-tuned small: "
            f"{kl['small_ft'].mean():.3f}; each at its own E_q z). Nats per sequence that another "
            f"style's thoughts cost beyond those of the same style: {style}."
        )
    return (
        "All scores are bounds on fresh draws with the KL charged; ± are 95 % intervals over "
        f"{table['seed'].nunique()} seeds, errors clustered by document stand in the table.\n\n"
        + "\n".join(lines)
        + "\n\nThe models have 3,000 to 60,000 weights, and a pair differs by a factor of a few in "
        "size; the source's finding, that scale at pre-training adds knowledge and scale at "
        "fine-tuning style, is about models a thousand times larger and is not tested."
    )
