"""`compare`: equal budgets, paired differences, verdicts that say only what the errors allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from known_models import make_language_model, make_oracle, make_tokens
from pyro.infer import TraceMeanField_ELBO
from scipy import stats
from wrong_guides import as_posterior

from ltm_pyro import plots
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.compare import Comparison, compare
from ltm_pyro.diagnostics.compare.differences import ERROR_RATE, in_words, paired_difference
from ltm_pyro.diagnostics.compare.reference import against_reference
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide, register_guide
from ltm_pyro.inference.guides.amortized import Amortized
from ltm_pyro.inference.guides.registry import GUIDES
from ltm_pyro.inference.mcmc import sample_posterior

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
        draws=1000,  # enough for a k-hat
        fast=Fast(optimizer="adam", lr=0.1),
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
    # Two printed errors on either side hold 95 % by Student's t, for 16 sequences.
    assert 2 * float(row["elbo_difference_per_sequence_error"]) == pytest.approx(
        difference.std(ddof=1) / 4 * stats.t.isf(stats.norm.sf(2), 15)
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


def test_the_exact_posterior_has_no_mean_error() -> None:
    """The reference's own error, 0.09 of a scale here, is taken off in squares."""
    oracle = make_oracle(noise_scale=0.5)
    batch = oracle.simulate(24, seed=1)
    exact = as_posterior(oracle, batch, oracle.posterior(batch))
    off = as_posterior(
        oracle,
        batch,
        dist.Normal(exact.mean + 0.5 * oracle.posterior(batch).variance.sqrt(), 1.0).to_event(2),
    )
    chains = sample_posterior(oracle, batch, "hmc", start=exact, **SHORT)
    found = against_reference(chains, [exact, off], seed=0)
    error, floor = found["reference_mean_error"][1], found["reference_mean_floor"][1]
    usable = ~np.isnan(floor)
    assert usable.sum() > 12
    assert 0.05 < np.median(floor[usable]) < 0.15
    # Squares are unbiased: half of them fall below 0 and are cut there.
    assert np.median(error[0, usable]) < 0.6 * np.median(floor[usable])
    assert np.median(error[1, usable]) == pytest.approx(0.5, abs=0.05)


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


def difference(guide: np.ndarray, base: np.ndarray, documents: np.ndarray | None = None):
    """Per sequence, of (R, n) scores."""
    return paired_difference(guide, base, np.ones(guide.shape[1]), documents)


def told_apart(text: str) -> bool:
    return not text.startswith("not told apart")


def most_wrong(n: int, rate: float = ERROR_RATE) -> float:
    """Wrong verdicts of n that a correct level exceeds once in 10^5."""
    return float(stats.binom.isf(1e-5, n, rate))


def test_a_verdict_is_right_as_often_as_it_claims() -> None:
    """Two thousand comparisons of nothing: at most the stated rate is called a difference."""
    generator = np.random.default_rng(0)
    nothing = np.zeros((1, 20))
    said = [in_words(difference(generator.normal(size=(1, 20)), nothing)) for _ in range(2000)]
    wrong = sum(told_apart(text) for text in said)
    assert stats.binom.ppf(1e-5, 2000, 0.05) <= wrong <= most_wrong(2000)
    # And an effect far beyond its error is seen.
    rows = generator.normal(5.0, 1.0, size=(100, 1, 20))
    assert all(in_words(difference(row, nothing)).startswith("better") for row in rows)


def test_few_documents_allow_no_verdict() -> None:
    """As `evaluate` and `compare_runs` say: an error from few is too uncertain to rest on."""
    rows = np.random.default_rng(0).normal(5.0, 0.1, size=(1, 32))
    assert in_words(difference(rows, np.zeros_like(rows))).startswith("better")
    few = difference(rows, np.zeros_like(rows), np.repeat(np.arange(4), 8))
    assert in_words(few) == "too few documents to say"


