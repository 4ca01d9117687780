"""The published score, corrected step by step to a bound."""

import numpy as np
import pandas as pd
import pytest
import torch

import ltm_pyro as ltm
from ltm_pyro.diagnostics.published import _perplexity, across_documents, as_published


@pytest.fixture(scope="module")
def fit() -> tuple[ltm.DualRateSVI, ltm.Batch]:
    """A decoder that hears its thoughts (cross-attention off its zero start), and a batch of
    documents that are shorter than T."""
    torch.manual_seed(0)
    config = ltm.ModelConfig(
        vocab_size=11, seq_len=12, n_layers=1, width=16, n_heads=2, mlp_hidden=24, window=12,
        thoughts_per_layer=2, thought_dim=4,
    )  # fmt: skip
    model = ltm.LatentThoughtModel(config)
    for p in model.parameters():
        p.data.normal_(std=0.4)
    lengths = torch.tensor([12, 5, 12, 7, 9])
    mask = torch.arange(12) < lengths[:, None]
    x = torch.randint(11, (5, 12)) * mask
    batch = ltm.Batch(x, mask, documents=torch.arange(5))
    return ltm.DualRateSVI(model, ltm.build_guide("mean_field", model), ltm.Fast(steps=64)), batch


@pytest.fixture(scope="module")
def table(fit: tuple[ltm.DualRateSVI, ltm.Batch]) -> pd.DataFrame:
    """The published table of that fit."""
    return as_published(*fit, draws=200)


def test_windows_across_documents_hold_the_same_tokens(
    fit: tuple[ltm.DualRateSVI, ltm.Batch],
) -> None:
    batch = fit[1]
    windows = across_documents(batch)
    assert windows.observed[windows.mask].tolist() == batch.observed[batch.mask].tolist()
    assert windows.n_tokens.tolist() == [12, 12, 12, 9]


def test_only_scores_on_fresh_draws_are_called_bounds(table: pd.DataFrame) -> None:
    assert table["is_bound"].tolist() == [False] * 4 + [True] * 4
    fresh = table[table["is_bound"]]
    np.testing.assert_allclose(fresh["ppl_per_token"], fresh["ppl_fresh_per_token"], rtol=1e-12)


def test_own_draws_flatter_and_fresh_draws_tell(table: pd.DataFrame) -> None:
    """64 steps on one draw: q shrinks around what suits that draw, and the score shows it."""
    own = table[~table["is_bound"]]
    excess = np.log(own["ppl_fresh_per_token"] / own["ppl_per_token"])
    # The oracle's excess at these steps is 0.5 to 5 nats per dimension; 0.1 per token is far less.
    assert (excess > 0.1).all()


def test_a_mean_of_exponentials_is_not_the_perplexity() -> None:
    nats, tokens = np.array([2.0, 12.0]), np.array([2, 4])
    assert _perplexity(nats, tokens, meant=False) == pytest.approx(np.exp(14 / 6))
    assert _perplexity(nats, tokens, meant=True) == pytest.approx((np.exp(1) + np.exp(3)) / 2)


def test_the_first_token_of_each_window_is_left_out_as_published(table: pd.DataFrame) -> None:
    assert table["n_tokens"][0] == table["n_tokens"][2] - table["n_sequences"][2]


def test_the_last_row_is_the_honest_bound(
    fit: tuple[ltm.DualRateSVI, ltm.Batch], table: pd.DataFrame
) -> None:
    svi, batch = fit
    honest = ltm.evaluate(svi.model, svi.infer(batch), batch, draws=200)
    assert table["ppl_per_token"].iloc[-1] == pytest.approx(honest.attrs["ppl_elbo"], rel=1e-9)


def test_the_start_of_the_log_variances_costs_kl(table: pd.DataFrame) -> None:
    kl = dict(zip(table["change"], table["kl_per_sequence"], strict=True))
    assert kl["fitted on fresh draws too"] > kl["q starts at the prior, not at log variance -5"]


def test_the_decoder_stays_as_it_is(fit: tuple[ltm.DualRateSVI, ltm.Batch]) -> None:
    svi, batch = fit
    before = {name: p.clone() for name, p in svi.model.state_dict().items()}
    as_published(svi, batch, fast_steps=2, draws=2)
    assert all(torch.equal(before[name], p) for name, p in svi.model.state_dict().items())
    assert svi.slow_step == 0


def test_single_tokens_leave_nothing_to_score() -> None:
    oracle = ltm.LinearGaussian(torch.eye(2), noise_scale=1.0, shape=(1, 2))
    svi = ltm.DualRateSVI(oracle, ltm.build_guide("mean_field", oracle))
    with pytest.raises(ltm.InputError, match="2 tokens or more"):
        as_published(svi, ltm.Batch(torch.zeros(3, 1)))
