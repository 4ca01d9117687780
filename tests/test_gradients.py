"""Every objective's gradient against brute force, and the diagnostic that measures its noise.

Brute force is quadrature: on a one-dimensional oracle the expectation of each objective over its S
particles is an S-fold Gauss-Hermite sum, exact to about 1e-9, differentiated by central
differences. Nothing of the package computes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from known_models import LearnedOracle, make_language_model, make_oracle, make_tokens
from numpy.polynomial.hermite_e import hermegauss
from pyro.distributions import TorchDistribution
from pyro.infer import TraceMeanField_ELBO
from scipy import stats
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.gradients import BLOCKS, efficiency, gradient_noise
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide, guide_families
from ltm_pyro.inference.objectives import Objective, build_objective
from ltm_pyro.models.full_normal import FullNormal
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.random import Drawing, Noise

W, NOISE, X = 1.3, 0.7, 2.0
AT = np.array([0.3, -0.4, 0.5])
"""loc, log variance, and the decoder's bias."""
NODES = 32

Terms = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(log p(x | z), log p(z) - log q(z), KL) at S particles, first dimension, to the objective."""


def _power(particles: np.ndarray, power: float) -> np.ndarray:
    top = particles.max(0)
    return (np.log(np.exp(power * (particles - top)).mean(0))) / power + top


BRUTE: dict[str, tuple[Objective, Callable[[float], Terms]]] = {
    "elbo": (build_objective("elbo"), lambda c: lambda ll, r, kl: (ll + c * r).mean(0)),
    "elbo, particles": (
        build_objective("elbo", particles=3),
        lambda c: lambda ll, r, kl: (ll + c * r).mean(0),
    ),
    "stl": (build_objective("stl"), lambda c: lambda ll, r, kl: (ll + c * r).mean(0)),
    "iwae": (
        build_objective("iwae", particles=3),
        lambda c: lambda ll, r, kl: _power(ll + c * r, 1.0),
    ),
    "dreg": (
        build_objective("dreg", particles=3),
        lambda c: lambda ll, r, kl: _power(ll + c * r, 1.0),
    ),
    "renyi": (
        build_objective("renyi", alpha=0.5, particles=3),
        lambda c: lambda ll, r, kl: _power(ll + c * r, 0.5),
    ),
    "renyi, order 2": (
        build_objective("renyi", alpha=2.0, particles=2),
        lambda c: lambda ll, r, kl: _power(ll + c * r, -1.0),
    ),
    "beta": (
        build_objective("beta", weight=2.5),
        lambda c: lambda ll, r, kl: (ll + 2.5 * c * r).mean(0),
    ),
    "free bits, charged": (
        build_objective("free_bits", nats=0.01),
        lambda c: lambda ll, r, kl: ll.mean(0) - c * max(kl, 0.01),
    ),
    "free bits, free": (
        build_objective("free_bits", nats=3.0, level="thought"),
        lambda c: lambda ll, r, kl: ll.mean(0) - c * max(kl, 3.0),
    ),
}


def expected_objective(at: np.ndarray, terms: Terms, particles: int) -> float:
    """E over the particles, by quadrature."""
    loc, log_variance, bias = at
    nodes, weights = hermegauss(NODES)
    weights = weights / math.sqrt(2 * math.pi)
    grid = np.stack([g.ravel() for g in np.meshgrid(*[nodes] * particles, indexing="ij")])
    mass = np.prod([g.ravel() for g in np.meshgrid(*[weights] * particles, indexing="ij")], axis=0)
    z = loc + np.exp(log_variance / 2) * grid
    log_lik = stats.norm.logpdf(X, W * z + bias, NOISE)
    ratio = stats.norm.logpdf(z) - stats.norm.logpdf(z, loc, np.exp(log_variance / 2))
    kl = 0.5 * (loc**2 + np.exp(log_variance) - 1 - log_variance)
    return float((mass * terms(log_lik, ratio, kl)).sum())


def brute_force_gradient(terms: Terms, particles: int) -> np.ndarray:
    """Of the loss by loc, log variance and bias: central differences, error about 1e-8."""
    step = 1e-4
    sides = [
        [expected_objective(AT + sign * step * unit, terms, particles) for sign in (1, -1)]
        for unit in np.eye(3)
    ]
    return np.array([-(up - down) / (2 * step) for up, down in sides])


def estimated_gradients(objective: Objective, weight: float, calls: int, rows: int) -> np.ndarray:
    """(calls, 3): means over `rows` independent copies of one sequence."""
    model = LearnedOracle(
        LinearGaussian(
            torch.tensor([[W]], dtype=torch.float64), NOISE, torch.tensor([AT[2]]).double()
        )
    )
    batch = Batch(torch.full((rows, 1), X, dtype=torch.float64))
    guide = build_guide("mean_field", model)
    guide.reset(batch)
    with torch.no_grad():
        guide.local["loc"].fill_(AT[0])
        guide.local["log_variance"].fill_(AT[1])
    draw = Drawing(Noise(0, batch.ids))
    parameters = [guide.local["loc"], guide.local["log_variance"], model.bias]
    out = []
    for _ in range(calls):
        loss, _ = objective.descend(model, guide, batch, draw, weight)
        found = torch.autograd.grad(loss, parameters)
        out.append([float(g.sum()) / rows for g in found])
    return np.array(out)


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("name", BRUTE)
def test_gradient_agrees_with_brute_force(name: str, weight: float) -> None:
    objective, make = BRUTE[name]
    calls = 100
    estimates = estimated_gradients(objective, weight, calls, rows=400)
    exact = brute_force_gradient(make(weight), objective.particles)
    # The error of the differences themselves is allowed for; a wrong factor is off by 1e-2 or more.
    error = estimates.std(0, ddof=1) / math.sqrt(calls) + 1e-7
    MC.assert_close(estimates.mean(0), error, exact, draws=calls)


def test_brute_force_tells_the_objectives_apart() -> None:
    # So that agreement means something: the gradients to be matched differ by far more than the
    # error allowed, which is below 0.02.
    gradients = [
        brute_force_gradient(BRUTE[name][1](1.0), BRUTE[name][0].particles)
        for name in ("elbo", "iwae", "renyi", "renyi, order 2", "beta", "free bits, free")
    ]
    for one, other in itertools.combinations(gradients, 2):
        assert np.abs(one - other).max() > 0.05


class Correlated(LocalGuide):
    """A full covariance by its Cholesky factor: it can hold the oracle's exact posterior."""

    family = "correlated"

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        n_thoughts, dim = self.thought_shape
        eye = torch.eye(n_thoughts * dim).to(self.anchor)
        return {
            "loc": self.anchor.new_zeros(len(batch), n_thoughts, dim),
            "scale_tril": eye.repeat(len(batch), 1, 1),
        }

    def posterior(self) -> TorchDistribution:
        return FullNormal(self.local["loc"], self.local["scale_tril"].tril())