def test_pieces_of_documents_are_not_independent() -> None:
    """Eight pieces of each of twelve documents: taken for independent, half would be told apart."""
    generator = np.random.default_rng(0)
    documents = np.repeat(np.arange(12), 8)
    clustered = unclustered = 0
    for _ in range(1000):
        row = generator.normal(size=(1, 12)).repeat(8, axis=1)
        row = row + 0.3 * generator.normal(size=row.shape)
        clustered += difference(row, np.zeros_like(row), documents).differs(ERROR_RATE)
        unclustered += difference(row, np.zeros_like(row)).differs(ERROR_RATE)
    assert clustered <= most_wrong(1000)
    assert unclustered > 400


@pytest.mark.parametrize("restarts", [2, 3, 5])
def test_a_family_verdict_has_the_randomness_of_training_in_its_error(restarts: int) -> None:
    """A family against itself: each fit is better or worse on all sequences by 0.3 nats."""
    generator = np.random.default_rng(restarts)
    wrong = wrong_of_one = 0
    for _ in range(1000):
        sequences = generator.normal(size=64)
        one, other = (
            sequences
            + 0.3 * generator.normal(size=(restarts, 1))
            + 0.2 * generator.normal(size=(restarts, 64))
            for _ in range(2)
        )
        wrong += difference(one, other).differs(ERROR_RATE)
        wrong_of_one += difference(one[:1], other[:1]).differs(ERROR_RATE)
    assert wrong <= most_wrong(1000)
    # A single fit can claim nothing about its family: told apart in nearly all comparisons.
    assert wrong_of_one > 800


def test_more_comparisons_ask_for_more() -> None:
    found = difference(np.random.default_rng(0).normal(size=(1, 64)), np.zeros((1, 64)))
    assert (
        found.margin(ERROR_RATE / 8) > found.margin(ERROR_RATE) > found.se * stats.norm.isf(0.025)
    )
    lost = difference(np.array([[1.0, np.inf]]), np.zeros((1, 2)))
    assert in_words(lost) == "no difference can be computed"
    rate = paired_difference(np.array([[2.0, 4.0]]), np.zeros((1, 2)), np.array([10.0, 20.0]), None)
    assert (rate.value, rate.se) == pytest.approx((0.2, 0.0))


def test_a_verdict_is_about_this_fit_unless_there_are_restarts() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(12, seed=3)
    common = {"budget": 32, "train": oracle.simulate(64, seed=4), "gaps": False}
    guides = ["mean_field", "amortized", "full_rank"]
    single = compare(oracle, batch, guides, **common)
    verdicts = single.frame["verdict"]
    assert verdicts["amortized"].startswith(("this fit of amortized", "not told apart"))
    assert "this fit" not in verdicts["full_rank"]
    assert any("verdicts are about this fit" in note for note in single.notes)

    several = compare(oracle, batch, guides, restarts=3, **common)
    data = several.dataset
    assert data["fits"].values.tolist() == [1, 3, 1]
    assert "this fit" not in several.frame["verdict"]["amortized"]
    fits = data["fit_elbo"].sel(guide="amortized").values
    assert np.unique(fits.mean(1)).size == 3, "each fit has a start of its own"
    np.testing.assert_allclose(data["elbo"].sel(guide="amortized"), fits.mean(0))
    # The error of the difference holds the spread between fits.
    between = fits.mean(1).var(ddof=1) / 3
    error = float(data["elbo_difference_per_sequence_se"].sel(guide="amortized"))
    assert error**2 > between
    # Every fit has the whole budget, and the first is the one that a single comparison makes.
    np.testing.assert_allclose(fits[0], single.dataset["elbo"].sel(guide="amortized"))
    assert float(data["decoder_evaluations"].sel(guide="amortized")) <= 32


@pytest.mark.slow
def test_a_family_against_itself_from_another_start_is_not_told_apart() -> None:
    """The level holds for trained encoders, over 40 comparisons of a family with itself."""

    @register_guide("another_start")
    class AnotherStart(Amortized):
        def __init__(self, *given: Any, **options: Any) -> None:
            torch.rand(7)
            super().__init__(*given, **options)

    oracle = make_oracle(noise_scale=0.5)
    family = wrong_fits = 0
    try:
        for seed in range(40):
            found = compare(
                oracle,
                oracle.simulate(64, seed=seed),
                ["amortized", "another_start"],
                budget=16,
                train=oracle.simulate(256, seed=1000),
                restarts=3,
                gaps=False,
                draws=16,
                seed=seed,
            )
            family += told_apart(found.frame["verdict"]["another_start"])
            one, other = (
                found.dataset["fit_elbo"].sel(guide=name).values[:1]
                for name in ("amortized", "another_start")
            )
            wrong_fits += difference(one, other).differs(ERROR_RATE)
    finally:
        GUIDES.remove("another_start")
    assert family <= most_wrong(40)
    assert wrong_fits > most_wrong(40), "single fits do differ here: the case is a hard one"


