"""Dual-rate variational Bayes: fast steps fit q(z_i) per sequence, slow steps fit the decoder.

    for each batch:
        fast:  T_fast steps on phi_i   of  ELBO(phi_i; beta)        beta frozen
        slow:  one step on beta        of  ELBO(phi_i; beta)        at the fitted q, on fresh draws

Kong et al. (2025), algorithm 1. Every random number is a function of (seed, slow step), so a fit
that was interrupted goes on bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from pyro.infer import ELBO
from tqdm.auto import tqdm

from ltm_pyro.checks import switch, whole_number
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.data.training_data import TrainingData
from ltm_pyro.doors import door, meet
from ltm_pyro.engine.execution import Execution, frozen
from ltm_pyro.engine.rows.store import MemoryRows, RowStore
from ltm_pyro.errors import InputError, NonFiniteError
from ltm_pyro.inference.callbacks import Callback, Evaluation, followed, followers
from ltm_pyro.inference.clocks.fast import FastLoop, FastResult
from ltm_pyro.inference.clocks.fast_posterior import fast_posterior
from ltm_pyro.inference.clocks.schedules import Now, learning_rate
from ltm_pyro.inference.clocks.slow import (
    Part,
    SlowClock,
    SlowObjective,
    embedding_weights,
    show_prior,
)
from ltm_pyro.inference.course import Course, Metrics, shown_fit
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.inputs import (
    Sequences,
    guide_for,
    objective_name,
    settings,
    tokenizer_of,
    training_data,
)
from ltm_pyro.inference.objectives import as_objective, build_objective, describe
from ltm_pyro.inference.point_mass import headline, metrics_row, refuse_runaway
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.word_dropout import WordDropout
from ltm_pyro.models.base import LatentModel


class DualRateSVI:
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

    Attributes:
        metrics: One row per slow step; see `step`.
        slow_step: Slow steps done.
        whole: Whether everything is as `slow_step` left it; not so while a step changes weights.
        horizon: Slow steps over which the slow schedules run; set by the first `fit`.
        batch_size: B of the last `fit`.
        tokenizer: By which `infer` reads text: that of the corpus it was fitted on last.
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
        guide, elbo = guide_for(guide, model), objective_name(elbo)
        self.execution = settings("execution", execution, Execution, "compile=True")
        self.execution.prepare(model)
        self.model = model
        self.guide = guide
        self._fast, slow = settings("fast", fast, Fast), settings("slow", slow, Slow)
        self.elbo = as_objective(build_objective(elbo) if isinstance(elbo, str) else elbo)
        self.slow_objective = SlowObjective(model, guide, self.elbo)
        self.seed = whole_number("seed", seed, at_least=0)
        self.tokenizer: Tokenizer | None = None
        self.parallel = self.execution.parallel
        self.store: RowStore | None = MemoryRows() if switch("persistent", persistent) else None
        self.slow_step = 0
        self.whole = True
        self.horizon: int | None = None
        self.batch_size: int | None = None
        self.metrics = Course()
        beta = [*model.parameters(), *guide.shared_parameters()]
        learned = [p for p in beta if p.requires_grad]  # what the caller has frozen stays frozen
        self.clock = SlowClock(learned, slow, embedding_weights(model, guide), self.parallel)
        self.fast_loop = FastLoop(model, guide, self.elbo, learned)
        self.word_dropout = WordDropout(model, slow.word_dropout, seed)

    @property
    def fast(self) -> Fast:
        """The fast clock's settings; may be replaced at any time."""
        return self._fast

    @fast.setter
    def fast(self, fast: Fast) -> None:
        self._fast = settings("fast", fast, Fast)

    @property
    def slow(self) -> Slow:
        """The slow clock's settings; may be replaced between slow steps, all of them."""
        return self.clock.slow

    @slow.setter
    def slow(self, slow: Slow) -> None:
        slow = settings("slow", slow, Slow)
        self.word_dropout = WordDropout(self.model, slow.word_dropout, self.seed)
        self.clock.slow = slow

    def __repr__(self) -> str:
        return (
            f"DualRateSVI({self.guide.family}, {describe(self.elbo)}: {self.fast.steps} fast steps "
            f"per slow step, {self.slow_step} slow steps done)"
        )

    def _repr_html_(self) -> str:
        return shown_fit(self)

    @door
    def infer(
        self,
        batch: Sequences,
        steps: int | None = None,
        *,
        seed: int | None = None,
        warm_start: bool = False,
        progress: bool = True,
    ) -> Posterior:
        """The fast loop alone: q(z_i) for each sequence, model and clocks untouched.

        Noise belongs to a sequence's id: its posterior is the same in any batch.

        Args:
            batch: The sequences: a batch, a split of a corpus, a text, or a list of texts (which
                `tokenizer` reads, and which get the ids 0, 1, ...).
            steps: T_fast; the fast clock's own by default. The schedule runs over these steps.
            seed: Of the noise; the fit's own by default, so the answer is reproducible.
            warm_start: Start from the stored local parameters of known ids (persistent fits).
            progress: Show a progress bar on stderr, if it takes longer than a few seconds.

        Raises:
            InputError: if the model cannot score the batch, or `steps` is negative.
            NonFiniteError: if local parameters became NaN or infinite.
        """
        return fast_posterior(
            self, batch, steps, seed=seed, warm_start=warm_start, progress=progress
        )

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
            refuse_runaway(self.model, self.guide)
        now = Now.at(self.slow, self.slow_step, self.horizon, self.seed)
        try:
            with self.execution.computing(self.model):
                rows = self.execution.parts(len(batch))
                parts = [self._part(batch.select(some), now) for some in rows]
            sums, norm = self.clock.exchange([part.sums for part in parts], now.step)
        except BaseException:
            self.clock.discard()
            raise
        # Nothing of this step is kept, local rows included, before both clocks are known finite.
        show_prior(self.model, [part.z for part in parts], self.parallel)
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
        self.metrics.append(row := metrics_row(self.guide, sums, told))
        return row

    @door
    def fit(
        self,
        data: TrainingData | Batch,
        steps: int,
        batch_size: int = 16,
        *,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        held_out: Evaluation | None = None,
    ) -> Course:
        """`steps` slow steps over the training set, or fewer where a callback stops it.

        The first call sets the horizon of the slow schedules to `steps`; a later call goes on from
        where the last ended, at the schedules' last values.

        Args:
            data: The training sequences, e.g. `corpus.train`; of a single `Batch`, random rows are
                taken.
            steps: Slow steps to do now.
            batch_size: B, of all processes together.
            progress: Show a progress bar on stderr.
            callbacks: Follow the fit and may stop it.
            held_out: Scores held-out text every some steps: `HeldOutBound(corpus.val, every=50)`.

        Returns:
            The metrics of these steps.

        Raises:
            InputError: if `steps` or `batch_size` is not above 0.
            NonFiniteError: on NaN, before any weight has changed.
        """
        callbacks = followers(callbacks, held_out)
        if steps <= 0 or batch_size <= 0:
            raise InputError(f"steps={steps}, batch_size={batch_size}: both must be above 0")
        self.tokenizer = tokenizer_of(data, self.tokenizer)
        data = training_data(data)
        if self.horizon is None:
            self.horizon = self.slow_step + steps
        self.batch_size = batch_size
        first, last = len(self.metrics), self.slow_step + steps
        feed, lanes = self.execution.batch_of_step, self.store is not None
        bar = tqdm(total=steps, disable=not progress, desc="fit", unit="step")
        following = followed(self, callbacks, held_out, last)
        with bar, following as after:
            for _ in range(steps):
                now = self.slow_step
                row = self.step(feed(data, now, batch_size, self.seed, lanes=lanes))
                bar.update()
                bar.set_postfix(headline(row))
                if after(row):
                    break
        return Course(self.metrics[first:])

    @door
    def fit_guide(
        self,
        data: TrainingData | Batch,
        steps: int,
        batch_size: int = 16,
        *,
        progress: bool = True,
    ) -> Course:
        """Slow steps on the guide's shared parameters alone: an encoder's, a flow's network.

        Model, clocks and metrics stay as they are; the slow schedules run over these steps, with
        KL weight 1. A persistent fit keeps local parameters from visit to visit here too, in a
        store of their own. Does nothing for a family that shares no parameters. Arguments, answer
        and errors are those of `fit`.
        """
        if not self.guide.shared_parameters():
            return Course()
        source = training_data(data)
        slow = replace(self.slow, thoughts_start=0.0, kl_start=1.0, word_dropout=0.0)
        with frozen(self.model.parameters()):
            # With the model frozen, a clock of its own finds the guide's parameters alone.
            alone = DualRateSVI(
                self.model, self.guide, self.fast, slow, self.elbo, self.seed,
                persistent=self.store is not None, execution=self.execution,
            )  # fmt: skip
            return alone.fit(source, steps, batch_size, progress=progress)

    def _part(self, batch: Batch, now: Now) -> Part:
        """Both clocks on some rows of a batch; adds to the slow gradient.

        Raises:
            NonFiniteError: in this process; all others are told.
        """
        # The same object where no word is dropped, so that the slow step scores once.
        read = self.word_dropout(batch, now.step) if self.slow.word_dropout else batch
        fitted, rows = FastResult(*torch.zeros(3, device=batch.device)), {}
        try:
            if now.thinks:
                fitted, moments = self.fast_loop(
                    read, self.fast, now.fast_noise, weight=now.kl_weight, store=self.store
                )
                loss = self.slow_objective.at_fitted(batch, read, now.kl_weight, now.slow_noise)
                if self.store is not None and self.guide.local_parameters():
                    rows = {**self.guide.rows(), **moments.state()}
            else:
                loss = self.slow_objective.without_thoughts(batch, read)
            bad = ~(loss.nll + loss.kl).isfinite()
            if bool(bad.any()):
                raise NonFiniteError(batch.ids[bad].tolist(), now.step)
        except NonFiniteError as error:
            here = NonFiniteError(error.ids, now.step, error.reason)
            raise self.parallel.report(here, now.step) from None
        self.clock.add_gradient(loss.descended)
        return Part(loss, fitted, rows, batch)
