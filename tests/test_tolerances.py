"""The tolerances do what their docstrings promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import EXACT, FALSE_ALARM_RATE, GOF, MC, MonteCarlo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_takes_rounding_and_nothing_more(dtype: torch.dtype) -> None:
    x = torch.linspace(0.1, 3.0, 50, dtype=dtype)
    EXACT.assert_close(x.flip(0).cumsum(0)[-1], x.sum())
    with pytest.raises(AssertionError):
        EXACT.assert_close(x * (1 + 1e-3), x)


def test_monte_carlo_allowance_grows_with_comparisons_and_shrinks_with_draws() -> None:
    assert MC.sigmas() == pytest.approx(4.26, abs=0.01)
    assert MC.sigmas(comparisons=1000) == pytest.approx(5.61, abs=0.01)
    assert MC.sigmas(draws=10) > MC.sigmas(draws=1000) > MC.sigmas()


def test_monte_carlo_false_alarm_rate_is_the_stated_one() -> None:
    # At a rate that can be seen: 4,000 repeats of ten means of five draws, 5 % alarms expected.
    rate, repeats = 0.05, 4000
    draws = np.random.default_rng(0).normal(size=(repeats, 10, 5))
    mean, error = draws.mean(-1), draws.std(-1, ddof=1) / np.sqrt(5)
    alarms = (np.abs(mean) > MonteCarlo(rate).sigmas(10, draws=5) * error).any(-1).sum()
    # Bonferroni on independent means: 1 - (1 - rate / 10)^10, a little under the rate.
    GOF.assert_fits(stats.binomtest(int(alarms), repeats, 1 - (1 - rate / 10) ** 10).pvalue)


def test_monte_carlo_fails_on_bias_and_on_nan() -> None:
    MC.assert_close([1.0, 2.0], 0.1, [1.1, 1.9])
    MC.assert_at_most(-10.0, 0.1, bound=-3.0)
    with pytest.raises(AssertionError, match="1 of 2 estimates"):
        MC.assert_close([1.0, 2.0], 0.1, [1.0, 2.6])
    with pytest.raises(AssertionError, match="off by"):
        MC.assert_at_most(-2.0, 0.1, bound=-3.0)
    with pytest.raises(AssertionError):
        MC.assert_close(np.nan, 0.1, 0.0)


def test_goodness_of_fit_tells_right_from_wrong() -> None:
    draws = np.random.default_rng(0).normal(size=4000)
    GOF.assert_fits(stats.kstest(draws, "norm").pvalue)
    assert GOF.rejects(stats.kstest(draws / 2, "norm").pvalue)
    with pytest.raises(AssertionError, match="p-values"):
        GOF.assert_fits([0.5, FALSE_ALARM_RATE / 3])
