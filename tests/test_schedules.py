"""Schedules as tables: value by step."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import EXACT

from ltm_pyro.config import Fast, Slow
from ltm_pyro.diagnostics.cost import fast_reach, kl_floor_per_sequence
from ltm_pyro.inference.clocks.schedules import (
    constant,
    cosine,
    kl_weight,
    learning_rate,
    slow_kl_weight,
    warmup_cosine,
)
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.linear_gaussian import LinearGaussian


def _same(actual: list[float], expected: list[float]) -> None:
    EXACT.assert_close(
        torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("factor", "total", "expected"),
    [
        (constant, 3, [1.0, 1.0, 1.0]),
        (cosine, 5, [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0]),
        (lambda s, t: cosine(s, t, 0.1), 3, [1.0, 0.55, 0.1]),
        (cosine, 1, [1.0]),
        (cosine, 2, [1.0, 0.0]),
        (lambda s, t: warmup_cosine(s, t, 0.4), 5, [0.5, 1.0, 1.0, 0.5, 0.0]),
        (lambda s, t: warmup_cosine(s, t, 0.0, 0.2), 3, [1.0, 0.6, 0.2]),
        (lambda s, t: warmup_cosine(s, t, 0.05), 4, [1.0, 0.75, 0.25, 0.0]),
    ],
)
def test_factor_by_step(factor, total: int, expected: list[float]) -> None:
    _same([factor(step, total) for step in range(total)], expected)


def test_steps_beyond_the_horizon_keep_the_last_value() -> None:
    for step in (10, 11, 1000):
        assert cosine(step, 10, 0.1) == pytest.approx(0.1)
        assert warmup_cosine(step, 10, 0.2, 0.1) == pytest.approx(0.1)
        assert kl_weight(step, 10, 0.02, 0.3, 0.7) == 1.0


@pytest.mark.parametrize(
    ("start", "hold", "full", "expected"),
    [
        (0.2, 0.2, 0.6, [0.2, 0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]),
        (0.0, 0.0, 1.0, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (0.5, 0.3, 0.3, [0.5] * 3 + [1.0] * 7),
        (1.0, 0.3, 0.7, [1.0] * 10),
        (0.5, 0.0, 0.0, [1.0] * 10),
        (0.5, 1.0, 1.0, [0.5] * 10),
    ],
)
def test_kl_weight_by_step(start: float, hold: float, full: float, expected: list[float]) -> None:
    _same([kl_weight(step, 10, start, hold, full) for step in range(10)], expected)


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        (Fast(lr=2.0, schedule="constant"), [2.0, 2.0, 2.0]),
        (Fast(lr=2.0, final_fraction=0.1), [2.0, 1.1, 0.2]),
        (Fast(lr=2.0, schedule="warmup_cosine", warmup=1 / 3, final_fraction=0.5), [2.0, 2.0, 1.0]),
        (Fast(lr=2.0, schedule=lambda step, total: step / total), [0.0, 2 / 3, 4 / 3]),
        (Slow(lr=3.0, warmup=0.0, final_fraction=0.0), [3.0, 1.5, 0.0]),
    ],
)
def test_learning_rate_by_step(clock: Fast | Slow, expected: list[float]) -> None:
    _same([learning_rate(clock, step, 3) for step in range(3)], expected)


def test_slow_kl_weight_reads_the_clock() -> None:
    slow = Slow(kl_start=0.02, kl_hold=0.3, kl_full=0.7)
    _same([slow_kl_weight(slow, s, 100) for s in (0, 29, 50, 70)], [0.02, 0.02, 0.51, 1.0])


def test_reach_is_the_sum_of_the_rates() -> None:
    assert fast_reach(Fast(steps=4, lr=0.5, schedule="constant")) == pytest.approx(2.0)
    assert fast_reach(Fast(steps=0)) == 0.0


def test_kl_floor_is_what_a_dimension_without_data_pays() -> None:
    # Loadings of 0: the data say nothing, and the best q is the prior, at no cost.
    fast = Fast(steps=16, optimizer="adam", lr=0.3)
    oracle = LinearGaussian([[0.0]], noise_scale=1.0)
    guide = build_guide("mean_field", oracle, init_log_variance=-5.0)
    paid = DualRateSVI(oracle, guide, fast).infer(oracle.simulate(1)).kl().item()
    floor = kl_floor_per_sequence(fast, 1, init_log_variance=-5.0)
    left = -5.0 + fast_reach(fast)
    assert floor == pytest.approx(0.5 * (math.exp(left) - 1 - left))
    assert paid == pytest.approx(floor, rel=0.05)
    # In the paper's small configuration: several nats in each of 1024 tokens.
    assert floor * 24 * 512 / 1024 > 5


@pytest.mark.parametrize("start", [-3.0, 2.0])
def test_kl_floor_of_natural_steps(start: float) -> None:
    fast = Fast(steps=16, momentum=0.0, average=0.0)
    oracle = LinearGaussian([[0.0]], noise_scale=1.0)
    guide = build_guide("mean_field", oracle, init_log_variance=start)
    paid = DualRateSVI(oracle, guide, fast).infer(oracle.simulate(1)).kl().item()
    # Nothing is random here but a mean that stays at 0: the recursion is exact but for rounding.
    assert paid == pytest.approx(kl_floor_per_sequence(fast, 1, start), rel=1e-4)


@pytest.mark.parametrize(
    ("start", "steps", "floored"),
    [(0.0, 16, False), (-1.0, 16, False), (-9.0, 16, True), (9.0, 4, True)],
)
def test_kl_floor_is_what_the_schedule_cannot_reach(
    start: float, steps: int, floored: bool
) -> None:
    fast = Fast(steps=steps, optimizer="adam", lr=0.1, schedule="constant")
    floor = kl_floor_per_sequence(fast, 3, start)
    assert (floor > 0) == floored
