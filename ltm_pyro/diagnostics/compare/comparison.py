"""`compare`: fit each guide family on the same sequences at the same cost, and score them alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import xarray as xr
from pyro.infer import ELBO
from tqdm.auto import tqdm

from ltm_pyro.checks import QUIET_SECONDS, whole_number
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch, TrainingData
from ltm_pyro.diagnostics.compare.fitting import Candidate, Fit, Settings, clock, fit_and_score
from ltm_pyro.diagnostics.compare.reference import against_reference, check_reference
from ltm_pyro.diagnostics.compare.summary import add_summary
from ltm_pyro.diagnostics.compare.table import Comparison
from ltm_pyro.diagnostics.estimates import provenance, sequence_coords
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError, shown, unknown_name
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.inference.mcmc import KERNELS, MCMCDraws, sample_posterior
from ltm_pyro.inference.objectives import as_objective, describe
from ltm_pyro.models.base import LatentModel, exact_evidence
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.random import Stream, derive_seed, seeded


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
    train: TrainingData | None = None,
    training_share: float = 0.5,
    restarts: int = 1,
    reference: str | None = None,
    subset: int | None = None,
    reference_options: dict[str, Any] | None = None,
    compile_reference: bool = False,
    gaps: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Compares guide families on the same sequences, with the decoder fixed.

    Every guide gets the same number of decoder evaluations. A family with shared parameters (an
    encoder, a flow's network) trains them out of its own budget, so nothing is free; to compare
    guides that were trained elsewhere, give the guide objects instead of names.

    Since log p(x) is the same for all, a difference of ELBOs is exactly a difference of
    KL(q || p(z | x)): how much closer one family is to the posterior.

    Errors are clustered by document; fewer than five effective ones allow no verdict. Another start
    of the training would give other shared parameters, so a single fit allows a verdict on "this
    fit of" a family; with `restarts` the error has the part between fits, and the verdict is on the
    family at this budget.

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
        restarts: Independent fits, each with a start, a training and a budget of its own, of
            every family that trains shared parameters; scores are means over them. Guides given
            as objects are as they are.
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
        progress: Show a progress bar on stderr, if it takes longer than a few seconds.

    Returns:
        A `Comparison`: print it, or take `.dataset`, `.frame`, `.to_csv(path)`;
        `ltm_pyro.plots.guide_comparison` draws it. Ctrl-C after the second guide returns what is
        done, with `.interrupted` set.

    Raises:
        InputError: naming the argument that cannot be used: an unknown family, fewer than two
            guides or sequences, a count that is none, or a budget that does not pay for one step.
        NonFiniteError: if a guide's local parameters became NaN or infinite.
    """
    objective = as_objective(elbo)
    _check(batch, guides, options, reference, reference_options)
    settings = Settings(
        fast or Fast(), slow or Slow(), objective, budget, draws, training_share, train, restarts,
        gaps, seed,
    )  # fmt: skip
    reals = math.prod(model.thought_shape)
    whole_number("draws", draws, bytes_each=8 * len(batch) * reals)
    batch = batch.to(model.device)
    model.check(batch)
    sampled = _spread(batch, subset)
    check_reference(reference or "hmc", reference_options or {}, len(sampled) * reals)
    candidates = _build(model, guides, options or {}, seed)
    fits: list[Fit] = []
    found: MCMCDraws | None = None
    interrupted = False
    bar = tqdm(total=len(candidates), disable=not progress, unit="guide", delay=QUIET_SECONDS)
    try:
        with bar:
            for label, candidate in candidates.items():
                bar.set_description(label, refresh=False)
                fits.append(fit_and_score(label, candidate, model, batch, sampled, settings))
                bar.update()
        if reference is not None:
            start = build_guide("mean_field", model)
            near = clock(model, start, settings, settings.budget, seed).infer(sampled)
            if compile_reference and isinstance(model, LatentThoughtModel):
                model.compile_fast_loop()
            given = {"start": near, "seed": seed, "progress": progress, **(reference_options or {})}
            found = sample_posterior(model, sampled, reference, **given)
    except KeyboardInterrupt:
        if len(fits) < 2:
            raise
        interrupted = True
    return Comparison(_collect(model, batch, fits, found, settings), interrupted)


def _check(
    batch: Batch,
    guides: Sequence[str | LocalGuide],
    options: dict[str, dict[str, Any]] | None,
    reference: str | None,
    reference_options: dict[str, Any] | None,
) -> None:
    """Refuses what is not there or of another kind."""
    if isinstance(guides, str) or not isinstance(guides, Sequence) or len(guides) < 2:
        raise InputError(f"guides is {shown(guides)}: give a list of at least two families")
    for guide in guides:
        if not isinstance(guide, str | LocalGuide):
            raise InputError(f"guides holds {shown(guide)}: give names of families, or guides")
    if len(batch) < 2:
        raise InputError(
            f"batch holds {len(batch)} sequences: a paired difference needs at least 2 for its "
            "error"
        )
    for name, given in (("options", options), ("reference_options", reference_options)):
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"{name} is {shown(given)}: give a dict")
    if reference is not None and reference not in KERNELS:
        raise unknown_name("reference", reference, KERNELS)


def _build(
    model: LatentModel,
    guides: Sequence[str | LocalGuide],
    options: dict[str, dict[str, Any]],
    seed: int,
) -> dict[str, Candidate]:
    """Candidates by label."""
    unused = set(options) - {g for g in guides if isinstance(g, str)}
    if unused:
        raise InputError(f"options for {shown(sorted(unused)[0])}, which is not among the guides")
    out: dict[str, Candidate] = {}
    for given in guides:
        if isinstance(given, LocalGuide):
            out[_free_label(given, out)] = Candidate(given, None)
            continue
        if given in out:
            raise InputError(f"guide {shown(given)} is named twice: give each once")
        another = partial(_start, given, model, options.get(given, {}))
        out[given] = Candidate(another(seed), another)
    return out


def _start(name: str, model: LatentModel, options: dict[str, Any], seed: int) -> LocalGuide:
    with seeded(derive_seed(seed, Stream.INITIAL, 1), model.device):
        return build_guide(name, model, **options)


def _free_label(guide: LocalGuide, taken: Mapping[str, object]) -> str:
    """What a given guide is called: its family, and a number where there are several."""
    family = guide.family
    labels = (f"{family} (given{f', {n}' if n > 1 else ''})" for n in itertools.count(1))
    return next(label for label in labels if label not in taken)


def _spread(batch: Batch, count: int | None) -> Batch:
    """`count` of the sequences at even distances; all of them for `None`."""
    if count is None:
        return batch
    count = whole_number("subset", count, 1, len(batch))
    rows = torch.linspace(0, len(batch) - 1, count, device=batch.device)
    return batch.select(rows.round().long())


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
    if batch.documents is not None:
        data = data.assign_coords(document=("sequence", batch.documents.cpu().numpy()))
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
        "restarts": settings.restarts,
        "seed": settings.seed,
        "objective": describe(settings.elbo),
        "particles": settings.elbo.particles,
        "fast_optimizer": settings.fast.optimizer,
        "fast_lr": settings.fast.lr,
        "shared_parameters_trained_on": "other sequences"
        if settings.train is not None
        else "the compared sequences themselves",
        "reference": "none" if reference is None else reference.kernel,
        **provenance(batch),
    }
    data = add_summary(data)
    return data.assign_coords(sequence_coords(batch, {*data.variables} - {"document"}))
