"""Chains against exact posteriors: right where they claim to be, and visibly wrong where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from known_models import TINY, make_language_model, make_oracle, make_tokens
from scipy import stats
from tolerances import EXACT, GOF, MC
from torch import Tensor

from ltm_pyro import compat_arviz
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.mcmc import MCMCDraws, sample_posterior
from ltm_pyro.inference.mcmc.convergence import (
    ess_bulk,
    ess_mean,
    ess_tail,
    mean_error,
    rhat,
    rhat_and_ess,
)
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussian


def exact(oracle: LinearGaussian, batch: Batch) -> Posterior:
    return Posterior(oracle.posterior(batch), oracle.prior(), batch.ids, batch.mask, "exact")


def random_oracle(noise: float, seed: int) -> LinearGaussian:
    """Twelve observed dimensions, eight of thought, loadings as they come."""
    generator = torch.Generator().manual_seed(seed)
    return LinearGaussian(torch.randn(12, 8, generator=generator), noise, shape=(2, 4))


def assert_reference(noise: float, seed: int, kernel: str, limit: float, draws: int) -> None:
    oracle = random_oracle(noise, seed)
    batch = oracle.simulate(64, seed=seed)
    got = sample_posterior(oracle, batch, kernel, seed=seed, draws=draws)
    posterior = oracle.posterior(batch)
    # A standard error from the chains is itself known to a few per cent: as if from 500 draws.
    MC.assert_close(got.mean, got.mean_se, posterior.mean, draws=500)
    MC.assert_close(got.scale**2, got.variance_se, posterior.variance, draws=500)
    assert bool((got.rhat < limit).all())
    assert bool((got.ess > 400).all())
    assert got.unreliable == []
    assert got.flags == []


def test_hmc_is_a_reference_for_64_sequences_at_once() -> None:
    assert_reference(0.1, 0, "hmc", limit=1.01, draws=1000)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hmc_is_a_reference_for_random_loadings(noise: float, seed: int) -> None:
    assert_reference(noise, seed, "hmc", limit=1.01, draws=1000)


@pytest.mark.slow
def test_mala_gets_there_with_more_draws() -> None:
    assert_reference(0.3, 1, "mala", limit=1.02, draws=2000)


@pytest.mark.parametrize("mass", ["diagonal", "dense", "start"])
def test_every_mass_is_right(mass: str) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    start = Posterior(oracle.best_mean_field(batch), oracle.prior(), batch.ids, batch.mask, "mf")
    got = sample_posterior(oracle, batch, start=start, mass=mass, warmup=120, draws=250)
    MC.assert_close(got.mean, got.mean_se, oracle.posterior(batch).mean, draws=200)
    MC.assert_close(got.scale**2, got.variance_se, oracle.posterior(batch).variance, draws=200)


def radii(kernel: str) -> np.ndarray:
    """Probability integral transforms after five steps from exact draws, at a long step."""
    oracle = make_oracle()
    batch = oracle.simulate(2)
    got = sample_posterior(
        oracle, batch, kernel, start=exact(oracle, batch), chains=2000, warmup=0, draws=20,
        step_size=0.6,
    )  # fmt: skip
    assert 0.3 < float(got.accept.min()) < float(got.accept.max()) < 0.95
    posterior = oracle.posterior(batch)
    away = (got.z[:, 5] - posterior.mean).flatten(-2)[..., None]
    white = torch.linalg.solve_triangular(posterior.flat.scale_tril, away, upper=False)
    return stats.chi2.cdf(white.squeeze(-1).square().sum(-1).T.numpy(), df=4)


def test_adjusted_kernels_leave_the_posterior_as_it_is() -> None:
    for kernel in ("hmc", "mala"):
        GOF.assert_fits([stats.kstest(row, "uniform").pvalue for row in radii(kernel)])


def test_unadjusted_langevin_does_not() -> None:
    assert GOF.rejects([stats.kstest(row, "uniform").pvalue for row in radii("ula")])


def test_unadjusted_langevin_is_off_by_the_known_amount() -> None:
    # Orthogonal loadings: independent dimensions, so that the start's scales are the exact mass.
    # In units of it z' = (1 - e^2/2) z + e xi, whose variance is 1 / (1 - e^2/4).
    oracle = LinearGaussian(2 * torch.eye(4, dtype=torch.float64), 1.0, shape=(2, 2))
    batch = oracle.simulate(8)
    options = {
        "start": exact(oracle, batch),
        "mass": "start",
        "step_size": 0.8,
        "warmup": 0,
        "draws": 800,
    }
    truth = oracle.posterior(batch).variance
    ula = sample_posterior(oracle, batch, "ula", **options)  # type: ignore[arg-type]
    MC.assert_close(ula.scale**2, ula.variance_se, truth / (1 - 0.8**2 / 4), draws=500)
    with pytest.raises(AssertionError):
        MC.assert_close(ula.scale**2, ula.variance_se, truth, draws=500)
    assert ula.biased
    assert "biased" in ula.summary()
    mala = sample_posterior(oracle, batch, "mala", **options)  # type: ignore[arg-type]
    MC.assert_close(mala.scale**2, mala.variance_se, truth, draws=500)
    assert not mala.biased


def test_each_row_decides_for_itself() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(6)
    got = sample_posterior(
        oracle, batch, "mala", start=exact(oracle, batch), warmup=0, draws=20, step_size=0.6
    )
    moved = (got.z[:, 1:] != got.z[:, :-1]).flatten(-2).any(-1)
    # Independent decisions: chains and sequences do not move together at any step.
    assert bool((moved.flatten(2).sum((0, 2)) > 0).all())
    assert not bool((moved == moved[:1]).all())
    assert not bool((moved == moved[..., :1]).all())


class Holed(LinearGaussian):
    """The likelihood is not a number beyond a wall that the posterior leans on."""

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        return super().log_likelihood(z, batch) + torch.where(z[..., 0, 0] > 0.2, torch.nan, 0.0)


def test_proposals_without_a_density_are_refused() -> None:
    oracle = make_oracle()
    holed = Holed(oracle.W, float(oracle.noise_scale), oracle.bias, oracle.thought_shape)
    got = sample_posterior(holed, oracle.simulate(3), warmup=60, draws=60)
    assert bool(got.log_joint.isfinite().all())
    assert bool((got.z[..., 0, 0] <= 0.2).all())


def test_a_sequence_with_no_density_anywhere_is_named() -> None:
    class Nowhere(LinearGaussian):
        def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
            value = super().log_likelihood(z, batch)
            return torch.where(batch.ids == 7, torch.nan, value)

    model = Nowhere(torch.eye(2), 1.0)
    batch = Batch(torch.zeros(2, 2), ids=torch.tensor([4, 7]))
    with pytest.raises(InputError, match=r"sequence ids \[7\]"):
        sample_posterior(model, batch)


def small_language_model() -> tuple[LatentThoughtModel, Batch]:
    """One layer, six dimensions of thought; ragged tokens."""
    config = replace(TINY, n_layers=1, seq_len=6)
    return make_language_model(config), make_tokens(3, config)


def test_language_model_is_left_alone() -> None:
    model, batch = small_language_model()
    before, flags = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]

    def sample() -> MCMCDraws:
        return sample_posterior(model, batch, warmup=50, draws=20, max_leapfrog=3, seed=3)

    got, again = sample(), sample()
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(got.ids, batch.ids)
    assert torch.equal(again.z, got.z)
    assert got.gradient_evaluations == again.gradient_evaluations > 4 * 70


@pytest.mark.slow
def test_language_model_agrees_with_importance_sampling() -> None:
    model, batch = small_language_model()
    got = sample_posterior(model, batch, seed=3)
    assert bool((got.rhat < 1.01).all())
    with torch.no_grad():
        z = model.prior().sample(torch.Size([20_000, 3]))
        weight = model.log_likelihood(z, batch).softmax(0)[..., None, None]
        mean = (weight * z).sum(0)
        error = (weight * (z - mean)).square().sum(0).sqrt()
    both = (error.square() + got.mean_se.square()).sqrt()
    MC.assert_close(got.mean, both, mean, draws=200)


def test_dataset_and_summary() -> None:
    oracle = make_oracle()
    got = sample_posterior(oracle, oracle.simulate(3), warmup=60, draws=30)
    data = got.to_dataset()
    assert data["z"].dims == ("chain", "draw", "sequence", "thought", "dim")
    assert data["z"].shape == (4, 30, 3, 2, 2)
    assert data["log_joint"].attrs["units"] == "nats"
    assert data["sequence"].values.tolist() == [0, 1, 2]
    assert "fewer than 100 effective draws" in got.summary()
    assert "hmc from prior: 4 chains x 30 draws" in got.summary()


def made_up(z: Tensor, **changes: object) -> MCMCDraws:
    rows = z.shape[2]
    draws = MCMCDraws(
        z, z.double().square().sum((-1, -2)), torch.arange(10, 10 + rows), "hmc", "prior",
        torch.ones(rows), torch.ones(rows), 1, 0, 0, "auto",
    )  # fmt: skip
    return replace(draws, **changes)  # type: ignore[arg-type]


def test_chains_that_disagree_or_stand_still_are_named() -> None:
    z = torch.randn(4, 500, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    assert made_up(z).unreliable == []
    z[0, :, 1] += 1.0  # one chain of the second sequence sits in a mode of its own
    z[..., 2, 0, 0] = 0.3  # one dimension of the third is frozen
    draws = made_up(z)
    assert draws.unreliable == [11, 12]
    assert draws.rhat[2] == torch.inf
    assert "ids 11, 12" in " ".join(draws.flags)
    # The known blind spot: chains that all miss the same mode agree with each other.
    assert made_up(z[..., :1, :, :] + 5).unreliable == []


@pytest.mark.parametrize("repeat", [1, 3])
def test_convergence_numbers_are_arviz_s(repeat: int) -> None:
    generator = torch.Generator().manual_seed(repeat)
    noise = torch.randn(4, 201, 6, generator=generator, dtype=torch.float64)
    draws = noise.clone()
    slope = torch.tensor([-0.7, -0.2, 0.0, 0.3, 0.8, 0.98])
    for step in range(1, draws.shape[1]):
        draws[:, step] += slope * draws[:, step - 1]
    # Refused proposals repeat the draw before: ties.
    draws = draws.repeat_interleave(repeat, 1)
    data = xr.Dataset({"q": (("chain", "draw", "quantity"), draws.numpy())})

    def compare(ours: Callable[[Tensor], Tensor], theirs: xr.Dataset) -> None:
        # Their normal quantiles are another library's, good to about 1e-9.
        np.testing.assert_allclose(ours(draws).numpy(), theirs["q"].values, rtol=1e-6)

    compare(rhat, compat_arviz.rhat(data))
    for name, ours in (("bulk", ess_bulk), ("tail", ess_tail), ("mean", ess_mean)):
        compare(ours, compat_arviz.ess(data, name))
    both = rhat_and_ess(draws)
    EXACT.assert_close(both[0], rhat(draws))
    EXACT.assert_close(both[1], torch.minimum(ess_bulk(draws), ess_tail(draws)))


def test_errors_of_means_are_honest() -> None:
    # AR(1) with known mean 0: a z-score per series, whose spread must be one.
    noise = torch.randn(2, 600, 400, generator=torch.Generator().manual_seed(5))
    draws = noise.clone()
    for step in range(1, draws.shape[1]):
        draws[:, step] += 0.6 * draws[:, step - 1]
    scores = draws.flatten(0, 1).mean(0) / mean_error(draws)
    assert scores.std().item() == pytest.approx(1.0, abs=0.15)


def test_bad_options_are_refused() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    good = exact(oracle, batch)
    point = build_guide("delta", oracle)
    point.reset(batch)
    delta = replace(good, distribution=point.posterior(), family="delta", has_density=False)
    cases: list[tuple[str, dict[str, object]]] = [
        ("did you mean 'hmc'", {"kernel": "hmcc"}),
        ("unknown mass", {"mass": "full"}),
        ("chains is 1: must be 2", {"chains": 1}),
        ("draws is 5: must be 20", {"draws": 5}),
        ("warmup is 10: must be 50", {"warmup": 10}),
        ("step_size is -1", {"step_size": -1.0}),
        ("max_leapfrog is 0", {"max_leapfrog": 0}),
        ("ids must be equal", {"start": replace(good, ids=good.ids + 1)}),
        ("point mass", {"start": delta}),
    ]
    for message, options in cases:
        with pytest.raises(InputError, match=message):
            sample_posterior(oracle, batch, **options)  # type: ignore[arg-type]
