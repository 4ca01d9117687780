"""Bounds on log p(x) against the exact value: never above, close, and bracketed from both sides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from known_models import TINY, make_language_model, make_oracle, make_tokens
from tolerances import EXACT, MC
from torch import Tensor
from wrong_guides import one_of_two_modes, two_modes, two_modes_evidence

from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.evidence import annealed_bound, evidence_bracket, importance_bound
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.models.simulation import Simulated, simulate


def posterior(oracle: LinearGaussian, batch: Batch, q: Any, name: str = "given") -> Posterior:
    return Posterior(q, oracle.prior(), batch.ids, batch.mask, name)


def mean_field(oracle: LinearGaussian, batch: Batch, times: float = 1.0) -> Posterior:
    """The best one, its scale multiplied."""
    best = oracle.best_mean_field(batch)
    q = dist.Normal(best.mean, times * best.variance.sqrt()).to_event(2)
    return posterior(oracle, batch, q, "mean_field")


def wide_oracle(seed: int) -> LinearGaussian:
    """Forty observed dimensions, 32 of thought."""
    generator = torch.Generator().manual_seed(seed)
    return LinearGaussian(torch.randn(40, 32, generator=generator), 0.3, shape=(4, 8))


def assert_brackets(oracle: LinearGaussian, simulated: Simulated, **options: Any) -> None:
    found = evidence_bracket(oracle, simulated, **options)
    truth = oracle.log_evidence(simulated.batch).double().numpy()
    assert bool((found["lower"] <= truth + 4 * found["lower_se"]).all())
    assert bool((found["upper"] >= truth - 4 * found["upper_se"]).all())
    assert bool((found["width"] <= 1.0).all())
    np.testing.assert_allclose(found["width"], found["upper"] - found["lower"])


def test_exact_posterior_has_no_error() -> None:
    oracle = make_oracle()
    simulated = simulate(oracle, 4)
    post = posterior(oracle, simulated.batch, oracle.posterior(simulated.batch))
    evidence = oracle.log_evidence(simulated.batch)
    found = importance_bound(oracle, post, simulated.batch, draws=1000, rows=7)
    EXACT.assert_close(torch.from_numpy(found["iw_bound"].values), evidence)
    assert found["khat"].values.tolist() == [0.0] * 4
    assert bool(found["reliable"].all())
    assert found.attrs["flags"] == ""


def test_importance_bound_rises_with_draws_and_arrives_where_khat_is_small() -> None:
    oracle = make_oracle(noise_scale=2.5)
    batch = oracle.simulate(100)
    post = mean_field(oracle, batch, times=1.2)
    truth = oracle.log_evidence(batch).numpy()
    found = {s: importance_bound(oracle, post, batch, draws=s) for s in (30, 100, 1000)}
    gap = {s: float((data["iw_bound"] - truth).mean()) for s, data in found.items()}
    assert gap[30] < gap[100] < gap[1000]
    last = found[1000]
    good = last["khat"].values < 0.5
    assert good.mean() > 0.9
    assert abs(float((last["iw_bound"] - truth).values[good].mean())) < 0.02
    MC.assert_close(last["iw_bound"][good], last["iw_bound_se"][good], truth[good], draws=200)


def test_too_narrow_a_proposal_is_called_unreliable() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(8)
    found = importance_bound(oracle, mean_field(oracle, batch, times=0.15), batch)
    assert not bool(found["reliable"].any())
    assert "8 of 8 sequences have k-hat above 0.67" in found.attrs["flags"]


def test_memory_does_not_grow_with_draws() -> None:
    largest = 0

    class Watched(LinearGaussian):
        def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
            nonlocal largest
            largest = max(largest, z.shape[:-2].numel())
            return super().log_likelihood(z, batch)

    oracle = Watched(torch.eye(3), 1.0)
    batch = oracle.simulate(5)
    found = importance_bound(oracle, mean_field(oracle, batch), batch, draws=1003, rows=64)
    assert largest == 60
    assert found.attrs["draws"] == 1003


def test_no_importance_bound_exceeds_the_evidence_in_twenty_seeds() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(16)
    truth = oracle.log_evidence(batch).numpy()
    guide = mean_field(oracle, batch, times=1.3)
    for seed in range(20):
        found = importance_bound(oracle, guide, batch, draws=500, seed=seed)
        assert float(((found["iw_bound"] - truth) / found["iw_bound_se"]).max()) <= 4


@pytest.mark.parametrize("start", ["prior", "guide"])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))]
)
def test_no_annealed_bound_exceeds_the_evidence(seed: int, start: str) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(16)
    truth = oracle.log_evidence(batch).numpy()
    guide = mean_field(oracle, batch, times=1.3) if start == "guide" else None
    found = annealed_bound(oracle, batch, start=guide, rungs=30, chains=100, seed=seed)
    assert float(((found["lower"] - truth) / found["lower_se"]).max()) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bracket_in_32_dimensions(seed: int) -> None:
    oracle = wide_oracle(seed)
    assert_brackets(oracle, simulate(oracle, 16, seed=seed))


def test_bracket_in_eight_dimensions() -> None:
    oracle = make_oracle(shape=(2, 4), n_observed=12, noise_scale=0.2)
    assert_brackets(oracle, simulate(oracle, 8))


def test_bracket_of_two_modes_holds_their_evidence() -> None:
    # Started at a guide on one mode, 52 % of these brackets were [-0.693, -0.693] around the truth.
    model = two_modes()
    simulated = simulate(model, 100, seed=1)
    truth = two_modes_evidence(model, simulated.batch)
    found = evidence_bracket(model, simulated)
    lower, upper = found["lower"].values - truth, found["upper"].values - truth
    MC.assert_at_most(lower, found["lower_se"].values, 0.0, draws=32)
    MC.assert_at_most(-upper, found["upper_se"].values, 0.0, draws=32)
    # Two errors on either side: 95 % promised, and 100 sequences know a share to 2 %.
    inside = (lower <= 2 * found["lower_se"]) & (upper >= -2 * found["upper_se"])
    assert float(inside.mean()) >= 0.88
    assert np.abs([lower.mean(), upper.mean()]).max() < 0.05
    assert found.attrs["start"] == "prior"


def test_no_bracket_starts_at_a_guide() -> None:
    # A guide that misses a mode leaves a lower bound, low by the mass that it misses.
    model = two_modes()
    batch = Batch(torch.tensor([[3.0], [4.0], [5.0]], dtype=torch.float64))
    missing = one_of_two_modes(model, batch)
    normal = dist.Normal(missing.mean, torch.full_like(missing.mean, 0.3)).to_event(2)
    start = replace(missing, distribution=normal)
    low = annealed_bound(model, batch, start=start)["lower"].values
    truth = two_modes_evidence(model, batch)
    np.testing.assert_allclose(low - truth, -math.log(2), atol=0.1)
    with pytest.raises(TypeError, match="start"):
        evidence_bracket(model, simulate(model, 3), start=start)  # type: ignore[call-arg]


def test_bracket_in_few_dimensions() -> None:
    oracle = make_oracle(noise_scale=0.5)
    assert_brackets(oracle, simulate(oracle, 8))


@pytest.mark.parametrize("schedule", ["sigmoid", "linear"])
def test_fixed_schedules_bound_from_both_sides(schedule: str) -> None:
    oracle = make_oracle()
    assert_brackets(oracle, simulate(oracle, 6), schedule=schedule, rungs=200)


def test_annealing_beats_importance_sampling_from_the_same_start() -> None:
    oracle = make_oracle(shape=(2, 4), n_observed=12, noise_scale=0.2)
    batch = oracle.simulate(8)
    start = mean_field(oracle, batch)
    truth = oracle.log_evidence(batch).numpy()
    annealed = annealed_bound(oracle, batch, start=start)
    weighted = importance_bound(oracle, start, batch, draws=1000)
    assert abs(float((annealed["lower"] - truth).mean())) < 0.1
    assert float((weighted["iw_bound"] - truth).mean()) < -0.15


def test_a_hurried_bracket_says_that_it_is_wide() -> None:
    oracle = make_oracle(shape=(2, 4), n_observed=12, noise_scale=0.1)
    found = evidence_bracket(oracle, simulate(oracle, 4), rungs=8, chains=4)
    assert bool((found["width"] > 1).any())
    assert "wider than 1 nat" in found.attrs["flags"]
    assert "guide" not in found.attrs["flags"]


def test_language_model_with_a_ragged_mask() -> None:
    config = replace(TINY, n_layers=1, seq_len=6)
    model, tokens = make_language_model(config), make_tokens(3, config)
    whole = simulate(model, 3, seed=2)
    simulated = Simulated(Batch(whole.batch.x, tokens.mask, tokens.ids), whole.z)
    before = torch.get_rng_state()
    found = evidence_bracket(model, simulated, chains=16, rungs=30)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert found["sequence"].values.tolist() == tokens.ids.tolist()
    # Six dimensions: many draws from the prior give the value itself.
    prior = posterior(model, simulated.batch, model.prior().expand(torch.Size([3])))  # type: ignore[arg-type]
    truth = importance_bound(model, prior, simulated.batch, draws=20_000)
    error = np.hypot(truth["iw_bound_se"], found["lower_se"])
    assert bool((found["lower"] <= truth["iw_bound"] + 4 * error).all())
    error = np.hypot(truth["iw_bound_se"], found["upper_se"])
    assert bool((found["upper"] >= truth["iw_bound"] - 4 * error).all())
    assert bool((found["width"] < 1).all())


def test_bad_options_are_refused() -> None:
    oracle = make_oracle()
    simulated = simulate(oracle, 3)
    batch = simulated.batch
    start = mean_field(oracle, batch)
    point = replace(start, has_density=False, family="delta")
    other = replace(start, ids=start.ids + 1)
    for message, options in (
        ("did you mean 'sigmoid'", {"schedule": "sigmoidal"}),
        ("chains is 1: must be 2", {"chains": 1}),
        ("rungs is 1: must be 2", {"rungs": 1}),
        ("point mass", {"start": point}),
        ("ids must be equal", {"start": other}),
    ):
        with pytest.raises(InputError, match=message):
            annealed_bound(oracle, batch, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="draws is 1: must be 2"):
        importance_bound(oracle, start, batch, draws=1)
    with pytest.raises(InputError, match="point mass"):
        importance_bound(oracle, point, batch)
    with pytest.raises(InputError, match="ids must be equal"):
        importance_bound(oracle, other, batch)
    with pytest.raises(InputError, match=r"simulated.z is \(2, 2, 2\)"):
        evidence_bracket(oracle, Simulated(batch, simulated.z[:2]))
