"""Runs made anew, and runs read from their folders, in one process or in all that share them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch

import ltm_pyro
from ltm_pyro.config import CorpusConfig, FitConfig, from_dict, to_dict
from ltm_pyro.course import Course
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.finding import IN_MEMORY
from ltm_pyro.data.hub import PREFIX
from ltm_pyro.data.tokenizer import Tokenizer, check_restorable, load_tokenizer
from ltm_pyro.doors import door
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.engine.rows.database import new_store_files
from ltm_pyro.errors import InputError, nearest, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.learning import refuse_runaway
from ltm_pyro.reading import LARGEST_JSON, as_path, damaged, read_bytes, read_json
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.building import absolute_paths, open_corpus
from ltm_pyro.run.changes import difference
from ltm_pyro.run.checkpoint import Checkpoint, put, share_checkpoint, take, weights_of
from ltm_pyro.run.files import followed, json_bytes, refuse_protected, sha256
from ltm_pyro.run.folder import CHECKPOINT, CONFIG, CONTROL, FOLDERS, METRICS, STORE, TOKENIZER, Run
from ltm_pyro.run.limits import refuse_oversize
from ltm_pyro.run.lock import sole_writer
from ltm_pyro.run.replacing import (
    forget_replaced,
    recover_replaced,
    refuse_existing,
    refuse_foreign,
    replace_folder,
    undo_new,
)
from ltm_pyro.run.schemas import Facts, Heading, checked

FORMAT = 1
"""Raised when a run folder's layout changes."""
RETIRED = frozenset({"shard"})
"""Settings that runs of older versions have."""


@door
def create_run(
    folder: str | Path,
    config: FitConfig,
    *,
    corpus: Corpus | None = None,
    overwrite: bool = False,
    parallel: Parallel | None = None,
    keep_replaced: bool = False,
) -> Run:
    """A new run at step 0, in a folder that appears whole.

    Everything that can be checked is checked first, so that a fit that cannot start leaves nothing.

    Args:
        folder: Must not exist, or be empty. Where it is a link, the run is put where that leads.
        config: The settings. `model.vocab_size` and `model.seq_len` make way for the corpus's.
        corpus: The corpus of `config`, where it is at hand.
        overwrite: Replace a run that is there.
        parallel: The processes that will share the fit; the first one makes the folder, and the
            others come in by `share_run`.
        keep_replaced: Keep a run that was replaced, hidden, until `forget_replaced` or
            `undo_new`.

    Raises:
        InputError: if the settings cannot be used, the folder cannot be written, or another
            process writes to it.
    """
    folder = followed(as_path("run folder", folder))
    refuse_foreign(folder)
    refuse_protected(folder)
    refuse_oversize(config, 1 if parallel is None else parallel.size)
    with sole_writer(folder):
        recover_replaced(folder)
        refuse_existing(folder, overwrite)
        run = make_run(folder, absolute_paths(config), corpus, parallel)
        if not keep_replaced:
            forget_replaced(folder)
    return run


def make_run(
    folder: Path,
    config: FitConfig,
    corpus: Corpus | None,
    parallel: Parallel | None = None,
    *,
    svi: DualRateSVI | None = None,
    rows: Mapping[str, bytes] | None = None,
) -> Run:
    """The new run, known to be one that can be opened again; one that it replaces is kept aside.

    Args:
        folder: Where, with the lock held.
        config: With absolute paths.
        corpus: That of `config` by default.
        parallel: The processes that will share the fit.
        svi: A fit that is under way; a new one by default.
        rows: The files of its store, where it has one.
    """
    if corpus is None:
        corpus = first_corpus(config)
    else:
        config = _described(config, corpus)
    shape = replace(config.model, vocab_size=corpus.vocab_size, seq_len=corpus.seq_len)
    config = replace(config, model=shape)
    refuse_oversize(config, 1 if parallel is None else parallel.size)
    check_restorable(corpus.tokenizer)
    tokenizer = json_bytes(corpus.tokenizer.to_json())
    facts = {**_versions(), "corpus": corpus.describe(), "tokenizer_sha256": sha256(tokenizer)}
    run = Run(folder, config, facts, corpus.tokenizer, parallel=parallel, svi=svi)
    if not run.guide.has_density:
        refuse_runaway(run.model, run.guide.family)
    control = _start_from(run, read_run(Path(config.init_from), "cpu")) if config.init_from else {}
    files = {
        CONFIG: json_bytes({**facts, "config": to_dict(config)}),
        TOKENIZER: tokenizer,
        **{f"{CHECKPOINT}/{k}": v for k, v in checkpoints.to_files(run.checkpoint()).items()},
        **control,
    }
    if run.metrics:
        files[METRICS] = run.metrics_file.content(run.metrics)
    if config.persistent:
        files |= rows or {f"{STORE}/{name}": data for name, data in new_store_files().items()}
    replace_folder(folder, files)
    try:
        run.open_rows(run.svi.slow_step)
        run.note_checkpoint()
    except BaseException:
        undo_new(folder)
        raise
    return run


