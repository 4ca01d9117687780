"""`RowAdam` is torch's Adam for each row by itself."""

from __future__ import annotations

import gc
import weakref

import torch
from tolerances import EXACT
from torch import Tensor

from ltm_pyro.engine.rows.optimizers import RowAdam

BETAS = (0.8, 0.95)


def _start() -> dict[str, Tensor]:
    return {
        "a": torch.randn(3, 2, 2, dtype=torch.float64),
        "b": torch.randn(3, 4, dtype=torch.float64),
    }


def _gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """A gradient that depends on row, step and value."""
    return {name: (p - step).sin() + p for name, p in params.items()}


def _run(params: dict[str, Tensor], steps: range, optimizer: RowAdam | None = None) -> RowAdam:
    optimizer = optimizer or RowAdam(params, BETAS, memory=1.0)
    for step in steps:
        optimizer.step(_gradients(params, step), lr=0.1 / (1 + step))
    return optimizer


def test_agrees_with_torch_adam() -> None:
    params = _start()
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    adam = torch.optim.Adam(theirs.values(), lr=0.1, betas=BETAS)
    _run(params, range(20))
    for step in range(20):
        adam.param_groups[0]["lr"] = 0.1 / (1 + step)
        gradients = _gradients({n: p.detach() for n, p in theirs.items()}, step)
        for name, p in theirs.items():
            p.grad = gradients[name]
        adam.step()
    for name, p in params.items():
        EXACT.assert_close(p, theirs[name].detach())


def test_rows_are_independent() -> None:
    together = _start()
    alone = {name: p[1:2].clone() for name, p in together.items()}
    _run(together, range(10))
    _run(alone, range(10))
    for name, p in alone.items():
        assert torch.equal(together[name][1:2], p)


def test_a_row_does_not_feel_how_many_there_are() -> None:
    # In single precision, where torch's vectorised functions round otherwise than its scalar ones.
    together = {"a": torch.randn(40, 16)}
    alone = {"a": together["a"][:1].clone()}
    for params in (together, alone):
        _run(params, range(40), RowAdam(params, BETAS))
    assert torch.equal(together["a"][:1], alone["a"])


def test_a_row_that_comes_back_brings_its_step_count() -> None:
    # Row 0 is visited with row 1, then goes on beside a row that is new.
    whole = _start()
    visited = {name: p[:2].clone() for name, p in whole.items()}
    state = _run(visited, range(5)).state()
    mixed = {name: torch.cat((visited[name][:1], p[2:])).clone() for name, p in whole.items()}
    optimizer = RowAdam(mixed, BETAS, memory=1.0)
    fresh = optimizer.state()
    optimizer.load({k: torch.cat((state[k][:1], fresh[k][1:])) for k in fresh})
    _run(mixed, range(5, 10), optimizer)
    expected = {name: p[:1].clone() for name, p in whole.items()}
    _run(expected, range(10))
    for name, p in expected.items():
        assert torch.equal(mixed[name][:1], p)
    assert optimizer.state()["adam_steps"].tolist() == [10.0, 5.0]


def test_state_round_trip_continues_bit_for_bit() -> None:
    straight = _start()
    stopped = {name: p.clone() for name, p in straight.items()}
    _run(straight, range(8))
    state = {name: value.clone() for name, value in _run(stopped, range(4)).state().items()}
    resumed = RowAdam(stopped, BETAS, memory=1.0)
    resumed.load(state)
    _run(stopped, range(4, 8), resumed)
    for name, p in straight.items():
        assert torch.equal(stopped[name], p)


def test_the_first_gradients_are_forgotten() -> None:
    """A first gradient 1,000 times too large must not shorten the steps 100 steps later."""
    moved = {}
    for memory in (0.6, 1.0):
        params = {"a": torch.zeros(1, 1, dtype=torch.float64)}
        optimizer = RowAdam(params, (0.9, 0.999), memory=memory)
        for step in range(100):
            before = params["a"].clone()
            optimizer.step({"a": torch.full((1, 1), 1e3 if step == 0 else 1.0).double()}, lr=0.1)
        moved[memory] = float((before - params["a"]).abs())
    assert moved[0.6] > 0.08  # the full learning rate again, or nearly
    assert moved[1.0] < 0.01  # Adam itself


def test_moments_are_freed_with_their_optimiser() -> None:
    # A fast loop has one of its own: none may wait for the garbage collector.
    gc.disable()
    try:
        optimizer = _run(_start(), range(3))
        moment = weakref.ref(optimizer.first["a"])
        del optimizer
        assert moment() is None
    finally:
        gc.enable()
