"""Low-rank and full-rank posteriors: densities, closed-form KL, and the exact posterior reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from known_models import make_language_model, make_oracle, make_tokens
from pyro.infer import TraceMeanField_ELBO
from tolerances import EXACT
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, kl_divergence

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide, full_rank
from ltm_pyro.inference.guides.base import closed_kl
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.models.shaped import Shaped

EVIDENCE = 0.01
"""Nats per sequence that inference may leave to the evidence: the acceptance number."""
MOMENTS = 0.02
"""The same for means and covariances, in units of the exact posterior scales."""

NORMALS: list[tuple[str, dict[str, Any]]] = [
    ("full_rank", {}),
    ("full_rank", {"block": "layer"}),
    ("full_rank", {"block": "thought"}),
    ("low_rank", {"rank": 1}),
    ("low_rank", {"rank": 12}),
]
each_normal = pytest.mark.parametrize(
    ("family", "options"), NORMALS, ids=lambda v: v if isinstance(v, str) else str(v or "whole")
)


def moved(family: str, model: LatentModel, batch: Batch, **options: Any) -> LocalGuide:
    """A guide with random parameters, rows unlike each other."""
    guide = build_guide(family, model, **options)
    guide.reset(batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return guide


def flat_normal(q: Any) -> MultivariateNormal:
    """The same distribution, dense, from its mean and covariance."""
    return MultivariateNormal(q.mean.flatten(-2), q.covariance)


@each_normal
def test_density_is_that_of_the_dense_normal(family: str, options: dict[str, Any]) -> None:
    q = moved(family, make_language_model(), make_tokens(3), **options).posterior()
    dense = flat_normal(q)
    z = q.sample(torch.Size([5]))
    EXACT.assert_close(q.log_prob(z), dense.log_prob(z.flatten(-2)))
    EXACT.assert_close(q.entropy(), dense.entropy())
    EXACT.assert_close(q.variance.flatten(1), dense.variance)
    wide = q.expand((2, 3))
    assert type(wide) is type(q)
    assert wide.rsample(torch.Size([4])).shape == (4, 2, 3, 4, 3)
    EXACT.assert_close(wide.log_prob(z[:2]), q.log_prob(z[:2]))


@each_normal
def test_draws_have_the_covariance_that_is_stated(family: str, options: dict[str, Any]) -> None:
    q: Any = moved(family, make_language_model(), make_tokens(2), **options).posterior()
    draws = 20_000
    z = q.sample(torch.Size([draws])).flatten(-2)
    dense = flat_normal(q)
    # Whitened by the stated moments, draws have covariance I, up to 5.5 standard errors of each
    # entry (at most 1.42 / sqrt(draws)): 156 entries, two-sided, a false alarm in 10^5 runs.
    centred = (z - dense.mean)[..., None]
    white = torch.linalg.solve_triangular(dense.scale_tril, centred, upper=False)[..., 0]
    covariance = torch.einsum("sbi,sbj->bij", white, white) / draws
    eye = torch.eye(12, dtype=z.dtype)
    assert float((covariance - eye).detach().abs().max()) < 5.5 * 1.42 / draws**0.5


@each_normal
def test_kl_is_the_dense_normals(family: str, options: dict[str, Any]) -> None:
    guide = moved(family, make_language_model(), make_tokens(3), **options)
    generator = torch.Generator().manual_seed(1)
    loc, scale = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    prior = dist.Normal(loc, scale.exp()).to_event(2)
    dense = MultivariateNormal(loc.flatten(), torch.diag(scale.exp().square().flatten()))
    expected = kl_divergence(flat_normal(guide.posterior()), dense)
    kl = guide.kl(prior)
    assert kl is not None
    EXACT.assert_close(kl, expected)
    # Torch knows it too, also for rows that were expanded, as Pyro does it in a plate.
    q = guide.posterior().expand((2, 3))
    EXACT.assert_close(kl_divergence(q, prior.expand((2, 3))), expected.expand(2, 3))


@each_normal
def test_there_is_no_closed_kl_to_another_prior(family: str, options: dict[str, Any]) -> None:
    guide = moved(family, make_language_model(), make_tokens(2), **options)
    zero = torch.zeros(4, 3, dtype=torch.float64)
    laplace = dist.Laplace(zero, 1.0).to_event(2)
    mixed = dist.Normal(zero, 1.0).to_event(1)
    assert guide.kl(laplace) is None
    assert closed_kl(guide.posterior(), mixed) is None
    with pytest.raises(NotImplementedError):
        kl_divergence(guide.posterior(), laplace.expand((2,)))


@pytest.mark.parametrize("family", ["low_rank", "full_rank"])
def test_pyros_elbo_takes_the_closed_form(family: str) -> None:
    # Where the data say nothing, the closed form leaves nothing to chance.
    model = LinearGaussian(torch.zeros(2, 4, dtype=torch.float64), 1.0, shape=(2, 2))
    batch = model.simulate(3)
    guide = moved(family, model, batch)
    loss = TraceMeanField_ELBO()(model, guide)
    kl = guide.kl(model.prior())
    assert kl is not None
    for _ in range(2):
        EXACT.assert_close(loss(batch), (kl - model.log_evidence(batch)).sum())


@pytest.mark.parametrize("start", [0.0, -3.0])
@each_normal
def test_the_start_is_near_the_prior_or_where_told(
    family: str, options: dict[str, Any], start: float
) -> None:
    model, batch = make_language_model(), make_tokens(3)
    guide = build_guide(family, model, init_log_variance=start, **options)
    guide.reset(batch)
    assert guide.start_log_variance == start
    q = guide.posterior()
    EXACT.assert_close(q.variance.log(), torch.full_like(q.variance, start))
    assert not q.mean.any()
    for value in guide.rows().values():
        assert torch.equal(value[0], value[2])
    if start == 0.0:
        kl = guide.kl(model.prior())
        assert kl is not None
        assert bool((kl < 0.05).all())


def test_low_rank_does_not_start_on_a_saddle() -> None:
    oracle = make_oracle(shape=(2, 4), n_observed=12)
    batch = oracle.simulate(3)
    guide = build_guide("low_rank", oracle, rank=8)
    guide.reset(batch)
    loss = TraceMeanField_ELBO(num_particles=256, vectorize_particles=True, max_plate_nesting=1)(
        oracle, guide
    )(batch)
    (gradient,) = torch.autograd.grad(loss, [guide.local["factor"]])
    columns = gradient.flatten(1, 2)
    assert bool((columns.norm(dim=1) > 1).all())
    # No two columns are pulled alike, so they do not stay copies of each other.
    units = columns / columns.norm(dim=1, keepdim=True)
    likeness = (units.mT @ units).abs() - torch.eye(8, dtype=units.dtype)
    assert float(likeness.max()) < 0.999


def test_blocks_are_the_layers_or_the_thoughts() -> None:
    model, batch = make_language_model(), make_tokens(2)
    for block, size in (("whole", 12), ("layer", 6), ("thought", 3)):
        guide = moved("full_rank", model, batch, block=block)
        covariance = guide.posterior().covariance  # type: ignore[attr-defined]
        number = torch.arange(12) // size
        inside = number[:, None] == number
        assert bool((covariance[:, inside] != 0).all())
        assert not covariance[:, ~inside].any()


def test_blocks_of_one_dimension_are_mean_field() -> None:
    oracle = make_oracle(shape=(4, 1))
    batch = oracle.simulate(3)
    blocks = moved("full_rank", oracle, batch, block="thought")
    assert set(blocks.rows()) == {"loc", "log_variance"}
    plain = build_guide("mean_field", oracle)
    plain.load_rows(blocks.rows())
    z = plain.posterior().sample()
    EXACT.assert_close(blocks.posterior().log_prob(z), plain.posterior().log_prob(z))


def test_bad_options_are_refused_in_plain_words() -> None:
    oracle = make_oracle()
    for rank in (0, -1, 5, 1.5, True):
        with pytest.raises(InputError, match=r"1 or more and at most 4, .* K \* D = 2 \* 2"):
            build_guide("low_rank", oracle, rank=rank)
    with pytest.raises(InputError, match="unknown block 'thoughts': did you mean 'thought'"):
        build_guide("full_rank", oracle, block="thoughts")
    with pytest.raises(InputError, match=r"LinearGaussian has none: use block='thought'"):
        build_guide("full_rank", oracle, block="layer")
    for family in ("low_rank", "full_rank"):
        with pytest.raises(InputError, match="init_log_variance is nan"):
            build_guide(family, oracle, init_log_variance=float("nan"))


def test_covariances_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = LinearGaussian(torch.ones(1, 40_000), 1.0, shape=(4, 10_000))
    with pytest.raises(InputError, match=r"35\.8 GiB .* 1 sequence of 1 x 40000.*low_rank"):
        build_guide("full_rank", wide)
    oracle = make_oracle()
    guide = build_guide("full_rank", oracle)
    monkeypatch.setattr(full_rank, "MEMORY", 6 * 16 * 8 * 2)
    guide.reset(oracle.simulate(2))
    with pytest.raises(InputError, match=r"covariances of 3 sequences .* a smaller batch"):
        guide.reset(oracle.simulate(3))


def random_oracle(seed: int, noise: float) -> LinearGaussian:
    """Eight dimensions in two thoughts behind twelve observed ones."""
    generator = torch.Generator().manual_seed(seed)
    return LinearGaussian(torch.randn(12, 8, generator=generator), noise, shape=(2, 4))


def distance(q: Distribution, exact: MultivariateNormal) -> Tensor:
    """KL(q || exact posterior) per sequence, without draws: what the ELBO leaves to log p(x)."""
    dense = MultivariateNormal(q.mean.flatten(1).double(), q.covariance.double())  # type: ignore[attr-defined]
    return kl_divergence(dense, exact)


def exact_posterior(oracle: LinearGaussian, batch: Batch) -> MultivariateNormal:
    p = oracle.posterior(batch)
    return MultivariateNormal(p.mean.flatten(1).double(), p.covariance.double())


def assert_exact(oracle: LinearGaussian, batch: Batch, post: Posterior) -> None:
    """Evidence, means and covariances of every sequence, to the acceptance numbers."""
    q, p = post.distribution, exact_posterior(oracle, batch)
    assert float(distance(q, p).max()) < EVIDENCE
    scale = p.variance.sqrt()
    assert float(((q.mean.flatten(1) - p.mean) / scale).abs().max()) < MOMENTS
    units = scale[:, :, None] * scale[:, None]
    error = (q.covariance - p.covariance_matrix) / units  # type: ignore[attr-defined]
    assert float(error.abs().max()) < MOMENTS


# Sticking the landing: at the exact posterior its gradient has no variance, so that the learning
# rate's fall to zero ends there and not beside it. An average over the last steps would bring back
# the way there.
LANDING = Fast(steps=600, optimizer="adam", lr=0.1, final_fraction=0.0, average=0.0)


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize(("family", "options"), [("full_rank", {}), ("low_rank", {"rank": 8})])
def test_the_exact_posterior_is_reached(family: str, options: dict[str, Any], noise: float) -> None:
    oracle = random_oracle(seed=0, noise=noise)
    batch = oracle.simulate(16, seed=0)
    guide = build_guide(family, oracle, **options)
    objective = build_objective("stl", particles=32)
    post = DualRateSVI(oracle, guide, LANDING, elbo=objective).infer(batch)
    assert_exact(oracle, batch, post)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("family", "options"), [("full_rank", {}), ("low_rank", {"rank": 8})])
def test_the_exact_posterior_is_reached_for_any_loadings(
    family: str, options: dict[str, Any], noise: float, seed: int
) -> None:
    oracle = random_oracle(seed, noise)
    batch = oracle.simulate(64, seed=seed)
    # Ill-conditioned loadings at low noise take longer: a condition number of 170 for seed 3.
    fast = replace(LANDING, steps=1000)
    guide = build_guide(family, oracle, **options)
    objective = build_objective("stl", particles=32)
    post = DualRateSVI(oracle, guide, fast, elbo=objective, seed=seed).infer(batch)
    assert_exact(oracle, batch, post)


def best_blocks_gap(exact: MultivariateNormal, size: int) -> Tensor:
    """KL to the posterior of the best normal with independent blocks of `size` neighbours.

    Its blocks' precisions are the diagonal blocks of the posterior's (Bishop 2006, 10.1.2).
    """
    P = exact.precision_matrix
    blocks = [P[:, i : i + size, i : i + size].logdet() for i in range(0, P.shape[1], size)]
    return 0.5 * (sum(blocks, torch.zeros(len(P), dtype=P.dtype)) - P.logdet())


def test_blocks_reach_their_analytic_optimum_and_not_more() -> None:
    oracle = random_oracle(seed=0, noise=0.5)
    batch = oracle.simulate(16, seed=0)
    guide = build_guide("full_rank", oracle, block="thought")
    elbo = TraceMeanField_ELBO(num_particles=32, vectorize_particles=True)
    fast = Fast(steps=400, lr=0.1, final_fraction=0.0)
    post = DualRateSVI(oracle, guide, fast, elbo=elbo).infer(batch)
    exact = exact_posterior(oracle, batch)
    excess = distance(post.distribution, exact) - best_blocks_gap(exact, size=4)
    assert float(best_blocks_gap(exact, size=4).min()) > 0.5
    assert float(excess.mean()) < EVIDENCE
    # Below the optimum there is nothing but rounding in single precision.
    assert float(excess.min()) > -1e-3


class _Zukoish(MultivariateNormal):
    """A distribution that scores its draws while it makes them."""

    def rsample_and_log_prob(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        z = self.rsample(shape)
        return z, self.log_prob(z) + 1.0


@pytest.mark.parametrize(("made_of", "extra"), [(MultivariateNormal, 0.0), (_Zukoish, 1.0)])
def test_shaped_draws_and_scores_at_once(
    made_of: Callable[..., MultivariateNormal], extra: float
) -> None:
    q = Shaped(made_of(torch.zeros(2, 6), torch.eye(6)), (2, 3))
    z, log_prob = q.rsample_and_log_prob(torch.Size([5]))
    assert z.shape == (5, 2, 2, 3)
    EXACT.assert_close(log_prob, q.log_prob(z) + extra)


def test_shaped_refuses_an_event_of_another_size() -> None:
    with pytest.raises(ValueError, match="cannot be seen"):
        Shaped(MultivariateNormal(torch.zeros(6), torch.eye(6)), (2, 4))
