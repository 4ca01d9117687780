from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import MixtureSameFamily, TorchDistribution
from test_collapse import Silent
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.diagnostics.information import information_by_block
from ltm_pyro.diagnostics.marginals import blocks, marginal
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.full_normal import BlockNormal, FullNormal, LowRankNormal
from ltm_pyro.models.normal_mixture import NormalMixture
from ltm_pyro.models.priors.autoregressive import StationaryAR1

torch_double = torch.float64


def standard(shape: tuple[int, int]) -> TorchDistribution:
    prior: TorchDistribution = dist.Normal(
        torch.zeros(shape, dtype=torch_double), torch.ones(shape, dtype=torch_double)
    ).to_event(2)
    return prior


def posterior(q: TorchDistribution, prior: TorchDistribution | None = None) -> Posterior:
    n = q.batch_shape[0]
    shape = (q.event_shape[0], q.event_shape[1])
    return Posterior(
        q,
        standard(shape) if prior is None else prior,
        torch.arange(n),
        torch.ones(n, 1, dtype=torch.bool),
        family="made",
    )


def normals(mean: Tensor, scale: float = 1.0) -> TorchDistribution:
    q: TorchDistribution = dist.Normal(mean, torch.full_like(mean, scale)).to_event(2)
    return q


def covariances(n: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, size, size, generator=generator, dtype=torch_double)
    return root @ root.mT / size + 0.2 * torch.eye(size, dtype=torch_double)


def correlated(n: int = 6, shape: tuple[int, int] = (4, 2), seed: int = 0) -> FullNormal:
    generator = torch.Generator().manual_seed(seed + 100)
    mean = torch.randn(n, *shape, generator=generator, dtype=torch_double)
    return FullNormal(mean, torch.linalg.cholesky(covariances(n, shape[0] * shape[1], seed)))


