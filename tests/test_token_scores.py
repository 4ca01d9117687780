"""Scores of each token: they add up to those of the sequences, and are right one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from known_models import make_language_model, make_tokens
from tolerances import EXACT

import ltm_pyro as ltm
from ltm_pyro.errors import InputError
from ltm_pyro.models.examples import PoissonEffects


def scored(mode: str, batch: ltm.Batch, **options: Any) -> Any:
    model = make_language_model()
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=4, lr=0.3))
    post = None if mode == "prior" else svi.infer(batch.prefix(3) if mode == "prefix" else batch)
    return ltm.evaluate(model, post, batch, mode=mode, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["oracle", "prior", "prefix"])
def test_sums_over_tokens_are_the_scores_of_sequences(mode: str) -> None:
    batch = make_tokens(5)
    # More draws than are held at once, and rows of unequal length; one with a hole at its start.
    mask = batch.mask & (
        torch.arange(batch.mask.shape[1]) < torch.tensor([[8], [7], [5], [4], [8]])
    )
    mask[1, 0] = False
    scores = scored(mode, ltm.Batch(batch.x, mask), draws=70, seed=3, per_token=True)
    whole = "log_predictive" if mode == "prefix" else "iw_bound"
    np.testing.assert_allclose(
        scores.log_score.sum("token"), -scores.nll_given_z, rtol=EXACT.float64
    )
    np.testing.assert_allclose(scores.log_score_iw.sum("token"), scores[whole], rtol=EXACT.float64)
    assert scores.log_score.dims == ("sequence", "token")
    assert (scores.log_score.notnull() == scores.mask).all()
    assert (scores.mask.sum("token") == scores.n_tokens).all()
    if mode != "oracle":
        assert float(abs(scores.price).max()) < 1e-12
    plain = scored(mode, ltm.Batch(batch.x, mask), draws=70, seed=3)
    assert "log_score" not in plain
    np.testing.assert_array_equal(plain.nll_given_z, scores.nll_given_z)


def test_weighted_token_scores_are_the_exact_conditionals() -> None:
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    oracle = ltm.LinearGaussian(loadings, 1.0)
    batch = oracle.simulate(6, seed=1)
    q = ltm.Posterior(oracle.posterior(batch), oracle.prior(), batch.ids, batch.mask, "exact")
    evidence = [torch.zeros(6, dtype=torch.float64)]
    evidence += [oracle.log_evidence(batch.prefix(t)) for t in range(1, 5)]
    evidence.append(oracle.log_evidence(batch))
    exact = torch.stack(evidence, 1).diff(dim=1).numpy()
    scores = ltm.evaluate(oracle, None, batch, 40_000, mode="prior", per_token=True)
    # Of 40,000 draws from the prior; the ratio of two means is within 0.05 by far.
    np.testing.assert_allclose(scores.log_score_iw, exact, atol=0.05)
    # Draws from the exact posterior pay for what they know at the first token.
    knowing = ltm.evaluate(oracle, q, batch, 40_000, per_token=True)
    whole = knowing.log_score_iw.sum("token")
    np.testing.assert_allclose(whole, oracle.log_evidence(batch), rtol=EXACT.float64)
    first = knowing.log_score_iw[:, 0] - knowing.price
    rest = np.concatenate([first.values[:, None], knowing.log_score_iw[:, 1:]], axis=1)
    assert float((knowing.price + rest.sum(1) - whole).max()) < 1e-9


def test_the_loss_by_position_is_that_of_its_tokens() -> None:
    scores = scored("oracle", make_tokens(5), draws=4, per_token=True)
    table = ltm.loss_by_position(scores)
    np.testing.assert_allclose(table["nats_per_token"], -scores.log_score.mean("sequence"))
    taken = ltm.loss_by_position(scores, doubling=True)
    assert taken.index.tolist() == [0, 1, 2, 4, 8]
    assert taken["until"].tolist()[:4] == [0, 1, 3, 7]
    for name, column in (("nats_per_token", "log_score"), ("nats_per_token_iw", "log_score_iw")):
        total = float((taken[name] * taken["n_tokens"]).sum())
        assert total == pytest.approx(-float(scores[column].sum()))
    with pytest.raises(InputError, match="per_token=True"):
        ltm.loss_by_position(scored("oracle", make_tokens(5), draws=4))


def test_a_likelihood_that_is_not_of_elements_is_told() -> None:
    class Whole(PoissonEffects):
        def likelihood(self, z: Any, batch: Any) -> Any:
            return super().likelihood(z, batch).base_dist.to_event(1).mask(True)

    model = Whole()
    batch = ltm.simulate(model, 3).batch
    with pytest.raises(InputError, match="define token_log_likelihood"):
        ltm.evaluate(model, None, batch, 2, mode="prior", per_token=True)
