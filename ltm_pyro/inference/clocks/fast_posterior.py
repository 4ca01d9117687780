"""The fast clock alone: the posterior of sequences under a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
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
from ltm_pyro.inference.objectives import Terms, describe, kl_estimator
from ltm_pyro.inference.posterior import FastTrace, Posterior, fitted_posterior
from ltm_pyro.random import Stream, derive_seed

if TYPE_CHECKING:
    from ltm_pyro.inference.clocks.fitting import Fitting


_OWN, _TRACED = "own_draw_elbo", ("elbo", "nll", "kl", "grad_norm")


class _Course:
    """The course of a fast loop, step by step.

    Args:
        after_step: Called at each step, to show progress.
    """

    def __init__(self, after_step: Callable[[], object]) -> None:
        self.after_step = after_step
        self.steps: list[tuple[Tensor, ...]] = []
        self.rates: list[float] = []

    def __call__(self, terms: list[Terms], gradients: dict[str, Tensor], lr: float) -> None:
        nll, kl = mean_report(terms)
        self.steps.append((-nll - kl, nll, kl, row_norms(gradients)))
        self.rates.append(lr)
        self.after_step()

    def columns(self) -> dict[str, Tensor]:
        """(B, T_fast) by name; none without a step."""
        parts = zip(*self.steps, strict=True)
        return {name: torch.stack(part, 1) for name, part in zip(_TRACED, parts, strict=False)}


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

    rates: Tensor | None = None

    def fit(rows: Batch) -> dict[str, Tensor]:
        nonlocal rates
        course = _Course(bar.update)
        result, _ = svi.fast_loop(rows, fast, noise, store=store, watch=course)
        own = {} if result.own_draw_elbo is None else {_OWN: result.own_draw_elbo}
        rates = torch.tensor(course.rates)
        return {**svi.guide.rows(), **own, **course.columns()}

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
    if "elbo" in fitted and rates is not None:
        trace = FastTrace(lr=rates, **{name: fitted.pop(name).T.contiguous() for name in _TRACED})
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
            optimizer=local_optimizer(svi.guide, fast, svi.elbo).name,
            objective=describe(svi.elbo),
            objective_kl=kl_estimator(svi.elbo, svi.model, svi.guide),
        )
    except (RuntimeError, ValueError) as error:
        tell_non_finite(error, svi.guide.local_parameters().values(), batch.ids)
        raise
