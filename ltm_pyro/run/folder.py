"""The run folder: a fit that outlives its process.

    config.json      settings, versions, what the corpus was; written once
    tokenizer.json   all there is to the tokenizer
    checkpoint/      weights, AdamW's moments, and how far the fit is
    store/           persistent local parameters with their moments, one row per sequence
    metrics.csv      one row per slow step
    control/         the same for the decoder without thoughts

A fit is a function of `config.json`: random numbers and batches are functions of seed and slow
step, so a fit that was killed goes on from its checkpoint to the very weights of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ltm_pyro.config import FitConfig, from_dict, to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.finding import IN_MEMORY
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.engine.execution import Execution
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.engine.rows.database import RowDatabase
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.control import AutoregressiveFit
from ltm_pyro.inference.course import Course, Metrics
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.reading import damaged
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.building import initial_guide, initial_model, open_corpus
from ltm_pyro.run.changes import difference
from ltm_pyro.run.checkpoint import ATTEMPTS, STATE, Checkpoint, check_names, put, take
from ltm_pyro.run.files import json_bytes, write_atomic
from ltm_pyro.run.limits import refuse_oversize, refuse_unscorable
from ltm_pyro.run.lock import sole_writer
from ltm_pyro.run.metrics import MetricsFile
from ltm_pyro.run.schemas import State, checked

CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.csv"
CHECKPOINT, STORE, CONTROL = "checkpoint", "store", "control"


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
    ) -> None:
        self.parallel = parallel or Parallel()
        if self.parallel.size > 1:
            device = str(self.parallel.device)
        self.folder = folder
        self.config = config
        self.facts = facts
        self.tokenizer = tokenizer
        self.model = initial_model(config, device)
        self.guide = initial_guide(config, self.model)
        # Held-out sequences, of whatever number, are then inferred in parts of that size too.
        rows = max(1, config.batch_size // self.parallel.size)
        self.svi = DualRateSVI(
            self.model,
            self.guide,
            fast=config.fast,
            slow=config.slow,
            elbo=build_objective(config.objective, **config.objective_options),
            seed=config.seed,
            persistent=config.persistent,
            execution=Execution(
                precision=config.precision,
                micro_batch=config.micro_batch or rows,
                checkpointing=config.checkpointing,
                parallel=self.parallel,
            ),
        )
        self.svi.horizon = config.steps
        self._mark = ""
        self.svi.tokenizer = tokenizer

    def __repr__(self) -> str:
        return (
            f"Run({str(self.folder)!r}: {self.config.preset} on {self.config.corpus.name}, "
            f"step {self.svi.slow_step} of {self.config.steps})"
        )

    @property
    def metrics(self) -> list[Metrics]:
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
        if self.config.corpus.name == IN_MEMORY:
            raise InputError(
                f"the corpus of {self.label} was in the memory of a program: load it again by "
                "load_corpus, with tokenizer=run.tokenizer, and give it where a corpus is asked for"
            )
        corpus = open_corpus(self.config)
        if corpus.tokenizer.to_json() != self.tokenizer.to_json():
            corpus = open_corpus(self.config, self.tokenizer)
        recorded = self.facts["corpus"]["sha256"]
        if corpus.sha256 != recorded:
            raise InputError(
                f"corpus {self.config.corpus.name!r} is not the one that {self.label} was fitted "
                f"to (SHA-256 {corpus.sha256[:12]}, then {recorded[:12]}): restore the text, or "
                "fit anew (the built-in pydoc differs between builds of Python)"
            )
        return corpus

    def score_by(self, changes: Mapping[str, Any]) -> None:
        """Takes over other settings of the scores; the fit does not depend on them.

        Args:
            changes: Of `eval_sequences`, `eval_draws` and `eval_fast_steps`.

        Raises:
            InputError: if the run could not be scored by them, or its folder not be written.
        """
        config = from_dict(FitConfig, {**to_dict(self.config), **changes})
        refuse_unscorable(config)
        refuse_oversize(config, self.parallel.size)
        if config != self.config:
            self.config = config
            facts = json_bytes({**self.facts, "config": to_dict(config)})
            write_atomic(self.folder / CONFIG, facts)

    def checkpoint(self) -> Checkpoint:
        """All that the fit needs to go on."""
        shared = {
            name: value
            for name, value in self.guide.state_dict().items()
            if not name.startswith(("local.", "inputs."))
        }
        tensors = {
            **put("model.", self.model.state_dict()),
            **put("guide.", shared),
            **put("adamw.", self.svi.clock.state()),
        }
        return Checkpoint(tensors, self._state(self.svi.slow_step))

    def save(self) -> None:
        """Replaces the checkpoint on disk.

        Raises:
            InputError: if it cannot be written; the one before is then still whole.
        """
        if not self.svi.whole:
            raise InputError(
                f"a slow step of {self.label} was cut short, so what is held is of no step: load "
                "the run again"
            )
        store, step = self.svi.store, self.svi.slow_step
        checkpoint = self.checkpoint()
        with self.writing():
            # The checkpoint decides which rows count: see `ltm_pyro.engine.rows.database`.
            if isinstance(store, RowDatabase):
                store.prepare(step)
                self.parallel.wait()
            self.parallel.lead(lambda: self._write(checkpoint))
            if isinstance(store, RowDatabase):
                store.publish(step)

    def save_alone(self) -> bool:
        """Replaces the checkpoint when other processes are gone, if this one holds all of it.

        Returns:
            Whether it could.
        """
        if not self.parallel.first or self.svi.store is not None:
            return False
        with self._alone():
            self._write(self.checkpoint())
        return True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block nothing else writes to the folder; see `sole_writer`.

        Raises:
            InputError: saying who writes to it, or that another has since it was read here.
        """
        with ExitStack() as held:
            self.parallel.lead(lambda: held.enter_context(self._alone()))
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

    def saved_step(self) -> int:
        """Slow steps of the checkpoint on disk.

        Raises:
            InputError: if it is damaged.
        """
        return checkpoints.saved_step(self.folder / CHECKPOINT, self.label)

    @property
    def metrics_file(self) -> MetricsFile:
        """`metrics.csv`."""
        return MetricsFile(self.folder / METRICS, self.label)

    def restore(self) -> None:
        """Puts the checkpoint on disk into model, guide and optimiser.

        Raises:
            InputError: if it is damaged, or belongs to other settings.
        """
        self.take_up(self._load_with_rows())
        self.svi.metrics = Course(self.metrics_file.read(self.svi.slow_step))

    def take_up(self, saved: Checkpoint) -> None:
        """Puts a checkpoint into model, guide and optimiser.

        Raises:
            InputError: if it belongs to other settings.
        """
        step = self._checked_step(saved)
        weights, shared = take(saved.tensors, "model."), take(saved.tensors, "guide.")
        check_names(self.model.state_dict(), weights, self.label)
        self.model.load_state_dict(weights)
        with self._same_model():
            self.guide.load_state_dict(shared)
            self.svi.clock.load(take(saved.tensors, "adamw."))
        self.svi.slow_step, self.svi.whole = step, True

    @contextmanager
    def _same_model(self) -> Iterator[None]:
        """Turns what torch says of tensors that do not fit into one line."""
        try:
            yield
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise damaged(self.label, f"its checkpoint is another model's ({error})") from None

    def open_rows(self, step: int) -> None:
        """Takes up the local parameters on disk as they were at slow step `step`."""
        if self.config.persistent:
            self.svi.store = RowDatabase(
                self.folder / STORE,
                step,
                owner=self.label,
                rank=self.parallel.rank,
                world=self.parallel.size,
            )

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

    def control(self) -> AutoregressiveFit:
        """The control, as far as it has been fitted; see `ltm_pyro.inference.control`.

        Raises:
            InputError: if its checkpoint is damaged.
        """
        config = self.config
        model = initial_model(config, str(self.model.device))
        fit = AutoregressiveFit(model, config.slow, config.seed, self.svi.execution)
        fit.horizon = config.steps
        saved = share_checkpoint(self.parallel, self._control_checkpoint)
        if saved is not None:
            fit.slow_step = self._checked_step(saved)
            weights = take(saved.tensors, "model.")
            check_names(model.state_dict(), weights, self.label)
            model.load_state_dict(weights)
            with self._same_model():
                fit.clock.load(take(saved.tensors, "adamw."))
        return fit

    def _control_checkpoint(self) -> Checkpoint | None:
        folder = self.folder / CONTROL
        return checkpoints.load(folder, self.label) if checkpoints.exists(folder) else None

    def save_control(self, fit: AutoregressiveFit) -> None:
        """Replaces the control's checkpoint on disk.

        Raises:
            InputError: if it cannot be written; the one before is then still whole.
        """
        tensors = {
            **put("model.", fit.model.state_dict()),
            **put("adamw.", fit.clock.state()),
        }
        checkpoint = Checkpoint(tensors, self._state(fit.slow_step))
        with self.writing():
            self.parallel.lead(lambda: checkpoints.save(self.folder / CONTROL, checkpoint))

    @property
    def control_metrics_file(self) -> MetricsFile:
        """`control/metrics.csv`."""
        return MetricsFile(self.folder / CONTROL / METRICS, self.label)

    def control_metrics(self) -> list[Metrics]:
        """One row per slow step of the control.

        Raises:
            InputError: if the checkpoint is damaged.
        """
        saved = self._control_checkpoint()
        step = 0 if saved is None else self._checked_step(saved)
        return self.control_metrics_file.read(step)

    def _state(self, step: int) -> dict[str, Any]:
        return {"slow_step": step, "config": to_dict(self.config)}

    def _checked_step(self, saved: Checkpoint) -> int:
        """The checkpoint's slow step, known to belong to this run's settings."""
        state = checked(State, saved.state, Path(STATE), self.label)
        other = difference(self.config, to_dict(state.config), CONFIG, STATE)
        if other is not None:
            raise damaged(self.label, other)
        return state.slow_step


def share_checkpoint(
    parallel: Parallel, read: Callable[[], Checkpoint | None]
) -> Checkpoint | None:
    """What the first process reads, in all processes."""
    if parallel.size == 1:
        return read()
    mine = parallel.lead(read)
    state = parallel.say(None if mine is None else mine.state)
    if state is None:
        return None
    return Checkpoint(parallel.from_first({} if mine is None else mine.tensors), state)
