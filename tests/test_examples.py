"""The examples that are not about language: held to numerical quadrature, and through everything.

Their z has two dimensions, so log p(x) and the moments of p(z | x) are sums over a grid. For smooth
functions that vanish at the grid's edge the trapezoid rule is exact to rounding as soon as its step
is half a posterior's scale (Trefethen & Weideman 2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from tolerances import EXACT, MC
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.export import load_datatree, save_datatree
from ltm_pyro.inference.mcmc.target import setting
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.examples import BernoulliFactors, PoissonEffects


@dataclass(frozen=True)
class Truth:
    """Of B rows: log p(x) (B,), and mean (B, 2) and covariance (B, 2, 2) of p(z | x)."""

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def quadrature(model: LatentModel, batch: Batch, step: float = 0.1) -> Truth:
    """By the trapezoid rule on a grid of `step` over [-8, 8]^2."""
    line = torch.arange(-8.0, 8.0 + step / 2, step, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)  # (S, 2)
    z = grid[:, None, None].expand(-1, len(batch), 1, 2)
    joint = model.prior().log_prob(z) + model.log_likelihood(z, batch) + 2 * np.log(step)
    evidence = joint.logsumexp(0)
    share = (joint - evidence).exp()
    mean = torch.einsum("sb,sd->bd", share, grid)
    second = torch.einsum("sb,sd,se->bde", share, grid, grid)
    return Truth(evidence, mean, second - mean[:, :, None] * mean[:, None])


def poisson() -> PoissonEffects:
    model = PoissonEffects().double()
    with torch.no_grad():
        model.weights.copy_(torch.tensor([0.7, -0.4], dtype=torch.float64))
        model.log_scales.copy_(torch.tensor([0.6, 0.3], dtype=torch.float64).log())
    return model


def bernoulli() -> BernoulliFactors:
    model = BernoulliFactors(6).double()
    first, second = [1.5, 1.2, 1.0, 0.0, 0.4, -0.5], [0.0, 0.3, -0.5, 1.5, 1.2, 1.0]
    with torch.no_grad():
        model.loadings.copy_(torch.tensor([first, second]).T)
        model.easiness.copy_(torch.linspace(-1, 1, 6))
    return model


MODELS = {"poisson": poisson, "bernoulli": bernoulli}


def data(model: LatentModel, rows: int = 8) -> Batch:
    """Rows of the model's own, one of them ragged."""
    made = ltm.simulate(model, rows, seed=3).batch
    mask = made.mask.clone()
    mask[-1, 4:] = False
    return Batch(made.observed, mask, covariates=made.covariates)


@pytest.mark.parametrize("name", MODELS)
def test_examples_keep_the_contract(name: str) -> None:
    model = MODELS[name]()
    batch = data(model)
    ltm.check_model(model, batch)
    whole = Batch(batch.observed.long(), batch.mask, covariates=batch.covariates)
    ltm.check_model(model, whole)
    z = model.prior().sample(torch.Size([3, len(batch)]))
    # Torch's lgamma of whole numbers is in single precision: a constant of x! is off by 1e-7.
    torch.testing.assert_close(
        model.log_likelihood(z, batch), model.log_likelihood(z, whole), atol=1e-5, rtol=0.0
    )
    assert model(size=5).shape[0] == 5


def test_poisson_likelihood_is_the_formula() -> None:
    model = poisson()
    batch = data(model)
    z = model.prior().sample(torch.Size([len(batch)]))
    expected = []
    for i in range(len(batch)):
        total = 0.0
        for j in range(8):
            if batch.mask[i, j]:
                c, x = batch.covariates["design"][i, j], int(batch.observed[i, j])
                eta = float(c[0] * (0.7 + 0.6 * z[i, 0, 0]) + c[1] * (-0.4 + 0.3 * z[i, 0, 1]))
                total += x * eta - math.exp(eta) - math.lgamma(x + 1)
        expected.append(total)
    EXACT.assert_close(model.log_likelihood(z, batch), torch.tensor(expected, dtype=torch.float64))


