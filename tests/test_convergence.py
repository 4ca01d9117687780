from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from known_models import exact_elbo, make_oracle
from pyro.distributions import Normal, TorchDistribution
from tolerances import MC
from torch import Tensor, nn

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.convergence import (
    CANNOT_TELL,
    ENOUGH,
    NOT_ENOUGH,
    continue_from,
    fast_convergence,
    judge,
    mean_and_error,
    objective_draws,
)
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.mean_field import MeanField
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.plots import convergence_curves

SEQUENCES = 16
CONVERGED = Fast(steps=150, lr=0.2, final_fraction=0.0)


def setting(seed: int = 0) -> tuple[LinearGaussian, Batch]:
    """Two thoughts of four dimensions behind twelve observed ones; ids not in order."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(12, 8, generator=generator, dtype=torch.float64) / 8**0.5
    oracle = LinearGaussian(W, noise_scale=0.5, shape=(2, 4))
    ids = 50 + torch.randperm(SEQUENCES, generator=generator)
    return oracle, Batch(oracle.simulate(SEQUENCES, seed=seed).x, ids=ids)


def recipe(oracle: LinearGaussian, fast: Fast, particles: int = 1, seed: int = 0) -> DualRateSVI:
    elbo = build_objective("elbo", particles=particles)
    return DualRateSVI(oracle, build_guide("mean_field", oracle), fast, elbo=elbo, seed=seed)


@pytest.fixture(scope="module")
def four_steps() -> tuple[DualRateSVI, Batch, xr.Dataset]:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=4, optimizer="adam", lr=0.1))
    return svi, batch, fast_convergence(svi, batch)


@pytest.fixture(scope="module")
def converged() -> tuple[DualRateSVI, Batch, xr.Dataset]:
    oracle, batch = setting()
    svi = recipe(oracle, CONVERGED, particles=4)
    return svi, batch, fast_convergence(svi, batch, draws=512, tolerance=0.2)


def test_four_steps_are_not_enough(four_steps: tuple[DualRateSVI, Batch, xr.Dataset]) -> None:
    _, batch, data = four_steps
    assert data.attrs["share_not_enough"] >= 0.95
    assert (data["remedy"] == "more steps").mean() >= 0.9
    assert "not enough for" in data.attrs["sentence"]
    np.testing.assert_array_equal(data["checkpoint"], [0, 1, 2, 4, 8])
    np.testing.assert_array_equal(data["sequence"], batch.ids)
    assert (data["gain_per_step"] > 3 * data["gain_per_step_se"]).mean() > 0.9
    # One draw, which is all that the fast loop prints, does not show the gain of a step.
    assert (data["noise_per_draw"] > data["gain_per_step"]).mean() > 0.9


def test_gains_are_those_of_the_exact_elbo(
    four_steps: tuple[DualRateSVI, Batch, xr.Dataset],
) -> None:
    svi, batch, data = four_steps
    oracle = svi.model
    assert isinstance(oracle, LinearGaussian)
    exact = [
        exact_elbo(oracle, svi.infer(batch, steps).distribution, batch).numpy()
        for steps in data["checkpoint"].values
    ]
    for place, value in enumerate(exact):
        MC.assert_close(data["objective"][place], data["objective_se"][place], value, draws=256)
        if place != 3:
            MC.assert_close(
                data["behind"][place], data["behind_se"][place], value - exact[3], draws=256
            )
    MC.assert_close(data["gain_doubling"], data["gain_doubling_se"], exact[4] - exact[3], draws=256)


def test_a_converged_recipe_has_enough(
    converged: tuple[DualRateSVI, Batch, xr.Dataset],
) -> None:
    svi, batch, data = converged
    assert data.attrs["share_enough"] >= 0.9
    assert data.attrs["share_not_enough"] == 0
    oracle = svi.model
    assert isinstance(oracle, LinearGaussian)
    best = oracle.best_mean_field_elbo(batch)
    short = best - exact_elbo(oracle, svi.infer(batch).distribution, batch)
    called = data["verdict"].values == ENOUGH
    assert float(short.numpy()[called].max()) < data.attrs["tolerance"]
    # Common draws: the difference is known far better than either side.
    level = data["objective_se"].isel(checkpoint=-1)
    assert data["gain_doubling_se"].median() < 0.4 * level.median()


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_a_rate_far_too_small_is_not_called_enough(lr: float) -> None:
    # Flat from step to step, and at 1e-5 doubling gains less than the tolerance: only another rate
    # shows what is missing.
    oracle, batch = setting()
    fast = Fast(steps=16, optimizer="adam", lr=lr)
    data = fast_convergence(recipe(oracle, fast), batch, draws=64)
    assert data.attrs["share_not_enough"] == 1
    assert (data["gain_per_step"] < 0.01 * data["noise_per_draw"]).all()
    if lr == 1e-5:
        assert (data["gain_doubling"] < data.attrs["tolerance"]).all()
        assert (data["remedy"] == "another rate").all()
        assert "another learning rate" in data.attrs["sentence"]


def test_a_rate_far_too_large_is_not_called_enough() -> None:
    oracle, batch = setting()
    fast = Fast(steps=64, optimizer="adam", lr=1.0, schedule="constant", average=0.0)
    data = fast_convergence(recipe(oracle, fast), batch, draws=128)
    assert data.attrs["share_enough"] == 0
    assert data.attrs["share_not_enough"] >= 0.9


def test_few_draws_leave_it_open_and_say_how_many_would_do() -> None:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=120, lr=0.1, final_fraction=0.0))
    data = fast_convergence(svi, batch, draws=16)
    open_ones = data["verdict"].values == CANNOT_TELL
    assert open_ones.mean() > 0.5
    needed = data["draws_needed"].values
    assert (needed[open_ones] > 16).all()
    assert (needed[~open_ones] == 16).all()
    assert "draws" in data.attrs["sentence"]
    assert (data["remedy"].values[open_ones] == "more draws").all()


def test_verdicts_are_wrong_as_rarely_as_promised() -> None:
    # 20,000 estimated gains, each from 256 draws, of a gain just inside or outside the tolerance.
    generator = np.random.default_rng(0)
    for truth, wrong in ((0.099, NOT_ENOUGH), (0.101, ENOUGH)):
        draws = generator.normal(truth, 1.0, (256, 20_000))
        gain, error = mean_and_error(torch.from_numpy(draws))
        verdict = judge(gain, error, tolerance=0.1, draws=256)[0]
        # Three standard errors, one-sided: 0.0013; 0.002 is six of that count's own errors away.
        assert (verdict == wrong).mean() < 0.0025
        assert (verdict == CANNOT_TELL).mean() > 0.99


def test_the_draws_asked_for_decide() -> None:
    generator = np.random.default_rng(1)
    for truth, right in ((0.02, ENOUGH), (0.25, NOT_ENOUGH)):
        verdict, needs = judge(np.array([truth]), np.array([0.1]), tolerance=0.1, draws=64)
        assert verdict == CANNOT_TELL
        needed = int(needs[0] * 2)
        # 0.1 at 64 draws is a standard deviation of 0.8.
        draws = torch.from_numpy(generator.normal(truth, 0.8, (needed, 500)))
        verdict = judge(*mean_and_error(draws), tolerance=0.1, draws=needed)[0]
        # Twice the draws put the gain 4.2 errors from the tolerance; the verdict wants 3.
        assert (verdict == right).mean() > 0.8
    assert np.isinf(judge(np.array([0.1]), np.array([0.1]), 0.1, 64)[1][0])


@pytest.mark.slow
def test_no_converged_loop_is_called_too_short_in_six_seeds() -> None:
    called = []
    for seed in range(6):
        oracle, batch = setting(seed)
        fast = Fast(steps=300, lr=0.1, final_fraction=0.0)
        svi = recipe(oracle, fast, particles=4, seed=seed)
        data = fast_convergence(svi, batch, draws=1024, seed=seed)
        best = oracle.best_mean_field_elbo(batch)
        short = best - exact_elbo(oracle, svi.infer(batch).distribution, batch)
        assert float(short.max()) < 0.1
        called += data["verdict"].values.tolist()
    assert NOT_ENOUGH not in called
    assert np.mean([verdict == ENOUGH for verdict in called]) > 0.85


def test_a_loop_goes_on_from_given_rows() -> None:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=20))
    post = svi.infer(batch)
    still = continue_from(svi, post.parameters, batch, Fast(steps=1, lr=1e-12))
    for name, value in post.parameters.items():
        torch.testing.assert_close(still.parameters[name], value, atol=1e-10, rtol=0)
    assert torch.equal(still.ids, batch.ids)


def test_one_family_shares_its_noise() -> None:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=20))
    a, b = svi.infer(batch, 20), svi.infer(batch, 21)
    first, second = (objective_draws(oracle, post, batch, 64) for post in (a, b))
    assert torch.equal(first, objective_draws(oracle, a, batch, 64))
    assert bool(((first - second).std(0) < 0.5 * first.std(0)).all())
    other = objective_draws(oracle, a, batch, 64, seed=1)
    assert bool(((first - other).std(0) > first.std(0)).all())


def test_nothing_is_left_behind(four_steps: tuple[DualRateSVI, Batch, xr.Dataset]) -> None:
    svi, batch, data = four_steps
    state = torch.get_rng_state()
    again = fast_convergence(svi, batch)
    assert torch.equal(torch.get_rng_state(), state)
    xr.testing.assert_identical(again, data)
    assert svi.slow_step == 0
    assert svi.metrics == []
    assert svi.store is None


def test_a_point_mass_is_judged_by_its_joint() -> None:
    oracle, batch = setting()
    fast = Fast(steps=80, optimizer="adam", lr=0.2, final_fraction=0.0)
    svi = DualRateSVI(oracle, build_guide("delta", oracle), fast)
    data = fast_convergence(svi, batch, draws=16)
    assert data.attrs["share_enough"] == 1
    assert "log joint" in data.attrs["objective_kind"]
    short = fast_convergence(DualRateSVI(oracle, svi.guide, Fast(steps=2)), batch, draws=16)
    assert short.attrs["share_not_enough"] == 1


class Encoder(LocalGuide):
    """The exact best factorised posterior of an oracle, as a map of x, possibly off the mark."""

    family = "encoder"
    bias: Tensor

    def __init__(self, oracle: LinearGaussian, shift: float = 0.0) -> None:
        super().__init__(oracle)
        probe = Batch(torch.eye(len(oracle.W), dtype=oracle.W.dtype) + oracle.bias)
        best = oracle.best_mean_field(probe)
        self.map = nn.Parameter(best.mean.flatten(1))
        self.log_variance = nn.Parameter(best.variance[0].log())
        self.register_buffer("bias", oracle.bias.clone())
        self.shift = shift

    def initial_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {"x": batch.observed}

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = ((x - self.bias) @ self.map).unflatten(-1, self.thought_shape) + self.shift
        return mean, self.log_variance.expand_as(mean)

    def posterior(self) -> TorchDistribution:
        mean, log_variance = self.encoded(self.inputs.values()["x"])
        q: TorchDistribution = Normal(mean, (0.5 * log_variance).exp()).to_event(2)
        return q


class RefinedEncoder(Encoder):
    """The same as the start of local steps."""

    family = "refined_encoder"

    @torch.no_grad()
    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        mean, log_variance = self.encoded(batch.observed)
        return {"loc": mean, "log_variance": log_variance.clone()}

    posterior = MeanField.posterior


def test_what_cannot_be_judged_is_refused() -> None:
    oracle, batch = setting()
    svi = recipe(oracle, Fast(steps=4, optimizer="adam", lr=0.1))
    for options, match in (
        ({"steps": 0}, "at least 1"),
        ({"draws": 2}, "at least 16"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ):
        with pytest.raises(InputError, match=match):
            fast_convergence(svi, batch, **options)
    with pytest.raises(InputError, match="no local parameters"):
        fast_convergence(DualRateSVI(oracle, Encoder(oracle)), batch)


def test_one_step_of_one_sequence_is_judged() -> None:
    oracle = make_oracle()
    data = fast_convergence(recipe(oracle, Fast(steps=1)), oracle.simulate(1), draws=16)
    np.testing.assert_array_equal(data["checkpoint"], [0, 1, 2])
    assert convergence_curves(data).axes


def test_the_figure_says_what_to_conclude(
    four_steps: tuple[DualRateSVI, Batch, xr.Dataset],
    converged: tuple[DualRateSVI, Batch, xr.Dataset],
) -> None:
    for data in (four_steps[2], converged[2]):
        figure = convergence_curves(data)
        (caption,) = [text.get_text() for text in figure.texts if text.get_gid() == "caption"]
        assert data.attrs["sentence"] in caption.replace("\n", " ")
        assert all("nats" in axes.get_ylabel() for axes in figure.axes)
        assert figure.axes[0].get_legend() is not None
    with pytest.raises(InputError, match="fast_convergence"):
        convergence_curves(xr.Dataset())
