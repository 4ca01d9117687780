"""Reference draws from p(z | x): HMC, MALA and unadjusted Langevin, batched over sequences."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from ltm_pyro.checks import finite_number, one_of
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.mcmc.draws import MCMCDraws
from ltm_pyro.inference.mcmc.mover import KERNELS, MASSES, Mover
from ltm_pyro.inference.mcmc.target import check_count, setting
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Stream, derive_seed, seeded

MAX_LEAPFROG = 32
MIN_DRAWS = 20
MIN_WARMUP = 50


@door
def sample_posterior(
    model: LatentModel,
    batch: Batch,
    kernel: str = "hmc",
    *,
    start: Posterior | None = None,
    chains: int = 4,
    warmup: int = 400,
    draws: int = 1000,
    mass: str = "auto",
    step_size: float | None = None,
    max_leapfrog: int = MAX_LEAPFROG,
    seed: int = 0,
    progress: bool = False,
) -> MCMCDraws:
    """Draws from p(z | x) of every sequence, with one accept decision per chain and sequence.

    Chains start at independent draws of `start` and are preconditioned with its scale. During
    warmup, and never after it, step size (dual averaging) and mass are adapted per sequence, from
    all its chains together.

    Args:
        model: Prior and likelihood; its weights are neither changed nor differentiated.
        batch: B sequences.
        kernel: `hmc`; `mala`, one leapfrog step per draw; or `ula`, MALA without the accept
            decision, the ablation of Kong et al. (2025): biased, and labelled so.
        start: A guide's posterior for these sequences, or `None` for the prior.
        chains: Independent starts per sequence, at least 2.
        warmup: Steps per chain that adapt and are not kept.
        draws: S, steps per chain that are kept.
        mass: `diagonal` or `dense`, learned in warmup; `auto`, dense up to 64
            dimensions; or `start`, the start's variances as they are.
        step_size: In units of the mass's scale; adapted by default.
        max_leapfrog: Gradients per HMC draw at most.
        seed: The same seed gives the same draws; torch's global generator is left alone.
        progress: Show a progress bar.

    Raises:
        InputError: for a bad option, or a start that does not belong to the batch.
    """
    options = {"chains": chains, "warmup": warmup, "draws": draws, "mass": mass}
    check_options(kernel, {**options, "step_size": step_size, "max_leapfrog": max_leapfrog})
    how = KERNELS[kernel]
    with (
        setting(model, batch, start) as place,
        seeded(derive_seed(seed, Stream.MCMC), model.device),
        tqdm(total=warmup + draws, disable=not progress, desc=kernel, unit="step") as bar,
    ):
        mover = Mover(place, how, chains, step_size, max_leapfrog)
        mover.warm_up(warmup, mass, step_size is None, bar.update)
        kept, accepts = [], []
        for _ in range(draws):
            accepts.append(mover.step(warm=True).accept)
            kept.append(mover.state)
            bar.update()
    return MCMCDraws(
        z=torch.stack([s.z for s in kept], 1).unflatten(-1, model.thought_shape),
        log_joint=torch.stack([s.terms[0] for s in kept], 1),
        ids=place.batch.ids,
        kernel=kernel,
        start="prior" if start is None else start.family,
        accept=torch.stack(accepts).mean((0, 1)),
        step_size=mover.step_size,
        gradient_evaluations=chains * mover.target.evaluations,
        warmup=warmup,
        seed=seed,
        mass=mass,
    )


def check_options(kernel: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `sample_posterior` by name, what is left out at its default; known to do."""
    parameters = inspect.signature(sample_posterior).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | dict(options)
    one_of("kernel", kernel, KERNELS)
    one_of("mass", given["mass"], MASSES)
    check_count("chains", given["chains"], 2, "since R-hat compares independent starts")
    check_count("draws", given["draws"], MIN_DRAWS, "since R-hat compares halves of each chain")
    check_count("max_leapfrog", given["max_leapfrog"], 1, "gradients per draw")
    least, why = MIN_WARMUP, "to adapt the step size, or give step_size"
    if given["step_size"] is not None:
        least, why = 0, "steps"
        if finite_number("step_size", given["step_size"]) <= 0:
            raise InputError(f"step_size is {given['step_size']}: must be a number above 0")
    check_count("warmup", given["warmup"], least, why)
    return given
