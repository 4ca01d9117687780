from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import wrong_guides
from known_models import make_language_model, make_oracle, make_tokens
from pyro.infer import TraceMeanField_ELBO
from scipy import stats
from tolerances import MC
from wrong_guides import RIGHT, WRONG, as_posterior

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.trust import Diagnosis, Flag, diagnose
from ltm_pyro.diagnostics.trust.diagnosis import Bonferroni
from ltm_pyro.diagnostics.trust.draws import Joint, draw, walk
from ltm_pyro.diagnostics.trust.drift import JOINT
from ltm_pyro.diagnostics.trust.other_side import BETTER, MISSED
from ltm_pyro.diagnostics.trust.score import CORRELATION, SHIFT, VARIANCE, score_moments
from ltm_pyro.diagnostics.trust.weights import GAP
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.full_normal import FullNormal
from ltm_pyro.models.simulation import simulate

FEWER = {"draws": 400, "steps": 8, "chains": 0}
"""Enough for these errors, and a tenth of the default's time."""

JUDGED = {**FEWER, "draws": 1000}
"""Enough for a k-hat."""

ANNEALED = {**FEWER, "chains": 32, "rungs": 24}
"""Enough for one dimension."""

# Wrong guide by diagnostic: the problem that it names, False where it is blind, None where that
# depends on the case. k-hat and gap are the two parts of `weights`.
COLUMNS = ("k-hat", "gap", "score", "drift", "rows", "annealing")
TABLE: dict[str, tuple[str | bool | None, ...]] = {
    "scale halved": ("tails", "gap", "narrow", "narrow", False, None),
    "scale doubled": (None, "gap", "wide", "wide", False, None),
    "mean shifted by half a scale": (None, "gap", "shift", "shift", False, None),
    "one dimension frozen": ("tails", "gap", "frozen", "narrow", False, None),
    "one of two modes": (False, False, False, False, False, "missed mass"),
    "correlation of 0.95 ignored": (None, "gap", "correlation", "correlation", False, None),
    "heavy tails cut": (False, False, None, "tails", False, False),
    "wrong sequence": ("tails", "gap", "shift", "shift", "other sequence", None),
}


@pytest.fixture(scope="module")
def diagnoses() -> dict[str, Diagnosis]:
    """Each wrong guide's."""
    out = {}
    for name, case in WRONG.items():
        model = case.make_model()
        batch = case.batch(model, 8, seed=1)
        effort = {**ANNEALED, "draws": 1000} if model.thought_shape == (1, 1) else JUDGED
        out[name] = diagnose(model, case.infer(model)(batch), batch, **effort)
    return out


def seen(diagnosis: Diagnosis, diagnostic: str) -> set[str]:
    """The problems that one diagnostic names."""
    if diagnostic in ("k-hat", "gap"):
        problem = {"k-hat": "tails", "gap": "gap"}[diagnostic]
        return {f.problem for f in diagnosis.flags if f.diagnostic == "weights"} & {problem}
    return {f.problem for f in diagnosis.flags if f.diagnostic == diagnostic}


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_guide_is_flagged_as_the_table_says(
    name: str, diagnoses: dict[str, Diagnosis]
) -> None:
    assert not diagnoses[name].passed
    for diagnostic, expected in zip(COLUMNS, TABLE[name], strict=True):
        found = seen(diagnoses[name], diagnostic)
        if expected is False:
            assert not found, diagnostic
        elif expected is not None:
            assert expected in found, diagnostic


