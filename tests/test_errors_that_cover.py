"""Errors against the spread that they are of, and one answer to one question whoever is asked."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from tolerances import EXACT, MC

import ltm_pyro as ltm
from ltm_pyro.diagnostics.control import against_control
from ltm_pyro.diagnostics.estimates import clustered_ratio, khat_threshold
from ltm_pyro.models.full_normal import FullNormal


def oracle_in(dims: int, noise_scale: float = 1.0) -> ltm.LinearGaussian:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, dims, generator=generator, dtype=torch.float64)
    return ltm.LinearGaussian(W, noise_scale, shape=(1, dims))


def narrow(oracle: ltm.LinearGaussian, batch: ltm.Batch, k: float) -> ltm.Posterior:
    """The exact posterior, its covariance times 1 - k: weights then have a tail of shape k."""
    exact = oracle.posterior(batch)
    q = FullNormal(exact.mean, torch.linalg.cholesky((1 - k) * exact.covariance))
    return ltm.Posterior(q, oracle.prior(), batch.ids, batch.mask, "narrow")


@pytest.mark.parametrize(("draws", "k"), [(32, 0.3), (32, 0.6), (64, 0.5)])
def test_the_error_of_the_iw_bound_is_its_spread_over_seeds(draws: int, k: float) -> None:
    # 4,000 sequences of one posterior up to shifts are as many seeds. The delta method's error is
    # 0.39 here at k = 0.6 and S = 32, the spread 0.60. The jackknife's mean square is known to
    # about 5 %, and by Efron and Stein not below the variance.
    oracle = oracle_in(8)
    batch = oracle.simulate(4000, seed=1)
    scores = ltm.evaluate(oracle, narrow(oracle, batch, k), batch, draws=draws, controls=False)
    spread = (scores.iw_bound - oracle.log_evidence(batch).numpy()).values.std()
    printed = float(np.sqrt((scores.iw_bound_se**2).mean()))
    assert 0.93 * spread < printed < 1.15 * spread


@pytest.mark.parametrize("k", [0.3, 0.5, 0.6])
def test_what_is_called_reliable_is_covered(k: float) -> None:
    # With the error and the k-hat of the estimating draws, 73 % (k = 0.5) and 37 % (0.6) were.
    oracle = oracle_in(8)
    batch = oracle.simulate(400, seed=2)
    found = ltm.importance_bound(oracle, narrow(oracle, batch, k), batch, draws=1000, rows=20_000)
    reliable = found["reliable"].values
    off = np.abs(found["iw_bound"].values - oracle.log_evidence(batch).numpy())
    covered = (off <= 2 * found["iw_bound_se"].values)[reliable]
    assert reliable.sum() > 40
    # 95 % promised; 3 standard errors of a share of at least 40 to 400 sequences below that.
    assert covered.mean() > 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(covered))


def test_too_few_draws_are_called_neither_reliable_nor_heavy() -> None:
    oracle = oracle_in(8)
    batch = oracle.simulate(4)
    found = ltm.importance_bound(oracle, narrow(oracle, batch, 0.2), batch, draws=100)
    assert np.isnan(found["khat"]).all()
    assert not found["reliable"].any()
    assert "100 draws" in found.attrs["flags"]


def test_one_question_has_one_answer() -> None:
    oracle = oracle_in(4)
    batch = oracle.simulate(8, seed=3)
    guides = [ltm.build_guide(name, oracle) for name in ("mean_field", "full_rank")]
    table = ltm.compare(oracle, batch, guides, budget=16, draws=1000, gaps=False, seed=5).dataset
    for guide, label in zip(guides, table["guide"].values, strict=True):
        fast = ltm.Fast(steps=16)
        post = ltm.DualRateSVI(oracle, guide, fast, seed=5).infer(batch)
        scores = ltm.evaluate(oracle, post, batch, draws=1000, seed=5)
        bound = ltm.importance_bound(oracle, post, batch, draws=1000, seed=5)
        told = ltm.diagnose(oracle, post, batch, draws=1000, steps=0, chains=0, seed=5).data
        row = table.sel(guide=label)
        for name in ("elbo", "iw_bound", "khat"):
            np.testing.assert_allclose(row[name], scores[name], rtol=1e-12)
            np.testing.assert_allclose(told[name], scores[name], rtol=1e-9)
        for name in ("iw_bound", "khat"):
            np.testing.assert_allclose(bound[name], scores[name], rtol=1e-12)
        assert bound.attrs["khat_limit"] == scores.attrs["khat_limit"] == khat_threshold(1000)
        assert (bound["iw_bound_se"] >= scores["iw_bound_se"] - 1e-12).all()


def test_a_prediction_can_beat_the_exact_conditional_and_is_not_called_a_bound() -> None:
    # The data have less noise than the model believes. The exact conditional spreads over what it
    # does not know of z; a point mass does not, and here that is rewarded.
    oracle = oracle_in(4, noise_scale=1.0)
    batch = oracle_in(4, noise_scale=0.1).simulate(200, seed=4)
    post = ltm.DualRateSVI(
        oracle, ltm.build_guide("delta", oracle), ltm.Fast(steps=200, lr=0.1)
    ).infer(batch.prefix(4))
    scores = ltm.evaluate(oracle, post, batch, draws=4, mode="prefix")
    exact = oracle.log_evidence(batch) - oracle.log_evidence(batch.prefix(4))
    assert float((scores["log_predictive"] - exact.numpy()).mean()) > 0.1
    assert scores.attrs["ppl_predictive"] < math.exp(-float(exact.mean()) / 2)
    assert not {"elbo", "iw_bound", "kl"} & set(scores.data_vars)
    assert not {"ppl_elbo", "ppl_iw"} & set(scores.attrs)


def test_sequences_with_nothing_left_are_left_out_and_said_to_be() -> None:
    oracle = oracle_in(4)
    whole = oracle.simulate(6, seed=5)
    mask = whole.mask.clone()
    mask[2, 2:] = False  # a tail of two
    batch = replace(whole, mask=mask)
    svi = ltm.DualRateSVI(oracle, ltm.build_guide("mean_field", oracle))
    scores = ltm.evaluate(oracle, svi.infer(batch.prefix(3)), batch, mode="prefix")
    assert scores["sequence"].values.tolist() == [0, 1, 3, 4, 5]
    assert scores.attrs["left_out"] == 1
    assert "1 of 6" in scores.attrs["note"]
    assert scores["n_tokens"].values.tolist() == [3] * 5
    with pytest.raises(ltm.InputError, match="nothing is left"):
        ltm.evaluate(oracle, svi.infer(batch.prefix(3)), batch.prefix(3), mode="prefix")


def test_scores_know_their_documents() -> None:
    oracle = oracle_in(4)
    one = oracle.simulate(30, seed=6)
    pieces = torch.arange(30).repeat_interleave(8)  # eight like pieces of each of thirty documents
    batch = replace(one.select(pieces), ids=torch.arange(240), documents=pieces)
    scores = ltm.evaluate(oracle, narrow(oracle, batch, 0.0), batch, draws=4)
    alone = ltm.evaluate(oracle, narrow(oracle, one, 0.0), one, draws=4)
    assert scores["document"].values.tolist() == pieces.tolist()
    assert (scores.attrs["n_documents"], alone.attrs["n_documents"]) == (30, 0)
    # Exact scores: the pieces of a document are copies, and copies add nothing.
    for name in ("ppl_elbo", "ppl_elbo_sampling_se"):
        assert scores.attrs[name] == pytest.approx(alone.attrs[name], rel=1e-6)
    few = batch.select(torch.arange(20))
    assert "too few" in ltm.evaluate(oracle, narrow(oracle, few, 0.0), few, draws=4).attrs["note"]


def scores_of(nats: np.ndarray, documents: np.ndarray, column: str, sign: float) -> xr.Dataset:
    tokens = np.full(len(nats), 100)
    columns = {column: ("sequence", sign * nats), "n_tokens": ("sequence", tokens)}
    coords = {"sequence": np.arange(len(nats)), "document": ("sequence", documents)}
    return xr.Dataset(columns, coords=coords)


@pytest.mark.parametrize(
    ("gain", "column", "verdict"),
    [
        (5.0, "elbo", "this fit is better"),
        (0.0, "elbo", "not told apart"),
        (-5.0, "elbo", "a bound cannot say"),
        (-5.0, "log_predictive", "this fit is worse"),
    ],
)
def test_the_ratio_to_the_control_is_paired_and_says_what_its_error_allows(
    gain: float, column: str, verdict: str
) -> None:
    rng = np.random.default_rng(7)
    documents = np.repeat(np.arange(40), 5)
    hard = 150 + 30 * np.repeat(rng.normal(size=40), 5)  # what both find hard cancels
    noise = rng.normal(0, 1.0, 200)
    scores = scores_of(hard - gain + noise, documents, column, -1.0)
    control = scores_of(hard, documents, "nll_z0", 1.0)
    (found,) = against_control(scores, control).values()
    rate = clustered_ratio(noise - gain, np.full(200, 100), documents)
    assert found["difference_per_token"] == pytest.approx(rate.value)
    assert found["ratio"] == pytest.approx(math.exp(rate.value))
    assert found["ratio_error"] == pytest.approx(found["ratio"] * rate.error)
    assert found["ratio_error"] < 0.005  # each alone: about 0.05
    assert verdict in found["verdict"]
    assert found["documents"] == 40


def test_the_error_of_a_ratio_is_not_below_that_of_its_draws() -> None:
    same, documents = np.full(20, 150.0), np.arange(20)
    scores = scores_of(same - 1.0, documents, "elbo", -1.0)
    scores["elbo_se"] = ("sequence", np.where(documents == 3, 40.0, 0.0))
    (found,) = against_control(scores, scores_of(same, documents, "nll_z0", 1.0)).values()
    assert found["difference_per_token_se"] == pytest.approx(40.0 / 2000)
    assert found["verdict"] == "not told apart"


def test_draws_of_the_bound_are_those_of_evaluate_at_any_number() -> None:
    oracle = oracle_in(4)
    batch = oracle.simulate(8, seed=8)
    post = narrow(oracle, batch, 0.3)
    for draws in (2, 64, 65, 200):
        bound = ltm.importance_bound(oracle, post, batch, draws=draws, rows=7, seed=9)
        scores = ltm.evaluate(oracle, post, batch, draws=draws, seed=9, controls=False)
        EXACT.assert_close(
            torch.from_numpy(bound["iw_bound"].values), torch.from_numpy(scores["iw_bound"].values)
        )
    truth = oracle.log_evidence(batch).numpy()
    MC.assert_at_most(bound["iw_bound"], bound["iw_bound_se"], truth, draws=200)
