"""The guards see what they are there to see."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pyro
import pytest
import torch
from guards import GlobalState, lacks_reason
from torch.distributions import Distribution


def _leave_open_handler() -> None:
    pyro.poutine.trace().__enter__()


LEAKS: dict[str, Callable[[], object]] = {
    "torch default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch grad mode": lambda: torch.set_grad_enabled(False),
    "torch deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "torch.distributions validation": lambda: Distribution.set_default_validate_args(False),
    "pyro parameter store": lambda: pyro.param("leak", torch.zeros(())),
    "pyro handler stack": _leave_open_handler,
    "pyro setting module_local_params": lambda: pyro.settings.set(module_local_params=True),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_named_and_undone(name: str) -> None:
    before = GlobalState.capture()
    LEAKS[name]()
    changed = before.differences(GlobalState.capture())
    before.restore()
    assert any(line.startswith(f"{name}: ") for line in changed)
    assert before.differences(GlobalState.capture()) == []


def test_reading_the_state_changes_nothing() -> None:
    assert GlobalState.capture().differences(GlobalState.capture()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Skipped: ", True),
        ("Skipped", True),
        ("Skipped: unconditional skip", True),
        ("Skipped: needs a CUDA device", False),
    ],
)
def test_lacks_reason(text: str, expected: bool) -> None:
    assert lacks_reason(("test_x.py", 1, text)) is expected


def test_each_test_is_seeded_by_its_own_name(request: pytest.FixtureRequest) -> None:
    assert torch.initial_seed() == zlib.crc32(request.node.nodeid.encode())
