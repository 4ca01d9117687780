"""What several studies do: fit a model and its control, and hold one against the other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ltm_pyro.cli.settings import build_config
from ltm_pyro.config import Fast, FitConfig
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.cost import cost_report
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of, losses
from ltm_pyro.diagnostics.published import START_LOG_VARIANCE as START_LOG_VARIANCE
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides.mean_field import MeanField
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.run import Interrupted, Run, create_run, train, train_control
from ltm_pyro.run.folder import CHECKPOINT, CONTROL, METRICS
from ltm_pyro.run.scoring import HeldOut, score_run

RELEASED = Fast(optimizer="adam", lr=0.34, noise="fixed", final_fraction=0.1)
"""The fast loop of the released code: one draw of the noise, kept."""


def config_of(settings: Mapping[str, Any], data: Path | None = None) -> FitConfig:
    """The settings of a fit among those of a cell: `preset`, `seed`, `fast.steps`, and so on.

    What stands under `study` in a cell is the study's own. A corpus `DATA/NAME` is in the folder of
    corpora.
    """
    given: dict[str, Any] = {} if data is None else {"corpus": {"name": str(data)}}
    for name, value in settings.items():
        if name.startswith("study."):
            continue
        if name == "corpus.name" and str(value).startswith("DATA/"):
            assert data is not None
            value = str(data / value.removeprefix("DATA/"))
        *groups, last = name.split(".")
        place = given
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return build_config(given)


@contextmanager
def fitted(config: FitConfig) -> Iterator[Run]:
    """A run fitted to the end, its control too if the settings ask for one; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-study-") as folder:
        run = create_run(Path(folder) / "run", config)
        corpus = run.corpus()
        train(run, corpus, progress=False)
        if config.control:
            train_control(run, corpus, progress=False)
        yield run


def train_both(run: Run, corpus: Corpus) -> None:
    """Fits run and control to the end, or goes on with them.

    Until thoughts join, both are the same fit, weights, moments and batches: it is done once, and
    the control goes on from a copy.
    """
    joins = round(run.config.slow.thoughts_start * run.config.steps)
    if run.svi.slow_step < joins:
        with suppress(Interrupted):
            train(run, corpus, progress=False, after_step=lambda row: row["step"] >= joins)
    if not (run.folder / CONTROL).exists():
        shutil.copytree(run.folder / CHECKPOINT, run.folder / CONTROL)
        shutil.copy(run.folder / METRICS, run.folder / CONTROL)
    train_control(run, corpus, progress=False)
    train(run, corpus, progress=False)


def scored(run: Run, **options: Any) -> HeldOut:
    """Held-out scores of a run on its own corpus."""
    return score_run(run, run.corpus(), **options)


def against_control(held_out: HeldOut) -> dict[str, float]:
    """Gain over the control in nats per sequence, by bound, with errors clustered by document."""
    scores, control = held_out.scores, held_out.control
    assert control is not None
    out: dict[str, float] = {}
    for name in ("ppl_elbo", "ppl_iw"):
        gain = clustered_mean(
            losses(control, "ppl_z0") - losses(scores, name), documents_of(scores)
        )
        short = name.removeprefix("ppl_")
        out |= {f"{short}_gain_per_sequence": gain.value, f"{short}_gain_error": gain.error}
    return {
        **out,
        "kl_per_sequence": float(scores["kl"].mean()),
        "nats_of_shuffled_z": float((scores["nll_shuffled"] - scores["nll_given_z"]).mean()),
        "control_nats_per_token": float(control["nll_z0"].sum() / control["n_tokens"].sum()),
    }


