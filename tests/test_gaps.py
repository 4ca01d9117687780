from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from known_models import exact_elbo, make_language_model, make_oracle, make_tokens
from test_convergence import Encoder, RefinedEncoder, recipe, setting
from tolerances import MC

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.gaps import gap_decomposition, gap_means
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.plots import gap_bars

LONG = 150
DRAWS = 512
RESIDUAL = 0.02
"""Nats per sequence that the long loop's own gradient noise may leave: at eight draws per step and
150 steps 0.005 to 0.01 are measured on these oracles."""

Setting = tuple[DualRateSVI, Batch, xr.Dataset]


def caption(gaps: xr.Dataset) -> str:
    (text,) = [text for text in gap_bars(gaps).texts if text.get_gid() == "caption"]
    return text.get_text().replace("\n", " ")


def oracle_of(svi: DualRateSVI) -> LinearGaussian:
    assert isinstance(svi.model, LinearGaussian)
    return svi.model


@pytest.fixture(scope="module")
def short_loop() -> Setting:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=60, optimizer="adam", lr=0.1))
    return svi, batch, gap_decomposition(svi, batch, converged_steps=LONG, draws=DRAWS)


def assert_close_but_for(
    gaps: xr.Dataset, name: str, expected: torch.Tensor, residual: float = RESIDUAL
) -> None:
    """Within the Monte Carlo error, and what the long loop may leave."""
    excess = np.abs(gaps[name].values - expected.double().numpy()) - residual
    MC.assert_at_most(excess, gaps[f"{name}_se"].values, 0.0, draws=DRAWS)


def test_gaps_of_mean_field_are_the_analytic_ones(short_loop: Setting) -> None:
    svi, batch, gaps = short_loop
    oracle = oracle_of(svi)
    evidence, best = oracle.log_evidence(batch), oracle.best_mean_field_elbo(batch)
    judged = exact_elbo(oracle, svi.infer(batch).distribution, batch)
    assert_close_but_for(gaps, "approximation", evidence - best)
    assert_close_but_for(gaps, "truncation", best - judged)
    assert_close_but_for(gaps, "total", evidence - judged, residual=0.0)
    assert gaps.attrs["components"] == ["approximation", "truncation"]
    assert gaps.attrs["approximation_is"] == gaps.attrs["evidence_kind"] == "exact"
    np.testing.assert_array_equal(gaps["sequence"], batch.ids)
    assert all(gaps[f"{name}_se"].attrs["units"] == "nats" for name in gaps.attrs["components"])
    assert gaps.attrs["share_converged"] > 0.8


def test_components_add_up(short_loop: Setting) -> None:
    gaps = short_loop[2]
    together = gaps["approximation"] + gaps["truncation"]
    np.testing.assert_allclose(together, gaps["total"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gaps["evidence"] - gaps["elbo"], gaps["total"], rtol=0, atol=1e-12)


def test_common_draws_make_the_difference_precise(short_loop: Setting) -> None:
    gaps = short_loop[2]
    apart = np.hypot(gaps["elbo_se"], gaps["elbo_converged_se"])
    assert (gaps["still_gaining_se"] < 0.5 * gaps["elbo_converged_se"]).mean() > 0.9
    assert (gaps["truncation_se"] < apart).mean() > 0.9


def test_a_family_that_holds_the_posterior_has_no_approximation_gap() -> None:
    oracle, batch = setting()
    svi = DualRateSVI(oracle, build_guide("full_rank", oracle), Fast(steps=30, lr=0.1))
    gaps = gap_decomposition(svi, batch, converged_steps=LONG, draws=DRAWS)
    assert float(gaps["approximation"].mean()) == pytest.approx(0, abs=0.01)
    assert float(gaps["truncation"].min()) > 0.1
    # Nothing is clipped: what is 0 comes out on both sides of it, within its error.
    MC.assert_at_most(
        -gaps["approximation"].values, gaps["approximation_se"].values + 1e-6, 0.0, draws=DRAWS
    )


def test_an_exact_fit_in_many_dimensions_is_called_converged() -> None:
    # The noise of the long loop's 152 parameters left 0.13 nats, which only the check won: it
    # arrived, and was said not to have for all but 2 % of the sequences.
    oracle = make_oracle(shape=(4, 4), n_observed=24, noise_scale=0.5)
    batch = oracle.simulate(16, seed=3)
    svi = DualRateSVI(oracle, build_guide("full_rank", oracle), Fast(steps=16))
    gaps = gap_decomposition(svi, batch, draws=256)
    assert gaps.attrs["share_converged"] == 1.0
    assert float(np.abs(gaps["approximation"]).max()) < 0.01


class Mute(LinearGaussian):
    """An oracle that hides its evidence, so that a bound of the converged q's draws stands in."""

    log_evidence = property()


def test_mean_gaps_have_errors_clustered_by_document() -> None:
    """Every document twice tells no more of other documents than once."""
    values = np.random.default_rng(0).normal(size=8)

    def gaps(copies: int) -> xr.Dataset:
        columns = {n: ("sequence", np.repeat(values, copies)) for n in ("approximation", "total")}
        errors = {f"{n}_se": ("sequence", np.full(8 * copies, 0.1)) for n in columns}
        documents = ("sequence", np.repeat(np.arange(8), copies))
        return xr.Dataset(
            {**columns, **errors}, {"document": documents}, {"components": ["approximation"]}
        )

    once, twice = gap_means(gaps(1)), gap_means(gaps(2))
    np.testing.assert_allclose(once["sampling_se"], np.std(values, ddof=1) / np.sqrt(8))
    np.testing.assert_allclose(twice["sampling_se"], once["sampling_se"])
    np.testing.assert_allclose(twice["mc_se"], once["mc_se"] / np.sqrt(2))


@pytest.mark.parametrize("known", [True, False])
def test_the_sign_of_a_gap_that_is_zero(known: bool) -> None:
    """docs/guides.md: "against an exact or a given log p(x) a gap that is really 0 comes out on
    either side of it"; "against the default ... `approximation` is never negative".
    """
    oracle, _ = setting()
    model = oracle if known else Mute(oracle.W, 0.3, oracle.bias, oracle.thought_shape)
    batch = oracle.simulate(48, seed=2)
    svi = DualRateSVI(model, build_guide("full_rank", model), Fast(steps=30, lr=0.1))
    gaps = gap_decomposition(svi, batch, converged_steps=LONG, draws=64)
    negative = float((gaps["approximation"] < 0).mean())
    assert ("never negative" in gaps.attrs["negative_values"]) == (not known)
    if known:
        # Half of 48, with a standard deviation of 7 %: within four of these.
        assert 0.2 < negative < 0.8
    else:
        assert negative == 0.0


@pytest.mark.slow
def test_steps_close_truncation_and_leave_approximation() -> None:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=400, lr=0.1, final_fraction=0.0), particles=4)
    gaps = gap_decomposition(svi, batch, converged_steps=LONG, draws=DRAWS)
    assert abs(float(gaps["truncation"].mean())) < 0.03
    assert float(gaps["approximation"].mean()) > 0.3
    assert "richer" in caption(gaps)