def test_sentences_say_how_wrong(diagnoses: dict[str, Diagnosis]) -> None:
    def sentence(name: str, diagnostic: str, problem: str) -> str:
        (flag,) = [
            f for f in diagnoses[name].flags
            if (f.diagnostic, f.problem) == (diagnostic, problem)
        ]  # fmt: skip
        assert set(flag.sequences) <= set(diagnoses[name].data["sequence"].values.tolist())
        assert len(set(flag.sequences)) == len(flag.sequences) > 0
        return flag.sentence

    assert "too small" in sentence("scale halved", "score", "narrow")
    assert "too large" in sentence("scale doubled", "score", "wide")
    assert "above the posterior's" in sentence("mean shifted by half a scale", "score", "shift")
    assert "z[3,1]" in sentence("one dimension frozen", "score", "frozen")
    assert "another mode" in sentence("one of two modes", "annealing", "missed mass")
    assert "z[0,0] and z[0,1]" in sentence("correlation of 0.95 ignored", "score", "correlation")
    moved = sentence("scale halved", "drift", "narrow")
    assert "after a few steps towards the posterior" in moved
    assert "drift, of moved draws" in str(diagnoses["scale halved"])
    assert "tails are cut" in sentence("heavy tails cut", "drift", "tails")
    assert "out of order" in sentence("wrong sequence", "rows", "other sequence")


def test_the_other_sequence_is_named() -> None:
    oracle = wrong_guides.oracle_of_eight()
    x = simulate(oracle, 4, 1).batch.observed
    batch = Batch(x, ids=torch.tensor([40, 10, 30, 20]))
    diagnosis = diagnose(oracle, wrong_guides.rolled(oracle, batch), batch, **FEWER)
    (flag,) = [f for f in diagnosis.flags if f.diagnostic == "rows"]
    worst = flag.sequences[0]
    # Row i holds the posterior of row i + 1, so the sequence's own is in the row before.
    order = batch.ids.tolist()
    before = order[(order.index(worst) - 1) % 4]
    assert f"posterior of sequence {before} explains sequence {worst}" in flag.sentence


def test_right_posteriors_pass_nearly_always() -> None:
    """The issue allows one seed of twenty; the rate is set to one of a hundred."""
    for case in RIGHT.values():
        model = case.make_model()
        flagged = []
        for seed in range(20 if model.thought_shape == (4, 2) else 5):
            batch = case.batch(model, 6, seed)
            fewer = {"draws": 300, "steps": 4, "chains": 16 * (seed == 0), "rungs": 24}
            found = diagnose(model, case.infer(model)(batch), batch, seed=seed, **fewer)
            flagged += [(seed, flag) for flag in found.flags]
        assert len({seed for seed, _ in flagged}) <= 1, flagged


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_posteriors_pass_with_the_default_effort(name: str) -> None:
    model = RIGHT[name].make_model()
    flagged = 0
    for seed in range(40):
        batch = RIGHT[name].batch(model, 16, seed)
        post = RIGHT[name].infer(model)(batch)
        flagged += not diagnose(model, post, batch, seed=seed).passed
    assert flagged <= 2  # of 40 at a rate of 0.01 or less: 3 or more once in 130


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_the_default_effort_sees_all_of_it_too(name: str) -> None:
    model = WRONG[name].make_model()
    batch = WRONG[name].batch(model, 16, seed=2)
    found = diagnose(model, WRONG[name].infer(model)(batch), batch)
    expected = {problem for problem in TABLE[name] if isinstance(problem, str)}
    assert expected <= found.problems


@pytest.mark.slow
def test_annealing_runs_on_a_language_model() -> None:
    model, batch = make_language_model(), make_tokens(3)
    post = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=60, lr=0.1)).infer(batch)
    data = diagnose(model, post, batch, draws=100, steps=2, chains=8, rungs=8).data
    assert (data["annealed_bound"] > data["elbo"] - 1).all()


@pytest.mark.slow
def test_fitted_full_rank_guides_pass() -> None:
    flagged = 0
    for seed in range(20):
        oracle = make_oracle((4, 2), 12, noise_scale=(0.1, 0.4, 1.0)[seed % 3], seed=seed)
        batch = simulate(oracle, 16, seed).batch
        flagged += not diagnose(oracle, fit(oracle, "full_rank", batch), batch, seed=seed).passed
    assert flagged <= 1


def fit(model: LatentModel, family: str, batch: Batch, steps: int = 400):
    elbo = TraceMeanField_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    fast = Fast(steps=steps, lr=0.1, final_fraction=0.0)
    return DualRateSVI(model, build_guide(family, model), fast, elbo=elbo).infer(batch)


