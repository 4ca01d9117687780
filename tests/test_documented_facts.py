"""What docs/*.md state as facts is what tests assert: each sentence with the test that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from known_models import exact_elbo
from test_convergence import RefinedEncoder, setting

from ltm_pyro.config import Fast
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.linear_gaussian import LinearGaussian

ROOT = Path(__file__).parents[1]

FACTS = [
    ("`delta` | | a point: the posterior's mode", "test_guides::test_optimum_on_the_oracle"),
    (
        '"Closed form" holds against a factorised normal prior',
        "test_gaussian_guides::test_there_is_no_closed_kl_to_another_prior",
    ),
    ("Before that a flow is exactly a mean field", "test_flow_guide::test_a_fresh_network_is_mean"),
    (
        "the evidence within 0.01, moments within 0.02 scales, in every sequence",
        "test_gaussian_guides::test_the_exact_posterior_is_reached_for_any_loadings",
    ),
    (
        "the best mean field within 0.01 on average",
        "test_documented_facts::test_several_draws_arrive_at_the_best_mean_field",
    ),
    (
        "the evidence within 0.05 and means within 0.05 scales on average",
        "test_flow_guide::test_a_learned_flow_reaches_the_evidence",
    ),
    (
        "16 steps from the prior leave about 4 nats to the best mean field at noise 1, 40 at 0.3 "
        "and 500 at 0.1 (Adam's, at 0.1: tens, hundreds and thousands); 2,000 steps at `lr=0.03` "
        "leave about 0.01 at each",
        "test_documented_facts::test_what_a_fast_loop_leaves",
    ),
    (
        "eight steps with one draw leave 0.27 nats to an encoder that was right already at the "
        "default rate and 0.03 at `lr=0.1` (Adam: 1.3 at 0.1)",
        "test_documented_facts::test_steps_after_a_good_encoder_are_small",
    ),
    (
        "with eight, two components cover two modes",
        "test_mixture_guide::test_two_components_cover_two_modes_and_mean_field_one",
    ),
    (
        "A spline bends the inner five standard deviations only",
        "test_flow_guide::test_splines_leave_what_lies_beyond_their_bound",
    ),
    ("no noise at the end", "test_gradients::test_no_variance_at_the_exact_posterior"),
    ("q's gradient drowns as 1/sqrt(S)", "test_gradients::test_more_particles_drown"),
    ("instead of `iwae` wherever q is fitted too", "test_gradients::test_more_particles_drown"),
    ("against collapse; never above the ELBO", "test_objectives::test_the_elbo_column_is_the"),
    (
        '`metrics["elbo"]` is the plain ELBO on the same draws',
        "test_objectives::test_the_elbo_column_is_the_plain_elbo",
    ),
    (
        "its metrics hold `log_joint`, log p(x, z) at the point",
        "test_point_mass::test_the_metrics_of_a_point_mass_name_the_log_joint",
    ),
    ("that pair is refused", "test_point_mass::test_a_point_mass_does_not_teach_a_prior"),
    ("autoregressive flow, the identity at the start", "test_priors::test_the_start_is_the_stand"),
    ("AR(1) over thoughts with unit marginal variance", "test_priors::test_ar1_is_the_normal_with"),
    ("recovers the corpus's classes", "test_prior_fit::test_the_mixture_finds_the_classes_and"),
    ("makes a held-out bound worse", "test_prior_fit::test_other_priors_are_never_worse"),
    (
        "against an exact or a given log p(x) a gap that is really 0 comes out on either side",
        "test_gaps::test_the_sign_of_a_gap_that_is_zero",
    ),
    ("`approximation` is never negative", "test_gaps::test_the_sign_of_a_gap_that_is_zero"),
    (
        "from a guide that misses a mode both sides would miss it",
        "test_evidence::test_no_bracket_starts_at_a_guide",
    ),
    (
        "`at least` where so few sequences cannot show more",
        "test_collapse::test_more_information_than_the_sequences_can_show_is_called_at_least",
    ),
    ("Tests assert every cell", "test_trust::test_every_wrong_guide_is_flagged_as_the_table_says"),
    ("Tests assert every cell", "test_calibration::test_wrong_posteriors_are_not_and_blind_spots"),
    (
        "In 2 dimensions k-hat is below 0.5, an asserted blind spot",
        "test_trust::test_khat_does_not_see_a_scale_that_is_too_large",
    ),
    (
        "the prior in place of the posterior passes marginal SBC and VSBC",
        "test_calibration::test_the_prior_is_calibrated_to_the_marginals_alone",
    ),
    (
        "R-hat of independent draws from q is below 1.01 for all eight",
        "test_trust::test_independent_draws_have_a_good_rhat_whatever_q_is",
    ),
    ("a missed mode passes", "test_trust::test_without_annealing_a_missed_mode_stays_unseen"),
]
"""A sentence of docs/guides.md, or a part of it, and the test that asserts it, or its beginning."""


@pytest.mark.parametrize(("sentence", "test"), FACTS)
def test_the_sentence_stands_there_and_its_test_exists(sentence: str, test: str) -> None:
    text = " ".join((ROOT / "docs" / "guides.md").read_text().split())
    assert sentence in text
    module, name = test.split("::")
    code = (ROOT / "tests" / f"{module}.py").read_text()
    assert re.search(rf"^def {name}", code, re.MULTILINE)


def oracle_with(noise: float) -> LinearGaussian:
    """Eight dimensions behind twelve, loadings of unit variance."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    return LinearGaussian(W, noise, shape=(2, 4))


