"""A run fitted to its end: the model, its control and its restarts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from tqdm.auto import tqdm

from ltm_pyro.callbacks import Callback
from ltm_pyro.checks import MOST, whole_number
from ltm_pyro.config import to_dict
from ltm_pyro.course import Course
from ltm_pyro.data.base import Corpus
from ltm_pyro.errors import InputError
from ltm_pyro.run.changes import changes_in
from ltm_pyro.run.extending import extend
from ltm_pyro.run.folder import CONFIG, Run
from ltm_pyro.run.opening import create_run, load_run
from ltm_pyro.run.training import AfterStep, Interrupted, go_on, train, train_control

RESTARTS = "restarts"
"""Where restarts, the same fit again from other seeds, lie: each a run of its own inside it."""


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
            fit_others(run, corpus, progress=progress)
    except KeyboardInterrupt:
        if run.svi.whole and run.svi.slow_step > (run.saved_step() or 0):
            run.save()  # of the last whole step
        raise
    return Course(run.metrics[first:])


def fit_others(run: Run, corpus: Corpus, *, progress: bool) -> None:
    """What a run whose fit has ended has besides, to the end: its control and its restarts."""
    if run.config.control:
        train_control(run, corpus, progress=progress)
    fit_restarts(run, corpus, progress=progress)


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


def restart_of(run: Run, number: int, corpus: Corpus) -> Run:
    """Restart `number` of a run, from 1 to `config.restarts` - 1: made, or as far as it has come.

    It differs from the run in its seed alone, which is that of the run and `number` more. Where the
    run was extended since, so is the restart.
    """
    folder = run.folder / RESTARTS / str(number)
    config = replace(run.config, seed=run.config.seed + number, restarts=1)
    if not (folder / CONFIG).exists():
        return create_run(folder, config, corpus=corpus)
    again = load_run(folder, device=str(run.model.device))
    asked = {k: v for k, v in to_dict(config).items() if k not in ("corpus", "fast", "slow")}
    extend(again, changes_in(again.config, asked, again.label))
    return again


def finished_restarts(run: Run) -> list[Run]:
    """The restarts that have come to their end, in order."""
    places = [run.folder / RESTARTS / str(i) for i in range(1, run.config.restarts)]
    here = str(run.model.device)
    there = [load_run(place, device=here) for place in places if (place / CONFIG).exists()]
    done = [again for again in there if again.svi.slow_step >= again.last_step]
    for again in done:
        if run.checkpoint_name != "last":
            again.restore(run.checkpoint_name)
    return done