def at_the_exact_posterior(rows: int = 5) -> tuple[LinearGaussian, Correlated, Batch]:
    oracle = make_oracle()
    batch = oracle.simulate(rows)
    exact = oracle.posterior(batch)
    guide = Correlated(oracle)
    guide.load_rows({"loc": exact.mean, "scale_tril": torch.linalg.cholesky(exact.covariance)})
    return oracle, guide, batch


@pytest.mark.parametrize(("name", "particles"), [("stl", 1), ("stl", 4), ("dreg", 4)])
def test_no_variance_at_the_exact_posterior(name: str, particles: int) -> None:
    oracle, guide, batch = at_the_exact_posterior()
    loss = build_objective(name, particles=particles)(oracle, guide)
    for _ in range(5):
        for gradient in torch.autograd.grad(loss(batch), list(guide.parameters())):
            EXACT.assert_close(gradient, torch.zeros_like(gradient))


def test_sticking_the_landing_lands() -> None:
    # A family that holds the posterior converges to it as without noise: measured shortfall below
    # 1e-5 nats, against 0.01 for the same loop on the ELBO with its KL in closed form.
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(12, 8, generator=generator, dtype=torch.float64) / 8**0.5
    oracle = LinearGaussian(W, noise_scale=0.5, shape=(2, 4))
    batch = oracle.simulate(16)
    stl = build_objective("stl", particles=32)
    guide = build_guide("full_rank", oracle)
    fast = Fast(steps=300, lr=0.2, final_fraction=0.0)
    post = DualRateSVI(oracle, guide, fast, elbo=stl).infer(batch)
    # At the posterior log w is the evidence at every draw, so any draw tells the shortfall.
    z = post.sample(1)[0]
    log_w = oracle.log_likelihood(z, batch) + oracle.prior().log_prob(z) - post.log_prob(z)
    torch.testing.assert_close(log_w, oracle.log_evidence(batch), rtol=0.0, atol=0.01)


