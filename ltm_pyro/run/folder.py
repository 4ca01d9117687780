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

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch

import ltm_pyro
from ltm_pyro.config import FitConfig, from_dict, to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.tokenizer import Tokenizer, load_tokenizer
from ltm_pyro.errors import InputError, nearest
from ltm_pyro.inference.control import AutoregressiveFit
from ltm_pyro.inference.dual_rate import DualRateSVI, Metrics
from ltm_pyro.inference.mapped_store import MappedStore, new_store_files
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.inference.parallel import Parallel, refuse_unequal
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.building import absolute_paths, initial_guide, initial_model, open_corpus
from ltm_pyro.run.changes import refuse_changes
from ltm_pyro.run.checkpoint import ATTEMPTS, Checkpoint, check_names, put, take
from ltm_pyro.run.files import (
    damaged,
    json_bytes,
    new_folder,
    read_bytes,
    read_json,
    refuse_protected,
    sha256,
    writing,
)
from ltm_pyro.run.metrics import MetricsFile

FORMAT = 1
"""Raised when a run folder's layout changes."""
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
            refuse_unequal(config.batch_size, self.parallel.size)
            device = str(self.parallel.device)
        self.folder = folder
        self.config = config
        self.facts = facts
        self.tokenizer = tokenizer
        self.model = initial_model(config, device)
        self.guide = initial_guide(config, self.model)
        self.svi = DualRateSVI(
            self.model,
            self.guide,
            fast=config.fast,
            slow=config.slow,
            elbo=build_objective(config.objective, **config.objective_options),
            seed=config.seed,
            persistent=config.persistent,
            parallel=self.parallel,
        )
        self.svi.horizon = config.steps

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
            InputError: if it is not there, or is no longer the one that the model was fitted to.
        """
        corpus = open_corpus(self.config)
        recorded = self.facts["corpus"]["sha256"]
        if corpus.sha256 != recorded:
            raise InputError(
                f"corpus {self.config.corpus.name!r} is not the one that {self.label} was fitted "
                f"to (SHA-256 {corpus.sha256[:12]}, then {recorded[:12]}): restore the text, or "
                "fit anew (the built-in pydoc differs between builds of Python)"
            )
        return corpus

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
        store, step = self.svi.store, self.svi.slow_step
        checkpoint = self.checkpoint()
        # The checkpoint decides which rows count: see `ltm_pyro.inference.mapped_store`.
        if isinstance(store, MappedStore):
            store.prepare(step)
            self.parallel.wait()
        self.parallel.lead(lambda: self._write(checkpoint))
        if isinstance(store, MappedStore):
            store.publish(step)

    def save_alone(self) -> bool:
        """Replaces the checkpoint when other processes are gone, if this one holds all of it.

        Returns:
            Whether it could.
        """
        if not self.parallel.first or self.parallel.shard or self.svi.store is not None:
            return False
        self._write(self.checkpoint())
        return True

    def _write(self, checkpoint: Checkpoint) -> None:
        self.metrics_file.sync()
        checkpoints.save(self.folder / CHECKPOINT, checkpoint)

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
        self.svi.metrics = self.metrics_file.read(self.svi.slow_step)

    def take_up(self, saved: Checkpoint) -> None:
        """Puts a checkpoint into model, guide and optimiser.

        Raises:
            InputError: if it belongs to other settings.
        """
        step = self._checked_step(saved)
        weights, shared = take(saved.tensors, "model."), take(saved.tensors, "guide.")
        check_names(self.model.state_dict(), weights, self.label)
        self.model.load_state_dict(weights)
        self.guide.load_state_dict(shared)
        self.svi.clock.load(take(saved.tensors, "adamw."))
        self.svi.slow_step = step

    def open_rows(self, step: int) -> None:
        """Takes up the local parameters on disk as they were at slow step `step`."""
        if self.config.persistent:
            self.svi.store = MappedStore(
                self.folder / STORE,
                step,
                owner=self.label,
                rank=self.parallel.rank,
                world=self.parallel.size,
            )

    def _load_with_rows(self) -> Checkpoint:
        """The checkpoint, and the local parameters of its step, which a fit may be replacing."""
        for attempt in range(ATTEMPTS):
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
        fit = AutoregressiveFit(model, config.slow, config.seed, self.parallel)
        fit.horizon = config.steps
        saved = share_checkpoint(self.parallel, self._control_checkpoint)
        if saved is not None:
            fit.slow_step = self._checked_step(saved)
            weights = take(saved.tensors, "model.")
            check_names(model.state_dict(), weights, self.label)
            model.load_state_dict(weights)
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
        self.parallel.lead(lambda: checkpoints.save(self.folder / CONTROL, checkpoint))

    @property
    def control_metrics_file(self) -> MetricsFile:
        """`control/metrics.csv`."""
        return MetricsFile(self.folder / CONTROL / METRICS, self.label)

    def control_metrics(self) -> list[Metrics]:
        """One row per slow step of the control.

        Raises:
            InputError: if the file is damaged.
        """
        saved = self._control_checkpoint()
        step = 0 if saved is None else self._checked_step(saved)
        return self.control_metrics_file.read(step)

    def _state(self, step: int) -> dict[str, Any]:
        return {"slow_step": step, "config": to_dict(self.config)}

    def _checked_step(self, saved: Checkpoint) -> int:
        """The checkpoint's slow step, known to belong to this run's settings."""
        try:
            config = from_dict(FitConfig, saved.state["config"])
            step = int(saved.state["slow_step"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.label, f"its checkpoint's state: {error}") from None
        refuse_changes(self.config, to_dict(config), f"{CONFIG} of {self.label}", "the checkpoint")
        return step


def create_run(
    folder: str | Path,
    config: FitConfig,
    *,
    corpus: Corpus | None = None,
    overwrite: bool = False,
    parallel: Parallel | None = None,
) -> Run:
    """A new run at step 0, in a folder that appears whole.

    Everything that can be checked is checked first, so that a fit that cannot start leaves nothing.

    Args:
        folder: Must not exist, or be empty.
        config: The settings. `model.vocab_size` and `model.seq_len` make way for the corpus's.
        corpus: The corpus of `config`, where it is at hand.
        overwrite: Replace a run that is there.
        parallel: The processes that will share the fit; the first one makes the folder, and the
            others come in by `share_run`.

    Raises:
        InputError: if the settings cannot be used or the folder cannot be written.
    """
    folder = Path(folder)
    refuse_existing(folder, overwrite)
    refuse_protected(folder)
    config = absolute_paths(config)
    corpus = corpus if corpus is not None else open_corpus(config)
    config = replace(config, model=replace(config.model, vocab_size=corpus.vocab_size))
    tokenizer = json_bytes(corpus.tokenizer.to_json())
    facts = {
        "format": FORMAT,
        "version": ltm_pyro.__version__,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "pyro": pyro.__version__,
        },
        "corpus": corpus.describe(),
        "tokenizer_sha256": sha256(tokenizer),
    }
    run = Run(folder, config, facts, corpus.tokenizer, parallel=parallel)
    files = {
        CONFIG: json_bytes({**facts, "config": to_dict(config)}),
        TOKENIZER: tokenizer,
        **{f"{CHECKPOINT}/{k}": v for k, v in checkpoints.to_files(run.checkpoint()).items()},
    }
    if config.persistent:
        rows = new_store_files(config.batch_size, run.parallel.size)
        files |= {f"{STORE}/{name}": data for name, data in rows.items()}
    _replace_folder(folder, files)
    run.open_rows(0)
    return run


def load_run(
    folder: str | Path, *, device: str | None = None, parallel: Parallel | None = None
) -> Run:
    """A run as its last checkpoint left it. Nothing that the folder holds is executed.

    Args:
        folder: The run folder.
        device: Where to put the model; where it was fitted by default.
        parallel: The processes that share the run: the first one reads it, and gives it to all.

    Raises:
        InputError: if there is no run there, it is damaged, or another version wrote it.
    """
    folder = Path(folder)
    if parallel is None or parallel.size == 1:
        return read_run(folder, device)
    return share_run(parallel, parallel.lead(lambda: read_run(folder, device, parallel)))


def recorded_device(folder: str | Path) -> str:
    """Where the run in `folder` was fitted, e.g. `cpu`.

    Raises:
        InputError: if there is no run there, or its settings are damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise _no_run(folder)
    label = f"run folder {str(folder)!r}"
    try:
        return str(read_json(folder / CONFIG, label)["config"]["device"])
    except (KeyError, TypeError) as error:
        raise damaged(label, f"{CONFIG} lacks {error}") from None


