"""Fitting into a run folder: checkpoints as it goes, and a clean stop at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

from ltm_pyro.callbacks import Callback
from ltm_pyro.config import to_dict
from ltm_pyro.course import Metrics
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.held_out import EarlyStopping, HeldOutBound, best_step
from ltm_pyro.errors import InputError, NonFiniteError, ProcessLostError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.run.files import refuse_protected, writing
from ltm_pyro.run.folder import Run
from ltm_pyro.run.metrics import MetricsFile

AfterStep = Callable[[Metrics], bool]
"""Gets the metrics of each slow step; its answer `True` asks the fit to stop there."""


class Interrupted(Exception):
    """The fit was asked to stop, and stopped after a whole step, with its checkpoint on disk."""


def go_on(row: Metrics) -> bool:
    """Goes on to the end."""
    return False


def train(
    run: Run,
    corpus: Corpus,
    *,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    after_step: AfterStep = go_on,
) -> None:
    """Goes on with the fit to its last step. Does nothing where it is there already.

    Args:
        run: The run, at any step.
        corpus: Its corpus.
        progress: Show a progress bar on stderr.
        callbacks: Follow the fit; see `DualRateSVI.fit`.
        after_step: Called with the metrics of each slow step; `True` stops the fit there.

    Raises:
        Interrupted: if `after_step` or a callback said so; the checkpoint is of the last finished
            step.
        NonFiniteError: on NaN; the checkpoint is of the last good step.
        ProcessLostError: if another process is gone; the last checkpoint is whole.
        InputError: if the folder cannot be written, or another fit writes to it; its last
            checkpoint is whole.
        Exception: whatever else ends a step; the checkpoint is of the last whole step.
    """
    svi = run.svi
    if svi.slow_step >= run.last_step:
        return
    with run.writing():
        bound, patience = _held_out(run, corpus), run.config.held_out.patience
        run.parallel.on_rank_0(lambda: _ready(run, run.metrics_file, run.metrics))
        best = best_step(run.metrics)
        if best == svi.slow_step != run.parallel.broadcast(run.saved_step("best")):
            run.save_best()  # a fit was killed between its two checkpoints
        stopping = [EarlyStopping(patience)] if patience else []
        keeper = Keeper(run, run.metrics_file, run.save, after_step)
        with _saving(svi, run.save, run.save_alone):
            _go_on(run, svi, corpus, [keeper, *stopping, *callbacks], progress, bound)
    if svi.slow_step < run.last_step:
        raise Interrupted


def train_control(
    run: Run, corpus: Corpus, *, progress: bool = True, after_step: AfterStep = go_on
) -> DualRateSVI:
    """Fits the same decoder without thoughts, for as many slow steps, or goes on with it.

    Arguments and what is raised are as in `train`; returns the control, fitted to the end.
    """
    fit, metrics = run.control(), run.control_metrics_file
    if fit.slow_step >= run.last_step:
        return fit

    def save() -> None:
        if run.parallel.is_rank_0:
            metrics.sync()
        run.save_control(fit)

    with run.writing():
        fit = run.control()  # as it is now that nobody else goes on with it
        run.parallel.on_rank_0(lambda: _ready(run, metrics, metrics.read(fit.slow_step)))
        with _saving(fit, save, lambda: None):
            _go_on(run, fit, corpus, [Keeper(run, metrics, save, after_step)], progress)
    if fit.slow_step < run.last_step:
        raise Interrupted
    return fit


def _go_on(
    run: Run,
    fit: DualRateSVI,
    corpus: Corpus,
    callbacks: Sequence[Callback],
    progress: bool,
    bound: HeldOutBound | None = None,
) -> None:
    if run.config.compile:
        cast("LatentThoughtModel", fit.model).compile_fast_loop()
    remaining, size = run.last_step - fit.slow_step, run.config.batch_size
    fit.fit(corpus.train, remaining, size, progress=progress, callbacks=callbacks, held_out=bound)


@contextmanager
def _saving(
    fit: DualRateSVI, save: Callable[[], None], save_alone: Callable[[], None]
) -> Iterator[None]:
    """Saves when the block ends; where an error ends it, what there is of whole steps.

    `save` is called in all processes, `save_alone` where others are gone, or may be.
    """
    try:
        yield
    except NonFiniteError:
        save()
        raise
    except InputError:
        raise  # most likely the disk is full
    except ProcessLostError:
        save_alone()
        raise
    except Exception:
        if fit.whole:
            with suppress(Exception):  # what ended the fit is what must be told
                (save if fit.parallel.size == 1 else save_alone)()
        raise
    save()


class Keeper(Callback):
    """Writes metrics and checkpoints, before other callbacks, which may fail.

    `save` replaces the last checkpoint, `after_step` says by a step's metrics whether to stop.
    """

    def __init__(
        self, run: Run, metrics: MetricsFile, save: Callable[[], None], after_step: AfterStep
    ) -> None:
        self.run, self.metrics, self.save, self.after_step = run, metrics, save, after_step

    def on_step(self, svi: DualRateSVI, row: Metrics) -> bool:
        """Adds the row, and saves every `checkpoint_every` steps."""
        if svi.parallel.is_rank_0:
            self.metrics.append(row)
        if svi.slow_step % self.run.config.checkpoint_every == 0:
            self.save()
        return self.after_step(row)

    def on_evaluate(self, svi: DualRateSVI, row: Metrics) -> None:
        """Keeps the best checkpoint; the last one is never behind it."""
        if best_step(svi.metrics) == svi.slow_step:
            self.save()
            self.run.save_best()


def _held_out(run: Run, corpus: Corpus) -> HeldOutBound | None:
    """The bound to follow, if the run follows one."""
    settings = to_dict(run.config.held_out)
    settings.pop("patience")
    if not settings["every"]:
        return None
    return HeldOutBound(getattr(corpus, corpus.held_out()), **settings)


def _ready(run: Run, metrics: MetricsFile, done: Sequence[Metrics]) -> None:
    """Brings the metrics on disk to the step that a fit goes on from."""
    refuse_protected(run.folder)
    with writing(metrics.path.parent):
        metrics.path.parent.mkdir(exist_ok=True)
    metrics.truncate(done)
