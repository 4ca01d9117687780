"""Posteriors that are right, and eight that are wrong on purpose, with the models they are about.

Each `Case` is a model, a function from a batch to a posterior, and what the posterior is. Where the
oracle serves, the wrong posterior is its exact one with one thing changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from known_models import make_oracle
from numpy.typing import NDArray
from pyro.distributions import TorchDistribution
from scipy import stats
from torch import Tensor, nn

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import PLATE, SITE_X, SITE_Z, LatentModel
from ltm_pyro.models.full_normal import FullNormal
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.models.simulation import simulate

Infer = Callable[[Batch], Posterior]


def as_posterior(model: LatentModel, batch: Batch, q: TorchDistribution) -> Posterior:
    """Any distribution as inference's answer, without a closed-form KL."""
    return Posterior(q, model.prior(), batch.ids, batch.mask, family="by hand")


class OneNumber(nn.Module):
    """z is one number and so is x: x ~ N(mean(z), noise_scale^2). Posteriors come from a grid."""

    def __init__(
        self,
        prior: TorchDistribution,
        mean: Callable[[Tensor], Tensor],
        noise_scale: float,
        reach: float,
    ) -> None:
        super().__init__()
        self._prior = prior
        self.mean = mean
        self.noise_scale = noise_scale
        self.reach = reach
        self.thought_shape = (1, 1)
        self.device = torch.device("cpu")

    def forward(self, batch: Batch | None = None, *, size: int = 1) -> Tensor:
        if batch is None:
            batch = Batch(None, torch.ones(size, 1, dtype=torch.bool))
        with pyro.plate(PLATE, len(batch), dim=-1):
            z = pyro.sample(SITE_Z, self.prior())
            x: Tensor = pyro.sample(SITE_X, self.likelihood(z), obs=batch.x)
        return x

    def prior(self) -> TorchDistribution:
        return self._prior.expand([1, 1]).to_event(2)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        return dist.Normal(self.mean(z.squeeze(-1)), self.noise_scale).to_event(1)

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        return self.likelihood(z).log_prob(batch.observed)

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def check(self, batch: Batch) -> None:
        pass

    def posterior(self, batch: Batch, keep: float = 1.0) -> TorchDistribution:
        """p(z | x) to the grid's precision, or its middle part of mass `keep`."""
        grid = torch.linspace(-self.reach, self.reach, 4_001, dtype=torch.float64)
        z = grid[:, None, None, None].expand(-1, len(batch), 1, 1)
        log_joint = self.prior().log_prob(z) + self.log_likelihood(z, batch)
        mass = torch.softmax(log_joint, 0).T
        if keep < 1:
            below = mass.cumsum(1)
            mass = mass * ((below > (1 - keep) / 2) & (below < (1 + keep) / 2))
        return OnGrid(grid, mass / mass.sum(1, keepdim=True))


