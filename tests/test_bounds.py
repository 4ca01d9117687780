"""Scores against exact values, their errors against brute force, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from tolerances import EXACT, MC

import ltm_pyro as ltm
from ltm_pyro.diagnostics import bounds
from ltm_pyro.diagnostics.estimates import clustered_ratio, totals


@pytest.fixture
def oracle() -> ltm.LinearGaussian:
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return ltm.LinearGaussian(loadings, 0.5, shape=(2, 2))


def exact_posterior(oracle: ltm.LinearGaussian, batch: ltm.Batch) -> ltm.Posterior:
    """q = p(z | x): every importance weight is then exactly the evidence."""
    return ltm.Posterior(oracle.posterior(batch), oracle.prior(), batch.ids, batch.mask, "exact")


def micro_model(**overrides: int) -> ltm.LatentThoughtModel:
    """A small model whose thoughts matter from the start."""
    settings = {
        "vocab_size": 5, "seq_len": 8, "width": 16, "n_heads": 2, "mlp_hidden": 24,
        "n_layers": 2, "thoughts_per_layer": 1, "thought_dim": 3, "window": 4,
    }  # fmt: skip
    model = ltm.LatentThoughtModel(ltm.ModelConfig(**(settings | overrides)))
    for name, p in model.named_parameters():
        if name.endswith("cross_attention.out.weight"):
            torch.nn.init.normal_(p, std=0.5)
    return model


def test_at_the_exact_posterior_every_bound_is_the_evidence(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(32, seed=1)
    evidence = oracle.log_evidence(batch).numpy()
    scores = ltm.evaluate(oracle, exact_posterior(oracle, batch), batch, draws=16)
    np.testing.assert_allclose(scores.elbo, evidence, rtol=EXACT.float64)
    np.testing.assert_allclose(scores.iw_bound, evidence, rtol=EXACT.float64)
    assert float(scores.elbo_se.max()) < 1e-9
    assert scores.attrs["kl_estimator"] == "monte_carlo"


def test_columns_agree_with_exact_expectations(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(16, seed=2)
    post = ltm.DualRateSVI(oracle, ltm.build_guide("mean_field", oracle)).infer(batch, steps=32)
    scores = ltm.evaluate(oracle, post, batch, draws=2000, seed=5)
    variance = post.parameters["log_variance"].exp().flatten(1)
    residual = batch.observed - post.mean.flatten(1) @ oracle.W.T
    expected_square = residual.square().sum(1) + variance @ oracle.W.square().sum(0)
    exact_nll = 0.5 * expected_square / 0.25 + 6 * (0.5 * math.log(2 * math.pi) + math.log(0.5))
    exact_elbo = (-exact_nll - post.kl()).numpy()
    MC.assert_close(scores.nll_given_z, scores.nll_given_z_se, exact_nll.numpy(), draws=2000)
    MC.assert_close(scores.elbo, scores.elbo_se, exact_elbo, draws=2000)
    np.testing.assert_allclose(scores.kl, post.kl(), rtol=EXACT.float64)
    MC.assert_at_most(scores.elbo, scores.elbo_se, oracle.log_evidence(batch).numpy(), draws=2000)
    assert (scores.iw_bound >= scores.elbo - 4 * scores.elbo_se).all()


def test_prior_mode_is_the_mean_likelihood_under_the_prior() -> None:
    model = micro_model()
    batch = ltm.Batch(torch.randint(0, 5, (6, 8)))
    scores = ltm.evaluate(model, None, batch, draws=512, mode="prior", seed=1)
    with torch.no_grad():
        z = torch.randn(4096, 6, *model.thought_shape)
        log_lik = model.log_likelihood(z, batch).double()
    brute = log_lik.logsumexp(0) - math.log(4096)
    error = np.hypot(
        scores.iw_bound_se, (log_lik.exp().std(0) / log_lik.exp().mean(0) / 64).numpy()
    )
    MC.assert_close(scores.iw_bound, error, brute.numpy(), draws=512)
    assert float(abs(scores.kl).max()) == 0.0
    assert scores.attrs["guide"] == "prior"


def test_prefix_mode_scores_only_what_was_not_seen() -> None:
    model = micro_model()
    batch = ltm.Batch(torch.randint(0, 5, (4, 8)))
    svi = ltm.DualRateSVI(model, ltm.build_guide("mean_field", model))
    post = svi.infer(batch.prefix(3))
    scores = ltm.evaluate(model, post, batch, draws=32, mode="prefix")
    assert scores.n_tokens.values.tolist() == [5] * 4
    torch.manual_seed(0)
    z = post.sample(2000)
    with torch.no_grad():
        rest = model.log_likelihood(z, batch.suffix(3)).double()
    error = np.hypot(scores.nll_given_z_se, (rest.std(0) / 2000**0.5).numpy())
    MC.assert_close(scores.nll_given_z, error, -rest.mean(0).numpy(), draws=32)


def test_rows_scored_some_at_a_time_get_the_scores_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ltm.LatentThoughtModel.from_preset("nano", vocab_size=9, seq_len=12)
    torch.nn.init.normal_(model.decoder.layers[0].cross_attention.out.weight)
    batch = ltm.Batch(torch.randint(9, (5, 12), generator=torch.Generator().manual_seed(0)))
    whole = ltm.evaluate(model, None, batch, draws=3, mode="prior")
    sizes: list[int] = []
    prepare = model.prepare
    monkeypatch.setattr(model, "prepare", lambda part: sizes.append(len(part)) or prepare(part))
    monkeypatch.setattr(bounds, "TOKENS_AT_ONCE", 24)
    parts = ltm.evaluate(model, None, batch, draws=3, mode="prior")
    assert set(sizes) == {2, 1}
    # Matrix products of fewer rows may add in another order.
    np.testing.assert_allclose(parts["iw_bound"], whole["iw_bound"], rtol=1e-6)


def test_the_whole_is_prefix_plus_suffix() -> None:
    model = micro_model()
    batch = ltm.Batch(torch.randint(0, 5, (4, 8)))
    z = torch.randn(4, *model.thought_shape)
    parts = model.log_likelihood(z, batch.prefix(3)) + model.log_likelihood(z, batch.suffix(3))
    EXACT.assert_close(parts, model.log_likelihood(z, batch))


def test_controls_take_the_thoughts_away() -> None:
    model = micro_model()
    batch = ltm.Batch(torch.randint(0, 5, (6, 8)))
    post = ltm.DualRateSVI(model, ltm.build_guide("mean_field", model)).infer(batch, steps=64)
    scores = ltm.evaluate(model, post, batch, draws=64)
    with torch.no_grad():
        zero = -model.log_likelihood(torch.zeros(6, *model.thought_shape), batch)
    np.testing.assert_allclose(scores.nll_z0, zero, rtol=EXACT.float32)
    harm = scores.nll_shuffled - scores.nll_given_z
    assert float(harm.mean()) > 2 * float(harm.std()) / 6**0.5  # each z fits its own sequence best


def test_a_point_mass_has_no_bound(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(5)
    post = ltm.DualRateSVI(oracle, ltm.build_guide("delta", oracle)).infer(batch, steps=64)
    scores = ltm.evaluate(oracle, post, batch, draws=4)
    assert (scores.elbo == -np.inf).all()
    assert (scores.iw_bound == -np.inf).all()
    assert (scores.kl == np.inf).all()
    assert np.isfinite(scores.log_joint).all()
    assert scores.attrs["ppl_elbo"] == math.inf
    assert "point mass" in scores.attrs["note"]


def test_scores_are_reproducible_and_leave_the_generator_alone(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(5)
    post = exact_posterior(oracle, batch)
    state = torch.get_rng_state()
    first, again = (ltm.evaluate(oracle, post, batch, draws=8, seed=7) for _ in range(2))
    assert first.identical(again)
    assert torch.equal(state, torch.get_rng_state())
    other = ltm.evaluate(oracle, post, batch, draws=8, seed=8)
    assert not np.array_equal(first.nll_given_z, other.nll_given_z)


def test_perplexity_is_of_totals_not_a_mean_over_sequences() -> None:
    def scores(tokens: list[int]) -> xr.Dataset:
        columns = {"nll_z0": [10.0, 40.0], "nll_z0_se": [0.3, 0.4], "n_tokens": tokens}
        return xr.Dataset({name: ("sequence", values) for name, values in columns.items()})

    out = totals(scores([10, 20]))
    assert out["ppl_z0"] == pytest.approx(math.exp(50 / 30))
    assert out["ppl_z0_se"] == pytest.approx(out["ppl_z0"] * 0.5 / 30)
    assert out["ppl_z0_sampling_se"] == pytest.approx(
        out["ppl_z0"] * clustered_ratio([10, 40], [10, 20]).error
    )
    assert totals(scores([15, 15]))["ppl_z0"] < np.exp([10 / 15, 40 / 15]).mean()  # Jensen


def test_no_attribute_is_a_bare_perplexity(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(5)
    attributes = ltm.evaluate(oracle, exact_posterior(oracle, batch), batch, draws=4).attrs
    assert not {"ppl", "perplexity"} & set(attributes)
    assert attributes["ppl_reconstruction_is_a_bound"].startswith("no")


def test_own_draws_flatter_and_fresh_draws_do_not(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(64)
    guide = ltm.build_guide("mean_field", oracle)
    svi = ltm.DualRateSVI(oracle, guide, fast=ltm.Fast(steps=200, lr=0.2, noise="fixed"))
    report = ltm.score_on_own_draws(svi, batch)
    assert float(report.excess.mean()) > 1.0
    evidence = oracle.log_evidence(batch).numpy()
    assert float((report.own_draw_objective - evidence).mean()) > 0.0  # above what a bound can be
    assert float((report.elbo - evidence).mean()) < 0.0
    fresh = ltm.DualRateSVI(oracle, guide)
    with pytest.raises(ltm.InputError, match="fixed"):
        ltm.score_on_own_draws(fresh, batch)


def test_what_cannot_be_scored_is_refused(oracle: ltm.LinearGaussian) -> None:
    batch = oracle.simulate(5)
    post = exact_posterior(oracle, batch)
    with pytest.raises(ltm.InputError, match="2 or more"):
        ltm.evaluate(oracle, post, batch, draws=1)
    with pytest.raises(ltm.InputError, match="did you mean 'oracle'"):
        ltm.evaluate(oracle, post, batch, mode="orcale")  # type: ignore[arg-type]
    with pytest.raises(ltm.InputError, match="needs a posterior"):
        ltm.evaluate(oracle, None, batch)
    with pytest.raises(ltm.InputError, match="ids"):
        ltm.evaluate(oracle, post, batch.select(torch.tensor([1, 0, 2, 3, 4])))
    with pytest.raises(ltm.InputError, match="nothing is left"):
        ltm.evaluate(oracle, post, batch, mode="prefix")


def test_shuffled_thoughts_come_from_another_document(oracle: ltm.LinearGaussian) -> None:
    # Three pieces that say nearly the same in each of two documents: a neighbour's thoughts fit.
    two = oracle.simulate(2, seed=8).observed.repeat_interleave(3, 0)
    x = two + 1e-3 * torch.randn(two.shape, generator=torch.Generator().manual_seed(0))
    unknown = ltm.Batch(x)
    known = ltm.Batch(x, documents=torch.tensor([0, 0, 0, 1, 1, 1]))
    one = ltm.Batch(x[:3], documents=torch.zeros(3, dtype=torch.long))
    penalty = {
        name: (scores["nll_shuffled"] - scores["nll_given_z"]).values
        for name, batch in (("unknown", unknown), ("known", known), ("one", one))
        for scores in [ltm.evaluate(oracle, exact_posterior(oracle, batch), batch)]
    }
    assert (penalty["known"] > 5).all()
    # Without documents only the first of each three gets the other document's thoughts.
    assert (penalty["unknown"] > 5).tolist() == [True, False, False, True, False, False]
    assert np.isnan(penalty["one"]).all()
