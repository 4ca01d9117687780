"""`ltm-pyro fit`: text in, a run folder out, with scores and samples printed at the end."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ltm_pyro.cli.parsing import Parser
from ltm_pyro.cli.processes import many
from ltm_pyro.cli.settings import (
    Settings,
    add_settings,
    build_config,
    expand_shortcuts,
    given_settings,
)
from ltm_pyro.cli.stopping import StopSignals
from ltm_pyro.cli.streams import hush, tell
from ltm_pyro.config import PRESETS
from ltm_pyro.errors import InputError, NonFiniteError, ProcessLostError, printable
from ltm_pyro.reading import as_path

if TYPE_CHECKING:
    from ltm_pyro.data.base import Corpus
    from ltm_pyro.engine.processes import Parallel
    from ltm_pyro.run import Run

_DESCRIPTION = """\
Fit a latent-thought model to text, score it on held-out text beside a control
without thoughts, write some text, and leave a run folder.

Settings come from --preset, then from the YAML file of --config, then from the
options below; each names a field, as in --fast.steps 8. Shortcuts: --corpus,
--tokenizer and --encoding for --corpus.name, --corpus.tokenizer and
--corpus.encoding; --no-control, --no-compile and --persistent.
"""
_EXAMPLES = """\
ltm-pyro fit --preset nano                         Python's documentation, on a CPU
ltm-pyro fit --corpus book.txt --out runs/book     your own text, folder or .jsonl
ltm-pyro fit --resume --out runs/book              go on after an interruption
ltm-pyro fit --resume --steps 900 --out runs/book  extend a fit, its schedules restated
ltm-pyro fit --init_from runs/book --corpus other.txt --out runs/other
ltm-pyro fit --restarts 4 --out runs/four          four fits: the chains of an export
ltm-pyro fit --held_out.every 50 --held_out.patience 5
ltm-pyro fit --steps 1000 --fast.steps 8 --slow.lr 1e-3
ltm-pyro fit --corpus mixture --corpus.options.classes 4
ltm-pyro fit --config mine.yaml --seed 1           lines like  steps: 1000
ltm-pyro fit --sweep grid.yaml --out runs/grid     lists like  seed: [0, 1, 2]
"""
_BROKEN_PIPE = 141
"""The exit status of a program that SIGPIPE has ended."""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro fit`; returns the exit status."""
    arguments = expand_shortcuts(arguments)
    parser = _parser(arguments)
    options: Settings = parser.parse_args(arguments, defaults=False).as_dict()
    out, file = options.pop("out", None), options.pop("config", None)
    sweep = options.pop("sweep", None)
    resume, overwrite = options.pop("resume", False), options.pop("overwrite", False)
    board = options.pop("tensorboard", False)
    if board:
        from ltm_pyro.run.tensorboard import require_tensorboard

        require_tensorboard()
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: choose one")
    if out is not None and not out.strip():
        raise InputError("out is empty: name a folder")
    if sweep is not None:
        from ltm_pyro.cli.sweep import run_sweep

        if overwrite:
            raise InputError("--overwrite replaces one run, not a sweep's: remove their folder")
        if board:
            raise InputError("--tensorboard follows one fit: leave it out of a sweep")
        return run_sweep(parser, given_settings(parser, {}, file), options, sweep, out)
    given = given_settings(parser, options, file)
    with ExitStack() as held:
        if many():
            return _share(given, out, held, board, resume=resume, overwrite=overwrite)
        fitted, corpus, new = _open(given, out, held, resume=resume, overwrite=overwrite)
        return fit_and_report(fitted, corpus, new=new, board=board)


def _share(
    given: Settings, out: str | None, held: ExitStack, board: bool, *, resume: bool, overwrite: bool
) -> int:
    """The same in many processes: the first one opens the run, and gives it to all."""
    config = build_config(given)
    from ltm_pyro.cli.printing import default_folder
    from ltm_pyro.engine.processes import join, refuse_unequal, started
    from ltm_pyro.run.opening import recorded_config, share_run

    folder = as_path("out", default_folder(config) if out is None else out)
    if resume and folder.exists():
        config = recorded_config(folder)
    if config.restarts > 1:
        raise InputError(
            f"restarts is {config.restarts} and processes share the fit: give each restart a fit "
            "of its own, with another --seed and --out"
        )
    refuse_unequal(config.batch_size, started()[1])
    parallel = join(config.device)
    opened = parallel.on_rank_0(
        lambda: _open(given, out, held, resume=resume, overwrite=overwrite, parallel=parallel)
    )
    fitted = share_run(parallel, None if opened is None else opened[0])
    new = parallel.broadcast(opened is not None and opened[2])
    corpus = fitted.corpus() if opened is None else opened[1]
    return fit_and_report(fitted, corpus, new=new, board=board)


