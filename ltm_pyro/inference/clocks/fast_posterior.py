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
from ltm_pyro.data.inputs import Sequences, batch_of
from ltm_pyro.doors import meet, nested
from ltm_pyro.engine.rows.finite import tell_non_finite
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.fast import local_optimizer, mean_report, row_norms
from ltm_pyro.inference.clocks.schedules import learning_rate
from ltm_pyro.inference.objectives import Terms, describe, kl_estimator
from ltm_pyro.inference.posterior import TRACED, FastTrace, Posterior
from ltm_pyro.random import Stream, derive_seed

if TYPE_CHECKING:
    from ltm_pyro.inference.clocks.fitting import Fitting

_OWN = "own_draw_elbo"


def fast_posterior(
    svi: Fitting,
    batch: Sequences,
    steps: int | None,
    *,
    seed: int | None,
    warm_start: bool,
    progress: bool,
) -> Posterior:
    """What `Fitting.infer` returns, and raises; arguments as there."""
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

    def fit(rows: Batch) -> dict[str, Tensor]:
        course: list[tuple[Tensor, ...]] = []

        def watch(terms: list[Terms], gradients: dict[str, Tensor]) -> None:
            nll, kl = mean_report(terms)
            course.append((-nll - kl, nll, kl, row_norms(gradients)))
            bar.update()

        result, _ = svi.fast_loop(rows, fast, noise, store=store, watch=watch)
        own = {} if result.own_draw_elbo is None else {_OWN: result.own_draw_elbo}
        traced = (torch.stack(part, 1) for part in zip(*course, strict=True))
        return {**svi.guide.rows(), **own, **dict(zip(TRACED, traced, strict=False))}

    # Within another public function, that one's bar is the one to watch.
    shown = progress and svi.parallel.is_rank_0 and not nested()
    parts = svi.execution.parts_of(batch, slice(0, len(batch)))
    bar = tqdm(
        total=fast.steps * len(parts), desc="infer", unit="step", delay=QUIET_SECONDS,
        leave=False, disable=not shown,
    )  # fmt: skip
    with bar, svi.execution.computing(svi.model):
        fitted = svi.execution.by_rows(batch, fit)
    own, trace = fitted.pop(_OWN, None), None
    if "elbo" in fitted:
        rates = torch.tensor([learning_rate(fast, t, fast.steps) for t in range(fast.steps)])
        trace = FastTrace(lr=rates, **{name: fitted.pop(name).T.contiguous() for name in TRACED})
    return _answer(svi, batch, fitted, trace, own, local_optimizer(svi.guide, fast, svi.elbo).name)


def _answer(
    svi: Fitting,
    batch: Batch,
    fitted: dict[str, Tensor],
    trace: FastTrace | None,
    own_draw_elbo: Tensor | None,
    optimizer: str,
) -> Posterior:
    """Of the fitted rows, nothing to differentiate; the guide holds them afterwards."""
    guide = svi.guide
    guide.reset(batch)
    guide.load_rows(fitted)
    for p in guide.local_parameters().values():
        p.requires_grad_(False)
    try:
        with torch.no_grad():
            prior = svi.model.prior()  # a learned one as it stands now
            return Posterior(
                distribution=guide.posterior(),
                prior=prior,
                ids=batch.ids,
                mask=batch.mask,
                family=guide.family,
                has_density=guide.has_density,
                parameters=guide.rows(),
                trace=trace,
                closed_form_kl=guide.kl(prior),
                own_draw_elbo=own_draw_elbo,
                objective=describe(svi.elbo),
                objective_kl=kl_estimator(svi.elbo, svi.model, guide),
                optimizer=optimizer,
                corpus=batch.corpus,
                x=batch.x,
                covariates=batch.covariates,
            )
    except (RuntimeError, ValueError) as error:
        tell_non_finite(error, guide.local_parameters().values(), batch.ids)
        raise
