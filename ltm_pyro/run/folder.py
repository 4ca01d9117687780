"""The run folder: a fit that outlives its process.

    config.json      settings, versions, what the corpus was; written once
    tokenizer.json   all there is to the tokenizer
    checkpoint/      weights, AdamW's moments, and how far the fit is
    best/            the same where the held-out bound was highest, if it is followed
    store/           persistent local parameters with their moments, one row per sequence
    metrics.csv      one row per slow step
    control/         the same for the decoder without thoughts

A fit is a function of `config.json`, which says of a fit that was extended when it was: random
numbers and batches are functions of seed and slow step, so a fit that was killed goes on from its
checkpoint to the very weights of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ltm_pyro
from ltm_pyro.callbacks import Callback
from ltm_pyro.checks import one_of
from ltm_pyro.config import FitConfig, to_dict
from ltm_pyro.course import Course, Metrics
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.diagnostics.control import control
from ltm_pyro.diagnostics.held_out import EarlyStopping, held_out_columns
from ltm_pyro.doors import door
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.engine.rows.database import RowDatabase
from ltm_pyro.errors import InputError, shown
from ltm_pyro.html import show
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.reading import damaged, read_json
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.building import initial_fit, initial_model, reopened_corpus
from ltm_pyro.run.changes import clocks_of, difference_from_all
from ltm_pyro.run.checkpoint import ATTEMPTS, STATE, Checkpoint, share_checkpoint, take
from ltm_pyro.run.files import json_bytes, write_atomic
from ltm_pyro.run.lock import sole_writer
from ltm_pyro.run.metrics import MetricsFile
from ltm_pyro.run.schemas import State, checked

CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.csv"
CHECKPOINT, BEST, STORE, CONTROL = "checkpoint", "best", "store", "control"
FOLDERS = {"last": CHECKPOINT, "best": BEST}
"""Where a checkpoint lies, by what it is asked for."""


class Run:
    """A fit and its folder. Made by `create_run` and `load_run`.

    Attributes:
        folder: Where it lives.
        config: Its settings.
        facts: What was recorded with them: versions, and the corpus's description and SHA-256.
        tokenizer: Between text and ids.
        model: The latent-thought model, as fitted so far.
        guide: Its local posterior family.
        svi: The fit itself.
        parallel: The processes that share it. Where they are several, `checkpoint`, `save` and
            `control` are called in all of them; the first one alone reads and writes the folder.
    """

    def __init__(
        self,
        folder: Path,
        config: FitConfig,
        facts: Mapping[str, Any],
        tokenizer: Tokenizer,
        device: str | None = None,
        parallel: Parallel | None = None,
        svi: DualRateSVI | None = None,
    ) -> None:
        self.parallel = parallel or Parallel()
        if self.parallel.size > 1:
            device = str(self.parallel.device)
        self.folder, self.config, self.facts, self.tokenizer = folder, config, facts, tokenizer
        self.checkpoint_name, self._mark = "last", ""
        self.svi = initial_fit(config, device, self.parallel) if svi is None else svi
        self.svi.horizon, self.svi.tokenizer = config.steps, tokenizer
        self.model = cast("LatentThoughtModel", self.svi.model)
        self.guide = self.svi.guide

    def __repr__(self) -> str:
        return (
            f"Run({str(self.folder)!r}: {self.config.preset} on {self.config.corpus.name}, "
            f"step {self.svi.slow_step} of {self.last_step})"
        )

    def _repr_html_(self) -> str:
        corpus = self.facts["corpus"]
        facts = {
            "corpus": f"{shown(corpus['name'])} (SHA-256 {corpus['sha256'][:12]})",
            "model": self.model,
            "guide": self.config.guide,
            "objective": self.config.objective,
            "seed": self.config.seed,
        }
        with suppress(InputError, LookupError, TypeError, ValueError):  # not scored, or damaged
            scores = read_json(self.folder / "scores.json", self.label)
            for name in ("ppl_elbo", "ppl_iw"):
                value, error = scores[name], scores[f"{name}_sampling_se"] or math.nan
                told = f"{name} per {self.tokenizer.unit}, step {scores['step']}"
                facts[told] = f"{value:.4g} ± {error:.2g} (of having sampled these documents)"
        return show(repr(self), facts, tables=[self.metrics.frame().tail(3)])

    def model_card(self, repo_id: str = "OWNER/NAME") -> str:
        """What it is, how it scores, and when not to use it; see `ltm_pyro.report.model_card`."""
        return ltm_pyro.model_card(self, repo_id)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Puts the run on the Hugging Face Hub with its card; see `ltm_pyro.push_to_hub`."""
        return ltm_pyro.push_to_hub(self, repo_id, **options)

    @property
    def metrics(self) -> Course:
        """One row per slow step done; see `DualRateSVI.step`."""
        return self.svi.metrics

    @property
    def label(self) -> str:
        """What messages call this run."""
        return f"run folder {str(self.folder)!r}"

    def corpus(self) -> Corpus:
        """The corpus of the fit, loaded again.

        Raises:
            InputError: if it is not there, was never on disk, or is no longer the one that the
                model was fitted to.
        """
        recorded = self.facts["corpus"]["sha256"]
        return reopened_corpus(self.config, self.tokenizer, recorded, self.label)

    @property
    def last_step(self) -> int:
        """The slow step that the fit ends with: `config.steps`, or where it stopped early."""
        patience = self.config.held_out.patience
        over = patience and EarlyStopping(patience).over(self.svi.metrics)
        return self.svi.slow_step if over else self.config.steps

    def adopt(self, config: FitConfig) -> None:
        """Takes `config` for the run's settings, in memory and on disk.

        Clocks and steps that it had so far stay on record: its checkpoints may be of them.
        """
        old, facts = self.config, dict(self.facts)
        if (old.steps, old.fast, old.slow) != (config.steps, config.fast, config.slow):
            record = {"until_step": self.svi.slow_step, **clocks_of(old)}
            facts["earlier"] = [*facts.get("earlier", ()), record]
        write_atomic(self.folder / CONFIG, json_bytes({**facts, "config": to_dict(config)}))
        self.config, self.facts = config, facts

    @door
    def fit(
        self,
        corpus: Corpus | None = None,
        *,
        more: int | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> Course:
        """Goes on with the fit, its control and its restarts, where it has them, and saves.

        Ctrl-C leaves the last whole step saved.

        Args:
            corpus: Its corpus; loaded again by default.
            more: Slow steps to do from here. Beyond the run's `steps` the fit is extended, its
                schedules restated, which a line on stderr tells. By default all that is left.
            progress: Show progress on stderr.
            callbacks: Follow the fit, and may stop it.

        Returns:
            The metrics of these steps.

        Raises:
            InputError: if the corpus is not at hand, or the folder cannot be written.
            NonFiniteError: on NaN; the checkpoint is of the last good step.
        """
        from ltm_pyro.run.fitting import fit_run  # which is about runs

        return fit_run(self, corpus, more, progress=progress, callbacks=callbacks)

    def checkpoint(self, fit: DualRateSVI | None = None) -> Checkpoint:
        """All that the fit needs to go on; or its control, where that is `fit`."""
        fit = self.svi if fit is None else fit
        state = {"slow_step": fit.slow_step, "config": to_dict(self.config)}
        return Checkpoint(checkpoints.tensors_of(fit), state)

    def save(self) -> None:
        """Replaces the checkpoint on disk, whatever was changed since it was read.

        Steps beyond `config.steps` and other clocks, set by hand, become the run's settings.

        Raises:
            InputError: if it cannot be written, or not be read again; the one before is then still
                whole.
        """
        if not self.svi.whole:
            raise InputError(
                f"a slow step of {self.label} was cut short, so what is held is of no step: load "
                "the run again"
            )
        store, step = self.svi.store, self.svi.slow_step
        checkpoint, config = self.checkpoint(), self._as_it_stands()
        with self.writing():
            if config != self.config:
                self.parallel.on_rank_0(lambda: self.adopt(config))
            # The checkpoint decides which rows count: see `ltm_pyro.engine.rows.database`.
            if isinstance(store, RowDatabase):
                store.prepare(step)
                self.parallel.barrier()
            self.parallel.on_rank_0(lambda: self._write(checkpoint))
            if isinstance(store, RowDatabase):
                store.publish(step)

    def _as_it_stands(self) -> FitConfig:
        """The settings, those that were changed by hand included."""
        svi, config = self.svi, self.config
        steps = max(config.steps, svi.slow_step)
        changed = replace(config, fast=svi.fast, slow=svi.slow, steps=steps)
        to_dict(changed)  # a schedule that is a function cannot be written down
        return changed

    def save_best(self) -> None:
        """Keeps the fit as it stands for the best; `InputError` if it cannot be written."""
        self._save_at(BEST, self.checkpoint())

    def _save_at(self, name: str, checkpoint: Checkpoint) -> None:
        with self.writing():
            self.parallel.on_rank_0(lambda: checkpoints.save(self.folder / name, checkpoint))

    def save_alone(self) -> None:
        """Replaces the checkpoint when other processes are gone, if this one holds all of it."""
        if self.parallel.is_rank_0 and self.svi.store is None:
            with self._alone():
                self._write(self.checkpoint())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block nothing else writes to the folder; see `sole_writer`.

        `InputError` if another does, or has since it was read here.
        """
        if self.checkpoint_name != "last":
            raise InputError(
                f"this is the {self.checkpoint_name} checkpoint of {self.label}, and a fit goes on "
                "from the last: load that, or keep this one by save_run in another folder"
            )
        with ExitStack() as held:
            self.parallel.on_rank_0(lambda: held.enter_context(self._alone()))
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with sole_writer(self.folder):
            if checkpoints.mark(self.folder / CHECKPOINT) != self._mark:
                raise InputError(
                    f"{self.label} has been changed since it was opened here: load it again, and "
                    "go on from what it holds now"
                )
            yield

    def _write(self, checkpoint: Checkpoint) -> None:
        self.metrics_file.complete(self.svi.metrics)
        self.metrics_file.sync()
        checkpoints.save(self.folder / CHECKPOINT, checkpoint)
        self.note_checkpoint()

    def note_checkpoint(self) -> None:
        """Takes the checkpoint on disk for this run's own."""
        self._mark = checkpoints.mark(self.folder / CHECKPOINT)

    def saved_step(self, name: str = "last") -> int | None:
        """Slow steps of a checkpoint on disk; `None` where there is no such."""
        place = self.folder / FOLDERS[name]
        return checkpoints.saved_step(place, self.label) if checkpoints.exists(place) else None

    @property
    def metrics_file(self) -> MetricsFile:
        """`metrics.csv`."""
        scored = self.config.held_out.every
        later = held_out_columns(self.guide.has_density) if scored else ()
        return MetricsFile(self.folder / METRICS, self.label, later)

    def restore(self, name: str = "last") -> None:
        """Puts a checkpoint on disk into model, guide and optimiser.

        Args:
            name: `last` or `best`; from the latter no fit goes on.

        Raises:
            InputError: if it is not there, is damaged, or belongs to other settings.
        """
        self.checkpoint_name = one_of("checkpoint", name, FOLDERS)
        if name == "last":
            self.take_up(self._load_with_rows())
        elif not checkpoints.exists(self.folder / FOLDERS[name]):
            raise InputError(
                f"{self.label} has no best checkpoint: it is kept with a held-out bound, so fit "
                "with --held_out.every 50, or leave the checkpoint out"
            )
        else:
            self.take_up(checkpoints.load(self.folder / FOLDERS[name], self.label))
            self.svi.store = None  # rows on disk are the last checkpoint's
        self.svi.metrics = Course(self.metrics_file.read(self.svi.slow_step))

    def take_up(self, saved: Checkpoint) -> None:
        """Puts a checkpoint of this run's settings into model, guide and optimiser."""
        checkpoints.restore(self.svi, saved.tensors, self._checked_step(saved), self.label)

    def open_rows(self, step: int) -> None:
        """Takes up the local parameters on disk as they were at slow step `step`."""
        if self.config.persistent:
            place, rank, world = self.folder / STORE, self.parallel.rank, self.parallel.size
            self.svi.store = RowDatabase(place, step, owner=self.label, rank=rank, world=world)

    def _load_with_rows(self) -> Checkpoint:
        """The checkpoint, and the local parameters of its step, which a fit may be replacing."""
        for attempt in range(ATTEMPTS):
            self.note_checkpoint()  # before it is read, so that what comes between is noticed
            saved = checkpoints.load(self.folder / CHECKPOINT, self.label)
            if self.config.persistent and take(saved.tensors, "store."):
                raise InputError(
                    f"{self.label} keeps its local parameters in the checkpoint, as older versions "
                    "did: use the version that wrote it, or fit anew"
                )
            try:
                self.open_rows(self._checked_step(saved))
                break
            except InputError:
                if attempt == ATTEMPTS - 1:
                    raise
        return saved

    def control(self) -> DualRateSVI:
        """The control, as far as it has been fitted; see `ltm_pyro.diagnostics.control`."""
        config = self.config
        model = initial_model(config, str(self.model.device))
        fit = control(model, config.slow, config.steps, config.seed, self.svi.execution)
        saved = share_checkpoint(self.parallel, self._control_checkpoint)
        if saved is not None:
            checkpoints.restore(fit, saved.tensors, self._checked_step(saved), self.label)
        return fit

    def _control_checkpoint(self) -> Checkpoint | None:
        folder = self.folder / CONTROL
        return checkpoints.load(folder, self.label) if checkpoints.exists(folder) else None

    def save_control(self, fit: DualRateSVI) -> None:
        """Replaces the control's checkpoint on disk; as `save` where it cannot be written."""
        self._save_at(CONTROL, self.checkpoint(fit))

    @property
    def control_metrics_file(self) -> MetricsFile:
        """`control/metrics.csv`."""
        return MetricsFile(self.folder / CONTROL / METRICS, self.label)

    def control_metrics(self) -> list[Metrics]:
        """One row per slow step of the control; `InputError` if the checkpoint is damaged."""
        saved = self._control_checkpoint()
        step = 0 if saved is None else self._checked_step(saved)
        return self.control_metrics_file.read(step)

    def _checked_step(self, saved: Checkpoint) -> int:
        """The checkpoint's slow step, known to belong to this run's settings."""
        state = checked(State, saved.state, Path(STATE), self.label)
        found = to_dict(state.config)
        earlier = self.facts.get("earlier", ())
        other = difference_from_all(self.config, earlier, found, CONFIG, STATE)
        if other is not None:
            raise damaged(self.label, other)
        return state.slow_step