class OnGrid(TorchDistribution):
    """A density that is constant around each point of an even grid; event shape (1, 1)."""

    arg_constraints = {}  # noqa: RUF012 - torch's own interface

    def __init__(self, grid: Tensor, mass: Tensor) -> None:
        self.grid, self.mass = grid, mass
        self.step = float(grid[1] - grid[0])
        super().__init__(mass.shape[:1], torch.Size([1, 1]), validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(len(self.mass), sample_shape.numel(), dtype=self.grid.dtype)
        index = torch.searchsorted(self.mass.cumsum(1), u).clamp_max(len(self.grid) - 1)
        index = index.T.reshape(*sample_shape, -1)
        jitter = torch.rand(index.shape, dtype=self.grid.dtype) - 0.5
        return (self.grid[index] + self.step * jitter)[..., None, None]

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value[..., 0, 0]
        index = ((flat - self.grid[0]) / self.step).round().long()
        inside = (index >= 0) & (index < len(self.grid))
        row = torch.arange(len(self.mass)).expand_as(index)
        mass = self.mass[row, index.clamp(0, len(self.grid) - 1)]
        return torch.where(inside, mass, 0.0).log() - math.log(self.step)

    @property
    def mean(self) -> Tensor:
        return (self.mass * self.grid).sum(1)[:, None, None]


def heavy_tails() -> OneNumber:
    """A posterior with Student's tails: a vague observation of a heavy-tailed z."""
    zero = torch.zeros((), dtype=torch.float64)
    prior = dist.StudentT(torch.tensor(2.5, dtype=torch.float64), zero, zero + 1)
    return OneNumber(prior, lambda z: z, noise_scale=8.0, reach=80.0)


def two_modes() -> OneNumber:
    """x = |z| + noise: z and -z are equally probable."""
    zero = torch.zeros((), dtype=torch.float64)
    return OneNumber(dist.Normal(zero, zero + 2), torch.abs, noise_scale=0.3, reach=12.0)


def two_modes_evidence(model: OneNumber, batch: Batch) -> NDArray[np.float64]:
    """Log p(x) of `two_modes`, exact: twice the mass of z > 0 in a normal model, (B,)."""
    prior_variance, noise = float(model.prior().variance), model.noise_scale**2
    x = batch.observed[:, 0].double().numpy()
    total = prior_variance + noise
    mean, scale = x * prior_variance / total, math.sqrt(prior_variance * noise / total)
    evidence: NDArray[np.float64] = (
        math.log(2) + stats.norm.logpdf(x, 0.0, math.sqrt(total)) + stats.norm.logcdf(mean / scale)
    )
    return evidence


def correlated_oracle(correlation: float = 0.95) -> LinearGaussian:
    """Two thoughts of which x shows the sum alone: their posterior has correlation -0.95."""
    loading = math.sqrt(correlation / (1 - correlation))
    return LinearGaussian(torch.full((1, 2), loading, dtype=torch.float64), 1.0)


def oracle_of_eight() -> LinearGaussian:
    return make_oracle((4, 2), n_observed=12, noise_scale=0.5, seed=3)


def exact(oracle: LinearGaussian, batch: Batch) -> Posterior:
    return as_posterior(oracle, batch, oracle.posterior(batch))


def rescaled(oracle: LinearGaussian, batch: Batch, factor: float) -> Posterior:
    q = oracle.posterior(batch)
    return as_posterior(oracle, batch, FullNormal(q.mean, factor * q.flat.scale_tril))


def shifted(oracle: LinearGaussian, batch: Batch, by: float = 0.5) -> Posterior:
    q = oracle.posterior(batch)
    mean = q.mean + by * q.variance.sqrt()
    return as_posterior(oracle, batch, FullNormal(mean, q.flat.scale_tril))


def frozen(oracle: LinearGaussian, batch: Batch, scale: float = 1e-4) -> Posterior:
    """The last dimension stays at the posterior's mean."""
    q = oracle.posterior(batch)
    covariance = q.covariance.clone()
    covariance[..., -1, :] = covariance[..., :, -1] = 0.0
    covariance[..., -1, -1] = scale**2
    return as_posterior(oracle, batch, FullNormal(q.mean, torch.linalg.cholesky(covariance)))


def uncorrelated(oracle: LinearGaussian, batch: Batch) -> Posterior:
    """The exact marginals, independent of each other."""
    q = oracle.posterior(batch)
    return as_posterior(oracle, batch, dist.Normal(q.mean, q.variance.sqrt()).to_event(2))


def rolled(oracle: LinearGaussian, batch: Batch) -> Posterior:
    """Each sequence has the next one's posterior."""
    q = oracle.posterior(batch.select(torch.arange(len(batch)).roll(-1)))
    return as_posterior(oracle, batch, q)


def one_of_two_modes(model: OneNumber, batch: Batch) -> Posterior:
    """The exact posterior's positive half."""
    q = model.posterior(batch)
    assert isinstance(q, OnGrid)
    mass = q.mass * (q.grid > 0)
    return as_posterior(model, batch, OnGrid(q.grid, mass / mass.sum(1, keepdim=True)))


def tails_cut(model: OneNumber, batch: Batch, keep: float = 0.9) -> Posterior:
    """The exact posterior without its outer tenth."""
    return as_posterior(model, batch, model.posterior(batch, keep))


def normal_core(model: OneNumber, batch: Batch) -> Posterior:
    """A normal that agrees with the exact posterior's quartiles, and so has too thin tails."""
    q = model.posterior(batch)
    assert isinstance(q, OnGrid)
    below = q.mass.cumsum(1)
    low, middle, high = (q.grid[(below < p).sum(1)] for p in (0.25, 0.5, 0.75))
    scale = (high - low) / 1.349
    normal = dist.Normal(middle[:, None, None], scale[:, None, None]).to_event(2)
    return as_posterior(model, batch, normal)


@dataclass(frozen=True)
class Case:
    """A way to be wrong (or right)."""

    make_model: Callable[[], LatentModel]
    posterior: Callable[..., Posterior]
    options: tuple[float, ...] = ()
    x: tuple[float, ...] = ()
    """Sequences for `diagnose`, where those that the model writes would blur the case."""

    def batch(self, model: LatentModel, n: int, seed: int) -> Batch:
        if self.x:
            return Batch(torch.tensor(self.x, dtype=torch.float64)[:, None])
        return simulate(model, n, seed).batch

    def infer(self, model: LatentModel) -> Infer:
        return lambda batch: self.posterior(model, batch, *self.options)


WRONG: dict[str, Case] = {
    "scale halved": Case(oracle_of_eight, rescaled, (0.5,)),
    "scale doubled": Case(oracle_of_eight, rescaled, (2.0,)),
    "mean shifted by half a scale": Case(oracle_of_eight, shifted),
    "one dimension frozen": Case(oracle_of_eight, frozen),
    "one of two modes": Case(two_modes, one_of_two_modes, x=(2.5, 3.0, 3.5, 4.0, 4.5, 5.0)),
    "correlation of 0.95 ignored": Case(correlated_oracle, uncorrelated),
    "heavy tails cut": Case(heavy_tails, tails_cut),
    "wrong sequence": Case(oracle_of_eight, rolled),
}

RIGHT: dict[str, Case] = {
    "exact, 8 dimensions": Case(oracle_of_eight, exact),
    "exact, correlation 0.95": Case(correlated_oracle, exact),
    "exact, heavy tails": Case(heavy_tails, lambda m, b: as_posterior(m, b, m.posterior(b))),
    "exact, two modes": Case(two_modes, lambda m, b: as_posterior(m, b, m.posterior(b))),
}
