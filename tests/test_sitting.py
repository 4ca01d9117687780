"""How far a newcomer has to read: files that a step and a score enter, and lines of the idea."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import ltm_pyro as ltm

PACKAGE = Path(ltm.__file__).parent
MOST_OF_A_STEP = 15
MOST_OF_A_SCORE = 10

SITTING = (
    "models/latent_thought.py", "inference/guides/base.py", "inference/guides/mean_field.py",
    "inference/objectives/evidence.py", "inference/clocks/reference.py",
    "inference/clocks/svi.py", "inference/clocks/fast.py", "inference/clocks/slow.py",
)  # fmt: skip
"""The generative story, q, the ELBO and both clocks."""
MOST_LINES_OF_THE_SITTING = 1199
MOST_LINES_OF_INFERENCE = 2200


class _ReachedError(Exception):
    """The first gradient is asked for."""


@pytest.fixture
def svi() -> ltm.DualRateSVI:
    model = ltm.LatentThoughtModel.from_preset("nano", vocab_size=16)
    return ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=2))


BATCH = ltm.Batch(torch.randint(16, (2, 16)))


def files_entered(work: Callable[[], object]) -> set[str]:
    """The package's files in which something is called, until `work` ends or is stopped."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            entered.add(str(path.relative_to(PACKAGE)))

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    except _ReachedError:
        pass
    finally:
        sys.settrace(before)
    return entered


def test_a_slow_step_enters_few_files(
    svi: ltm.DualRateSVI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(*args: Any, **options: Any) -> None:
        sys.settrace(None)
        raise _ReachedError

    monkeypatch.setattr(torch.autograd, "grad", gradient)
    entered = files_entered(lambda: svi.step(BATCH))
    assert "inference/clocks/fast.py" in entered
    assert len(entered) <= MOST_OF_A_STEP, sorted(entered)


def test_a_score_enters_few_files(svi: ltm.DualRateSVI) -> None:
    post = svi.infer(BATCH)
    evaluate = ltm.evaluate  # looked up once, by the package's front door
    entered = files_entered(lambda: evaluate(svi.model, post, BATCH))
    assert "diagnostics/bounds.py" in entered
    assert len(entered) <= MOST_OF_A_SCORE, sorted(entered)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_idea_is_read_in_a_sitting() -> None:
    lines = {name: lines_of(PACKAGE / name) for name in SITTING}
    assert sum(lines.values()) <= MOST_LINES_OF_THE_SITTING, lines


def test_inference_is_short() -> None:
    """Without the families of q and the chains, each of which is read by itself."""
    root = PACKAGE / "inference"
    read = [f for f in root.rglob("*.py") if f.relative_to(root).parts[0] not in ("guides", "mcmc")]
    lines = {str(f.relative_to(root)): lines_of(f) for f in read}
    assert sum(lines.values()) <= MOST_LINES_OF_INFERENCE, lines