def _parser(arguments: list[str]) -> Parser:
    parser = Parser("fit", "[OPTIONS]", _DESCRIPTION, _EXAMPLES)
    parser.option("out", str, "the run folder (default: runs/PRESET-CORPUS)")
    parser.option("config", str, "a YAML file with settings")
    parser.option("sweep", str, "a YAML file with lists of values: a fit for each of all points")
    parser.switch("tensorboard", "write metrics for TensorBoard too (an extra)")
    parser.switch("resume", "go on with the run in --out")
    parser.switch("overwrite", "replace the run in --out")
    # The help shows the defaults of the preset that stands beside it.
    shown = next((b for a, b in itertools.pairwise(arguments) if a == "--preset"), "nano")
    add_settings(parser, PRESETS.get(shown, PRESETS["nano"]))
    return parser


def _open(
    given: Settings,
    out: str | None,
    held: ExitStack,
    *,
    resume: bool,
    overwrite: bool,
    parallel: Parallel | None = None,
) -> tuple[Run, Corpus, bool]:
    """The run, its corpus, and whether it is new; `held` gets the lock of its folder."""
    config = build_config(given)  # before anything heavy: most slips are found here
    from ltm_pyro.cli.printing import default_folder

    folder = as_path("out", default_folder(config) if out is None else out)
    from ltm_pyro.run import create_run
    from ltm_pyro.run.files import followed, refuse_protected
    from ltm_pyro.run.limits import refuse_oversize
    from ltm_pyro.run.lock import sole_writer
    from ltm_pyro.run.opening import first_corpus, read_run
    from ltm_pyro.run.replacing import recover_replaced, refuse_existing, refuse_foreign

    folder = followed(folder)
    if not resume:
        refuse_foreign(folder)
    refuse_protected(folder)
    held.enter_context(sole_writer(folder))
    recover_replaced(folder)
    if resume and (folder.exists() or not given):
        fitted = read_run(folder, parallel=parallel)
        _take_over(fitted, given)
        return fitted, fitted.corpus(), False
    if resume:
        tell(f"no run in {str(folder)!r} yet: starting it")
    refuse_existing(folder, overwrite)
    refuse_oversize(config, 1 if parallel is None else parallel.size)
    corpus = first_corpus(config)
    corpus.held_out()  # a fit that cannot be scored does not start
    fitted = create_run(
        folder, config, corpus=corpus, overwrite=overwrite, parallel=parallel, keep_replaced=True
    )
    return fitted, corpus, True


def _take_over(fitted: Run, given: Settings) -> None:
    """Gives a run that goes on the settings asked for, and tells what that restates."""
    from ltm_pyro.run.building import absolute_name
    from ltm_pyro.run.changes import changes_in
    from ltm_pyro.run.extending import extend

    corpus = given.get("corpus", {})
    for name in ("name", "tokenizer"):
        if name in corpus:
            corpus[name] = absolute_name(corpus[name])
    if given.get("init_from"):
        given["init_from"] = str(Path(given["init_from"]).absolute())
    for line in extend(fitted, changes_in(fitted.config, given, fitted.label)):
        print(line)


def fit_and_report(fitted: Run, corpus: Corpus, *, new: bool, board: bool = False) -> int:
    """Trains model and control, then reports; stops cleanly when asked to. The exit status."""
    from ltm_pyro.cli.printing import describe_fit, resume_line
    from ltm_pyro.run import Interrupted

    watch = _Watch(fitted)
    try:
        print(describe_fit(fitted))
        if not new:
            print(f"Resumed  at slow step {fitted.svi.slow_step}")
        print(f"Folder   {printable(str(fitted.folder))}", flush=True)
        with watch.signals:
            _fit_all(fitted, corpus, watch, board)
            # When one of many is gone `torchrun` sends SIGTERM to those that can tell of it.
            if many():
                _report(fitted, corpus)
        if not many():
            _report(fitted, corpus)
    except (Interrupted, KeyboardInterrupt):
        if fitted.parallel.is_rank_0:
            tell(f"stopped; {_put_back(fitted, new) or resume_line(fitted)}")
        return watch.signals.status
    except BrokenPipeError:
        hush()
        left = _put_back(fitted, new) or resume_line(fitted)
        tell(f"stopped, since nobody reads what it prints; {left}")
        return _BROKEN_PIPE
    except Exception as error:
        if fitted.parallel.is_rank_0 or isinstance(error, ProcessLostError):
            for note in _what_is_left(error, fitted, watch.stage, new):
                error.add_note(note)
        raise
    return 0


def _fit_all(fitted: Run, corpus: Corpus, watch: _Watch, board: bool) -> None:
    """The run, its control and its restarts, to their ends."""
    from ltm_pyro.cli.printing import stopped_early
    from ltm_pyro.run import train, train_control
    from ltm_pyro.run.fitting import fit_restarts
    from ltm_pyro.run.tensorboard import TensorBoard

    boards = [TensorBoard(fitted.folder / "tensorboard")] if board else []
    train(fitted, corpus, progress=watch.bars, callbacks=boards, after_step=watch)
    if fitted.svi.slow_step < fitted.config.steps:
        print(stopped_early(fitted), flush=True)
    if fitted.config.control:
        watch.begin("control")
        train_control(fitted, corpus, progress=watch.bars, after_step=watch)
    fit_restarts(fitted, corpus, progress=watch.bars, after_step=watch, begin=watch.begin)