@pytest.mark.parametrize(("name", "particles"), [("elbo", 1), ("iwae", 4), ("renyi", 4)])
def test_other_objectives_are_noisy_there(name: str, particles: int) -> None:
    oracle, guide, batch = at_the_exact_posterior()
    loss = build_objective(name, particles=particles)(oracle, guide)
    found = torch.autograd.grad(loss(batch), list(guide.parameters()))
    assert all(bool((g.flatten(1).norm(dim=1) > 0.05).all()) for g in found)


def replicated(family: str, rows: int) -> tuple[LinearGaussian, LocalGuide, Batch]:
    """One sequence in many rows, all at the same parameters away from the start."""
    oracle = make_oracle()
    one = oracle.simulate(1, seed=3)
    batch = Batch(one.observed.expand(rows, -1))
    guide = build_guide(family, oracle)
    guide.reset(batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in guide.local_parameters().values():
            p.add_(0.3 * torch.randn(p[:1].shape, generator=generator, dtype=p.dtype))
        for p in guide.shared_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return oracle, guide, batch


def local_gradient(loss: Callable[[Batch], Tensor], guide: LocalGuide, batch: Batch) -> Tensor:
    """(rows, P): the rows are independent copies, so one call has many replicates."""
    parameters = list(guide.local_parameters().values())
    found = torch.autograd.grad(loss(batch), parameters)
    return torch.cat([g.flatten(1) for g in found], 1)


def shared_gradient(loss: Callable[[Batch], Tensor], guide: LocalGuide, batch: Batch) -> Tensor:
    """(calls, 8): along eight directions, since a network has too many weights to compare all."""
    parameters, calls = guide.shared_parameters(), 30
    found = [torch.autograd.grad(loss(batch), parameters) for _ in range(calls)]
    whole = torch.stack([torch.cat([g.flatten() for g in call]) for call in found]) / len(batch)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(whole.shape[1], 8, generator=generator, dtype=whole.dtype)
    return whole @ directions


@pytest.mark.parametrize("other", ["stl", "dreg"])
@pytest.mark.parametrize("family", guide_families())
def test_estimators_of_one_bound_agree_for_every_family(family: str, other: str) -> None:
    """Stopped parameters are the guide's own, local and shared, whatever family it is of."""
    one, particles = ("elbo", 1) if other == "stl" else ("iwae", 2)
    oracle, guide, batch = replicated(family, 2000)
    few = batch.select(slice(50))
    for gradient in (local_gradient, shared_gradient):
        if gradient is shared_gradient:
            if not guide.shared_parameters():
                continue
            rows = {name: value[:50] for name, value in guide.rows().items()}
            guide.reset(few)
            guide.load_rows(rows)
            batch = few
        elif not guide.local_parameters():
            continue
        means, squares = [], []
        for name in (one, other):
            loss = build_objective(name, particles=particles)(oracle, guide)
            values = gradient(loss, guide, batch)
            means.append(values.mean(0))
            squares.append(values.var(0) / len(values))
        error = torch.stack(squares).sum(0).sqrt()
        MC.assert_close(means[1], error + 1e-9, means[0], draws=30)


# The diagnostic.


def test_noise_of_the_estimators_at_the_exact_posterior() -> None:
    oracle, guide, batch = at_the_exact_posterior()
    state = torch.get_rng_state()
    data = gradient_noise(oracle, guide, batch, ["elbo", "stl", "dreg"], draws=40)
    assert torch.equal(torch.get_rng_state(), state)
    assert data["gradient_variance"].dims == ("objective", "sequence")
    noise = data["gradient_variance"]
    assert float(noise.sel(objective="stl(particles=1)").max()) < 1e-18
    assert float(noise.sel(objective="dreg(particles=8)").max()) < 1e-18
    assert float(noise.sel(objective="elbo(particles=1)").min()) > 1.0
    assert data["decoder_evaluations"].values.tolist() == [1, 1, 8]
    # torch knows the KL of this guide, which the ELBO alone charges as such.
    assert data["kl_estimator"].values.tolist() == ["analytic", "monte_carlo", "monte_carlo"]


def test_the_diagnostic_knows_mean_and_variance() -> None:
    # A closed KL and a linear model: the gradient by loc is (W'(W z + b - x)) / s^2 + loc, normal
    # with covariance A diag(v) A for A = W'W / s^2.
    oracle = make_oracle()
    batch = oracle.simulate(3)
    guide = build_guide("mean_field", oracle)
    guide.reset(batch)
    guide.local.pop("log_variance")
    fixed = torch.full((3, 2, 2), 0.2, dtype=torch.float64)

    class LocOnly(type(guide)):  # type: ignore[misc]
        def posterior(self) -> TorchDistribution:
            self.local["log_variance"] = torch.nn.Parameter(fixed, requires_grad=False)
            try:
                return super().posterior()
            finally:
                self.local.pop("log_variance")

    guide.__class__ = LocOnly
    data = gradient_noise(oracle, guide, batch, ["elbo"], draws=400)
    A = oracle.W.T @ oracle.W / oracle.noise_scale**2
    variance = float(A.square().sum() * math.exp(0.2))
    mean = (oracle.bias - batch.observed) @ oracle.W / oracle.noise_scale**2
    MC.assert_close(
        data["gradient_variance"][0], data["gradient_variance_se"][0], variance, draws=BLOCKS
    )
    MC.assert_close(
        data["gradient_norm"][0], data["gradient_norm_se"][0], mean.norm(dim=1), draws=BLOCKS
    )
    ratio = (mean.norm(dim=1) / math.sqrt(variance)).numpy()
    MC.assert_close(data["snr"][0], data["snr_se"][0], ratio, draws=BLOCKS)


def snr_by_particles(name: str, particles: tuple[int, ...]) -> np.ndarray:
    """The ratio for 400 copies of one sequence, with q a scale off the posterior and too wide."""
    oracle = LinearGaussian(torch.ones(1, 1, dtype=torch.float64), noise_scale=1.0)
    batch = Batch(torch.ones(400, 1, dtype=torch.float64))
    guide = build_guide("mean_field", oracle)
    guide.reset(batch)
    best = oracle.best_mean_field(batch)
    with torch.no_grad():
        guide.local["loc"].copy_(best.mean + best.stddev)
        guide.local["log_variance"].copy_(best.variance.log() + 0.3)
    objectives = [build_objective(name, particles=s) for s in particles]
    data = gradient_noise(oracle, guide, batch, objectives, draws=40).mean("sequence")
    return np.sqrt(data["gradient_signal"] / data["gradient_variance"]).values


def test_more_particles_drown_the_importance_weighted_gradient_but_not_dreg() -> None:
    """Rainforth et al. (2018), theorem 1: 1 / sqrt(S); Tucker et al. (2019): sqrt(S) instead."""
    particles = (4, 16, 64)
    iwae, dreg = (snr_by_particles(name, particles) for name in ("iwae", "dreg"))
    slopes = [np.polyfit(np.log(particles), np.log(ratio), 1)[0] for ratio in (iwae, dreg)]
    # Asymptotic slopes are -1/2 and +1/2. Of 16,000 gradients each, the ratio near 0.09 at 64
    # particles is known to 15 %, which is 0.05 in the slope.
    assert slopes[0] == pytest.approx(-0.5, abs=0.15)
    assert slopes[1] == pytest.approx(0.5, abs=0.15)


def test_slow_gradients_are_measured_and_nothing_is_changed() -> None:
    model, batch = make_language_model(), make_tokens(3)
    svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=2))
    svi.infer(batch)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.decoder.norm.weight.requires_grad_(False)
    data = gradient_noise(model, svi.guide, batch, [TraceMeanField_ELBO()], draws=20, slow=True)
    assert data["slow_snr"].dims == ("objective",)
    assert data["objective"].values.tolist() == ["TraceMeanField_ELBO(num_particles=1)"]
    assert data["kl_estimator"].values.tolist() == ["analytic"]
    assert float(data["slow_gradient_norm"][0]) > 0
    assert np.isfinite(efficiency(data)).all()
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "decoder.norm.weight"
    ]
    assert not any(p.requires_grad for p in svi.guide.parameters())
    assert all(p.grad is None for p in model.parameters())
    # The local part does not depend on whether weights ask for gradients.
    alone = gradient_noise(model, svi.guide, batch, [TraceMeanField_ELBO()], draws=20)
    assert "slow_snr" not in alone
    np.testing.assert_allclose(alone["snr"], data["snr"], rtol=1e-9)


def test_what_cannot_be_measured_is_refused() -> None:
    oracle, guide, batch = at_the_exact_posterior()
    with pytest.raises(InputError, match="draws is 5"):
        gradient_noise(oracle, guide, batch, draws=5)
    with pytest.raises(InputError, match="did you mean 'iwae'"):
        gradient_noise(oracle, guide, batch, ["iwea"])
    with pytest.raises(InputError, match="objectives is empty"):
        gradient_noise(oracle, guide, batch, [])
    with pytest.raises(InputError, match="holds 5 sequences and the batch 2"):
        gradient_noise(oracle, guide, batch.select(slice(2)))
