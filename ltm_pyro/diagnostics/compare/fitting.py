"""One guide's answer for the compared sequences: trained, fitted and scored within its budget.

The budget counts decoder evaluations: one is log p(x_i | z_i) of one sequence at one draw, with its
gradient. It is the unit in which families with unlike parameters can be given the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch, TrainingData
from ltm_pyro.diagnostics.bounds import evaluate
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
    """What all guides of one comparison share; see `compare`.

    Raises:
        InputError: naming the setting that cannot be used.
    """

    fast: Fast
    slow: Slow
    elbo: Objective
    budget: int
    draws: int
    training_share: float
    train: TrainingData | None
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

    def seed_of(self, restart: int) -> int:
        """Of the start, the training and the fast loop of one independent fit."""
        return self.seed if restart == 0 else derive_seed(self.seed, Stream.INITIAL, 1 + restart)


@dataclass(frozen=True)
class Candidate:
    """The guide of the first fit, and what makes another from a seed, with a start of its own.

    Nothing does for a guide that was given, whose shared parameters are as they are.
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


@dataclass(frozen=True)
class Plan:
    """How a guide spends its budget.

    In slow steps on the shared parameters, T_fast within each, and T_fast of the local fit.
    """

    training_steps: int
    training_fast_steps: int
    local_steps: int


def fit_and_score(
    label: str,
    candidate: Candidate,
    model: LatentModel,
    batch: Batch,
    sampled: Batch,
    settings: Settings,
) -> Fit:
    """All fits of one guide, scored on the same draws; the longer loop is for `sampled` alone."""
    candidate.guide.reset(batch)
    shares = bool(candidate.guide.shared_parameters())
    another = candidate.another if shares else None
    posts, scores, gaps, spent, seconds = [], [], {}, np.zeros(2), 0.0
    for restart in range(1 if another is None else settings.restarts):
        began = time.perf_counter()
        seed = settings.seed_of(restart)
        guide = another(seed) if another is not None and restart else candidate.guide
        start = settings.elbo.evaluations
        plan = _train(guide, candidate.another is None, model, batch, seed, settings)
        training = settings.elbo.evaluations - start
        svi = clock(model, guide, settings, plan.local_steps, seed)
        posts.append(svi.infer(batch))
        seconds += time.perf_counter() - began
        spent += training, settings.elbo.evaluations - start - training
        scores.append(_scores(model, posts[-1], batch, settings))
        if not restart and settings.gaps and posts[0].has_density and guide.local_parameters():
            gaps = _longer_run(svi, plan, sampled, scores[0], settings)
    training, local = (spent / (len(posts) * len(batch))).tolist()
    facts = {
        "family": candidate.guide.family,
        "kl_estimator": posts[0].kl_estimator,
        "fits": len(posts),
        "shares_parameters": shares,
        "decoder_evaluations": training + local,
        "training_evaluations": training,
        "local_evaluations": local,
        "local_steps": plan.local_steps,
        "training_steps": plan.training_steps,
        "seconds": seconds / len(posts),
    }
    return Fit(label, posts[0], _over_fits(scores, settings.restarts).assign(gaps), facts)


def clock(
    model: LatentModel, guide: LocalGuide, settings: Settings, steps: int, seed: int
) -> DualRateSVI:
    """The two clocks of one fit, with `steps` fast steps."""
    fast = replace(settings.fast, steps=steps)
    return DualRateSVI(model, guide, fast, settings.slow, elbo=settings.elbo, seed=seed)


def _train(
    guide: LocalGuide, given: bool, model: LatentModel, batch: Batch, seed: int, settings: Settings
) -> Plan:
    """Trains the shared parameters, unless given; returns how the budget was divided."""
    guide.reset(batch)
    if given:
        steps = settings.budget // settings.elbo.particles if guide.local_parameters() else 0
        return Plan(0, 0, steps)
    source = batch if settings.train is None else settings.train
    size = min(TRAINING_BATCH, len(source) if isinstance(source, Batch) else TRAINING_BATCH)
    plan = _plan(guide, len(batch), size, settings)
    if plan.training_steps:
        svi = clock(model, guide, settings, plan.training_fast_steps, seed)
        svi.fit_guide(source, plan.training_steps, size, progress=False)
    return plan


def _plan(guide: LocalGuide, rows: int, batch_size: int, settings: Settings) -> Plan:
    """Divides the budget for `rows` compared sequences between shared and local parameters.

    A family without shared parameters spends all of it on its fast loop, one without local
    parameters all of it on training; the others the `training_share` of it on training.
    """
    local, shared = bool(guide.local_parameters()), bool(guide.shared_parameters())
    total, particles = settings.budget * rows, settings.elbo.particles
    steps, inner, spent = 0, 0, 0
    if shared:
        inner = TRAINING_FAST_STEPS if local else 0
        passes = inner + 1 + (type(guide).shared_loss is not LocalGuide.shared_loss)
        each = batch_size * particles * passes
        steps = int((settings.training_share if local else 1.0) * total) // each
        spent = steps * each
        if not steps:
            raise _too_small(guide, settings.budget, -(-each // rows))
    local_steps = (total - spent) // (rows * particles) if local else 0
    if local and not local_steps:
        raise _too_small(guide, settings.budget, 2 * particles)
    return Plan(steps, inner, local_steps)


def _too_small(guide: LocalGuide, budget: int, least: int) -> InputError:
    return InputError(
        f"a budget of {budget} decoder evaluations per sequence does not pay for one step of "
        f"{guide.family!r}: give at least {least}, or more sequences"
    )


def _scores(model: LatentModel, post: Posterior, batch: Batch, settings: Settings) -> xr.Dataset:
    scores = evaluate(model, post, batch, settings.draws, controls=False, seed=settings.seed)
    return scores.reset_coords(drop=True)


def _over_fits(scores: list[xr.Dataset], most: int) -> xr.Dataset:
    """Means over the fits, and each fit's own bounds, `nan` up to `most` fits."""
    fits = xr.concat([each[list(SCORES)].drop_attrs() for each in scores], "fit", join="exact")
    out = fits.mean("fit", skipna=False)
    for name in SCORES:
        if name.endswith("_se"):
            out[name] = np.sqrt((fits[name] ** 2).sum("fit", skipna=False)) / len(scores)
    each = fits[list(BETWEEN_FITS)].rename({name: f"fit_{name}" for name in BETWEEN_FITS})
    return out.assign(each.pad(fit=(0, most - len(scores)), constant_values=np.nan))


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