def test_a_lower_bound_makes_it_at_least(short_loop: Setting) -> None:
    svi, batch, exact = short_loop
    n = len(batch)
    evidence = exact["evidence"].values
    columns = {
        "lower": evidence - 0.1, "lower_se": np.full(n, 0.05),
        "upper": evidence + 0.2, "upper_se": np.full(n, 0.04),
    }  # fmt: skip
    given = xr.Dataset(
        {name: ("sequence", value) for name, value in columns.items()},
        coords={"sequence": batch.ids.numpy()},
    )
    quick = {"steps": 5, "converged_steps": 2, "draws": 64}
    gaps = gap_decomposition(svi, batch, evidence=given, **quick)
    alone = gap_decomposition(svi, batch, evidence="exact", **quick)
    assert gaps.attrs["approximation_is"] == "at least"
    assert gaps.attrs["evidence_kind"] == "bracket, given"
    assert "at least" in caption(gaps)
    for name in ("approximation", "total"):
        np.testing.assert_allclose(gaps[name], alone[name] - 0.1)
        np.testing.assert_allclose(gaps[f"{name}_upper"], alone[name] + 0.2)
        np.testing.assert_allclose(gaps[f"{name}_se"], np.hypot(alone[f"{name}_se"], 0.05))
    np.testing.assert_allclose(gaps["truncation"], alone["truncation"])
    given["lower"] = given["lower"] - 100
    lower = given[["lower", "lower_se"]]
    low = gap_decomposition(svi, batch, evidence=lower, **quick)
    assert "evidence is too low" in caption(low)
    assert "approximation_upper" not in low
    with pytest.raises(InputError, match="other sequences"):
        gap_decomposition(svi, batch, evidence=given.isel(sequence=slice(None, None, -1)))
    with pytest.raises(InputError, match="lower_se"):
        gap_decomposition(svi, batch, evidence=given[["lower"]])


def test_a_loop_that_has_not_arrived_is_not_called_converged() -> None:
    oracle, batch = setting()
    gaps = gap_decomposition(recipe(oracle, Fast(steps=2)), batch, converged_steps=30, draws=64)
    assert gaps.attrs["share_converged"] < 0.1
    assert "not shown that the long loop arrived" in caption(gaps)


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_an_encoder_has_an_amortisation_gap_instead(shift: float) -> None:
    oracle, batch = setting()
    svi = DualRateSVI(oracle, Encoder(oracle, shift))
    gaps = gap_decomposition(svi, batch, converged_steps=LONG, draws=DRAWS)
    evidence, best = oracle.log_evidence(batch), oracle.best_mean_field_elbo(batch)
    lost = best - exact_elbo(oracle, svi.infer(batch).distribution, batch)
    assert gaps.attrs["components"] == ["approximation", "amortisation"]
    assert "truncation" not in gaps
    assert gaps.attrs["steps"] == 0
    assert_close_but_for(gaps, "approximation", evidence - best)
    assert_close_but_for(gaps, "amortisation", lost)
    if shift:
        assert float(gaps["amortisation"].min()) > 0.1
    else:
        assert (gaps["amortisation"] < 0).any()  # the encoder is the best there is; not clipped


