"""The oracle's exact answers, each against another way of computing it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from known_models import exact_elbo, make_language_model, make_oracle, make_tokens
from pyro.infer import Predictive
from scipy import stats
from tolerances import EXACT, GOF, MC
from torch import Tensor
from torch.distributions import MultivariateNormal

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.full_normal import FullNormal
from ltm_pyro.models.linear_gaussian import LinearGaussian


@pytest.fixture
def oracle() -> LinearGaussian:
    return make_oracle()


@pytest.fixture(params=["whole", "masked"])
def batch(request: pytest.FixtureRequest, oracle: LinearGaussian) -> Batch:
    """Six sequences, in the second case with dimensions missing, all of them in one sequence."""
    whole = oracle.simulate(6, seed=1)
    if request.param == "whole":
        return whole
    mask = torch.rand(whole.mask.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0], mask[1] = True, False
    return Batch(whole.x, mask, whole.ids)


def _grid(n: int = 1201, edge: float = 9.0) -> tuple[Tensor, float]:
    """Points of the plane as thoughts (n * n, 1, 1, 2), and the area around each."""
    axis = torch.linspace(-edge, edge, n, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[:, None, None]
    return z, float(axis[1] - axis[0]) ** 2


def _marginal_covariance(oracle: LinearGaussian) -> Tensor:
    return oracle.W @ oracle.W.T + oracle.noise_scale**2 * torch.eye(5, dtype=oracle.W.dtype)


def test_evidence_and_moments_agree_with_quadrature() -> None:
    oracle = make_oracle(shape=(1, 2), n_observed=3)
    batch = oracle.simulate(2, seed=3)
    z, area = _grid()
    log_joint = oracle.prior().log_prob(z) + oracle.log_likelihood(z.expand(-1, 2, -1, -1), batch)
    EXACT.assert_close(oracle.log_evidence(batch), log_joint.logsumexp(0) + math.log(area))
    weights = log_joint.softmax(0)
    points = z.flatten(1)
    mean = weights.T @ points
    second = torch.einsum("nb,ni,nj->bij", weights, points, points)
    posterior = oracle.posterior(batch)
    EXACT.assert_close(posterior.mean.flatten(1), mean)
    EXACT.assert_close(posterior.covariance, second - mean[:, :, None] * mean[:, None])


def test_evidence_is_the_marginal_normal(oracle: LinearGaussian, batch: Batch) -> None:
    covariance = _marginal_covariance(oracle)
    for i in range(1, len(batch)):
        seen = batch.mask[i]
        expected = torch.zeros((), dtype=torch.float64)
        if seen.any():
            marginal = MultivariateNormal(oracle.bias[seen], covariance[seen][:, seen])
            expected = marginal.log_prob(batch.observed[i, seen])
        EXACT.assert_close(oracle.log_evidence(batch)[i], expected)


def test_bayes_rule_holds_at_every_point(oracle: LinearGaussian, batch: Batch) -> None:
    z = torch.randn(50, len(batch), 2, 2, dtype=torch.float64)
    log_joint = oracle.prior().log_prob(z) + oracle.log_likelihood(z, batch)
    evidence = log_joint - oracle.posterior(batch).log_prob(z)
    EXACT.assert_close(evidence, oracle.log_evidence(batch).expand_as(evidence))


def test_best_mean_field_elbo_is_the_elbo_of_best_mean_field(
    oracle: LinearGaussian, batch: Batch
) -> None:
    elbo = exact_elbo(oracle, oracle.best_mean_field(batch), batch)
    EXACT.assert_close(oracle.best_mean_field_elbo(batch), elbo)
    gap = oracle.log_evidence(batch) - elbo
    # Without data the posterior is the prior, which factorises; elsewhere correlation costs.
    empty = batch.n_tokens == 0
    assert bool((gap[~empty & (batch.n_tokens > 1)] > 0.01).all())
    EXACT.assert_close(gap[empty], torch.zeros_like(gap[empty]))


def test_no_factorised_normal_beats_best_mean_field(oracle: LinearGaussian, batch: Batch) -> None:
    best = oracle.best_mean_field(batch)
    loc = best.mean.clone().requires_grad_()
    log_scale = best.variance.sqrt().log().requires_grad_()
    # The ELBO is concave in both, so a zero gradient is the global optimum.
    variance = (2 * log_scale).exp().flatten(1)
    error = batch.observed - oracle.bias - loc.flatten(1) @ oracle.W.T
    squares = (error.square() + variance @ oracle.W.T.square()) / oracle.noise_scale**2
    nll = 0.5 * torch.where(batch.mask, squares, 0.0).sum()
    kl = 0.5 * (loc.flatten(1).square() + variance - variance.log()).sum()
    for gradient in torch.autograd.grad(nll + kl, (loc, log_scale)):
        EXACT.assert_close(gradient, torch.zeros_like(gradient))


def test_draws_of_the_posterior_have_its_moments(oracle: LinearGaussian, batch: Batch) -> None:
    posterior, draws = oracle.posterior(batch), 4000
    z = posterior.sample(torch.Size([draws]))
    assert z.shape == (draws, len(batch), 2, 2)
    MC.assert_close(z.mean(0), posterior.variance.sqrt() / draws**0.5, posterior.mean)
    flat = (z - posterior.mean).flatten(-2)
    products = flat[..., :, None] * flat[..., None, :]
    error = products.std(0) / draws**0.5
    MC.assert_close(products.mean(0), error, posterior.covariance, draws=draws)


def test_simulated_data_follow_the_marginal(oracle: LinearGaussian) -> None:
    batch = oracle.simulate(4000, seed=4)
    covariance = _marginal_covariance(oracle)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (batch.observed - oracle.bias).T, upper=False
    )
    GOF.assert_fits([stats.kstest(row, "norm").pvalue for row in white.numpy()])


def test_simulating_repeats_and_leaves_the_global_generator_alone(oracle: LinearGaussian) -> None:
    state = torch.get_rng_state()
    batch, z = oracle.simulate_with_thoughts(5, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(oracle.simulate(5, seed=7).observed, batch.observed)
    assert not torch.equal(oracle.simulate(5, seed=8).observed, batch.observed)
    assert batch.ids.tolist() == [0, 1, 2, 3, 4]
    assert z.shape == (5, 2, 2)


def test_the_oracle_stands_where_a_model_does(oracle: LinearGaussian) -> None:
    assert isinstance(oracle, LatentModel)
    assert oracle.thought_shape == (2, 2)
    assert list(oracle.parameters()) == []
    batch = oracle.simulate(3)
    assert oracle.prepare(batch) is batch
    assert oracle().shape == (1, 5)
    assert oracle(batch.unobserved()).shape == (3, 5)
    assert torch.equal(oracle(batch), batch.observed)
    assert Predictive(oracle, num_samples=4)()["x"].shape == (4, 1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_have_the_dtype_of_the_loadings(dtype: torch.dtype) -> None:
    oracle = make_oracle(dtype=dtype)
    batch = oracle.simulate(2)
    answers = [batch.x, oracle.log_evidence(batch), oracle.posterior(batch).sample()]
    answers += [oracle.best_mean_field(batch).mean, oracle.best_mean_field_elbo(batch), oracle()]
    assert {a.dtype for a in answers if a is not None} == {dtype}


def test_loadings_may_come_as_lists_and_arrays() -> None:
    assert LinearGaussian([[1, 2], [3, 4]], 1.0).thought_shape == (1, 2)
    assert LinearGaussian(np.eye(4), 1.0, shape=(2, 2)).W.dtype == torch.float64


def test_the_given_matrix_is_copied() -> None:
    W = torch.eye(2)
    oracle = LinearGaussian(W, 1.0)
    W.zero_()
    assert torch.equal(oracle.W, torch.eye(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"W": [1.0, 2.0]}, "must be a matrix"),
        ({"W": "loadings"}, "cannot be read"),
        ({"W": [[1.0, math.nan]]}, "W holds NaN"),
        ({"W": [[1.0, 2.0]], "shape": (2, 2)}, r"W must be \(Dx, K \* D\)"),
        ({"W": torch.zeros(0, 2)}, "Dx above 0"),
        ({"W": torch.zeros(2, 0)}, "Dx above 0"),
        ({"noise_scale": 0.0}, "noise_scale is 0.0"),
        ({"noise_scale": -1.0}, "noise_scale is -1.0"),
        ({"noise_scale": math.inf}, "noise_scale is inf"),
        ({"bias": [1.0, 2.0]}, "one number per row of W"),
        ({"bias": [math.inf]}, "bias holds NaN"),
    ],
)
def test_bad_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearGaussian(**{"W": [[1.0, 2.0]], "noise_scale": 1.0, **arguments})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "no x"),
        ([[1, 2, 3, 4, 5]], "token ids"),
        ([[1.0, 2.0]], "W has 5 rows"),
        ([[0.0] * 5, [0.0, 0.0, math.nan, 0.0, 0.0]], r"ids \[31\] is not finite"),
    ],
)
def test_bad_batches_are_refused(oracle: LinearGaussian, x: Any, message: str) -> None:
    if x is None:
        batch = oracle.simulate(2).unobserved()
    else:
        batch = Batch(torch.tensor(x), ids=torch.arange(30, 30 + len(x)))
    with pytest.raises(InputError, match=message):
        oracle.log_evidence(batch)


def test_simulating_nothing_is_refused(oracle: LinearGaussian) -> None:
    with pytest.raises(InputError, match="n is 0"):
        oracle.simulate(0)


def test_a_language_model_refuses_the_oracles_batch(oracle: LinearGaussian) -> None:
    with pytest.raises(InputError, match="token ids"):
        make_language_model().check(oracle.simulate(2))
    with pytest.raises(InputError, match="needs reals"):
        oracle.check(make_tokens(2))


def test_full_normal_is_the_multivariate_normal_with_two_axes() -> None:
    factor = torch.randn(6, 6, dtype=torch.float64).tril()
    factor.diagonal().exp_()
    loc = torch.randn(3, 2, 3, dtype=torch.float64)
    q, flat = FullNormal(loc, factor), MultivariateNormal(loc.flatten(1), scale_tril=factor)
    assert q.batch_shape == (3,)
    assert q.event_shape == (2, 3)
    z = q.rsample(torch.Size([4]))
    EXACT.assert_close(q.log_prob(z), flat.log_prob(z.flatten(-2)))
    EXACT.assert_close(q.entropy(), flat.entropy())
    EXACT.assert_close(q.variance.flatten(1), flat.variance)
    wide = q.expand((5, 3))
    assert wide.sample().shape == (5, 3, 2, 3)
    EXACT.assert_close(wide.log_prob(z[0]), q.log_prob(z[0]).expand(5, 3))


def test_a_double_model_keeps_every_digit_of_its_numbers() -> None:
    # 0.3 in single precision is off by 1e-8, which moved the evidence by as much per dimension.
    W = torch.tensor([[1.0, 0.5], [0.1, 2.0], [0.3, 0.7]], dtype=torch.float64)
    bias = [0.1, 0.2, 0.3]
    oracle = LinearGaussian(W, 0.3, bias, shape=(1, 2))
    assert oracle.noise_scale.dtype == oracle.bias.dtype == torch.float64
    assert float(oracle.noise_scale) == 0.3
    assert oracle.bias.tolist() == bias
    batch = oracle.simulate(8, seed=3)
    covariance = W.numpy() @ W.numpy().T + 0.3**2 * np.eye(3)
    exact = stats.multivariate_normal(bias, covariance).logpdf(batch.observed.numpy())
    np.testing.assert_allclose(oracle.log_evidence(batch).numpy(), exact, rtol=1e-12)
    single = LinearGaussian(W.float(), 0.3, bias, shape=(1, 2))
    assert single.noise_scale.dtype == single.bias.dtype == torch.float32
