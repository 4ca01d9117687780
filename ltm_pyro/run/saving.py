"""`save_run`: a fit that was made in Python, as a run folder."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltm_pyro.checks import switch
from ltm_pyro.config import FitConfig
from ltm_pyro.data.base import Corpus
from ltm_pyro.doors import door
from ltm_pyro.engine.rows.database import RowDatabase, new_store_files
from ltm_pyro.engine.rows.store import MemoryRows
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import OBJECTIVES, Objective
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.reading import as_path
from ltm_pyro.registry import option_names
from ltm_pyro.run.building import absolute_paths
from ltm_pyro.run.checkpoint import weights_of
from ltm_pyro.run.files import followed, refuse_protected
from ltm_pyro.run.folder import STORE, Run
from ltm_pyro.run.lock import sole_writer
from ltm_pyro.run.opening import make_run
from ltm_pyro.run.replacing import forget_replaced, refuse_existing


@door
def save_run(
    svi: DualRateSVI, folder: str | Path, *, corpus: Corpus, overwrite: bool = False
) -> Run:
    """Saves a fit as a run folder, for `load_run` and every command.

    Args:
        svi: The fit, at any whole step.
        folder: Must not exist, or be empty.
        corpus: What it was fitted on. Of one that was on disk the run knows where to find it again.
        overwrite: Replace a run that is there.

    Returns:
        The run, whose `svi` is this one: `run.fit(more=100)` goes on, and saves.

    Raises:
        InputError: if a run cannot record the fit, so that it would open as another one, or the
            folder cannot be written.
    """
    folder = followed(as_path("run folder", folder))
    overwrite = switch("overwrite", overwrite)
    config = absolute_paths(_config_of(svi, corpus))
    refuse_protected(folder)
    with sole_writer(folder):
        refuse_existing(folder, overwrite)
        _refuse_other(svi, Run(folder, config, {}, corpus.tokenizer).svi)
        run = make_run(folder, config, corpus, svi=svi, rows=_rows_of(svi))
        forget_replaced(folder)
    return run


def _config_of(svi: DualRateSVI, corpus: Corpus) -> FitConfig:
    """Settings that build this fit again."""
    model, guide, execution, objective = svi.model, svi.guide, svi.execution, _known(svi.elbo)
    if not isinstance(model, LatentThoughtModel):
        raise InputError(
            f"svi fits a {type(model).__name__}, and a run records a LatentThoughtModel alone: "
            "save this one's state_dict with safetensors"
        )
    if not svi.whole or svi.parallel.size > 1:
        raise InputError(
            "svi is in the midst of a slow step, or shared by processes: fit again, in one process"
        )
    if corpus.vocab_size != model.config.vocab_size or corpus.seq_len > model.config.seq_len:
        raise InputError(
            f"corpus has {corpus.vocab_size} kinds of tokens in sequences of {corpus.seq_len}, and "
            f"the model {model.config.vocab_size} in {model.config.seq_len}: give the corpus that "
            "it was fitted on"
        )
    return FitConfig(
        model=replace(model.config, seq_len=corpus.seq_len),
        guide=guide.family,
        guide_options=_options_of(guide),
        objective=objective.name,
        objective_options=objective.options,
        fast=svi.fast,
        slow=svi.slow,
        steps=max(svi.horizon or 1, svi.slow_step),
        batch_size=svi.batch_size or FitConfig().batch_size,
        seed=svi.seed,
        device=str(model.device),
        compile=execution.compile,
        precision=execution.precision,
        micro_batch=execution.micro_batch or 0,
        checkpointing=execution.checkpointing,
        persistent=svi.store is not None,
        control=False,
    )


def _known(objective: object) -> Objective:
    """An objective that a run can name."""
    if not isinstance(objective, Objective) or objective.name not in OBJECTIVES:
        raise InputError(
            f"elbo is {objective!r:.60}, which a run cannot name: use build_objective(name), or "
            "register it with register_objective"
        )
    return objective


def _options_of(guide: LocalGuide) -> dict[str, Any]:
    """Those that the guide was built with."""
    if guide.built_with is None and option_names(type(guide), 1, LocalGuide)[0]:
        raise InputError(
            f"guide was made by its class {type(guide).__name__}, so its options are not known: "
            f"make it by build_guide({guide.family!r}, model, ...)"
        )
    return guide.built_with or {}


def _refuse_other(svi: DualRateSVI, built: DualRateSVI) -> None:
    """Refuses a fit that what its settings build could not take up."""
    if len(svi.clock.parameters) != len(built.clock.parameters):
        raise InputError(
            "some of the model's weights are frozen, which a run does not record: unfreeze them "
            "(requires_grad_(True)), or save the model's state_dict with safetensors"
        )
    mine, theirs = (
        {name: (value.dtype, tuple(value.shape)) for name, value in weights_of(each).items()}
        for each in (svi, built)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise InputError(
                f"{name} is {mine.get(name)} here and {theirs.get(name)} as its settings build it, "
                "so the run would open as another: use model and guide as build_guide and "
                "LatentThoughtModel make them, in float32"
            )


def _rows_of(svi: DualRateSVI) -> dict[str, bytes]:
    """The files of a store with the local parameters that a persistent fit keeps in memory."""
    if svi.store is None:
        return {}
    if not isinstance(svi.store, MemoryRows):
        raise InputError(
            "svi keeps its local parameters in a run folder already: save that run by run.save(), "
            "and copy its folder"
        )
    if not svi.slow_step:
        return {}
    with tempfile.TemporaryDirectory() as place:
        files = new_store_files()
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        database = RowDatabase(Path(place), 0)
        database.scatter(*svi.store.all())
        database.prepare(svi.slow_step)
        database.publish(svi.slow_step)
        database.close()
        return {f"{STORE}/{name}": (Path(place) / name).read_bytes() for name in files}