def _start_from(run: Run, other: Run) -> dict[str, bytes]:
    """Gives a new run the weights of another, and its control those of the other's control.

    The guide's shared weights go along where the guide is the same one. A run that was fitted
    without a control lends its own decoder to the new control: both start alike, as always. Returns
    the files of the control's first checkpoint, if there is one.
    """
    mine, its = run.config, other.config
    asked = {k: v for k, v in to_dict(its.model).items() if k != "seq_len"}
    changed = difference(mine, {"model": asked}, "this fit", other.label)
    if changed is not None:
        raise InputError(f"{changed}: --init_from needs the same model; leave that setting out")
    if run.tokenizer.to_json() != other.tokenizer.to_json():
        raise InputError(
            f"the tokenizer of this fit's corpus is not that of {other.label}, whose weights it "
            "should start from: load the corpus with tokenizer=run.tokenizer"
        )
    run.model.load_state_dict(other.model.state_dict())
    if (mine.guide, dict(mine.guide_options)) == (its.guide, dict(its.guide_options)):
        run.guide.load_state_dict(take(weights_of(other.svi), "guide."))
    if not mine.control:
        return {}
    fitted = other.control().model if its.control else other.model
    first = Checkpoint(
        put("model.", fitted.state_dict()), {"slow_step": 0, "config": to_dict(mine)}
    )
    return {f"{CONTROL}/{k}": v for k, v in checkpoints.to_files(first).items()}


def first_corpus(config: FitConfig) -> Corpus:
    """The corpus of a new run; one that starts from another run's weights reads as that does."""
    if not config.init_from:
        return open_corpus(config)
    start = Path(config.init_from)
    facts, its = _read_facts(start)
    asked, known = absolute_paths(config).corpus.tokenizer, its.corpus.tokenizer
    if asked != known:
        raise InputError(
            f"tokenizer is {shown(asked)} and the weights of {shown(str(start), 200)} are for its "
            f"own, {shown(known)}: leave --tokenizer or --init_from out"
        )
    label = f"run folder {str(start)!r}"
    return open_corpus(config, _read_tokenizer(start / TOKENIZER, facts["tokenizer_sha256"], label))


def _described(config: FitConfig, corpus: Corpus) -> FitConfig:
    """`config` with settings that describe a corpus at hand: its own, or that it is in memory."""
    if corpus.recipe is None:
        return replace(config, corpus=CorpusConfig(name=IN_MEMORY))
    mine, its = to_dict(config.corpus), dict(corpus.recipe)
    if all(mine[name] == its[name] for name in ("name", "seed", "split") if name in its):
        return config
    return replace(config, corpus=from_dict(CorpusConfig, {"tokenizer": mine["tokenizer"], **its}))


def _versions() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": ltm_pyro.__version__,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "pyro": pyro.__version__,
        },
    }


@door
def load_run(
    folder: str | Path,
    *,
    checkpoint: str = "last",
    device: str | None = None,
    parallel: Parallel | None = None,
) -> Run:
    """A run as a checkpoint left it. Nothing that the folder holds is executed.

    Args:
        folder: The run folder; or `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`, see
            `from_pretrained`.
        checkpoint: `last`, from which the fit can go on, or `best`, of the highest held-out bound.
        device: Where to put the model; where it was fitted by default.
        parallel: The processes that share the run: the first one reads it, and gives it to all.

    Raises:
        InputError: if there is no run there, it is damaged, or another version wrote it.
    """
    if str(folder).startswith(PREFIX):
        from ltm_pyro.run.hub import fetch  # which opens runs

        repo_id, _, revision = str(folder).removeprefix(PREFIX).partition("@")
        folder = fetch(repo_id, revision=revision or None)
    folder = as_path("run folder", folder)
    if parallel is None or parallel.size == 1:
        return read_run(folder, device, checkpoint=checkpoint)
    return share_run(
        parallel, parallel.on_rank_0(lambda: read_run(folder, device, parallel, checkpoint))
    )