def released_loop(
    model: LatentThoughtModel,
    batch: Batch,
    steps: int,
    seed: int,
    log_variance: float = START_LOG_VARIANCE,
    **fast: Any,
) -> Posterior:
    """Q by the fast loop of the released code: on one draw, from log variance -5.

    Args:
        model: Its decoder stays as it is.
        batch: The sequences.
        steps: T_fast.
        seed: Of the noise.
        log_variance: Where q's start.
        **fast: What is to be otherwise, e.g. `noise="fresh"`.
    """
    guide = MeanField(model, init_log_variance=log_variance)
    clock = replace(RELEASED, steps=steps, **fast)
    return DualRateSVI(model, guide, clock, seed=seed).infer(batch, progress=False)


def bounds_of(
    model: LatentThoughtModel, post: Posterior | None, batch: Batch, draws: int = 64
) -> dict[str, float]:
    """Losses on fresh draws in nats per sequence, with errors clustered by document.

    Args:
        model: The model.
        post: q; `None` for a decoder without thoughts, whose losses are exact.
        batch: The sequences.
        draws: S.
    """
    mode: Any = "prior" if post is None else "oracle"
    scores = evaluate(model, post, batch, draws if post else 2, mode=mode, controls=False)
    out = {"kl_per_sequence": float(scores["kl"].mean())}
    for name in ("elbo", "iw"):
        loss = clustered_mean(losses(scores, f"ppl_{name}"), documents_of(scores))
        out |= {f"{name}_loss": loss.value, f"{name}_loss_error": loss.error}
    return out


def own_draw_loss(post: Posterior) -> float:
    """What a loop on one draw prints of its own draw, nats per sequence: no bound."""
    assert post.own_draw_elbo is not None
    return -float(post.own_draw_elbo.double().mean())


def training_gflops(config: FitConfig) -> float:
    """Matrix products of a whole fit, as `ltm-pyro cost` counts them; guide and prior left out."""
    cost, tokens = cost_report(config), config.batch_size * config.model.seq_len
    thinking = round(config.steps * (1 - config.slow.thoughts_start))
    return tokens * (config.steps * cost.flops_slow_step + thinking * cost.flops_fast_loop) / 1e9


def exact_loss(corpus: Any, batch: Batch) -> float:
    """The corpus's own -log p(x), nats per sequence; `nan` for text, whose truth is not known."""
    exact = getattr(corpus, "log_likelihood", None)
    return float("nan") if exact is None else -float(exact(batch).mean())


def over_seeds(table: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean over seeds of a column, with the standard error of that mean (`nan` for one seed)."""
    groups = table.groupby(by, sort=False)[column]
    out = groups.agg(["mean", "std", "count"]).reset_index()
    out["error"] = out["std"] / np.sqrt(out["count"])
    return out


def clear(value: float, error: float) -> bool:
    """Whether a difference is more than two of its errors from 0."""
    return bool(np.isfinite(error)) and abs(value) > 2 * error


def with_errors(table: pd.DataFrame, by: list[str], columns: dict[str, str]) -> str:
    """A table of means +- their standard errors over seeds, in Markdown.

    Args:
        table: One row or more per seed.
        by: What its rows are told apart by.
        columns: Heading by name of the column.
    """
    groups = table.groupby(by, sort=False)[list(columns)]
    mean, error = groups.mean(), groups.sem()
    heads = [*(name.rpartition(".")[2].replace("_", " ") for name in by), *columns.values()]
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(by) + len(columns)) + "|")
    for (key, values), errors in zip(mean.iterrows(), error.to_numpy(), strict=True):
        parts = key if isinstance(key, tuple) else (key,)
        names = [f"{part:g}" if isinstance(part, float) else str(part) for part in parts]
        cells = [_rounded(v, e) for v, e in zip(values, errors, strict=True)]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    return "\n".join(lines)


def _rounded(value: float, error: float) -> str:
    """A number with its error; alone where there is none, or where seeds cannot change it."""
    if np.isnan(value):
        return ""
    if error > 0:
        return f"{value:.2f} ± {error:.2f}"
    return f"{value:g}" if float(value).is_integer() else f"{value:.2f}"


def seeds_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval by Student's t (`nan` for one seed)."""
    array = np.asarray(list(values), dtype=float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(half)