def test_the_best_mean_field_guide_is_told_what_it_lacks() -> None:
    oracle = wrong_guides.correlated_oracle()
    batch = simulate(oracle, 4, 1).batch
    post = as_posterior(oracle, batch, oracle.best_mean_field(batch))
    assert {"narrow", "correlation"} <= diagnose(oracle, post, batch, **FEWER).problems


def test_a_normal_fit_to_heavy_tails_has_heavy_weights() -> None:
    model = wrong_guides.heavy_tails()
    batch = simulate(model, 4, 1).batch
    diagnosis = diagnose(model, wrong_guides.normal_core(model, batch), batch, **JUDGED)
    assert "tails" in seen(diagnosis, "k-hat")


def test_khat_does_not_see_a_scale_that_is_too_large() -> None:
    """Known blind spot: weights p / q are bounded there. In many dimensions few draws hide that."""
    oracle = make_oracle((1, 2))
    batch = simulate(oracle, 16, 1).batch
    diagnosis = diagnose(oracle, wrong_guides.rescaled(oracle, batch, 2.0), batch, **JUDGED)
    assert (diagnosis.data["khat"] < 0.5).all()
    assert "wide" in diagnosis.problems


def test_independent_draws_have_a_good_rhat_whatever_q_is() -> None:
    """Known blind spot: R-hat compares a posterior's draws with themselves."""
    from ltm_pyro.inference.mcmc.convergence import rhat

    for name, case in WRONG.items():
        model = case.make_model()
        batch = case.batch(model, 3, seed=1)
        z = case.infer(model)(batch).sample(4000).reshape(4, 1000, -1)
        assert float(rhat(z).max()) < 1.01, name


def test_without_annealing_a_missed_mode_stays_unseen_and_the_text_says_so() -> None:
    case = WRONG["one of two modes"]
    model = case.make_model()
    batch = case.batch(model, 6, seed=1)
    diagnosis = diagnose(model, case.infer(model)(batch), batch, draws=400, chains=0)
    assert diagnosis.passed
    assert "a missed mode stays unseen" in str(diagnosis)
    assert "not a proof" in str(diagnosis)


def test_scores_imply_the_exact_posterior_from_a_wrong_one() -> None:
    """On the oracle the gradient is linear in z, so the regression gives the posterior itself."""
    oracle = make_oracle((2, 2))
    batch = simulate(oracle, 5, 1).batch
    exact = oracle.posterior(batch)
    q = FullNormal(
        exact.mean + 0.3 * exact.variance.sqrt(),
        torch.diag_embed(1.5 * exact.variance.sqrt().flatten(1)),
    )
    drawn = draw(Joint(oracle, batch), as_posterior(oracle, batch, q), 500)
    moments = score_moments(drawn)
    MC.assert_close(*moments.shift, np.full((5, 4), -0.3 / 1.5), 40)
    MC.assert_close(*moments.variance, np.full((5, 4), 1.5**2 - 1), 40)
    assert moments.correlation is not None
    covariance = exact.covariance
    scale = exact.variance.flatten(1).sqrt()
    upper = np.triu_indices(4, 1)
    correlation = (covariance / scale[:, :, None] / scale[:, None, :]).numpy()[:, *upper]
    MC.assert_close(*moments.correlation, correlation, 40)


def test_dimensions_are_looked_at_alone_where_draws_are_few() -> None:
    oracle = wrong_guides.oracle_of_eight()
    batch = simulate(oracle, 3, 1).batch
    few = {**FEWER, "draws": 100}
    wide = make_oracle((4, 4), n_observed=20, seed=2)
    wide_batch = simulate(wide, 3, 1).batch
    assert (
        score_moments(
            draw(Joint(wide, wide_batch), wrong_guides.exact(wide, wide_batch), 100)
        ).correlation
        is None
    )
    assert (
        "frozen"
        in diagnose(wide, wrong_guides.frozen(wide, wide_batch), wide_batch, **few).problems
    )
    assert diagnose(wide, wrong_guides.exact(wide, wide_batch), wide_batch, **few).passed
    assert (
        "wide" in diagnose(oracle, wrong_guides.rescaled(oracle, batch, 2.0), batch, **few).problems
    )


