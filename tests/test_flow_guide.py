"""The flow guide: its density, its start at mean field, what it learns, what it refuses."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from known_models import make_language_model, make_oracle
from pyro.infer import TraceMeanField_ELBO
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.config import Fast, Slow
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.models.conditional_flow import SPLINE_BOUND, ConditionalFlow, FlowDistribution
from ltm_pyro.models.linear_gaussian import LinearGaussian

KINDS = ("affine", "spline")


def _distribution(kind: str, rows: int = 3, size: float = 0.3, **options: Any) -> FlowDistribution:
    """A bent one, rows unlike each other, in double precision."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ConditionalFlow(4, 5, kind, **options).double()  # type: ignore[arg-type]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * noise(*p.shape))
    return FlowDistribution(network, noise(rows, 5), noise(rows, 2, 2), noise(rows, 2, 2).exp())


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_determinant_is_that_of_the_jacobian(kind: str) -> None:
    q = _distribution(kind)
    eps = torch.randn(3, 4, dtype=torch.float64)
    y, log_det = q.network.push(eps, q.context)
    for row in range(3):

        def push(x: Tensor, row: int = row) -> Tensor:
            return q.network.push(x, q.context[row])[0]

        jacobian: Any = torch.autograd.functional.jacobian(push, eps[row])
        EXACT.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet)
    back, again = q.network.pull(y, q.context)
    EXACT.assert_close(back, eps)
    EXACT.assert_close(again, log_det)


