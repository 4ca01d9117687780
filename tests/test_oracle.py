"""Inference and scores against what is known exactly, on linear-Gaussian models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from known_models import exact_elbo, make_oracle
from pyro.infer import TraceMeanField_ELBO
from tolerances import EXACT, MC

from ltm_pyro.config import Fast
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.published import score_on_own_draws
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.linear_gaussian import LinearGaussian

SEQUENCES = 64


def eight_dimensions(seed: int = 0) -> LinearGaussian:
    """Two thoughts of four dimensions behind twelve observed ones, posterior correlated."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(12, 8, generator=generator) / 8**0.5
    return LinearGaussian(W, noise_scale=0.5, shape=(2, 4))


@pytest.mark.parametrize("seed", range(2))
def test_infer_reaches_the_best_mean_field_elbo(seed: int) -> None:
    oracle = eight_dimensions(seed)
    batch = oracle.simulate(SEQUENCES, seed=seed)
    # One draw a step leaves about 0.03 nats of noise in q after a thousand steps; 32 draws do not.
    elbo = TraceMeanField_ELBO(num_particles=32, vectorize_particles=True)
    fast = Fast(steps=200, lr=0.2, final_fraction=0.0)
    guide = build_guide("mean_field", oracle)
    post = DualRateSVI(oracle, guide, fast, elbo=elbo, seed=seed).infer(batch)
    best = oracle.best_mean_field_elbo(batch).double()
    shortfall = best - exact_elbo(oracle, post.distribution, batch)
    assert shortfall.mean().item() <= 0.02
    # No q of the family lies above; what little is below zero is rounding in single precision.
    assert bool((shortfall > -1e-3).all())
    scores = evaluate(oracle, post, batch, draws=2000, seed=seed)
    MC.assert_close(
        scores["elbo"].values,
        scores["elbo_se"].values,
        exact_elbo(oracle, post.distribution, batch).numpy(),
        draws=2000,
    )


@pytest.mark.slow
def test_one_draw_per_step_reaches_it_with_a_longer_loop() -> None:
    oracle = eight_dimensions()
    batch = oracle.simulate(SEQUENCES)
    fast = Fast(steps=2000, lr=0.05, final_fraction=0.0)
    post = DualRateSVI(oracle, build_guide("mean_field", oracle), fast).infer(batch)
    shortfall = oracle.best_mean_field_elbo(batch) - exact_elbo(oracle, post.distribution, batch)
    assert shortfall.mean().item() <= 0.02


@pytest.fixture(scope="module")
def converged() -> tuple[LinearGaussian, Posterior]:
    oracle = eight_dimensions()
    fast = Fast(steps=200, lr=0.2)
    guide = build_guide("mean_field", oracle)
    return oracle, DualRateSVI(oracle, guide, fast).infer(oracle.simulate(SEQUENCES))