def test_steps_leave_the_exact_posterior_as_it_is() -> None:
    oracle = make_oracle((1, 3))
    batch = simulate(oracle, 2, 1).batch
    exact = oracle.posterior(batch)
    target = Joint(oracle, batch)
    state, rates = walk(target, draw(target, wrong_guides.exact(oracle, batch), 4000), 5)
    assert ((rates > 0.4) & (rates < 0.9)).all()
    u = (state.z - exact.mean.flatten(1)) / exact.variance.flatten(1).sqrt()
    MC.assert_close(u.mean(0), torch.full((2, 3), 4000**-0.5), np.zeros((2, 3)))
    MC.assert_close(u.var(0), torch.full((2, 3), (2 / 4000) ** 0.5), np.ones((2, 3)))


def test_draws_in_parts_are_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_language_model(), make_tokens(2)
    z = torch.randn(5, 2, 4 * 3, dtype=torch.float64)
    whole = Joint(model, batch)(z)
    monkeypatch.setattr("ltm_pyro.diagnostics.trust.draws._TOKENS_AT_ONCE", 50)
    target = Joint(model, batch)
    assert target.at_once == 2
    parts = target(z)
    torch.testing.assert_close(parts.terms, whole.terms)
    torch.testing.assert_close(parts.gradients, whole.gradients)
    value = target.value(z.unflatten(-1, model.thought_shape))
    torch.testing.assert_close(value, whole.terms[0])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("signed", [True, False])
def test_the_rule_errs_as_often_as_it_says(signed: bool) -> None:
    level, rng, wrongs = 0.1, np.random.default_rng(0), 0
    rule = Bonferroni(np.arange(6), level)
    judge = rule.test if signed else rule.test_above
    for _ in range(1000):
        # The true effect lies on the edge of what is tolerated, everywhere.
        effect = 0.2 + 0.05 * rng.standard_normal((6, 4))
        wrongs += judge(effect, np.full((6, 4), 0.05), 0.2, df=10**6) is not None
    share = wrongs / 1000
    # Two-sided tests spend half of the level on the side that cannot happen here.
    expected = level / 2 if signed else level
    assert share < expected + 5 * (expected / 1000) ** 0.5
    assert share > expected / 4


def test_the_rule_sees_an_error_that_all_share() -> None:
    rule = Bonferroni(np.arange(50), 0.01)
    effect, error = np.full((50, 3), 0.3), np.full((50, 3), 0.1)
    found = rule.test(-effect, error, 0.2, df=100)
    assert found is not None
    assert found.worst == -1
    assert found.effect == pytest.approx(-0.3)
    assert found.whose == "the mean over sequences"
    assert len(found.sequences) == 50
    assert rule.test(effect[:1], error[:1], 0.2, df=100) is None
    assert rule.test(np.full((4, 2), np.nan), np.full((4, 2), 0.1), 0.2, df=9) is None


def test_a_point_mass_is_refused_a_diagnosis() -> None:
    oracle = make_oracle()
    batch = simulate(oracle, 3, 1).batch
    point = dist.Delta(oracle.posterior(batch).mean, event_dim=2)
    post = replace(as_posterior(oracle, batch, point), has_density=False)
    diagnosis = diagnose(oracle, post, batch)
    assert diagnosis.problems == {"point mass"}
    assert "no density" in str(diagnosis)


