"""`compare`: fit each guide family on the same sequences at the same cost, and score them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.infer import ELBO
from tqdm.auto import tqdm

import ltm_pyro
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.compare.budget import Plan, plan_budget
from ltm_pyro.diagnostics.compare.reference import against_reference
from ltm_pyro.diagnostics.compare.table import Comparison, add_summary
from ltm_pyro.diagnostics.labels import corpus_attrs
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.inference.mcmc import KERNELS, MCMCDraws, sample_posterior
from ltm_pyro.inference.objectives import Objective, as_objective, build_objective, describe
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.random import Stream, derive_seed, seeded
from ltm_pyro.inference.training_data import TrainingData
from ltm_pyro.models.base import LatentModel, exact_evidence
from ltm_pyro.models.doors import door
from ltm_pyro.models.latent_thought import LatentThoughtModel

SCORES = ("elbo", "elbo_se", "iw_bound", "iw_bound_se", "khat", "kl", "nll_given_z", "log_joint")
LONGER = 2
"""The truncation gap is what a fast loop with this many times the steps gains."""
TRAINING_BATCH = 16
TRAINING_FAST_STEPS = 4


@dataclass(frozen=True)
class Settings:
    """What all guides of one comparison share."""

    fast: Fast
    slow: Slow
    elbo: Objective
    budget: int
    draws: int
    training_share: float
    train: TrainingData | Batch | None
    gaps: bool
    seed: int

    @property
    def particles(self) -> int:
        """Draws of the objective per step."""
        return self.elbo.particles


@dataclass(frozen=True)
class Fit:
    """One guide's answer for the compared sequences."""

    label: str
    post: Posterior
    columns: xr.Dataset
    facts: dict[str, Any]


