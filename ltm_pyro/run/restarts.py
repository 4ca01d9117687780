"""Restarts: the same fit again from other seeds, each a run of its own inside the first one's."""

from __future__ import annotations

from dataclasses import replace

from ltm_pyro.config import to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.run.changes import changes_in
from ltm_pyro.run.extending import extend
from ltm_pyro.run.folder import CONFIG, Run
from ltm_pyro.run.opening import create_run, load_run

RESTARTS = "restarts"


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