def test_single_precision_a_stuck_dimension_and_no_density() -> None:
    oracle = make_oracle((1, 3), noise_scale=0.3, dtype=torch.float32)
    batch = simulate(oracle, 4, 1).batch
    assert diagnose(oracle, wrong_guides.exact(oracle, batch), batch, **FEWER).passed
    exact = oracle.posterior(batch)
    scale = exact.variance.sqrt() * torch.tensor([1.0, 1.0, 1e-12])
    stuck = as_posterior(oracle, batch, dist.Normal(exact.mean, scale).to_event(2))
    assert "frozen" in diagnose(oracle, stuck, batch, **FEWER).problems
    lost = as_posterior(oracle, batch, dist.Normal(exact.mean + 1e30, scale).to_event(2))
    assert diagnose(oracle, lost, batch, **FEWER).problems == {"not finite"}


def test_the_answer_is_reproducible_and_leaves_no_trace() -> None:
    oracle = wrong_guides.oracle_of_eight()
    batch = simulate(oracle, 3, 1).batch
    post = wrong_guides.rescaled(oracle, batch, 2.0)
    state = torch.random.get_rng_state()
    first, again = (diagnose(oracle, post, batch, **FEWER, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.data.identical(again.data)
    assert first.flags == again.flags
    assert not first.data.identical(diagnose(oracle, post, batch, **FEWER, seed=4).data)
    assert all(first.data[name].attrs["units"] for name in first.data.data_vars)
    assert first.data["khat"].dims == ("sequence",)
    json.dumps(first.data.attrs)


def test_one_sequence_is_enough() -> None:
    oracle = wrong_guides.oracle_of_eight()
    batch = simulate(oracle, 1, 1).batch
    diagnosis = diagnose(oracle, wrong_guides.rescaled(oracle, batch, 0.5), batch, **FEWER)
    assert "narrow" in diagnosis.problems
    assert "one sequence only" in diagnosis.left_out["rows"]


def test_it_runs_on_a_language_model() -> None:
    model, batch = make_language_model(), make_tokens(3)
    post = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=5)).infer(batch)
    less = {"draws": 100, "steps": 2, "chains": 0}
    diagnosis = diagnose(model, post, batch, **less)
    assert not diagnosis.passed  # five steps from the prior
    assert diagnosis.data["sequence"].values.tolist() == batch.ids.tolist()
    assert "mean_field" in str(diagnosis)


def test_bad_input_is_named() -> None:
    oracle = make_oracle()
    batch = simulate(oracle, 3, 1).batch
    post = wrong_guides.exact(oracle, batch)
    for message, change in (
        ("draws is 50: .* 100 or more", {"draws": 50}),
        ("draws is 1:", {"draws": 1}),
        ("draws is 1e[+]20", {"draws": 1e20}),
        ("draws is 1000", {"draws": 10**20}),
        ("draws is None", {"draws": None}),
        ("steps is -1", {"steps": -1}),
        ("steps is 1.5", {"steps": 1.5}),
        ("chains is 1:", {"chains": 1}),
        ("rungs is '8'", {"rungs": "8"}),
        ("seed is -1", {"seed": -1}),
    ):
        with pytest.raises(InputError, match=message):
            diagnose(oracle, post, batch, **change)
    for name, given in (
        ("model", (None, post, batch)),
        ("post", (oracle, None, batch)),
        ("batch", (oracle, post, None)),
        ("batch", (oracle, post, [1, 2])),
    ):
        with pytest.raises(InputError, match=f"{name} "):
            diagnose(*given)
    with pytest.raises(InputError, match="ids must be equal"):
        diagnose(oracle, post, batch.select(torch.tensor([2, 1, 0])))


def told(flag: Flag) -> tuple[float, float]:
    """The interval of a scale's sentence: "0.45 to 0.55 times", "at most 0.7 times"."""
    found = re.search(r"(?:(at most|at least) |([\d.]+) to )([\d.]+) times", flag.sentence)
    assert found is not None, flag.sentence
    end = float(found[3])
    if found[1]:
        return (-math.inf, end) if found[1] == "at most" else (end, math.inf)
    return float(found[2]), end