def recorded_config(folder: Path) -> FitConfig:
    """The settings of the run in `folder`; raises as `load_run` does."""
    return _read_facts(as_path("run folder", folder))[1]


def read_run(
    folder: Path,
    device: str | None = None,
    parallel: Parallel | None = None,
    checkpoint: str = "last",
) -> Run:
    """`load_run` in this process alone, whatever others do."""
    facts, config = _read_facts(folder)
    label = f"run folder {str(folder)!r}"
    tokenizer = _read_tokenizer(folder / TOKENIZER, facts["tokenizer_sha256"], label)
    if tokenizer.vocab_size != config.model.vocab_size:
        its = config.model.vocab_size
        raise damaged(label, f"{TOKENIZER} has {tokenizer.vocab_size} tokens and {CONFIG} {its}")
    run = Run(folder, config, facts, tokenizer, device, parallel)
    run.restore(checkpoint)
    return run


def _read_tokenizer(path: Path, expected: str, label: str) -> Tokenizer:
    """The tokenizer that was recorded."""
    data = read_bytes(path, label, most=LARGEST_JSON)
    if sha256(data) != expected:
        raise damaged(label, f"{path.name} does not match its checksum")
    saved = read_json(path, label)
    try:
        return load_tokenizer(saved)
    except InputError as error:
        raise damaged(label, f"{path.name}: {error}") from None
    except Exception as error:  # of the compiled library, which has no error class of its own
        raise damaged(label, f"{path.name} holds no tokenizer ({shown(str(error))})") from None


def _read_facts(folder: Path) -> tuple[dict[str, Any], FitConfig]:
    """What was recorded when the run was made, and its settings."""
    if not (folder / CONFIG).exists():
        raise _no_run(folder)
    label = f"run folder {str(folder)!r}"
    for name in (CHECKPOINT, STORE, CONTROL):
        if (folder / name).is_symlink():
            raise damaged(label, f"{name} is a link, and a run's files lie in its own folder")
    facts = read_json(folder / CONFIG, label)
    heading = checked(Heading, facts, folder / CONFIG, label)
    written, mine = heading.version, ltm_pyro.__version__
    if heading.format != FORMAT or _numbers(written) > _numbers(mine):
        raise InputError(
            f"{label} was written by ltm-pyro {written} (format {heading.format}) and this is "
            f"{mine} (format {FORMAT}): use that version, or fit anew"
        )
    settings = facts.get("config")
    for name in RETIRED.intersection(settings if isinstance(settings, dict) else ()):
        raise InputError(
            f"{label} was written by an older version of ltm-pyro {heading.version} (it has the "
            f"setting {name!r}, which is gone): use that version, or fit anew with --overwrite"
        )
    if isinstance(settings, dict) and isinstance(settings.get("fast"), dict):
        # Runs of before there was a choice: they go on with the clock that they began with.
        settings["fast"].setdefault("optimizer", "adam")
    return facts, checked(Facts, facts, folder / CONFIG, label).config


def share_run(parallel: Parallel, run: Run | None) -> Run:
    """The run that the first process has, in all that call this, weights and moments included."""
    told = None
    if run is not None:
        its = (run.tokenizer.to_json(), run.checkpoint_name)
        told = (str(run.folder), to_dict(run.config), dict(run.facts), *its)
    told = parallel.broadcast(told)
    assert told is not None
    folder, config, facts, tokenizer, name = told
    if run is None:
        settings = from_dict(FitConfig, config)
        run = Run(Path(folder), settings, facts, load_tokenizer(tokenizer), parallel=parallel)
    own = run
    place = own.folder / FOLDERS[name]
    saved = share_checkpoint(parallel, lambda: checkpoints.load(place, own.label))
    assert saved is not None
    rows = parallel.broadcast(list(run.metrics))
    if not parallel.is_rank_0:
        run.checkpoint_name = name
        run.take_up(saved)
        if name == "last":
            run.open_rows(run.svi.slow_step)
        run.svi.metrics = Course(rows)  # early stopping looks back
    return run


def _no_run(folder: Path) -> InputError:
    if not folder.is_dir():
        parent = folder.parent
        near = [p.parent.name for p in parent.glob(f"*/{CONFIG}")] if parent.is_dir() else []
        guess = nearest(folder.name, near)
        hint = f"did you mean {str(parent / guess)!r}?" if guess else "make one with ltm-pyro fit"
        return InputError(f"there is no run folder {str(folder)!r}: {hint}")
    return damaged(f"run folder {str(folder)!r}", f"{CONFIG} is missing")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
