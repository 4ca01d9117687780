"""One guide's answer for the compared sequences: trained, fitted and scored within its budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.training_data import TrainingData
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.compare.budget import Plan, plan_budget
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide
from ltm_pyro.inference.objectives import Objective
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Stream, derive_seed

SCORES = ("elbo", "elbo_se", "iw_bound", "iw_bound_se", "khat", "kl", "nll_given_z", "log_joint")
BETWEEN_FITS = ("elbo", "iw_bound")
"""Scores that are kept for each independent fit: their spread is the error of training."""

LONGER = 2
"""The truncation gap is what a fast loop with this many times the steps gains."""
MOST_RESTARTS = 1000
TRAINING_BATCH = 16
TRAINING_FAST_STEPS = 4


@dataclass(frozen=True)
class Settings:
    """What all guides of one comparison share.

    Raises:
        InputError: naming the setting that cannot be used.
    """

    fast: Fast
    slow: Slow
    elbo: Objective
    budget: int
    draws: int
    training_share: float
    train: TrainingData | Batch | None
    restarts: int
    gaps: bool
    seed: int

    def __post_init__(self) -> None:
        whole_number("budget", self.budget, 1, MOST_COUNT)
        whole_number("draws", self.draws, 2, MOST_COUNT)
        whole_number("restarts", self.restarts, 1, MOST_RESTARTS)
        share, train = self.training_share, self.train
        if not 0 < share < 1:
            raise InputError(f"training_share is {shown(share)}: must be between 0 and 1")
        if not (train is None or isinstance(train, Batch) or hasattr(train, "training_batch")):
            raise InputError(f"train is {shown(train)}: give corpus.train, or a batch")

    @property
    def particles(self) -> int:
        """Draws of the objective per step."""
        return self.elbo.particles

    def seed_of(self, restart: int) -> int:
        """Of the start, the training and the fast loop of one independent fit."""
        return self.seed if restart == 0 else derive_seed(self.seed, Stream.INITIAL, 1 + restart)


@dataclass(frozen=True)
class Candidate:
    """A guide to compare.

    Attributes:
        guide: For the first fit.
        another: Makes another from a seed, with a start of its own; `None` for a guide that was
            given, whose shared parameters are as they are.
    """

    guide: LocalGuide
    another: Callable[[int], LocalGuide] | None


@dataclass(frozen=True)
class Fit:
    """One guide's answer for the compared sequences.

    Attributes:
        label: The guide's name in the comparison.
        post: Of its first fit.
        columns: Scores over `sequence`, means over the fits; `fit_elbo` and `fit_iw_bound` over
            `fit` and `sequence`.
        facts: What it cost, and by which estimator it was scored.
    """

    label: str
    post: Posterior
    columns: xr.Dataset
    facts: dict[str, Any]


def fit_and_score(
    label: str,
    candidate: Candidate,
    model: LatentModel,
    batch: Batch,
    sampled: Batch,
    settings: Settings,
    on_fit: Callable[[], object] = lambda: None,
) -> Fit:
    """All fits of one guide, scored on the same fresh draws.

    Args:
        label: The guide's name in the comparison.
        candidate: The guide.
        model: Prior and decoder.
        batch: The compared sequences.
        sampled: Those of them that the longer loop is run for.
        settings: Of the comparison.
        on_fit: Called after each fit.
    """
    began = time.perf_counter()
    shares = _shares_parameters(candidate.guide, batch)
    count = settings.restarts if shares and candidate.another is not None else 1
    posts, scores, gaps, spent = [], [], {}, np.zeros(2)
    seconds = 0.0
    for restart in range(count):
        seed = settings.seed_of(restart)
        guide = candidate.guide
        if restart and candidate.another is not None:
            guide = candidate.another(seed)
        svi, post, plan, evaluations = _fit(guide, candidate, model, batch, seed, settings)
        seconds += time.perf_counter() - began
        spent += evaluations
        posts.append(post)
        scores.append(_scores(model, post, batch, settings))
        if not restart and settings.gaps and post.has_density and guide.local_parameters():
            gaps = _longer_run(svi, plan, sampled, scores[0], settings)
        on_fit()
        began = time.perf_counter()
    training, local = (spent / (count * len(batch))).tolist()
    facts = {
        "family": candidate.guide.family,
        "kl_estimator": posts[0].kl_estimator,
        "fits": count,
        "shares_parameters": shares,
        "decoder_evaluations": training + local,
        "training_evaluations": training,
        "local_evaluations": local,
        "local_steps": plan.local_steps,
        "training_steps": plan.training_steps,
        "seconds": seconds / count,
    }
    columns = _over_fits(scores, settings.restarts).assign(gaps)
    return Fit(label, posts[0], columns, facts)


def _shares_parameters(guide: LocalGuide, batch: Batch) -> bool:
    guide.reset(batch)
    return bool(guide.shared_parameters())


def _fit(
    guide: LocalGuide,
    candidate: Candidate,
    model: LatentModel,
    batch: Batch,
    seed: int,
    settings: Settings,
) -> tuple[DualRateSVI, Posterior, Plan, tuple[int, int]]:
    """Trains and fits within the budget; also says what that cost, in decoder evaluations."""
    start = settings.elbo.evaluations
    if candidate.another is not None:
        plan = _train(guide, model, batch, seed, settings)
    else:
        guide.reset(batch)
        steps = settings.budget // settings.particles if guide.local_parameters() else 0
        plan = Plan(0, 0, steps)
    training = settings.elbo.evaluations - start
    svi = clock(model, guide, settings, plan.local_steps, seed)
    post = svi.infer(batch)
    return svi, post, plan, (training, settings.elbo.evaluations - start - training)


def clock(
    model: LatentModel, guide: LocalGuide, settings: Settings, steps: int, seed: int
) -> DualRateSVI:
    """The two clocks of one fit, with `steps` fast steps."""
    fast = replace(settings.fast, steps=steps)
    return DualRateSVI(model, guide, fast, settings.slow, elbo=settings.elbo, seed=seed)


def _train(
    guide: LocalGuide, model: LatentModel, batch: Batch, seed: int, settings: Settings
) -> Plan:
    """Trains the shared parameters; returns how the budget was divided."""
    guide.reset(batch)
    source = batch if settings.train is None else settings.train
    size = min(TRAINING_BATCH, len(source) if isinstance(source, Batch) else TRAINING_BATCH)
    plan = plan_budget(
        guide,
        per_sequence=settings.budget,
        rows=len(batch),
        batch_size=size,
        training_fast_steps=TRAINING_FAST_STEPS,
        training_share=settings.training_share,
        particles=settings.particles,
    )
    if plan.training_steps:
        svi = clock(model, guide, settings, plan.training_fast_steps, seed)
        svi.fit_guide(source, plan.training_steps, size, progress=False)
    return plan


def _scores(model: LatentModel, post: Posterior, batch: Batch, settings: Settings) -> xr.Dataset:
    scores = evaluate(model, post, batch, settings.draws, controls=False, seed=settings.seed)
    return scores.reset_coords(drop=True)


def _over_fits(scores: list[xr.Dataset], most: int) -> xr.Dataset:
    """Means over the fits, and each fit's own bounds, `nan` up to `most` fits."""
    columns: dict[str, Any] = {}
    for name in SCORES:
        values = np.stack([score[name].values for score in scores])
        if name.endswith("_se"):
            columns[name] = ("sequence", np.sqrt(np.square(values).sum(0)) / len(values))
        else:
            columns[name] = ("sequence", values.mean(0))
    for name in BETWEEN_FITS:
        values = np.full((most, scores[0].sizes["sequence"]), np.nan)
        values[: len(scores)] = [score[name].values for score in scores]
        columns[f"fit_{name}"] = (("fit", "sequence"), values)
    return xr.Dataset(columns, coords={"sequence": scores[0]["sequence"]})


def _longer_run(
    svi: DualRateSVI, plan: Plan, sampled: Batch, scores: xr.Dataset, settings: Settings
) -> dict[str, Any]:
    """The gap that a longer fast loop closes, per sequence; `nan` for those not in the subset."""
    post = svi.infer(sampled, LONGER * plan.local_steps)
    longer = _scores(svi.model, post, sampled, settings).reindex(sequence=scores["sequence"])
    return {
        "longer_elbo": longer["elbo"],
        "truncation_gap": longer["elbo"] - scores["elbo"],
        "truncation_gap_se": np.hypot(longer["elbo_se"], scores["elbo_se"]),
    }