@pytest.mark.parametrize("kind", KINDS)
def test_density_of_own_draws_is_kept_and_is_the_density(kind: str) -> None:
    q = _distribution(kind).expand((2, 3))
    z = q.rsample()
    assert q.log_prob(z) is q.log_prob(z)
    EXACT.assert_close(q.log_prob(z.clone()), q.log_prob(z))
    # Every draw under every row's density, as the collapse panel asks.
    each = _distribution(kind)
    EXACT.assert_close(each.log_prob(z[:, 1, None])[:, 1], q.log_prob(z)[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_density_has_the_right_slope_in_z(kind: str) -> None:
    q = _distribution(kind)
    z = q.sample().requires_grad_()
    assert torch.autograd.gradcheck(q.log_prob, z, atol=1e-5, rtol=1e-4)


def test_a_fresh_network_is_mean_field() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    for kind in KINDS:
        guide = build_guide("flow", oracle, kind=kind)
        guide.reset(batch)
        with torch.no_grad():
            for p in guide.local.values():
                p.normal_()
        plain = dist.Normal(guide.local["loc"], (0.5 * guide.local["log_variance"]).exp())
        z = plain.sample()
        EXACT.assert_close(guide.posterior().log_prob(z), plain.to_event(2).log_prob(z))
        EXACT.assert_close(guide.posterior().mean, plain.mean)
        EXACT.assert_close(guide.posterior().variance, plain.variance)


def test_moments_are_exact_where_the_flow_is_linear() -> None:
    q = _distribution("affine", size=0.0)
    with torch.no_grad():
        q.network.lower.normal_(std=0.1)
    factor = q.scale.flatten(1)[..., None] * q.network.matrix()
    EXACT.assert_close(q.mean, q.loc)
    EXACT.assert_close(q.covariance, factor @ factor.mT)
    EXACT.assert_close(q.variance.flatten(1), q.covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_draws(kind: str) -> None:
    q = _distribution(kind)
    draws = 20_000
    with torch.no_grad():
        z = q.sample(torch.Size([draws]))
        # The estimate stands on 1024 fixed draws: its own error is about that of so many.
        for values, claim in ((z, q.mean), ((z - z.mean(0)).square(), q.variance)):
            MC.assert_close(values.mean(0), values.std(0) * (1 / draws + 1 / 1024) ** 0.5, claim)
    assert torch.equal(q.mean, _distribution(kind).mean)


def test_splines_leave_what_lies_beyond_their_bound() -> None:
    network = ConditionalFlow(4, 2, "spline", transforms=1).double()
    with torch.no_grad():
        for p in network.steps[0].parameters():
            p.normal_()
    eps = torch.tensor([[-1.0, 1.0, 0.5, 0.3]], dtype=torch.float64)
    context = torch.zeros(1, 2, dtype=torch.float64)
    far = eps.sign() * (SPLINE_BOUND + eps.abs())
    assert torch.equal(network.push(far, context)[0], far)
    assert not torch.isclose(network.push(eps, context)[0], eps).any()


@pytest.mark.parametrize("kind", KINDS)
def test_one_dimension_works(kind: str) -> None:
    oracle = LinearGaussian([[1.0], [0.5]], noise_scale=0.5)
    batch = oracle.simulate(4)
    svi = DualRateSVI(oracle, build_guide("flow", oracle, kind=kind), Fast(steps=2))
    svi.fit_guide(batch, 2, progress=False)
    post = svi.infer(batch)
    z = post.sample(3)
    torch.testing.assert_close(post.log_prob(z), post.log_prob(z.clone()))


def test_an_answer_stays_when_the_guide_learns_on() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    svi = DualRateSVI(oracle, build_guide("flow", oracle), Fast(steps=2), Slow(lr=0.1))
    svi.fit_guide(batch, 2, progress=False)
    post = svi.infer(batch)
    z = post.sample(2).clone()
    before = post.log_prob(z)
    assert not before.requires_grad
    svi.fit_guide(batch, 3, progress=False)
    assert torch.equal(post.log_prob(z), before)
    assert not torch.allclose(svi.infer(batch).log_prob(z), before)


def test_correlations_do_not_decay() -> None:
    network = build_guide("flow", make_oracle()).network
    assert isinstance(network, ConditionalFlow)
    assert network.lower.dim() == 1


def test_bad_options_are_refused() -> None:
    oracle = make_oracle()
    with pytest.raises(InputError, match="unknown flow kind 'splin': did you mean 'spline'"):
        build_guide("flow", oracle, kind="splin")
    for name in ("transforms", "context_dim", "hidden", "bins"):
        for value in (0, 1.5):
            with pytest.raises(InputError, match=f"flow {name} is {value}: must be a whole number"):
                build_guide("flow", oracle, **{name: value})
    with pytest.raises(InputError, match="init_log_variance is nan"):
        build_guide("flow", oracle, init_log_variance=float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_with_a_remedy(dtype: torch.dtype) -> None:
    model = make_language_model(dtype=dtype)
    with pytest.raises(InputError, match=r"guide 'flow' with a model in .*model\.float\(\)"):
        build_guide("flow", model)
    build_guide("flow", model.float())


def _learned(seed: int, noise: float, **options: Any) -> tuple[LinearGaussian, LocalGuide]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(12, 8, generator=generator)
    oracle = LinearGaussian(W, noise, shape=(2, 4))
    guide = build_guide("flow", oracle, **options)
    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True)
    fast = Fast(steps=16, lr=0.1, final_fraction=0.0)
    svi = DualRateSVI(oracle, guide, fast, elbo=elbo, persistent=True)
    svi.fit_guide(oracle.simulate(64, seed=seed), 150, batch_size=64, progress=False)
    return oracle, guide


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "noise"), [(0, 0.1), (1, 0.5), (2, 1.0)])
def test_a_learned_flow_reaches_the_evidence(seed: int, noise: float, kind: str) -> None:
    oracle, guide = _learned(seed, noise, kind=kind)
    batch = oracle.simulate(64, seed=seed)
    elbo = TraceMeanField_ELBO(num_particles=32, vectorize_particles=True)
    fast = Fast(steps=300, lr=0.2, final_fraction=0.0)
    post = DualRateSVI(oracle, guide, fast, elbo=elbo).infer(batch)
    z = post.sample(2000)
    log_joint = oracle.prior().log_prob(z)
    log_joint += torch.stack([oracle.log_likelihood(draw, batch) for draw in z])
    gap = oracle.log_evidence(batch) - (log_joint - post.log_prob(z))
    error = gap.mean(1).std() / 2000**0.5
    MC.assert_at_most(gap.mean().item(), error.item(), bound=0.05)
    MC.assert_at_most(-gap.mean().item(), error.item(), bound=0.0)
    # In units of the exact posterior's scale, beside the Monte Carlo error of 2000 draws.
    exact = oracle.posterior(batch)
    shift = (post.mean - exact.mean) / exact.variance.sqrt()
    assert shift.square().mean().sqrt() < 0.05