def test_bernoulli_likelihood_sums_to_one() -> None:
    """Over all 2^6 answers."""
    model = bernoulli()
    answers = torch.cartesian_prod(*[torch.arange(2)] * 6)
    z = model.prior().sample().expand(64, 1, 2)
    total = model.log_likelihood(z, Batch(answers)).logsumexp(0)
    EXACT.assert_close(total, torch.zeros((), dtype=torch.float64))
    evidence = quadrature(model, Batch(answers)).log_evidence
    EXACT.assert_close(evidence.logsumexp(0), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_the_evidence_lies_above_every_bound_and_near_the_best(name: str) -> None:
    """A normal with all correlations leaves 0.1 nats at most, and importance weights 0.02.

    Both posteriors are close to normal; what is left is skewness, which also moves the best
    normal's mean and scale by some hundredths of the posterior's scale.
    """
    model = MODELS[name]()
    batch = data(model)
    truth = quadrature(model, batch)
    evidence = truth.log_evidence.numpy()
    EXACT.assert_close(truth.log_evidence, quadrature(model, batch, 0.08).log_evidence)
    for family in ("mean_field", "full_rank"):
        fast = Fast(steps=150, lr=0.1, final_fraction=0.0)
        objective = ltm.build_objective("elbo", particles=16)
        post = ltm.DualRateSVI(model, family, fast, elbo=objective).infer(batch)
        scores = ltm.evaluate(model, post, batch, draws=1000)
        elbo, error = scores["elbo"].values, scores["elbo_se"].values
        MC.assert_at_most(elbo, error, evidence, draws=1000)
    assert (evidence - elbo < 0.1 + MC.sigmas(len(batch), 1000) * error).all()
    bound = ltm.importance_bound(model, post, batch, draws=2000)
    close = 0.02 + MC.sigmas(len(batch), 2000) * bound["iw_bound_se"].values
    assert (np.abs(bound["iw_bound"].values - evidence) < close).all()
    sd = truth.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(((post.mean[:, 0] - truth.mean) / sd).abs().max()) < 0.15
    assert float((post.sd[:, 0] / sd).log().abs().max()) < 0.15


def fitted(model: LatentModel, batch: Batch) -> None:
    """Learns the model's weights."""
    svi = ltm.DualRateSVI(
        model, "full_rank", Fast(steps=8, lr=0.2),
        Slow(lr=0.1, warmup=0.0, weight_decay=0.0), persistent=True,
    )  # fmt: skip
    svi.fit(batch, 120, batch_size=len(batch) // 8, progress=False)


def mean_evidence(model: LatentModel, batch: Batch) -> float:
    return float(quadrature(model, batch, 0.2).log_evidence.mean())


def test_regression_weights_and_scales_are_recovered() -> None:
    """600 groups of 8 counts: standard errors near 0.03 of weights and 0.06 of log scales.

    The fit's exact evidence comes within 0.01 nats per group of the true model's, from 2 below.
    """
    true, model = poisson(), PoissonEffects().double()
    batch = ltm.simulate(true, 600, seed=0).batch
    expected = mean_evidence(true, batch)
    assert mean_evidence(model, batch) < expected - 1.0
    fitted(model, batch)
    assert mean_evidence(model, batch) > expected - 0.01
    torch.testing.assert_close(model.weights, true.weights, atol=0.12, rtol=0.0)
    torch.testing.assert_close(model.log_scales, true.log_scales, atol=0.3, rtol=0.0)


def test_loadings_are_recovered_up_to_a_turn() -> None:
    """Of W only W W^T is identified, and the largest of its entries are known least."""
    true, model = bernoulli(), BernoulliFactors(6).double()
    batch = ltm.simulate(true, 1500, seed=0).batch
    expected = mean_evidence(true, batch)
    assert mean_evidence(model, batch) < expected - 0.2
    fitted(model, batch)
    assert mean_evidence(model, batch) > expected - 0.01
    with torch.no_grad():
        found, wanted = ((m.loadings @ m.loadings.T).flatten() for m in (model, true))
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.9


class Scalar(LatentModel):
    """One real number a row."""

    x_shape = ()

    def prior(self) -> TorchDistribution:
        return dist.Normal(torch.zeros(1, 2, dtype=torch.float64), 1.0).to_event(2)

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return dist.Normal(z.sum((-2, -1)), 1.0).mask(batch.mask)


class Grid(Scalar):
    """A matrix a row."""

    x_shape = (3, 2)

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        mean = z.sum((-2, -1))[..., None, None].expand(*z.shape[:-2], 3, 2)
        return dist.Normal(mean, 1.0).mask(batch.mask).to_event(2)


SHAPES = {**MODELS, "scalar": Scalar, "grid": Grid}
ENCODERS = ("amortized", "semi_amortized")
FAMILIES = ("mean_field", "low_rank", "full_rank", "mixture", "flow", "delta", *ENCODERS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHAPES)
def test_any_model_gets_everything(name: str, family: str) -> None:
    """No code of its own: shapes (B,), (B, J) and (B, 3, 2), with covariates and without."""
    model = SHAPES[name]()
    batch = ltm.simulate(model, 6, seed=1).batch
    svi = ltm.DualRateSVI(model, family, Fast(steps=4))
    svi.fit(batch, 2, batch_size=4, progress=False)
    post = svi.infer(batch)
    scores = ltm.evaluate(model, post, batch, draws=8)
    assert scores["n_tokens"].shape == (6,)
    assert scores["n_tokens"].values.tolist() == batch.n_tokens.tolist()
    diagnosis = ltm.diagnose(
        model, post, batch, draws=200, steps=2, chains=4, rungs=4, progress=False
    )
    assert diagnosis.problems or diagnosis.passed
    ranks = ltm.sbc(model, svi.infer, replications=20, draws=9, like=batch)
    assert ranks["rank"].shape == (20, 4)
    if family == "delta":
        with pytest.raises(InputError, match="point mass"):
            ltm.gap_decomposition(svi, batch, converged_steps=4, draws=32)
    else:
        gaps = ltm.gap_decomposition(svi, batch, converged_steps=4, draws=32)
        assert gaps["total"].shape == (6,)
    tree = ltm.to_datatree(post, batch=batch, scores=scores, draws=12, model=model)
    dims = tree["observed_data/x"].dims
    assert tree["observed_data/x"].shape == tuple(batch.observed.shape)
    assert tree["posterior_predictive/x"].dims == ("chain", "draw", *dims)
    for covariate, value in batch.covariates.items():
        stored = tree[f"constant_data/covariate_{covariate}"]
        np.testing.assert_array_equal(stored.values, value.numpy())


@pytest.mark.parametrize("name", SHAPES)
def test_any_model_is_compared_and_saved(name: str, tmp_path: Path) -> None:
    model = SHAPES[name]()
    batch = ltm.simulate(model, 6, seed=1).batch
    families = [f for f in FAMILIES if f not in ("delta", *ENCODERS)]
    table = ltm.compare(
        model, batch, families, budget=16, draws=8, gaps=False, progress=False
    ).dataset
    assert table.sizes["guide"] == len(families)
    post = ltm.DualRateSVI(model, "mean_field", Fast(steps=2)).infer(batch)
    tree = ltm.to_datatree(post, batch=batch, draws=12, model=model)
    loaded = load_datatree(save_datatree(tree, tmp_path / "posterior.nc"))
    assert loaded["observed_data"].equals(tree["observed_data"])


def test_encoders_read_what_is_shown_and_covariates() -> None:
    """Of counts; the posterior mean of a group with twice the counts is not that of the group."""
    model = poisson()
    batch = data(model)
    guide = ltm.build_guide("amortized", model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for p in guide.shared_parameters():
            p.add_(0.1 * torch.randn_like(p))

    def mean(x: Tensor, design: Tensor) -> Tensor:
        guide.reset(Batch(x, batch.mask, covariates={"design": design}))
        return guide.posterior().mean.detach()

    x, design = batch.observed, batch.covariates["design"]
    plain = mean(x, design)
    EXACT.assert_close(mean(torch.where(batch.mask, x, 7.0), design), plain)
    for other in (mean(2 * x, design), mean(x, design + 1.0)):
        assert ((other - plain).abs().amax((1, 2)) > 1e-3).all()
    with pytest.raises(InputError, match="x has 5 numbers a row: this encoder was made for 8"):
        guide.reset(Batch(x[:, :5], covariates={"design": design[:, :5]}))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_refuse_what_has_no_shape(family: str) -> None:
    model = Scalar()
    model.x_shape = None
    with pytest.raises(InputError, match=r"no encoder for a Scalar.* x_shape"):
        ltm.build_guide(family, model)


def test_one_latent_dimension_and_a_rate_that_vanishes() -> None:
    """Chains go where a rate is 0, which Pyro refuses: there the density is 0, and no mistake."""

    class Steep(Scalar):
        x_shape = (3,)

        def prior(self) -> TorchDistribution:
            return dist.Normal(torch.zeros(1, 1), 1.0).to_event(2)

        def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
            rate = (10.0 * z.sum((-2, -1))).exp()[..., None].expand(*z.shape[:-2], 3)
            counts = dist.ZeroInflatedPoisson(rate, gate=torch.tensor(0.2))
            return counts.mask(batch.mask).to_event(1)

    model, batch = Steep(), Batch(torch.tensor([[0.0, 3.0, 2.0], [1.0, 1.0, 0.0]]))
    post = ltm.DualRateSVI(model, "low_rank", Fast(steps=4)).infer(batch)
    assert post.parameters["factor"].shape == (2, 1, 1, 1)
    with setting(model, batch, post) as chains:
        state = chains.target(chains.log_joint)(torch.full((1, 2, 1), -20.0))
        assert (state.log_density(torch.ones(1, 2)) == -torch.inf).all()


def test_written_rows_have_the_masks_and_covariates_of_others() -> None:
    model = poisson()
    batch = data(model, 3)
    made = ltm.simulate(model, 7, seed=5, like=batch).batch
    rows = torch.arange(7) % 3
    assert torch.equal(made.mask, batch.mask[rows])
    assert torch.equal(made.covariates["design"], batch.covariates["design"][rows])
    again = ltm.simulate(model, 7, seed=5, like=batch).batch
    assert torch.equal(made.observed, again.observed)


def test_a_posterior_knows_its_covariates() -> None:
    model = poisson()
    batch = data(model)
    post = ltm.DualRateSVI(model, "mean_field", Fast(steps=2)).infer(batch)
    other = Batch(
        batch.observed, batch.mask, covariates={"design": batch.covariates["design"] + 1.0}
    )
    with pytest.raises(InputError, match=r"covariate 'design': infer on this"):
        ltm.evaluate(model, post, other, draws=8)


@pytest.mark.parametrize(
    ("x", "covariates", "match"),
    [
        ([[1.0, -1.0]], {"design": torch.ones(1, 2, 2)}, r"ids \[0\].*counts"),
        ([[1.0, 0.5]], {"design": torch.ones(1, 2, 2)}, r"ids \[0\].*counts"),
        ([[1.0, 2.0]], {"design": torch.full((1, 2, 2), torch.nan)}, r"ids \[0\].*finite"),
        ([[1.0, 2.0]], {"design": torch.ones(1, 2, 3)}, r"design is \(1, 2, 3\).*\(B, J, 2\)"),
        ([[1.0, 2.0]], {}, r"no covariate 'design'"),
    ],
)
def test_poisson_refuses(x: list[list[float]], covariates: dict[str, Tensor], match: str) -> None:
    model = PoissonEffects()
    with pytest.raises(InputError, match=match):
        ltm.DualRateSVI(model, "mean_field").infer(Batch(torch.tensor(x), covariates=covariates))


@pytest.mark.parametrize(("x", "match"), [([[0, 2]], "not 0 or 1"), ([[0, 1, 1]], r"\(B, 2\)")])
def test_bernoulli_refuses(x: list[list[int]], match: str) -> None:
    model = BernoulliFactors(2)
    with pytest.raises(InputError, match=match):
        ltm.DualRateSVI(model, "mean_field").infer(Batch(torch.tensor(x)))