def _what_is_left(error: Exception, fitted: Run, stage: str, new: bool) -> list[str]:
    """What to say with the error that has ended a fit: what is left, and how to go on with it."""
    from ltm_pyro.cli.printing import resume_line
    from ltm_pyro.run import load_run
    from ltm_pyro.run.replacing import undo_new

    kept = _put_back(fitted, new)
    if kept:
        return [kept]
    if isinstance(error, NonFiniteError):
        step = fitted.svi.slow_step if stage == "fit" else error.step
        return [f"the checkpoint of step {step} is kept in {str(fitted.folder)!r}"]
    if isinstance(error, ProcessLostError):
        return [f"the last checkpoint is of step {fitted.saved_step()}", resume_line(fitted)]
    if new and not fitted.svi.slow_step:
        undo_new(fitted.folder)
        return []
    try:
        load_run(fitted.folder, device="cpu")
    except Exception:
        return []  # nothing can be promised then
    return [f"the last checkpoint is whole: {resume_line(fitted)}"]


def _put_back(fitted: Run, new: bool) -> str:
    """Puts back the run that a new one without a step has replaced, and says so."""
    from ltm_pyro.run.replacing import undo_new, was_replaced

    unstarted = new and fitted.parallel.is_rank_0 and not fitted.svi.slow_step
    if not (unstarted and was_replaced(fitted.folder)):
        return ""
    undo_new(fitted.folder)
    return f"the run that was in {str(fitted.folder)!r} is kept"


class _Watch:
    """Follows a fit: tells of its course where no progress bar can, and when to stop."""

    def __init__(self, fitted: Run) -> None:
        self.folder = fitted.folder
        self.every = fitted.config.checkpoint_every
        self.total = fitted.config.steps
        self.signals = StopSignals()
        self.parallel = fitted.parallel
        self.parallel.asks_to_stop = self._asked
        self.bars = sys.stderr.isatty() and self.parallel.is_rank_0
        self.stage, self.label = "fit", ""  # or `control`; which restart

    def _asked(self) -> bool:
        return self.signals.received is not None

    def begin(self, stage: str, label: str = "") -> None:
        """Says which part comes next."""
        self.stage, self.label = stage, label

    def __call__(self, row: dict[str, float]) -> bool:
        """Whether to stop after the step with these metrics."""
        from ltm_pyro.course import bound_name
        from ltm_pyro.run.replacing import forget_replaced

        step = int(row["step"])
        if step == 1 and self.parallel.is_rank_0:
            forget_replaced(self.folder)  # the new run has started
        if not self.bars and (step % self.every == 0 or step == self.total):
            shown = f"{bound_name(row)}_per_token"
            print(
                f"{self.label}{self.stage}: step {step} of {self.total}, {shown} {row[shown]:.3f}",
                flush=True,
            )
        # Several processes stop together: the slow step asks all of them.
        return self._asked() and self.parallel.size == 1


def _report(fitted: Run, corpus: Corpus) -> None:
    """Scores, figures, samples and files: what the fit has come to.

    The run is read from its folder again, so that what is told is what anyone finds there later.
    """
    from ltm_pyro.cli.artefacts import list_files, write_artefacts, write_page
    from ltm_pyro.cli.printing import format_scores
    from ltm_pyro.diagnostics.collapse import format_panel
    from ltm_pyro.report.text import samples
    from ltm_pyro.run import load_run
    from ltm_pyro.run.scoring import score_run, summary

    parallel = fitted.parallel if fitted.parallel.size > 1 else None
    saved = load_run(fitted.folder, device=str(fitted.model.device), parallel=parallel)
    held_out = score_run(saved, corpus, split=corpus.held_out())
    if not fitted.parallel.is_rank_0:
        return
    scores = summary(saved, held_out)
    write_artefacts(saved, held_out, scores)
    panel = held_out.panel(saved.config.model.n_layers)
    if panel is not None:
        print(f"\n{format_panel(panel)}")
    print(f"\n{format_scores(scores)}")
    # The page asks for the control again, which processes read together.
    alone = saved if parallel is None else load_run(saved.folder, device=str(saved.model.device))
    texts = samples(alone, corpus)
    _print_samples(texts)
    print(f"\n{textwrap.fill(write_page(alone, corpus, held_out, texts), 100)}")
    print(f"\nFiles in {printable(str(saved.folder))}\n{list_files(saved.folder)}")


def _print_samples(texts: Sequence[Mapping[str, str]]) -> None:
    """Two texts from the prior, and one that goes on from held-out text."""
    from ltm_pyro.cli.printing import format_text

    for number, sample in enumerate(texts, start=1):
        if sample["kind"] == "prior":
            print(f"\nText {number}, its thoughts drawn from the prior")
        else:
            print(f"\nText after the held-out prompt {printable(sample['prompt'])!r}")
        print(format_text(sample["text"]))
