"""What one does with two clocks: fit a corpus, fit a guide's network, infer new sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from tqdm.auto import tqdm

from ltm_pyro.callbacks import Callback, Evaluation, followed, followers
from ltm_pyro.checks import settings
from ltm_pyro.config import Fast, Slow
from ltm_pyro.course import Course, Metrics, headline
from ltm_pyro.data.batches import Batch, TrainingData
from ltm_pyro.data.inputs import Sequences, training_data
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.doors import door
from ltm_pyro.engine.execution import Execution, frozen
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.engine.rows.store import RowStore
from ltm_pyro.errors import InputError
from ltm_pyro.html import show
from ltm_pyro.inference.clocks.fast import FastLoop
from ltm_pyro.inference.clocks.fast_posterior import fast_posterior
from ltm_pyro.inference.clocks.slow import SlowClock
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import Objective, describe
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.word_dropout import WordDropout


class Fitting(ABC):
    """Fits by `step`, slow step after slow step, and infers by the fast loop alone.

    Attributes:
        metrics: One row per slow step; see `step`.
        slow_step: Slow steps done.
        whole: Whether everything is as `slow_step` left it; not so while a step changes weights.
        horizon: Slow steps over which the slow schedules run; set by the first `fit`.
        batch_size: B of the last `fit`.
        tokenizer: By which `infer` reads text: that of the corpus it was fitted on last.
    """

    model: LatentModel
    guide: LocalGuide
    elbo: Objective
    execution: Execution
    parallel: Parallel
    clock: SlowClock
    fast_loop: FastLoop
    word_dropout: WordDropout
    store: RowStore | None
    seed: int
    metrics: Course
    slow_step: int = 0
    whole: bool = True
    horizon: int | None = None
    batch_size: int | None = None
    tokenizer: Tokenizer | None = None

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
            f"{type(self).__name__}({self.guide.family}, {describe(self.elbo)}: {self.fast.steps} "
            f"fast steps per slow step, {self.slow_step} slow steps done)"
        )

    def _repr_html_(self) -> str:
        horizon = "" if self.horizon is None else f" of {self.horizon}"
        facts = {
            "model": self.model,
            "guide": self.guide,
            "objective": describe(self.elbo),
            "fast clock": f"{self.fast.steps} steps, lr {self.fast.lr:g}, {self.fast.noise} noise",
            "slow clock": f"lr {self.slow.lr:g}, {self.slow.schedule}",
            "slow steps": f"{self.slow_step}{horizon}",
            "seed": self.seed,
        }
        course = [self.metrics.frame().tail(3)] if self.metrics else []
        return show(type(self).__name__, facts, tables=course)

    @abstractmethod
    def step(self, batch: Batch) -> Metrics:
        """One slow step on B sequences."""

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
    def fit(
        self,
        data: TrainingData,
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
        self.tokenizer = getattr(data, "tokenizer", None) or self.tokenizer
        data = training_data(data)
        if self.horizon is None:
            self.horizon = self.slow_step + steps
        self.batch_size = batch_size
        first, last = len(self.metrics), self.slow_step + steps
        feed, lanes = self.execution.batch_of_step, self.store is not None
        bar = tqdm(total=steps, disable=not progress, desc="fit", unit="step")
        with bar, followed(self, callbacks, held_out, last) as after:
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
        data: TrainingData,
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
        source, anew = training_data(data), cast("Any", type(self))
        slow = replace(self.slow, thoughts_start=0.0, kl_start=1.0, word_dropout=0.0)
        with frozen(self.model.parameters()):
            # With the model frozen, a clock of its own finds the guide's parameters alone.
            alone: Fitting = anew(
                self.model, self.guide, self.fast, slow, self.elbo, self.seed,
                persistent=self.store is not None, execution=self.execution,
            )  # fmt: skip
            return alone.fit(source, steps, batch_size, progress=progress)