def left(svi: DualRateSVI, oracle: LinearGaussian, n: int) -> float:
    """Nats per sequence to the best mean field, exact."""
    batch = oracle.simulate(n, seed=1)
    q = svi.infer(batch).distribution
    return float((oracle.best_mean_field_elbo(batch) - exact_elbo(oracle, q, batch)).mean())


@pytest.mark.parametrize(("noise", "nats", "adams"), [(1, 4, 10), (0.3, 40, 100), (0.1, 500, 1000)])
def test_what_a_fast_loop_leaves(noise: float, nats: float, adams: float) -> None:
    """docs/guides.md: "16 steps from the prior leave about 4 nats to the best mean field at noise
    1, 40 at 0.3 and 500 at 0.1 (Adam's, at 0.1: tens, hundreds and thousands); 2,000 steps at
    `lr=0.03` leave about 0.01 at each".
    """
    oracle = oracle_with(noise)
    short, adam, long = (
        DualRateSVI(oracle, build_guide("mean_field", oracle), fast)
        for fast in (
            Fast(steps=16),
            Fast(steps=16, optimizer="adam", lr=0.1),
            Fast(steps=2000, lr=0.03),
        )
    )
    # Over 32 sequences, whose losses spread by about half of their mean.
    assert left(short, oracle, 32) == pytest.approx(nats, rel=0.3)
    assert adams < left(adam, oracle, 32) < 10 * adams
    # Measured 0.010 to 0.014 on two loadings.
    assert 0 < left(long, oracle, 16) < 0.02


@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_several_draws_arrive_at_the_best_mean_field(noise: float) -> None:
    """docs/guides.md: "the best mean field within 0.01 on average"."""
    oracle = oracle_with(noise)
    fast, stl = Fast(steps=300, lr=0.2, final_fraction=0.0), build_objective("stl", particles=32)
    svi = DualRateSVI(oracle, build_guide("mean_field", oracle), fast, elbo=stl)
    assert 0 < left(svi, oracle, 32) < 0.01


def test_steps_after_a_good_encoder_are_small() -> None:
    """docs/guides.md: "eight steps with one draw leave 0.27 nats to an encoder that was
    right already at the default rate and 0.03 at `lr=0.1` (Adam: 1.3 at 0.1)".
    """
    oracle, batch = setting()
    best = oracle.best_mean_field_elbo(batch)
    adam = Fast(steps=8, optimizer="adam", lr=0.1)
    for fast, nats in ((Fast(steps=8), 0.27), (Fast(steps=8, lr=0.1), 0.03), (adam, 1.3)):
        svi = DualRateSVI(oracle, RefinedEncoder(oracle), fast)
        lost = best - exact_elbo(oracle, svi.infer(batch).distribution, batch)
        # Over 16 sequences, whose losses spread by about half of their mean.
        assert float(lost.mean()) == pytest.approx(nats, rel=0.3)
