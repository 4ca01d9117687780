"""`compare`: equal budgets, paired differences, verdicts that say only what the errors allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from known_models import make_language_model, make_oracle, make_tokens
from pyro.infer import TraceMeanField_ELBO
from scipy import stats

from ltm_pyro import plots
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.compare import Comparison, compare
from ltm_pyro.diagnostics.compare.budget import plan_budget
from ltm_pyro.diagnostics.compare.table import (
    difference_in_words,
    paired_mean,
    paired_ratio,
    threshold,
)
from ltm_pyro.errors import InputError
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.guides import build_guide

FAMILIES = ["mean_field", "full_rank", "amortized", "semi_amortized", "delta"]
SHORT = {"draws": 60, "warmup": 60, "chains": 2}


@pytest.fixture(scope="module")
def oracle_comparison() -> Comparison:
    """Five families on 16 sequences of an oracle whose posterior is correlated."""
    oracle = make_oracle(noise_scale=0.5)
    return compare(
        oracle,
        oracle.simulate(16, seed=1),
        FAMILIES,
        budget=256,
        draws=256,  # the error of 5 sequences' mean is then some hundredths of a nat
        fast=Fast(lr=0.1),
        train=oracle.simulate(64, seed=2),
        reference="hmc",
        subset=5,
        reference_options=SHORT,
    )


def test_every_guide_spends_the_same_budget(oracle_comparison: Comparison) -> None:
    data = oracle_comparison.dataset
    spent = data["decoder_evaluations"].values
    # What is left over is less than one step of the local fit or one training step of 16 rows.
    assert (spent <= 256).all()
    assert (spent > 256 * 0.95).all(), spent
    np.testing.assert_allclose(
        spent, data["training_evaluations"].values + data["local_evaluations"].values
    )
    trained = data["guide"].values[data["training_evaluations"].values > 0]
    assert set(trained) == {"amortized", "semi_amortized"}
    assert data["local_evaluations"].sel(guide="amortized") == 0


def test_the_counter_counts_rows_times_draws() -> None:
    oracle = make_oracle()
    elbo = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    svi = DualRateSVI(oracle, build_guide("mean_field", oracle), Fast(steps=5), elbo=elbo)
    svi.infer(oracle.simulate(4))
    assert svi.elbo.evaluations == 4 * 3 * 5


def test_differences_are_paired_and_known_on_the_oracle(oracle_comparison: Comparison) -> None:
    data = oracle_comparison.dataset
    oracle = make_oracle(noise_scale=0.5)
    batch = oracle.simulate(16, seed=1)
    expected = float(oracle.log_evidence(batch).mean() - oracle.best_mean_field_elbo(batch).mean())
    row = data.sel(guide="full_rank")
    found = float(row["elbo_difference_per_sequence"])
    # Both loops are short of their optimum by some hundredths of a nat; the gap itself is 1.
    assert abs(found - expected) < 0.15, (found, expected)
    assert row["verdict"].item().startswith("better")
    difference = row["elbo"].values - data.sel(guide="mean_field")["elbo"].values
    assert found == pytest.approx(difference.mean())
    assert float(row["elbo_difference_per_sequence_se"]) == pytest.approx(
        difference.std(ddof=1) / 4
    )
    per_token = float(row["elbo_difference_per_token"])
    assert per_token == pytest.approx(difference.sum() / data["n_tokens"].values.sum())
    gap = data["approximation_gap_per_sequence"]
    assert abs(float(gap.sel(guide="full_rank"))) < 0.1
    known = data["approximation_gap"].sel(guide="mean_field").dropna("sequence")["sequence"].values
    assert len(known) == 5
    exact = (oracle.log_evidence(batch) - oracle.best_mean_field_elbo(batch)).numpy()[known]
    assert float(gap.sel(guide="mean_field")) == pytest.approx(exact.mean(), abs=0.1)


def test_the_reference_measures_means_and_scales(oracle_comparison: Comparison) -> None:
    data = oracle_comparison.dataset
    assert int(data["reference_rhat"].notnull().sum()) == 5
    ratio = data["reference_scale_ratio_median"]
    # A mean field is narrower than a correlated posterior, a full covariance is not.
    assert float(ratio.sel(guide="mean_field")) < 0.9
    assert float(ratio.sel(guide="full_rank")) == pytest.approx(1.0, abs=0.15)
    assert float(ratio.sel(guide="delta")) == 0.0


def test_a_point_mass_is_shown_as_what_it_is(oracle_comparison: Comparison) -> None:
    data = oracle_comparison.dataset
    assert "point mass" in data["verdict"].sel(guide="delta").item()
    assert np.isnan(data["elbo_difference_per_sequence"].sel(guide="delta"))


def test_the_table_says_who_won_between_encoder_and_refinement(
    oracle_comparison: Comparison,
) -> None:
    [note] = [n for n in oracle_comparison.notes if n.startswith("semi_amortized against")]
    mean = oracle_comparison.dataset["pair_difference"].sel(
        guide="semi_amortized", other="amortized"
    )
    assert ("better" in note) or ("Why:" in note)
    assert ("better" in note) == (float(mean) > 0 and "Why:" not in note)


def test_table_csv_dataset_and_figure_agree(oracle_comparison: Comparison, tmp_path: Path) -> None:
    text = str(oracle_comparison)
    assert all(family in text for family in FAMILIES)
    assert "training included" in text
    oracle_comparison.to_csv(tmp_path / "table.csv")
    read = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert list(read.index) == FAMILIES
    np.testing.assert_allclose(
        read["elbo_per_sequence"], oracle_comparison.frame["elbo_per_sequence"]
    )
    figure = plots.guide_comparison(oracle_comparison)
    assert len(figure.axes) == 4
    assert "delta" not in [t.get_text() for t in figure.axes[0].get_yticklabels()]
    plots.save_figure(figure, tmp_path / "figure.png")
    oracle_comparison.dataset.to_netcdf(tmp_path / "table.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "table.nc", engine="h5netcdf") as again:
        assert again.attrs["baseline"] == "mean_field"


def test_it_repeats_and_leaves_the_model_alone() -> None:
    model, batch = make_language_model(), make_tokens(4)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, second = (
        compare(model, batch, ["mean_field", "low_rank"], budget=6, draws=8, gaps=False)
        for _ in range(2)
    )
    xr.testing.assert_equal(first.dataset.drop_vars("seconds"), second.dataset.drop_vars("seconds"))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_baseline_is_only_a_point_of_view() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(12, seed=3)
    one, other = (
        compare(oracle, batch, order, budget=40, gaps=False).dataset
        for order in (["mean_field", "full_rank"], ["full_rank", "mean_field"])
    )
    for name in ("elbo_difference_per_sequence", "iw_difference_per_token"):
        assert float(one[name][1]) == pytest.approx(-float(other[name][1]))
        assert float(one[f"{name}_se"][1]) == pytest.approx(float(other[f"{name}_se"][1]))


def test_a_verdict_is_right_as_often_as_it_claims() -> None:
    """Two thousand comparisons of nothing: at most the stated rate is called a difference."""
    generator = np.random.default_rng(0)
    factor = threshold(20, comparisons=1)
    said = [
        difference_in_words(*paired_mean(row), factor) for row in generator.normal(size=(2000, 20))
    ]
    wrong = sum(not text.startswith("not told apart") for text in said)
    # Binomial(2000, 0.05), both tails at 1e-5.
    assert stats.binom.ppf(1e-5, 2000, 0.05) <= wrong <= stats.binom.isf(1e-5, 2000, 0.05)
    # And an effect far beyond its error is seen.
    rows = generator.normal(5.0, 1.0, size=(100, 20))
    assert all(difference_in_words(*paired_mean(r), factor).startswith("better") for r in rows)


def test_more_comparisons_ask_for_more() -> None:
    assert threshold(64, 8) > threshold(64, 1) > stats.norm.isf(0.025)
    assert paired_mean(np.array([1.0, np.inf])) == pytest.approx((np.nan, np.nan), nan_ok=True)
    rate, error = paired_ratio(np.array([2.0, 4.0]), np.array([10, 20]))
    assert (rate, error) == pytest.approx((0.2, 0.0))


def test_a_budget_that_pays_for_nothing_is_refused() -> None:
    oracle = make_oracle()
    guide = build_guide("amortized", oracle)
    guide.reset(oracle.simulate(4))
    with pytest.raises(InputError, match="does not pay for one step of 'amortized'"):
        plan_budget(
            guide, per_sequence=1, rows=4, batch_size=16, training_fast_steps=4, training_share=0.5
        )


def test_bad_requests_are_one_clear_line() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    cases: list[tuple[str, dict[str, object]]] = [
        ("at least two families", {"guides": ["mean_field"]}),
        ("at least two families", {"guides": "mean_field,delta"}),
        ("unknown guide 'fullrank'", {"guides": ["mean_field", "fullrank"]}),
        ("named twice", {"guides": ["mean_field", "mean_field"]}),
        ("budget is 0", {"budget": 0}),
        ("training_share is 1", {"training_share": 1.0}),
        ("not among the guides", {"options": {"flow": {}}}),
        ("subset is 9", {"subset": 9}),
        ("unknown reference .hcm.", {"reference": "hcm"}),
    ]
    for message, change in cases:
        arguments = {"guides": ["mean_field", "delta"], "budget": 2, "gaps": False, **change}
        with pytest.raises(InputError, match=message):
            compare(oracle, batch, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 2"):
        compare(oracle, oracle.simulate(1), ["mean_field", "delta"])


def test_the_batch_goes_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    moved = oracle.simulate(4)
    seen: list[Batch] = []
    check = oracle.check
    monkeypatch.setattr(Batch, "to", lambda self, device: moved if self is batch else self)
    monkeypatch.setattr(oracle, "check", lambda b: (seen.append(b), check(b)))
    compare(oracle, batch, ["mean_field", "full_rank"], budget=4, draws=4, gaps=False)
    assert seen
    assert all(one is not batch for one in seen)
