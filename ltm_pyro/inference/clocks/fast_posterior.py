"""The fast clock alone: the posterior of sequences under a model that stays as it is."""

from __future__ import annotations

from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ltm_pyro.checks import QUIET_SECONDS
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import meet, nested
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.fast import FastResult, local_optimizer
from ltm_pyro.inference.inputs import Sequences, batch_of
from ltm_pyro.inference.non_finite import tell_non_finite
from ltm_pyro.inference.objectives import describe
from ltm_pyro.inference.posterior import Posterior, fitted_posterior
from ltm_pyro.random import Stream, derive_seed

if TYPE_CHECKING:
    from ltm_pyro.inference.clocks.svi import DualRateSVI


def fast_posterior(
    svi: DualRateSVI,
    batch: Sequences,
    steps: int | None,
    *,
    seed: int | None,
    warm_start: bool,
    progress: bool,
) -> Posterior:
    """What `DualRateSVI.infer` returns, and raises; arguments as there."""
    batch = batch_of(batch, svi.tokenizer)
    if steps is not None and steps < 0:
        raise InputError(f"steps is {steps}: must be 0 or more")
    if warm_start and svi.parallel.size > 1:
        raise InputError(
            "infer(warm_start=True) needs stored rows, and each process has its own alone: "
            "load the run in one process"
        )
    batch = batch.to(svi.model.device)
    meet(svi.model, batch)
    noise = derive_seed(svi.seed if seed is None else seed, Stream.FAST)
    fast = svi.fast if steps is None else replace(svi.fast, steps=index(steps))
    store = svi.store if warm_start else None

    result: FastResult | None = None

    def fit(rows: Batch) -> dict[str, Tensor]:
        nonlocal result
        result, _ = svi.fast_loop(
            rows, fast, noise, store=store, record=True, after_step=bar.update
        )
        return {**svi.guide.rows(), **result.columns()}

    # Within another public function, that one's bar is the one to watch.
    shown = progress and svi.parallel.is_rank_0 and not nested()
    parts = svi.execution.parts_of(batch, slice(0, len(batch)))
    bar = tqdm(
        total=fast.steps * len(parts), desc="infer", unit="step", delay=QUIET_SECONDS,
        leave=False, disable=not shown,
    )  # fmt: skip
    with bar, svi.execution.computing(svi.model):
        fitted = svi.execution.by_rows(batch, fit)
    trace, own = result.of_columns(fitted) if result is not None else (None, None)
    svi.guide.reset(batch)
    svi.guide.load_rows(fitted)
    with torch.no_grad():  # a learned prior as it stands now
        prior = svi.model.prior()
    try:
        return fitted_posterior(
            svi.guide,
            prior,
            batch,
            trace=trace,
            own_draw_elbo=own,
            optimizer=local_optimizer(svi.guide, fast).name,
            objective=describe(svi.elbo),
            objective_kl=svi.slow_objective.kl_estimator,
        )
    except (RuntimeError, ValueError) as error:
        tell_non_finite(error, svi.guide, batch)
        raise
