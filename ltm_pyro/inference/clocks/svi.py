"""Dual-rate variational Bayes: fast steps fit q(z_i) per sequence, slow steps fit the decoder.

Kong et al. (2025), algorithm 1; `reference` is that and nothing else. Every random number is a
function of (seed, slow step, sequence), so a fit that was interrupted goes on bit for bit.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from pyro.infer import ELBO
from torch import Tensor

from ltm_pyro.checks import settings, switch, whole_number
from ltm_pyro.config import Fast, Slow
from ltm_pyro.course import Course, Metrics
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import door, meet
from ltm_pyro.engine.execution import Execution
from ltm_pyro.engine.rows.finite import refuse_non_finite
from ltm_pyro.engine.rows.store import MemoryRows
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.clocks.fast import FastLoop, FastResult
from ltm_pyro.inference.clocks.fitting import Fitting
from ltm_pyro.inference.clocks.metrics import metrics_row, sums_of
from ltm_pyro.inference.clocks.schedules import Now, learning_rate
from ltm_pyro.inference.clocks.slow import SlowClock, SlowObjective, Sums
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import guide_for
from ltm_pyro.inference.objectives import as_objective
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.learning import embedding_weights, refuse_runaway, show_prior


class DualRateSVI(Fitting):
    """Stochastic variational inference with two clocks.

    Args:
        model: Prior and likelihood, a Pyro program over a plate of sequences.
        guide: The local posterior family: a guide for this model, or a family's name.
        fast: The fast clock.
        slow: The slow clock.
        elbo: The objective: a name of `build_objective`, what that returns, or any Pyro ELBO
            object. By default `elbo`, which uses the KL in closed form where the guide has one.
        seed: Of all random numbers.
        persistent: Keep local parameters per sequence id, in memory, and start each visit from
            them; a run folder keeps them on disk (`RowDatabase`).
        execution: How it is computed, and in which processes: precision, compilation, parts.
    """

    def __init__(
        self,
        model: LatentModel,
        guide: LocalGuide | str,
        fast: Fast | None = None,
        slow: Slow | None = None,
        elbo: ELBO | str | None = None,
        seed: int = 0,
        persistent: bool = False,
        execution: Execution | None = None,
    ) -> None:
        self.model, self.guide, self.elbo = model, guide_for(guide, model), as_objective(elbo)
        self.execution = settings("execution", execution, Execution, "compile=True")
        self.execution.prepare(model)
        self.parallel = self.execution.parallel
        self.seed = whole_number("seed", seed, at_least=0)
        self.store = MemoryRows() if switch("persistent", persistent) else None
        self.metrics = Course()
        beta = [*model.parameters(), *self.guide.shared_parameters()]
        learned = [p for p in beta if p.requires_grad]  # what the caller has frozen stays frozen
        self.fast, slow = settings("fast", fast, Fast), settings("slow", slow, Slow)
        spared = embedding_weights(model, self.guide)
        self.clock = SlowClock(learned, slow, spared, self.parallel)
        self.slow = slow
        self.fast_loop = FastLoop(model, self.guide, self.elbo, learned)
        self.slow_objective = SlowObjective(model, self.guide, self.elbo)

    @door
    def step(self, batch: Batch) -> Metrics:
        """A fast loop, then one slow step on fresh draws.

        Before thoughts join (`Slow.thoughts_start`), z is 0 and the fast loop is left out; `elbo`
        is then log p(x | z = 0), exact as long as cross-attention is at its zero start.

        Args:
            batch: B sequences; this process's rows of them where processes share the fit.

        Returns:
            `elbo`, `nll`, `kl` (nats per sequence, batch mean, fresh draws, KL weight 1, no word
            dropout: the plain ELBO, whatever is descended), `elbo_per_token` (for a point mass
            `log_joint`, `nll`, `log_prior`, `log_joint_per_token`), `objective` (what was
            descended, with its KL weight and word dropout, nats per sequence), `kl_weight`,
            `lr_fast` (of the first fast step; 0 without a fast loop), `lr_slow`, `grad_norm_fast`,
            `grad_norm_slow` (of the loss per token, before clipping), `fast_gain` (rise of the
            objective over the fast loop, nats per sequence), `tokens_per_second`, `seconds`, and
            `step`.

        Raises:
            InputError: if the model cannot score the batch, or a point mass would teach a prior.
            NonFiniteError: on NaN in any process, before any weight has changed.
            ProcessLostError: if another process is gone, before any weight has changed.
        """
        began = time.perf_counter()
        batch = batch.distinct().to(self.model.device)
        meet(self.model, batch)
        if not self.guide.has_density:
            refuse_runaway(self.model, self.guide.family)
        now = Now.at(self.clock.slow, self.slow_step, self.horizon, self.seed)
        try:
            with self.execution.computing(self.model):
                rows = self.execution.parts(len(batch))
                parts = [self._part(batch.select(some), now) for some in rows]
            sums, norm = self.clock.exchange([part.sums for part in parts], now.step)
        except BaseException:
            self.clock.discard()
            raise
        # Nothing of this step is kept, local rows included, before both clocks are known finite.
        show_prior(self.model, [part.z for part in parts if part.z is not None], self.parallel)
        self.whole = False
        lr = self.clock.step(now.scheduled, now.total)
        if self.store is not None and (names := parts[0].rows):
            fitted = {name: torch.cat([part.rows[name] for part in parts]) for name in names}
            self.store.scatter(batch.ids, fitted)
        self.slow_step += 1
        self.whole = True
        told = {
            "step": float(self.slow_step),
            "kl_weight": now.kl_weight,
            "lr_fast": learning_rate(self.fast, 0, self.fast.steps) if now.thinks else 0.0,
            "lr_slow": lr,
            "grad_norm_slow": norm,
            "seconds": time.perf_counter() - began,
        }
        self.metrics.append(row := metrics_row(self.guide.has_density, sums, told))
        return row

    def _part(self, batch: Batch, now: Now) -> _Part:
        """Both clocks on some rows of a batch; adds to the slow gradient.

        Raises:
            NonFiniteError: in this process; all others are told.
        """
        # The same object where no word is dropped, so that the slow step scores once.
        read = self.word_dropout(batch, now.step) if self.clock.slow.word_dropout else batch
        fitted, rows = FastResult(*torch.zeros(3, device=batch.device)), {}
        try:
            if now.thinks:
                fitted, moments = self.fast_loop(
                    read, self._fast, now.fast_noise, weight=now.kl_weight, store=self.store
                )
                loss = self.slow_objective.at_fitted(batch, read, now.kl_weight, now.slow_noise)
                if self.store is not None and self.guide.local_parameters():
                    rows = {**self.guide.rows(), **moments.state()}
            else:
                loss = self.slow_objective.without_thoughts(batch, read)
            refuse_non_finite([loss.nll + loss.kl], batch.ids)
        except NonFiniteError as error:
            here = NonFiniteError(error.ids, now.step, error.reason)
            raise self.parallel.report(here, now.step) from None
        self.clock.add_gradient(loss.descended)
        return _Part(sums_of(batch, loss, fitted), rows, loss.z)


class _Part(NamedTuple):
    """Of some rows of a batch: what is reported, rows for a store, and draws (S, B, K, D)."""

    sums: Sums
    rows: dict[str, Tensor]
    z: Tensor | None
