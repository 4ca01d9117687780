"""Log evidence log p(x) per sequence: bounds from below, and a bracket where both sides exist.

    importance_bound    log mean_s p(x, z_s) / q(z_s)            <= log p(x) in expectation
    annealed_bound      the same with annealing between q and p  <= log p(x) in expectation, tighter
    evidence_bracket    and from an exact posterior draw back    >= log p(x) in expectation

An exact posterior draw is at hand where the model itself wrote the sequences from known thoughts
(bidirectional Monte Carlo: Grosse, Ghahramani & Adams 2015, arXiv 1511.02543). A bracket always
anneals from the prior. From a guide that covers one mode of several, both directions agree on the
mass of that mode: an exact draw from it goes back to the guide with the weights of a posterior
that has no other. Such a bracket is narrow, its errors small, and its upper side below log p(x).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ltm_pyro.checks import one_of
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import Likelihoods, score_terms
from ltm_pyro.diagnostics.estimates import khat_threshold, log_mean, provenance, sequence_coords
from ltm_pyro.diagnostics.psis import MIN_DRAWS, khat_error, pareto_khat, tail_error
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.mcmc.annealing import Annealer, fixed, refine, rungs_needed
from ltm_pyro.inference.mcmc.target import check_count, setting
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.simulation import Simulated
from ltm_pyro.random import Stream, derive_seed, seeded

Columns = dict[str, tuple[Any, str]]
"""Values (B,) and their units, by name."""

SCHEDULES = ("adaptive", "sigmoid", "linear")
WIDE = 1.0
"""Nats between the two sides of a bracket above which it is flagged."""

FEW_WEIGHTS = 0.25
"""Share of chains, as effective sample size of their weights, below which a bound is flagged."""


@door
def importance_bound(
    model: LatentModel,
    post: Posterior,
    batch: Batch,
    draws: int = 1000,
    *,
    rows: int = 512,
    seed: int = 0,
) -> xr.Dataset:
    """The importance-weighted bound from many draws, in pieces so that memory stays small.

    Args:
        model: Prior and likelihood.
        post: q for the sequences of `batch`, in the same order.
        batch: B sequences.
        draws: S, fresh draws per sequence; `psis.MIN_DRAWS` or more for a k-hat. As many others
            are drawn to judge them by.
        rows: Draws times sequences scored together: bounds memory, whatever S.
        seed: Of the draws.

    Returns:
        Dataset over `sequence`: `iw_bound`, and `khat` as `evaluate` has them from as many draws;
        `iw_bound_se` in nats; `ess`, the weights' effective number; `khat_judge`, the k-hat of as
        many other draws, and `reliable`, whether that is below its limit at S draws. To judge on
        the draws that estimate would keep the lucky ones. `iw_bound_se` is the larger of the
        jackknife's error (`evaluate`'s) and of that which a Pareto tail of the larger k-hat, plus
        its own error, implies, so that it covers for what is called reliable. Where it is not, the
        bound still is one, but it is loose and its standard error too small; the attribute `flags`
        says so.

    Raises:
        InputError: for too few draws, a point mass, or a posterior of other sequences.
    """
    check_count("draws", draws, 2, "since the standard error compares them")
    check_count("rows", rows, 1, "draws times sequences")
    if not post.has_density:
        raise InputError(
            f"a {post.family!r} guide is a point mass: importance weights need a density"
        )
    with setting(model, batch, post) as place:
        likelihoods = Likelihoods(model, place.batch, at_once=rows)
        q, prior = post.distribution, place.prior
        log_weights, others = (
            score_terms(likelihoods, q, prior, draws, seed, other=other).log_weights.cpu()
            for other in (False, True)
        )
    bound = log_mean(log_weights)
    weights = log_weights.numpy()
    khat, khat_judge = pareto_khat(weights), pareto_khat(others.numpy())
    limit = khat_threshold(draws)
    # A k-hat of S draws is off by about (1 + k) / sqrt(tail), and a tail that looks light by luck
    # is what an error must allow for.
    largest = np.fmax(khat, khat_judge)
    error = np.fmax(bound.error.numpy(), tail_error(weights, largest + khat_error(largest, draws)))
    columns = {
        "iw_bound": (bound.value, "nats"),
        "iw_bound_se": (error, "nats"),
        "ess": (bound.ess, "draws"),
        "khat": (khat, "1"),
        "khat_judge": (khat_judge, "1"),
        "reliable": (khat_judge <= limit, "1"),
    }
    data = _dataset(batch, columns, draws=draws, seed=seed, guide=post.family, khat_limit=limit)
    data.attrs["flags"] = _unreliable(data, draws, limit)
    return data


def _unreliable(data: xr.Dataset, draws: int, limit: float) -> str:
    """What to say of the sequences that are not called reliable; empty where all are."""
    reliable = data["reliable"].values
    if reliable.all():
        return ""
    if draws < MIN_DRAWS:
        return (
            f"with {draws} draws no k-hat is judged, and nothing is called reliable: give "
            f"{MIN_DRAWS} or more"
        )
    return (
        f"{int((~reliable).sum())} of {len(reliable)} sequences have k-hat above {limit:.2f} on "
        f"other draws (ids {_some(data, ~reliable)}): their bound is loose and its standard error "
        "too small; use annealed_bound"
    )


@door
def annealed_bound(
    model: LatentModel,
    batch: Batch,
    *,
    start: Posterior | None = None,
    chains: int = 32,
    rungs: int | None = None,
    schedule: str = "adaptive",
    max_leapfrog: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Annealed importance sampling: a lower bound on log p(x) in expectation (Neal 2001).

    Chains walk by HMC from `start` to p(z | x). Pilot runs with random numbers of their own choose
    temperatures, preconditioners and step sizes, which are then frozen.

    Args:
        model: Prior and likelihood; its weights are neither changed nor differentiated.
        batch: B sequences.
        start: A guide's posterior for these sequences, or `None` for the prior. The closer it is,
            the fewer rungs are needed. What a guide misses, a mode for one, the bound misses too,
            and its standard error does not show it: it stays a lower bound, too low by that mass.
        chains: Independent chains per sequence whose weights are averaged.
        rungs: Temperatures; by default as many as the pilot finds the way to be long.
        schedule: `adaptive`, each sequence's rungs equally far apart as weights count; `sigmoid`
            or `linear`, the same temperatures for all.
        max_leapfrog: Gradients per transition at most.
        seed: The same seed gives the same answer; torch's global generator is left alone.
        progress: Show a progress bar.

    Returns:
        Dataset over `sequence`: `lower`, `lower_se` in nats, and `lower_ess`, the effective number
        of the chains' weights.

    Raises:
        InputError: for a bad option, or a start that is a point mass or of other sequences.
    """
    options = (chains, rungs, schedule, max_leapfrog, seed, progress)
    return _anneal(model, batch, start, None, *options)


