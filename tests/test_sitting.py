"""How far a newcomer has to read: the files that a slow step enters before its first gradient."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import ltm_pyro as ltm

PACKAGE = Path(ltm.__file__).parent
MOST_FILES = 15


class _ReachedError(Exception):
    """The first gradient is asked for."""


def test_a_slow_step_enters_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ltm.LatentThoughtModel.from_preset("nano", vocab_size=16)
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=2))
    batch = ltm.Batch(torch.randint(16, (2, 16)))
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            entered.add(str(path.relative_to(PACKAGE)))

    def gradient(*args: Any, **options: Any) -> None:
        sys.settrace(None)
        raise _ReachedError

    monkeypatch.setattr(torch.autograd, "grad", gradient)
    before = sys.gettrace()
    sys.settrace(note)
    try:
        with pytest.raises(_ReachedError):
            svi.step(batch)
    finally:
        sys.settrace(before)
    assert "inference/clocks/fast.py" in entered
    assert len(entered) <= MOST_FILES, sorted(entered)