@door
def compare(
    model: LatentModel,
    batch: Batch,
    guides: Sequence[str | LocalGuide],
    *,
    options: dict[str, dict[str, Any]] | None = None,
    budget: int = 64,
    draws: int = 64,
    fast: Fast | None = None,
    slow: Slow | None = None,
    elbo: ELBO | str = "elbo",
    train: TrainingData | Batch | None = None,
    training_share: float = 0.5,
    reference: str | None = None,
    subset: int | None = None,
    reference_options: dict[str, Any] | None = None,
    compile_reference: bool = False,
    gaps: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Compares guide families on the same sequences, with the decoder fixed.

    Every guide gets the same number of decoder evaluations. A family with shared parameters (an
    encoder, a flow's network) trains them out of its own budget, so nothing is free; to compare
    guides that were trained elsewhere, give the guide objects instead of names.

    Since log p(x) is the same for all, a difference of ELBOs is exactly a difference of
    KL(q || p(z | x)): how much closer one family is to the posterior.

    Args:
        model: Prior and decoder; left as it is.
        batch: The sequences, at least 2.
        guides: Names of families, or guides. The first is the baseline of the differences.
        options: Options of the families by name, e.g. `{"low_rank": {"rank": 4}}`.
        budget: Decoder evaluations per sequence for each guide, training included.
        draws: S, fresh draws per sequence in the scores.
        fast: The fast clock, but for its steps, which the budget decides.
        slow: The slow clock that trains shared parameters.
        elbo: The objective, as in `DualRateSVI`; with P particles a fast step costs P evaluations.
        train: Where shared parameters are trained; the compared sequences themselves by default,
            which is legitimate for a bound but flatters amortised families.
        training_share: Of the budget, for families with both shared and local parameters.
        reference: `"hmc"` or `"mala"`: posterior draws, to hold the guides' means and scales
            against. Its cost is not part of the budget.
        subset: Sequences, evenly spread, for the costly parts: the reference and the longer fits
            of `gaps`. All by default.
        reference_options: Options of `sample_posterior`, e.g. `{"draws": 500}`.
        compile_reference: Compile the likelihood of a `LatentThoughtModel` for the chains; the fits
            are too short to earn the half minute that each shape of a batch costs.
        gaps: Also fit each guide for `LONGER` times its steps, to tell how much of the distance is
            due to the short loop. These fits are not part of the budget.
        seed: Of everything random.
        progress: Show a progress bar on stderr.

    Returns:
        A `Comparison`: print it, or take `.dataset`, `.frame`, `.to_csv(path)`;
        `ltm_pyro.plots.guide_comparison` draws it. Ctrl-C after the second guide returns what is
        done, with `.interrupted` set.

    Raises:
        InputError: for an unknown family, fewer than two guides or sequences, or a budget that does
            not pay for one step.
        NonFiniteError: if a guide's local parameters became NaN or infinite.
    """
    objective = as_objective(build_objective(elbo) if isinstance(elbo, str) else elbo)
    settings = Settings(
        fast or Fast(), slow or Slow(), objective, budget, draws, training_share, train, gaps, seed
    )
    _check(batch, guides, settings)
    if reference is not None and reference not in KERNELS:
        raise unknown_name("reference", reference, KERNELS)
    batch = batch.to(model.device)
    model.check(batch)
    sampled = _spread(batch, subset)
    candidates = _build(model, guides, options or {}, seed)
    fits: list[Fit] = []
    found: MCMCDraws | None = None
    interrupted = False
    try:
        for label, guide in (bar := tqdm(candidates.items(), disable=not progress, unit="guide")):
            bar.set_description(label)
            fits.append(_fit(label, guide, model, batch, sampled, settings))
        if reference is not None:
            start = _svi(model, build_guide("mean_field", model), settings, budget).infer(sampled)
            if compile_reference and isinstance(model, LatentThoughtModel):
                model.compile_fast_loop()
            found = sample_posterior(
                model,
                sampled,
                reference,
                start=start,
                seed=seed,
                progress=progress,
                **(reference_options or {}),
            )
    except KeyboardInterrupt:
        if len(fits) < 2:
            raise
        interrupted = True
    return Comparison(_collect(model, batch, fits, found, settings), interrupted)


def _check(batch: Batch, guides: Sequence[str | LocalGuide], settings: Settings) -> None:
    if isinstance(guides, str) or len(guides) < 2:
        raise InputError(f"guides is {guides!r}: give a list of at least two families")
    if len(batch) < 2:
        raise InputError("one sequence: a paired difference needs at least 2 for its error")
    if settings.budget < 1:
        raise InputError(f"budget is {settings.budget}: must be 1 or more decoder evaluations")
    if not 0 < settings.training_share < 1:
        raise InputError(f"training_share is {settings.training_share}: must be between 0 and 1")


def _build(
    model: LatentModel,
    guides: Sequence[str | LocalGuide],
    options: dict[str, dict[str, Any]],
    seed: int,
) -> dict[str, tuple[LocalGuide, bool]]:
    """Guides by label, and whether their shared parameters are still to be trained."""
    unused = set(options) - {g for g in guides if isinstance(g, str)}
    if unused:
        raise InputError(f"options for {sorted(unused)[0]!r}, which is not among the guides")
    out: dict[str, tuple[LocalGuide, bool]] = {}
    for given in guides:
        label = given if isinstance(given, str) else f"{given.family} (given)"
        if label in out:
            raise InputError(f"guide {label!r} is named twice: give each once")
        if isinstance(given, str):
            with seeded(derive_seed(seed, Stream.INITIAL, 1), model.device):
                out[label] = build_guide(given, model, **options.get(given, {})), True
        else:
            out[label] = given, False
    return out


def _fit(
    label: str,
    candidate: tuple[LocalGuide, bool],
    model: LatentModel,
    batch: Batch,
    sampled: Batch,
    settings: Settings,
) -> Fit:
    """Trains and fits one guide within the budget, and scores it on fresh draws."""
    guide, untrained = candidate
    began = time.perf_counter()
    start = settings.elbo.evaluations
    plan = _train(guide, model, batch, settings) if untrained else None
    training = settings.elbo.evaluations - start
    if plan is None:
        guide.reset(batch)
        steps = settings.budget // settings.particles if guide.local_parameters() else 0
        plan = Plan(0, 0, steps)
    svi = _svi(model, guide, settings, steps=plan.local_steps)
    post = svi.infer(batch)
    evaluations = settings.elbo.evaluations - start
    seconds = time.perf_counter() - began
    scores = _scores(model, post, batch, settings)
    columns = scores[list(SCORES)]
    if settings.gaps and post.has_density and guide.local_parameters():
        columns = columns.assign(_longer_run(svi, plan, sampled, scores, settings))
    facts = {
        "family": guide.family,
        "kl_estimator": post.kl_estimator,
        "decoder_evaluations": evaluations / len(batch),
        "training_evaluations": training / len(batch),
        "local_evaluations": (evaluations - training) / len(batch),
        "local_steps": plan.local_steps,
        "training_steps": plan.training_steps,
        "seconds": seconds,
    }
    return Fit(label, post, columns, facts)


def _spread(batch: Batch, count: int | None) -> Batch:
    """`count` of the sequences at even distances; all of them for `None`.

    Raises:
        InputError: if there are not as many.
    """
    if count is None:
        return batch
    if not 1 <= count <= len(batch):
        raise InputError(f"subset is {count}: must be from 1 to {len(batch)} sequences")
    return batch.select(
        torch.linspace(0, len(batch) - 1, count, device=batch.device).round().long()
    )


def _svi(model: LatentModel, guide: LocalGuide, settings: Settings, steps: int) -> DualRateSVI:
    fast = replace(settings.fast, steps=steps)
    return DualRateSVI(model, guide, fast, settings.slow, elbo=settings.elbo, seed=settings.seed)


def _train(guide: LocalGuide, model: LatentModel, batch: Batch, settings: Settings) -> Plan:
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
        svi = _svi(model, guide, settings, steps=plan.training_fast_steps)
        svi.fit_guide(source, plan.training_steps, size, progress=False)
    return plan


def _scores(model: LatentModel, post: Posterior, batch: Batch, settings: Settings) -> xr.Dataset:
    return evaluate(model, post, batch, settings.draws, controls=False, seed=settings.seed)


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


def _collect(
    model: LatentModel,
    batch: Batch,
    fits: list[Fit],
    reference: MCMCDraws | None,
    settings: Settings,
) -> xr.Dataset:
    """One Dataset over guide and sequence, with the summary per guide."""
    columns = [fit.columns.drop_attrs() for fit in fits]
    data = xr.concat(columns, dim="guide", join="exact", data_vars="all", coords="minimal")
    data = data.assign_coords(guide=[fit.label for fit in fits])
    data["n_tokens"] = ("sequence", batch.n_tokens.cpu().numpy())
    for name in fits[0].facts:
        data[name] = ("guide", [fit.facts[name] for fit in fits])
    with torch.no_grad():
        log_evidence = exact_evidence(model, batch)
    if log_evidence is not None:
        data["log_evidence"] = ("sequence", log_evidence.double().cpu().numpy())
    if reference is not None:
        data = data.assign(against_reference(reference, [fit.post for fit in fits], settings.seed))
    data.attrs = {
        "baseline": fits[0].label,
        "budget": settings.budget,
        "draws": settings.draws,
        "seed": settings.seed,
        "objective": describe(settings.elbo),
        "particles": settings.particles,
        "fast_lr": settings.fast.lr,
        "shared_parameters_trained_on": "other sequences"
        if settings.train is not None
        else "the compared sequences themselves",
        "reference": "none" if reference is None else reference.kernel,
        **corpus_attrs(batch),
        "ltm_pyro_version": ltm_pyro.__version__,
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
    }
    return add_summary(data)