def read_run(folder: Path, device: str | None = None, parallel: Parallel | None = None) -> Run:
    """`load_run` in this process alone, whatever others do.

    Raises:
        InputError: as `load_run` does.
    """
    if not (folder / CONFIG).exists():
        raise _no_run(folder)
    label = f"run folder {str(folder)!r}"
    facts = read_json(folder / CONFIG, label)
    _check_version(facts, label)
    try:
        config = from_dict(FitConfig, facts["config"])
        expected = facts["tokenizer_sha256"]
        facts["corpus"]["sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(label, f"{CONFIG} lacks {error}") from None
    except InputError as error:
        raise damaged(label, f"{CONFIG}: {error}") from None
    if sha256(read_bytes(folder / TOKENIZER, label)) != expected:
        raise damaged(label, f"{TOKENIZER} does not match its checksum")
    tokenizer = load_tokenizer(read_json(folder / TOKENIZER, label))
    run = Run(folder, config, facts, tokenizer, device, parallel)
    run.restore()
    return run


def share_run(parallel: Parallel, run: Run | None) -> Run:
    """The first process's run in all processes, weights and moments included.

    Args:
        parallel: The processes, who all call this.
        run: In the first process.
    """
    told = None
    if run is not None:
        tokenizer = run.tokenizer.to_json()
        told = (str(run.folder), to_dict(run.config), dict(run.facts), tokenizer)
    told = parallel.say(told)
    assert told is not None
    folder, config, facts, tokenizer = told
    if run is None:
        settings = from_dict(FitConfig, config)
        run = Run(Path(folder), settings, facts, load_tokenizer(tokenizer), parallel=parallel)
    own = run
    saved = share_checkpoint(parallel, lambda: checkpoints.load(own.folder / CHECKPOINT, own.label))
    assert saved is not None
    if not parallel.first:
        run.take_up(saved)
        run.open_rows(run.svi.slow_step)
    return run


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


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuses to put a new run where something is.

    Raises:
        InputError: saying how to go on with a run that is there, or to replace it.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    is_run = (folder / CONFIG).exists() and (folder / CHECKPOINT).exists()
    if is_run and not overwrite:
        raise InputError(
            f"run folder {str(folder)!r} exists: go on with it by --resume, replace it by "
            "--overwrite, or choose another --out"
        )
    if folder.exists() and not is_run:
        raise InputError(
            f"{str(folder)!r} exists and is no run folder: choose another --out, nothing in it is "
            "touched"
        )


def _replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Puts a new run at `folder`; one that is there is removed only when the new one is written."""
    if not folder.exists() or not any(folder.iterdir()):
        new_folder(folder, files)
        return
    fresh, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    with writing(folder):
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        new_folder(fresh, files)
        folder.replace(old)
        fresh.replace(folder)
        shutil.rmtree(old)


def _no_run(folder: Path) -> InputError:
    if not folder.is_dir():
        parent = folder.parent
        near = [p.parent.name for p in parent.glob(f"*/{CONFIG}")] if parent.is_dir() else []
        guess = nearest(folder.name, near)
        hint = f"did you mean {str(parent / guess)!r}?" if guess else "make one with ltm-pyro fit"
        return InputError(f"there is no run folder {str(folder)!r}: {hint}")
    return damaged(f"run folder {str(folder)!r}", f"{CONFIG} is missing")


def _check_version(facts: Mapping[str, Any], label: str) -> None:
    """Refuses a layout that this version does not know."""
    written, version = facts.get("format"), str(facts.get("version"))
    if not isinstance(written, int):
        raise damaged(label, f"{CONFIG} has no format number")
    if written != FORMAT or _numbers(version) > _numbers(ltm_pyro.__version__):
        raise InputError(
            f"{label} was written by ltm-pyro {version} (format {written}) and this is "
            f"{ltm_pyro.__version__} (format {FORMAT}): use that version, or fit anew"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