def test_a_budget_that_pays_for_nothing_is_refused() -> None:
    oracle = make_oracle()
    with pytest.raises(InputError, match="does not pay for one step of 'amortized'"):
        compare(
            oracle,
            oracle.simulate(4),
            ["mean_field", "amortized"],
            budget=1,
            train=oracle.simulate(16),
        )


def test_bad_requests_are_one_clear_line() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    cases: list[tuple[str, dict[str, object]]] = [
        ("guides", {"guides": None}),
        ("guides", {"guides": [3, 4]}),
        ("guides", {"guides": [None, "mean_field"]}),
        ("options", {"options": [1]}),
        ("budget is 1.5", {"budget": 1.5}),
        ("budget is 1e[+]20", {"budget": 1e20}),
        ("budget is 1000", {"budget": 10**20}),
        ("budget is '8'", {"budget": "8"}),
        ("draws is 1:", {"draws": 1}),
        ("draws is nan", {"draws": float("nan")}),
        ("draws is 1000", {"draws": 10**20}),
        ("restarts is 0", {"restarts": 0}),
        ("restarts is True", {"restarts": True}),
        ("seed is -1", {"seed": -1}),
        ("seed is None", {"seed": None}),
        ("subset is 1.0", {"subset": 1.0}),
        ("fast is 'quick'", {"fast": "quick"}),
        ("slow is 3", {"slow": 3}),
        ("elbo is 7", {"elbo": 7}),
        ("train is 'text'", {"train": "text"}),
        ("training_share is 'half'", {"training_share": "half"}),
        ("reference is 3", {"reference": 3}),
        ("reference_options is 3", {"reference_options": 3}),
        ("did you mean 'draws'", {"reference_options": {"drws": 3}}),
        ("reference_options: draws is 1e", {"reference_options": {"draws": 1e20}}),
        ("reference_options: warmup is 20", {"reference_options": {"warmup": 20}}),
        ("'draws'.*memory", {"reference_options": {"draws": 10**7, "chains": 10**4}}),
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
    with pytest.raises(InputError, match="batch holds 1 sequence"):
        compare(oracle, oracle.simulate(1), ["mean_field", "delta"])
    for name, given in (("batch", (oracle, None)), ("batch", (oracle, "x")), ("model", (3, batch))):
        with pytest.raises(InputError, match=f"{name} is"):
            compare(*given, ["mean_field", "delta"])  # type: ignore[arg-type]


def test_two_given_guides_of_one_family_have_names_of_their_own() -> None:
    oracle = make_oracle()
    given = [build_guide("amortized", oracle) for _ in range(2)]
    found = compare(oracle, oracle.simulate(4), given, budget=4, draws=4, gaps=False)
    assert found.dataset["guide"].values.tolist() == ["amortized (given)", "amortized (given, 2)"]
    assert "this fit of" in in_words(difference(np.ones((1, 6)), np.zeros((1, 6))), 1, "a", "b")


def test_nothing_is_printed_where_it_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    oracle = make_oracle()
    compare(oracle, oracle.simulate(4), ["mean_field", "delta"], budget=2, draws=4, gaps=False)
    assert capsys.readouterr() == ("", "")


def test_too_few_documents_are_named() -> None:
    oracle = make_oracle()
    batch = replace(oracle.simulate(6), documents=torch.tensor([0, 0, 0, 1, 1, 1]))
    found = compare(oracle, batch, ["mean_field", "delta"], budget=2, draws=4, gaps=False)
    assert found.dataset.attrs["n_documents"] == 2
    assert "6 sequences of 2 documents" in str(found)
    assert "too few to trust" in str(found)


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