@pytest.mark.parametrize("shape", [(1, 2), (4, 2)])
def test_what_is_printed_covers_the_truth(shape: tuple[int, int]) -> None:
    """Scales halved, doubled: the worst of all dimensions and sequences is told, 20 times each.

    The weights said 0.62 to 0.68 +- 0.02 for a half; the score's worst was 0.46 +- 0.01.
    """
    oracle = make_oracle(shape, n_observed=12, noise_scale=0.5, seed=3)
    asked = missed = 0
    by_weights = 0
    for seed in range(20):
        batch = simulate(oracle, 8, seed).batch
        factor = 0.5 if seed % 2 else 2.0
        post = wrong_guides.rescaled(oracle, batch, factor)
        diagnosis = diagnose(oracle, post, batch, draws=1000, steps=0, chains=0, seed=seed)
        for flag in diagnosis.flags:
            if flag.problem in ("narrow", "wide"):
                low, high = told(flag)
                asked += 1
                by_weights += flag.diagnostic == "weights"
                # Half a unit of the last printed digit.
                missed += not low - 0.005 <= factor <= high + 0.005
    assert asked >= 20
    # In 8 dimensions k-hat lets no weights be used for moments here.
    assert by_weights > 0 or shape == (4, 2)
    # Binomial(asked, 0.05) at 1e-5.
    assert missed <= stats.binom.isf(1e-5, asked, 0.05)


def test_shifts_and_correlations_are_told_with_intervals_that_cover() -> None:
    missed = 0
    for seed in range(20):
        oracle = wrong_guides.oracle_of_eight()
        batch = simulate(oracle, 8, seed).batch
        post = wrong_guides.shifted(oracle, batch)
        diagnosis = diagnose(oracle, post, batch, draws=400, steps=0, chains=0, seed=seed)
        (flag,) = [f for f in diagnosis.flags if (f.diagnostic, f.problem) == ("score", "shift")]
        found = re.search(r"lies ([\d.]+) to ([\d.]+) of its", flag.sentence)
        assert found is not None
        missed += not float(found[1]) - 0.005 <= 0.5 <= float(found[2]) + 0.005
    assert missed <= stats.binom.isf(1e-5, 20, 0.05)


def test_a_fit_within_all_tolerances_is_let_pass_and_all_are_listed() -> None:
    """Scales of 0.9 in 8 dimensions meet every dimension's tolerance, and not the drift's sum."""
    oracle = wrong_guides.oracle_of_eight()
    for value in (SHIFT, VARIANCE, CORRELATION, GAP, JOINT, MISSED, f"{BETTER:g} nat"):
        assert str(value) in (diagnose.__doc__ or "")
    flagged: list[Flag] = []
    for seed in range(3):
        batch = simulate(oracle, 8, seed).batch
        flagged += diagnose(
            oracle, wrong_guides.rescaled(oracle, batch, 0.97), batch, **FEWER, seed=seed
        ).flags
    assert not flagged
    batch = simulate(oracle, 8, 0).batch
    diagnosis = diagnose(oracle, wrong_guides.rescaled(oracle, batch, 0.9), batch, **JUDGED)
    assert {flag.diagnostic for flag in diagnosis.flags} == {"drift"}
    assert "too typical draws" in diagnosis.problems


def test_it_answers_as_evaluate_does_on_the_same_draws() -> None:
    oracle = make_oracle()
    batch = simulate(oracle, 4, 1).batch
    post = DualRateSVI(oracle, build_guide("mean_field", oracle), Fast(steps=20)).infer(batch)
    scores = evaluate(oracle, post, batch, draws=1000, seed=7)
    data = diagnose(oracle, post, batch, draws=1000, steps=0, chains=0, seed=7).data
    for name in ("elbo", "iw_bound", "iw_bound_se", "khat"):
        np.testing.assert_allclose(data[name], scores[name], rtol=1e-9, err_msg=name)


def test_nothing_is_printed_where_it_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    oracle = make_oracle()
    batch = simulate(oracle, 3, 1).batch
    diagnose(oracle, wrong_guides.exact(oracle, batch), batch, draws=100, steps=1, chains=0)
    assert capsys.readouterr() == ("", "")