@door
def evidence_bracket(
    model: LatentModel,
    simulated: Simulated,
    *,
    chains: int = 32,
    rungs: int | None = None,
    schedule: str = "adaptive",
    max_leapfrog: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Log p(x) from both sides, on sequences that the model wrote (Grosse et al. 2015).

    Chains walk between the prior, which misses nothing, and p(z | x).

    Args:
        model: The model that wrote them.
        simulated: Of `simulate(model, n)`: sequences, and the thoughts they were made from.
        chains: As in `annealed_bound`, in each direction.
        rungs: As there.
        schedule: As there.
        max_leapfrog: As there.
        seed: As there.
        progress: As there.

    Returns:
        Dataset over `sequence`, nats: `lower`, `lower_se`, `upper`, `upper_se`, `width` (upper
        minus lower), and `lower_ess`, `upper_ess`. Each side is a bound in expectation, so with
        few chains `width` can be a little below 0. `upper_se` is given the one exact draw that all
        chains of a sequence go back from.

    Raises:
        InputError: as in `annealed_bound`; or if there is not one thought per sequence.
    """
    shape = (len(simulated.batch), *model.thought_shape)
    if simulated.z.shape != shape:
        raise InputError(
            f"simulated.z is {tuple(simulated.z.shape)}: must be {shape}, the thoughts that each "
            "sequence was made from"
        )
    options = (chains, rungs, schedule, max_leapfrog, seed, progress)
    return _anneal(model, simulated.batch, None, simulated.z, *options)


def _anneal(
    model: LatentModel,
    batch: Batch,
    start: Posterior | None,
    exact: Tensor | None,
    chains: int,
    rungs: int | None,
    schedule: str,
    max_leapfrog: int,
    seed: int,
    progress: bool,
) -> xr.Dataset:
    """One direction, or both where exact draws (B, K, D) are given."""
    one_of("schedule", schedule, SCHEDULES)
    check_count("chains", chains, 2, "since the standard error compares them")
    check_count("max_leapfrog", max_leapfrog, 1, "gradients per transition")
    if rungs is not None:
        check_count("rungs", rungs, 2, "temperatures between the start and the posterior")

    def random(purpose: int) -> Any:
        return seeded(derive_seed(seed, Stream.MCMC, purpose), model.device)

    with setting(model, batch, start) as place:
        with random(1):
            annealer = Annealer(place, max_leapfrog)
            pilot = annealer.pilot()
            n = rungs_needed(pilot) if rungs is None else rungs
            adaptive = schedule == "adaptive"
            ladder = refine(pilot, n) if adaptive else fixed(schedule, pilot, n)
        steps = len(ladder.beta) - 1
        length = steps * (1 if exact is None else 2)
        with tqdm(total=length, disable=not progress, desc="anneal", unit="rung") as bar:
            with random(2):
                columns = _side("lower", annealer.forward(ladder, chains, bar.update))
            if exact is not None:
                with random(3):
                    z = exact.to(place.scale).flatten(-2)
                    back = annealer.backward(ladder, z, chains, bar.update)
                columns |= _side("upper", -back, sign=-1.0)
                columns["width"] = (columns["upper"][0] - columns["lower"][0], "nats")
    family = "prior" if start is None else start.family
    data = _dataset(batch, columns, start=family, chains=chains, rungs=steps, seed=seed)
    cost = annealer.pilot_cost + chains * annealer.target.evaluations
    data.attrs["gradient_evaluations_per_sequence"] = cost
    data.attrs["schedule"] = schedule
    data.attrs["flags"] = "; ".join(_annealing_flags(data, chains))
    return data


def _side(name: str, log_weights: Tensor, sign: float = 1.0) -> Columns:
    """One side of the evidence, from the log weights (C, B) of its chains."""
    bound = log_mean(log_weights.cpu())
    return {
        name: (sign * bound.value, "nats"),
        f"{name}_se": (bound.error, "nats"),
        f"{name}_ess": (bound.ess, "chains"),
    }


def _annealing_flags(data: xr.Dataset, chains: int) -> list[str]:
    flags, n = [], data.sizes["sequence"]
    weights = [data[name].values for name in ("lower_ess", "upper_ess") if name in data]
    weak = np.min(weights, axis=0) < FEW_WEIGHTS * chains
    if weak.any():
        flags.append(
            f"{int(weak.sum())} of {n} sequences rest on few chains' weights (ids "
            f"{_some(data, weak)}): their standard errors are too small; more rungs"
        )
    wide = data["width"].values > WIDE if "width" in data else np.zeros(n, bool)
    if wide.any():
        flags.append(
            f"{int(wide.sum())} of {n} brackets are wider than {WIDE:g} nat (ids "
            f"{_some(data, wide)}): more rungs or chains"
        )
    return flags


def _dataset(batch: Batch, columns: Columns, **attrs: Any) -> xr.Dataset:
    """Columns over `sequence`, by their units."""
    return xr.Dataset(
        {n: ("sequence", np.asarray(v), {"units": units}) for n, (v, units) in columns.items()},
        coords=sequence_coords(batch, columns),
        attrs=provenance(batch) | attrs,
    )


def _some(data: xr.Dataset, rows: np.ndarray) -> str:
    ids = data["sequence"].values[rows].tolist()
    return ", ".join(str(i) for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