def two_clusters(distance: float, n: int = 8, shape: tuple[int, int] = (4, 1)) -> Tensor:
    """Means of n posteriors in two equal groups, told apart by the first thought alone."""
    mean = torch.zeros(n, *shape, dtype=torch_double)
    mean[: n // 2, 0, 0], mean[n // 2 :, 0, 0] = distance / 2, -distance / 2
    return mean


def two_cluster_information(distance: float) -> float:
    """I between the group and a draw from its unit normal, by quadrature."""
    x = torch.linspace(-30, 30, 200_001, dtype=torch_double)
    log_a, log_b = (dist.Normal(m, 1.0).log_prob(x) for m in (distance / 2, -distance / 2))
    mixed = torch.logaddexp(log_a, log_b) - math.log(2)
    return float(torch.trapezoid(log_a.exp() * (log_a - mixed), x))


@pytest.mark.parametrize("distance", [0.5, 2.0, 20.0])
def test_information_of_two_clusters_is_known(distance: float) -> None:
    data = information_by_block(posterior(normals(two_clusters(distance))), n_layers=2, draws=2000)
    exact = two_cluster_information(distance)
    MC.assert_close(
        data["mutual_information_thought"].values,
        # Far apart, or with nothing to tell, every draw gives the same up to rounding.
        data["mutual_information_thought_se"].values + 1e-9,
        [exact, 0.0, 0.0, 0.0],
    )
    MC.assert_close(
        data["mutual_information_layer"].values,
        data["mutual_information_layer_se"].values + 1e-9,
        [exact, 0.0],
    )
    assert float(data["mutual_information_thought"].max()) <= math.log(2) + 1e-9
    assert data.attrs["mutual_information_kind"] == "monte carlo"


def test_information_error_is_that_of_its_draws() -> None:
    post = posterior(correlated())
    found = [information_by_block(post, n_layers=2, draws=8, seed=s) for s in range(40)]
    for name in ("mutual_information_thought", "mutual_information_layer"):
        values = np.stack([data[name].values for data in found])
        printed = np.stack([data[f"{name}_se"].values for data in found]).mean(0)
        # A standard deviation of 40 is known to about 11 %, so 50 % is four of its errors.
        np.testing.assert_allclose(values.std(0, ddof=1), printed, rtol=0.5)


def test_what_is_seen_in_one_layer_only() -> None:
    # Layer 1 is collapsed onto a point that is not the prior: KL there, and no information. Layer 0
    # tells all eight sequences apart, and layer 2 is the prior.
    mean = torch.zeros(8, 6, 2, dtype=torch_double)
    mean[:, 0, 0] = 30 * torch.arange(8)
    mean[:, 2:4] = 1.5
    data = information_by_block(posterior(normals(mean)), n_layers=3, draws=64)
    information, kl = data["mutual_information_layer"].values, data["kl_layer"].mean("sequence")
    np.testing.assert_allclose(information, [math.log(8), 0, 0], atol=1e-9)
    assert data.attrs["mutual_information_cap"] == pytest.approx(math.log(8))
    np.testing.assert_allclose(kl[1:], [4 * 1.5**2 / 2, 0.0], atol=1e-12)
    np.testing.assert_allclose(data["kl_thought"].mean("sequence")[2:4], 2 * 1.5**2 / 2)


def test_independent_layers_add_up_and_others_do_not() -> None:
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(5, 4, 3, generator=generator, dtype=torch_double)
    apart = posterior(normals(mean, 0.4))
    total = torch.distributions.kl_divergence(apart.distribution, apart.prior.expand([5]))
    data = information_by_block(apart, n_layers=2)
    assert data.attrs["kl_kind"] == "exact"
    for name in ("thought", "layer"):
        EXACT.assert_close(torch.from_numpy(data[f"kl_{name}"].sum(name).values), total)
    q = correlated()
    data = information_by_block(posterior(q), n_layers=2)
    thoughts, layers = (
        data["kl_thought"].values.sum(1),
        data["kl_layer"].sum("layer").values,
    )
    whole = information_by_block(posterior(q), n_layers=1)["kl_layer"].values[:, 0]
    assert (thoughts < layers - 0.05).all()
    assert (layers < whole - 0.05).all()


def test_kl_of_a_correlated_block_is_that_of_its_covariance() -> None:
    q = correlated()
    data = information_by_block(posterior(q), n_layers=2)
    assert data.attrs["kl_kind"] == "exact"
    for layer in range(2):
        part = slice(4 * layer, 4 * layer + 4)
        inside = q.covariance[:, part, part]
        mean = q.mean.flatten(1)[:, part]
        expected = 0.5 * (
            inside.diagonal(dim1=1, dim2=2).sum(1)
            + mean.square().sum(1) - 4 - torch.logdet(inside)
        )  # fmt: skip
        EXACT.assert_close(torch.from_numpy(data["kl_layer"].values[:, layer]), expected)


def families() -> dict[str, TorchDistribution]:
    """Every distribution whose parts have a known density, as six rows of four thoughts of two."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch_double)

    by_thought = torch.linalg.cholesky(covariances(24, 2).unflatten(0, (6, 4)))
    by_layer = torch.linalg.cholesky(covariances(12, 4).unflatten(0, (6, 2)))
    components = dist.Normal(draw(3, 4, 2), draw(3, 4, 2).exp()).to_event(2)
    return {
        "factorised": normals(draw(6, 4, 2), 0.7),
        "full": correlated(),
        "blocks of a thought": BlockNormal(draw(6, 4, 2), by_thought),
        "blocks of a layer": BlockNormal(draw(6, 4, 2), by_layer),
        "low rank": LowRankNormal(draw(6, 4, 2), draw(6, 4, 2).exp(), draw(6, 4, 2, 3)),
        "mixture": NormalMixture(draw(6, 3), draw(6, 3, 4, 2), draw(6, 3, 4, 2).exp()),
        "shared mixture": MixtureSameFamily(dist.Categorical(logits=draw(3)), components),
        "autoregressive": StationaryAR1(draw(2), 4),
    }


def test_mixtures_keep_their_weights_and_lose_dimensions() -> None:
    everything = families()
    part, z = slice(1, 3), torch.randn(6, 2, 2, dtype=torch_double)
    for name in ("mixture", "shared mixture"):
        d = everything[name]
        inside = marginal(d, part)
        assert inside is not None
        if isinstance(d, NormalMixture):
            weights, loc, scale = d.log_weights, d.loc, d.scale
        else:
            weights = d.mixture_distribution.logits
            base = d.component_distribution.base_dist
            loc, scale = base.loc, base.scale
        each = dist.Normal(loc[..., part, :], scale[..., part, :]).log_prob(z[:, None])
        EXACT.assert_close(inside.log_prob(z), (weights + each.sum((-2, -1))).logsumexp(-1))


def test_a_stretch_of_the_process_is_normal_with_its_autocovariance() -> None:
    d = families()["autoregressive"]
    assert isinstance(d, StationaryAR1)
    z = torch.randn(5, 3, 2, dtype=torch_double)
    inside = marginal(d, slice(1, 4))
    assert inside is not None
    lag = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    expected = sum(
        dist.MultivariateNormal(torch.zeros(3, dtype=torch_double), a**lag).log_prob(z[..., i])
        for i, a in enumerate(d.coefficient)
    )
    EXACT.assert_close(inside.log_prob(z), torch.as_tensor(expected))


def test_parts_have_the_moments_of_their_draws() -> None:
    for name, d in families().items():
        draws = d.sample(torch.Size([4000]))
        for part in (slice(1, 2), slice(2, 4), slice(0, 4)):
            inside = marginal(d, part)
            assert inside is not None, name
            assert inside.event_shape == (part.stop - part.start, 2)
            z = draws[..., part, :]
            error = z.std(0) / math.sqrt(len(z))
            MC.assert_close(z.mean(0).numpy(), error.numpy(), inside.mean.numpy(), draws=len(z))


def test_normal_parts_have_the_covariance_of_the_whole() -> None:
    everything = families()
    for name in ("full", "blocks of a thought", "blocks of a layer", "low rank"):
        d = everything[name]
        for part in (slice(1, 2), slice(2, 4), slice(1, 4)):
            inside = marginal(d, part)
            at = slice(2 * part.start, 2 * part.stop)
            EXACT.assert_close(inside.covariance, d.covariance[:, at, at])
            EXACT.assert_close(inside.mean, d.mean[:, part])  # type: ignore[union-attr]


def test_without_densities_of_parts_the_values_are_bounds() -> None:
    q = correlated(n=8)
    known = information_by_block(posterior(q), n_layers=2, draws=2000)
    silent = information_by_block(posterior(Silent(q)), n_layers=2, draws=2000)
    assert silent.attrs["kl_kind"] == silent.attrs["mutual_information_kind"] == "at least"
    assert "not known" in silent.attrs["reason"]
    # Moments are from 256 draws, and the KL is sum(v + m^2 - 1 - log v) / 2 in them.
    squares = (q.variance - 1).square() / 2 + q.mean.square() * q.variance
    each = (squares.sum(-1) / 256).numpy()
    errors = {"thought": each**0.5, "layer": each.reshape(8, 2, 2).sum(-1) ** 0.5}
    for name, of_kl in errors.items():
        MC.assert_at_most(silent[f"kl_{name}"].values, of_kl, known[f"kl_{name}"].values)
        column = f"mutual_information_{name}"
        error = np.hypot(known[f"{column}_se"].values, silent[f"{column}_se"].values)
        MC.assert_at_most(silent[column].values, error, known[column].values)
    # Normals in place of normals lose what dimensions say together, and no more.
    assert (silent["mutual_information_layer"] > 0.5 * known["mutual_information_layer"]).all()
    apart = posterior(normals(torch.randn(8, 4, 2, dtype=torch_double), 0.5))
    stated = information_by_block(apart, n_layers=2)
    assert stated.attrs["reason"] == ""


def test_a_mixture_prior_is_measured_by_draws() -> None:
    q, prior = families()["low rank"], families()["shared mixture"]
    data = information_by_block(posterior(q, prior), n_layers=4)
    assert data.attrs["kl_kind"] == "monte carlo"
    for k in range(4):
        inside, p = marginal(q, slice(k, k + 1)), marginal(prior, slice(k, k + 1))
        assert inside is not None
        assert p is not None
        z = inside.sample(torch.Size([20_000]))
        gain = inside.log_prob(z) - p.log_prob(z)
        few = gain[:256].std(0).numpy() / 16  # KL_DRAWS behind the Dataset
        MC.assert_close(data["kl_thought"].values[:, k], few * 1.2, gain.mean(0).numpy(), draws=256)


def test_an_autoregressive_prior_lets_each_thought_be_itself() -> None:
    prior = StationaryAR1(torch.tensor([1.0, -2.0], dtype=torch_double), 4)
    post = posterior(prior.expand(torch.Size([6])), prior)
    data = information_by_block(post, n_layers=2)
    np.testing.assert_allclose(data["kl_thought"], 0, atol=1e-9)
    np.testing.assert_allclose(data["kl_layer"], 0, atol=1e-9)
    np.testing.assert_allclose(data["mutual_information_layer"], 0, atol=1e-9)


def test_what_cannot_be_known_is_not_a_number_and_says_why() -> None:
    q = normals(torch.randn(4, 2, 2, dtype=torch_double))
    data = information_by_block(posterior(q, Silent(standard((2, 2)))), n_layers=2)
    assert np.isnan(data["kl_thought"]).all()
    assert data.attrs["kl_kind"] == "unknown"
    assert "the prior" in data.attrs["reason"]
    # The information does not ask about the prior, and all thoughts together have a density.
    assert np.isfinite(data["mutual_information_thought"]).all()
    one = information_by_block(posterior(q, Silent(standard((2, 2)))), n_layers=1)
    assert np.isfinite(one["kl_layer"]).all()


def test_what_is_refused() -> None:
    assert blocks(6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    post = posterior(normals(torch.zeros(3, 4, 1, dtype=torch_double)))
    with pytest.raises(InputError, match="layers"):
        information_by_block(post, n_layers=3)
    with pytest.raises(InputError, match="draws"):
        information_by_block(post, draws=0)
    with pytest.raises(InputError, match="at least 2"):
        information_by_block(posterior(normals(torch.zeros(1, 4, 1, dtype=torch_double))))