@pytest.mark.parametrize("seed", range(20))
def test_no_elbo_estimate_exceeds_the_evidence(
    seed: int, converged: tuple[LinearGaussian, Posterior]
) -> None:
    oracle, post = converged
    batch = oracle.simulate(SEQUENCES)
    evidence = oracle.log_evidence(batch).numpy()
    scores = evaluate(oracle, post, batch, draws=64, seed=seed)
    excess = (scores["elbo"] - evidence).values
    assert bool((excess <= 4 * scores["elbo_se"].values).all())
    total_se = math.sqrt(float(np.square(scores["elbo_se"]).sum()))
    assert excess.sum() <= 4 * total_se
    # The importance-weighted bound lies between, up to the Monte Carlo error of both.
    assert scores["iw_bound"].mean() > scores["elbo"].mean()
    MC.assert_at_most(
        float((scores["iw_bound"] - evidence).sum()),
        math.sqrt(float(np.square(scores["iw_bound_se"]).sum())),
        bound=0.0,
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_inference_run_exceeds_the_evidence(seed: int) -> None:
    oracle = eight_dimensions(seed)
    batch = oracle.simulate(SEQUENCES, seed=seed)
    post = DualRateSVI(oracle, build_guide("mean_field", oracle), Fast(steps=30, lr=0.2)).infer(
        batch
    )
    scores = evaluate(oracle, post, batch, draws=64, seed=seed)
    excess = scores["elbo"].values - oracle.log_evidence(batch).numpy()
    assert bool((excess <= 4 * scores["elbo_se"].values).all())


def test_scores_of_the_exact_posterior_are_the_evidence() -> None:
    # log p(x, z) - log q(z) is the same at every draw: no Monte Carlo error is left.
    oracle = make_oracle()
    batch = oracle.simulate(5)
    post = Posterior(
        oracle.posterior(batch), oracle.prior(), batch.ids, batch.mask, family="exact posterior"
    )
    scores = evaluate(oracle, post, batch, draws=16)
    evidence = oracle.log_evidence(batch)
    for name in ("elbo", "iw_bound"):
        EXACT.assert_close(torch.from_numpy(scores[name].values), evidence)
    EXACT.assert_close(torch.from_numpy(scores["elbo_se"].values), torch.zeros_like(evidence))


@pytest.fixture(scope="module")
def one_dimension() -> dict[float, LinearGaussian]:
    """z ~ N(0, 1), x | z ~ N(z, s2), by s2."""
    return {s2: LinearGaussian([[1.0]], noise_scale=math.sqrt(s2)) for s2 in (1.0, 0.1)}


@pytest.mark.parametrize(
    ("s2", "own", "tolerance", "exact", "fresh"),
    [(1.0, +0.24, 0.02, -0.29, -0.02), (0.1, +1.02, 0.05, -4.33, -0.05)],
)
def test_a_fixed_draw_scores_itself_above_the_evidence(
    one_dimension: dict[float, LinearGaussian],
    s2: float,
    own: float,
    tolerance: float,
    exact: float,
    fresh: float,
) -> None:
    """The table of a one-draw fit: 20,000 data, nats per latent dimension above the evidence."""
    oracle = one_dimension[s2]
    batch = oracle.simulate(20_000)
    evidence = oracle.log_evidence(batch).double().mean()

    def fit(noise: str) -> Posterior:
        guide = build_guide("mean_field", oracle, init_log_variance=-5.0)
        fast = Fast(steps=64, optimizer="adam", lr=0.34, noise=noise)  # type: ignore[arg-type]
        return DualRateSVI(oracle, guide, fast).infer(batch)

    fixed = fit("fixed")
    assert fixed.own_draw_elbo is not None
    assert (fixed.own_draw_elbo.double().mean() - evidence).item() == pytest.approx(
        own, abs=tolerance
    )
    honest = exact_elbo(oracle, fixed.distribution, batch).mean() - evidence
    assert honest.item() == pytest.approx(exact, abs=tolerance)
    open_draws = exact_elbo(oracle, fit("fresh").distribution, batch).mean() - evidence
    assert open_draws.item() == pytest.approx(fresh, abs=0.01)


def test_the_diagnostic_puts_the_honest_value_beside_the_trap(
    one_dimension: dict[float, LinearGaussian],
) -> None:
    oracle = one_dimension[0.1]
    batch = oracle.simulate(4000)
    guide = build_guide("mean_field", oracle, init_log_variance=-5.0)
    svi = DualRateSVI(oracle, guide, Fast(steps=64, optimizer="adam", lr=0.34, noise="fixed"))
    shown = score_on_own_draws(svi, batch)
    evidence = oracle.log_evidence(batch).double().mean().item()
    assert float(shown["own_draw_objective"].mean()) > evidence + 0.9
    honest = exact_elbo(oracle, svi.infer(batch).distribution, batch)
    MC.assert_close(shown["elbo"].values, shown["elbo_se"].values, honest.numpy(), draws=64)
    gap = shown["own_draw_objective"] - shown["elbo"]
    assert np.array_equal(shown["excess"].values, gap.values)
    assert "not a bound" in shown.attrs["note"]
    with pytest.raises(InputError, match="own draws"):
        score_on_own_draws(DualRateSVI(oracle, guide), batch)
