"""A run fitted to its end: the model, its control and its restarts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from tqdm.auto import tqdm

from ltm_pyro.checks import MOST, whole_number
from ltm_pyro.course import Course
from ltm_pyro.data.base import Corpus
from ltm_pyro.errors import InputError
from ltm_pyro.inference.callbacks import Callback
from ltm_pyro.run.extending import extend
from ltm_pyro.run.folder import Run
from ltm_pyro.run.restarts import restart_of
from ltm_pyro.run.training import AfterStep, Interrupted, go_on, train, train_control


def fit_run(
    run: Run,
    corpus: Corpus | None,
    more: int | None,
    *,
    progress: bool,
    callbacks: Sequence[Callback],
) -> Course:
    """See `Run.fit`."""
    corpus = run.corpus() if corpus is None else corpus
    first, last = len(run.metrics), run.config.steps
    if more is not None:
        last = run.svi.slow_step + whole_number("more", more, 1, MOST)
        if run.last_step == run.svi.slow_step < run.config.steps:
            raise InputError(
                f"{run.label} stopped early at slow step {run.last_step}, and would again: go on "
                "with ltm-pyro fit --resume --held_out.patience 0"
            )
        if last > run.config.steps:
            for line in extend(run, {"steps": last}):
                if progress:
                    tqdm.write(line, file=sys.stderr)
    stop = (lambda row: row["step"] >= last) if last < run.config.steps else go_on
    try:
        with suppress(Interrupted):
            train(run, corpus, progress=progress, callbacks=callbacks, after_step=stop)
            if run.config.control:
                train_control(run, corpus, progress=progress)
            fit_restarts(run, corpus, progress=progress)
    except KeyboardInterrupt:
        if run.svi.whole and run.svi.slow_step > (run.saved_step() or 0):
            run.save()  # of the last whole step
        raise
    return Course(run.metrics[first:])


def fit_restarts(
    run: Run,
    corpus: Corpus,
    *,
    progress: bool = True,
    after_step: AfterStep = go_on,
    begin: Callable[[str, str], object] = lambda stage, label: None,
) -> None:
    """Fits the restarts of a run, and their controls, to the end; those that are there go on.

    `begin` is told which part comes next, `fit` or `control`, and of which restart; the other
    arguments, and what is raised, are as in `train`.
    """
    for number in range(1, run.config.restarts):
        again = restart_of(run, number, corpus)
        label = f"restart {number} of {run.config.restarts - 1}: "
        begin("fit", label)
        train(again, corpus, progress=progress, after_step=after_step)
        if again.config.control:
            begin("control", label)
            train_control(again, corpus, progress=progress, after_step=after_step)