def test_local_steps_after_an_encoder_win_its_gap_back() -> None:
    oracle, batch = setting()
    guide = RefinedEncoder(oracle, shift=0.3)
    svi = DualRateSVI(oracle, guide, Fast(steps=40, lr=0.05))
    gaps = gap_decomposition(svi, batch, converged_steps=LONG, draws=DRAWS)
    encoder = svi.infer(batch, 0)
    best = oracle.best_mean_field_elbo(batch)
    lost = best - exact_elbo(oracle, encoder.distribution, batch)
    assert_close_but_for(gaps, "encoder_gap", lost)
    np.testing.assert_allclose(gaps["refined"], gaps["encoder_gap"] - gaps["truncation"])
    assert float(gaps["truncation"].mean()) < 0.2 * float(gaps["encoder_gap"].mean())
    assert float(gaps["refined"].min()) > 0


def test_a_language_model_is_measured_against_its_own_bound() -> None:
    model, batch = make_language_model(), make_tokens(6)
    svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=4))
    gaps = gap_decomposition(svi, batch, converged_steps=6, draws=64)
    assert gaps.attrs["approximation_is"] == "at least"
    assert "64 draws" in gaps.attrs["evidence_kind"]
    # The bound on the same draws lies above their mean, whatever they are.
    assert (gaps["approximation"] > 0).all()
    assert (gaps["approximation_se"] > 0).all()
    np.testing.assert_array_equal(gaps["sequence"], batch.ids)


@pytest.mark.slow
def test_the_error_of_an_importance_weighted_gap() -> None:
    oracle, batch = setting()
    mute = Mute(oracle.W, float(oracle.noise_scale), oracle.bias, oracle.thought_shape)
    svi = recipe(mute, Fast(steps=200, lr=0.1))
    found = [
        gap_decomposition(svi, batch, converged_steps=1, draws=256, seed=seed) for seed in range(12)
    ]
    values = np.stack([gaps["total"].values for gaps in found])
    printed = np.stack([gaps["total_se"].values for gaps in found])
    # Mean over 16 sequences of a variance on 11 degrees of freedom: known to about 11 %; weights
    # with k-hat near 0.7 hide some of their own variance.
    ratio = values.var(0, ddof=1).mean() / np.square(printed).mean()
    assert 0.5 < ratio < 2.0
    exact = oracle.log_evidence(batch).numpy()
    assert (values.mean(0) < exact - found[0]["elbo"].values + 0.2).all()


def test_means_have_both_errors(short_loop: Setting) -> None:
    gaps = short_loop[2]
    means = gap_means(gaps)
    assert list(means["component"].values) == ["approximation", "truncation", "total"]
    assert float(means["mean"].sel(component="total")) == pytest.approx(float(gaps["total"].mean()))
    row = means.sel(component="truncation")
    assert 0 < row["mc_se"] < row["sampling_se"]
    assert np.isnan(gap_means(gaps.isel(sequence=[0]))["sampling_se"]).all()


def test_the_figure_stacks_to_the_total(short_loop: Setting) -> None:
    gaps = short_loop[2]
    figure = gap_bars(gaps)
    main = figure.axes[0]
    assert "nats" in main.get_ylabel()
    bars = [[bar.get_height() for bar in group] for group in main.containers[:2]]
    order = np.argsort(-gaps["total"].values)
    np.testing.assert_allclose(np.sum(bars, axis=0), gaps["total"].values[order])
    assert "would win the truncation gap" in caption(gaps)
    with pytest.raises(InputError, match="gap_decomposition"):
        gap_bars(xr.Dataset())


def test_what_has_no_gaps_is_refused() -> None:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=2))
    with pytest.raises(InputError, match="point mass"):
        gap_decomposition(DualRateSVI(oracle, build_guide("delta", oracle)), batch)
    for options, match in (
        ({"draws": 2}, "draws"),
        ({"converged_steps": 0}, "converged_steps"),
        ({"evidence": "exakt"}, "exakt"),
    ):
        with pytest.raises(InputError, match=match):
            gap_decomposition(svi, batch, **options)
    model = make_language_model()
    words = DualRateSVI(model, build_guide("mean_field", model))
    with pytest.raises(InputError, match="annealed_bound"):
        gap_decomposition(words, make_tokens(3), evidence="exact")
