from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ltm_pyro import compat_arviz
from ltm_pyro.diagnostics.estimates import khat_threshold
from ltm_pyro.diagnostics.psis import MIN_DRAWS, pareto_khat
from ltm_pyro.errors import InputError

DRAWS = 4_000


def pareto_log_weights(k: float, sequences: int, seed: int) -> np.ndarray:
    """Log weights (S, B) whose weights are generalised Pareto(k, scale 1), by inversion."""
    u = np.random.default_rng(seed).random((DRAWS, sequences))
    return np.log(np.expm1(-k * np.log1p(-u)) / k)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0])
def test_recovers_the_shape_of_known_tails(k: float) -> None:
    # One estimate rests on the 190 largest of 4,000 draws, and its standard deviation is about
    # (1 + k) / sqrt(190): 0.09 to 0.15. Averaging 64 columns takes that to 0.02 at most, so the
    # tolerance of 0.1 tests for bias (the prior on k pulls it a little towards 0.5).
    khat = pareto_khat(pareto_log_weights(k, sequences=64, seed=1))
    assert khat.shape == (64,)
    assert khat.mean() == pytest.approx(k, abs=0.1)
    assert khat.std() < 0.25


def test_weights_are_log_p_minus_log_q_and_not_the_reverse() -> None:
    # Weights of Pareto(1), all at least 1; their reciprocals are uniform, a tail of k = -1 (ArviZ
    # pulls estimates a little towards 0.5).
    heavy = np.random.default_rng(2).exponential(size=(DRAWS, 8))
    assert pareto_khat(heavy).min() > 0.6
    assert pareto_khat(-heavy).max() < -0.4


def test_gaussian_proposal_of_known_quality() -> None:
    # p = N(0, 1), q = N(0, s^2): log w = -z^2/2 (1 - 1/s^2) + const, so with s < 1 the weights
    # have a Pareto-like tail with k = 1 - s^2, and with s > 1 they are bounded.
    z = np.random.default_rng(3).standard_normal((DRAWS, 64))
    narrow, wide = 0.6 * z, 1.3 * z
    log_w_narrow = -(narrow**2) / 2 + z**2 / 2
    log_w_wide = -(wide**2) / 2 + z**2 / 2
    # The tail approaches its limit slowly (a log correction), hence the generous interval.
    assert 0.4 < pareto_khat(log_w_narrow).mean() < 0.75
    assert pareto_khat(log_w_wide).mean() < 0.1


def test_columns_are_independent_and_constants_do_not_matter() -> None:
    weights = pareto_log_weights(0.5, sequences=3, seed=4)
    whole = pareto_khat(weights)
    alone = [pareto_khat(weights[:, [i]])[0] for i in range(3)]
    np.testing.assert_allclose(whole, alone)
    np.testing.assert_allclose(pareto_khat(weights - 2_000.0), whole, atol=1e-6)


def test_input_is_left_alone() -> None:
    weights = pareto_log_weights(0.5, sequences=2, seed=5)
    before = weights.copy()
    pareto_khat(weights)
    np.testing.assert_array_equal(weights, before)


def test_degenerate_columns_by_name() -> None:
    rng = np.random.default_rng(6)
    usual = rng.normal(size=1000)
    with_zeros = np.where(np.arange(1000) % 2, usual, -np.inf)
    cases = {
        "exact posterior": (np.full(1000, -321.0), 0.0),
        "exact up to rounding": (-321.0 + 1e-4 * rng.random(1000), 0.0),
        "infinite weight": (np.append(usual[1:], np.inf), np.inf),
        "no weight": (np.full(1000, -np.inf), np.nan),
        "not a number": (np.append(usual[1:], np.nan), np.nan),
        "one weight above zero": (np.append(np.full(999, -np.inf), 0.0), np.inf),
        "tied largest": (np.where(np.arange(1000) < 500, 0.0, usual - 10), np.inf),
    }
    columns = np.stack([column for column, _ in cases.values()] + [with_zeros], axis=1)
    khat = pareto_khat(columns)
    for (name, (_, expected)), got in zip(cases.items(), khat, strict=False):
        np.testing.assert_equal(got, expected, err_msg=name)
    assert np.isfinite(khat[-1])  # draws of weight zero are draws like any others


def test_too_few_draws_are_not_known() -> None:
    assert np.isnan(pareto_khat(np.random.default_rng(7).normal(size=(MIN_DRAWS - 1, 4)))).all()
    assert np.isfinite(pareto_khat(np.random.default_rng(7).normal(size=(MIN_DRAWS, 4)))).all()


def test_shape_is_checked() -> None:
    with pytest.raises(InputError, match=r"\(S, B\)"):
        pareto_khat(np.zeros(100))


def test_threshold_knows_the_sample_size() -> None:
    assert khat_threshold(64) == pytest.approx(1 - 1 / np.log10(64))
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10_000) == 0.7
    with pytest.raises(InputError, match="draws"):
        khat_threshold(1)


def test_arviz_and_matplotlib_are_imported_only_where_they_are_used() -> None:
    code = (
        "import sys, ltm_pyro.export, ltm_pyro.diagnostics.psis;"
        "sys.exit('arviz' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_hundreds_of_nats_apart_are_unreliable() -> None:
    # At one of many such seeds ArviZ 0.23's fit overflows, and would answer 1/3.
    wild = 2000.0 * np.random.default_rng(160).normal(size=200)
    tame = np.random.default_rng(0).normal(size=200)
    khat = compat_arviz.pareto_khat(np.stack([tame, wild, tame], axis=1))
    assert khat[1] > 100.0
    assert khat[0] == khat[2] == compat_arviz.pareto_khat(tame[:, None])[0] < 1.0
