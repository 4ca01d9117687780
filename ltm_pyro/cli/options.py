"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ltm_pyro.cli.parsing import Parser
from ltm_pyro.cli.processes import many

if TYPE_CHECKING:
    from ltm_pyro.run import Run


def add_run(parser: Parser) -> None:
    """Which run, and where to compute."""
    parser.add_argument("run", type=str, metavar="RUN", help="a run folder, as fit leaves it")
    parser.option("checkpoint", str, "last, or best: of the highest held-out bound", default="last")
    add_device(parser)


def add_device(parser: Parser) -> None:
    """Where to compute."""
    parser.option("device", str, "where to compute (default: as fitted)")


def add_scoring(parser: Parser, split: str | None = "val") -> None:
    """Which sequences, and how many draws."""
    parser.option("split", str, "val, test or train", default=split)
    parser.option("sequences", int, "how many (default: the run's eval_sequences)")
    parser.option("draws", int, "S, fresh draws per sequence (default: eval_draws)")
    parser.option("seed", int, "seed of the draws", default=0)


def scoring(options: Namespace) -> dict[str, Any]:
    """The answers to `add_scoring`, as functions that score take them."""
    return {name: options[name] for name in ("split", "sequences", "draws", "seed")}


def open_run(folder: str, device: str | None, checkpoint: str = "last") -> Run:
    """The run in `folder`, in every process that `torchrun` started."""
    from ltm_pyro.engine.processes import join
    from ltm_pyro.run import load_run
    from ltm_pyro.run.opening import recorded_config

    if not many():
        return load_run(folder, checkpoint=checkpoint, device=device)
    device = device or recorded_config(Path(folder)).device
    return load_run(folder, checkpoint=checkpoint, parallel=join(device))


@contextmanager
def writing_to(run: str) -> Iterator[None]:
    """Inside the block no other command writes into this run's folder, which is there."""
    from ltm_pyro.run.files import refuse_protected
    from ltm_pyro.run.lock import sole_writer
    from ltm_pyro.run.opening import recorded_config

    recorded_config(Path(run))
    refuse_protected(Path(run))
    with sole_writer(run):
        yield


@contextmanager
def writing_file(run: str, target: Path) -> Iterator[None]:
    """Inside the block no other command writes `target`, in the run's folder or elsewhere."""
    from ltm_pyro.run.files import refuse_irregular, refuse_protected
    from ltm_pyro.run.lock import sole_writer

    inside = target.parent.resolve() == Path(run).resolve()
    if not inside:
        refuse_protected(target.parent)
    refuse_irregular(target)
    with writing_to(run) if inside else sole_writer(target):
        yield
