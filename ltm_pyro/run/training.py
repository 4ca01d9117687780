"""Fitting into a run folder: checkpoints as it goes, and a clean stop at any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

from ltm_pyro.config import to_dict
from ltm_pyro.course import Metrics
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.held_out import EarlyStopping, HeldOutBound, best_step
from ltm_pyro.errors import InputError, NonFiniteError, ProcessLostError
from ltm_pyro.inference.callbacks import Callback
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.run.files import refuse_protected, writing
from ltm_pyro.run.folder import Run

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
    if run.svi.slow_step < run.last_step:
        with run.writing():
            _train(run, corpus, progress, callbacks, after_step)


def _train(
    run: Run,
    corpus: Corpus,
    progress: bool,
    callbacks: Sequence[Callback],
    after_step: AfterStep,
) -> None:
    svi, config = run.svi, run.config
    bound = _held_out(run, corpus)
    run.parallel.on_rank_0(lambda: _ready(run))
    if best_step(run.metrics) == svi.slow_step != run.parallel.broadcast(run.saved_step("best")):
        run.save_best()  # a fit was killed between its two checkpoints
    if config.compile:
        run.model.compile_fast_loop()
    patience = config.held_out.patience
    followers = [
        Keeper(run, after_step),
        *([EarlyStopping(patience)] if patience else []),
        *callbacks,
    ]
    remaining = config.steps - svi.slow_step
    try:
        svi.fit(
            corpus.train,
            remaining,
            config.batch_size,
            progress=progress,
            callbacks=followers,
            held_out=bound,
        )
    except NonFiniteError:
        run.save()
        raise
    except InputError:
        raise  # most likely the disk is full
    except ProcessLostError:
        run.save_alone()  # of the last whole step
        raise
    except Exception:
        if svi.whole:
            _save_in_spite(run.save if run.parallel.size == 1 else run.save_alone)
        raise
    run.save()
    if svi.slow_step < run.last_step:
        raise Interrupted


class Keeper(Callback):
    """Writes metrics and checkpoints, before other callbacks, which may fail.

    Args:
        run: The run.
        after_step: Says whether to stop, by the metrics of a slow step.
    """

    def __init__(self, run: Run, after_step: AfterStep) -> None:
        self.run = run
        self.after_step = after_step

    def on_step(self, svi: DualRateSVI, row: Metrics) -> bool:
        """Adds the row, and saves every `checkpoint_every` steps."""
        if self.run.parallel.is_rank_0:
            self.run.metrics_file.append(row)
        if svi.slow_step % self.run.config.checkpoint_every == 0:
            self.run.save()
        return self.after_step(row)

    def on_evaluate(self, svi: DualRateSVI, row: Metrics) -> None:
        """Keeps the best checkpoint; the last one is never behind it."""
        if best_step(svi.metrics) == svi.slow_step:
            self.run.save()
            self.run.save_best()


def _held_out(run: Run, corpus: Corpus) -> HeldOutBound | None:
    """The bound to follow, if the run follows one."""
    settings = to_dict(run.config.held_out)
    settings.pop("patience")
    if not settings["every"]:
        return None
    return HeldOutBound(getattr(corpus, corpus.held_out()), **settings)


def _save_in_spite(save: Callable[[], object]) -> None:
    """Saves after an error that is not of the disk: nothing is lost but the step under way."""
    with suppress(Exception):  # what ended the fit is what must be told
        save()


def _ready(run: Run) -> None:
    """Brings the files of a run to the step that it goes on from."""
    refuse_protected(run.folder)
    run.metrics_file.truncate(run.metrics)


def train_control(
    run: Run, corpus: Corpus, *, progress: bool = True, after_step: AfterStep = go_on
) -> DualRateSVI:
    """Fits the same decoder without thoughts, for as many slow steps, or goes on with it.

    Args:
        run: The run.
        corpus: Its corpus.
        progress: Show a progress bar on stderr.
        after_step: Called with the metrics of each slow step; `True` stops the fit there.

    Returns:
        The control, fitted to the end.

    Raises:
        Interrupted: if `after_step` said so; the checkpoint is of the last finished step.
        NonFiniteError: on NaN; the checkpoint is of the last good step.
        InputError: if the folder cannot be written, or another fit writes to it; its last
            checkpoint is whole.
        Exception: whatever else ends a step; the checkpoint is of the last whole step.
    """
    fit = run.control()
    if fit.slow_step < run.last_step:
        with run.writing():
            fit = run.control()  # as it is now that nobody else goes on with it
            _train_control(run, fit, corpus, progress, after_step)
    return fit


def _train_control(
    run: Run, fit: DualRateSVI, corpus: Corpus, progress: bool, after_step: AfterStep
) -> None:
    config, metrics = run.config, run.control_metrics_file
    if config.compile:
        cast("LatentThoughtModel", fit.model).compile_fast_loop()
    run.parallel.on_rank_0(lambda: _ready_control(run, fit.slow_step))

    def save() -> None:
        if run.parallel.is_rank_0:
            metrics.sync()
        run.save_control(fit)

    class Keeper(Callback):
        def on_step(self, svi: DualRateSVI, row: Metrics) -> bool:
            if run.parallel.is_rank_0:
                metrics.append(row)
            if svi.slow_step % config.checkpoint_every == 0:
                save()
            return after_step(row)

    remaining = run.last_step - fit.slow_step
    try:
        fit.fit(corpus.train, remaining, config.batch_size, progress=progress, callbacks=[Keeper()])
    except NonFiniteError:
        save()
        raise
    except (InputError, ProcessLostError):
        raise
    except Exception:
        if fit.whole and run.parallel.size == 1:
            _save_in_spite(save)
        raise
    save()
    if fit.slow_step < run.last_step:
        raise Interrupted


def _ready_control(run: Run, step: int) -> None:
    """Brings the control's files to the step that it goes on from."""
    refuse_protected(run.folder)
    metrics = run.control_metrics_file
    done = metrics.read(step)
    with writing(metrics.path.parent):
        metrics.path.parent.mkdir(exist_ok=True)
    metrics.truncate(done)
