"""Parts of a posterior by themselves: moments, and the marginal of some neighbouring thoughts."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import MixtureSameFamily, TorchDistribution
from torch import Tensor

from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.full_normal import BlockNormal, FullNormal, LowRankNormal, is_factorised_normal
from ltm_pyro.models.normal_mixture import NormalMixture
from ltm_pyro.models.priors.autoregressive import StationaryAR1
from ltm_pyro.models.priors.tree import NormalTree

_MOMENT_DRAWS = 256  # for families that cannot state their marginal moments


def moments(post: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and marginal variance of each dimension of z, (B, K, D) each."""
    try:
        return post.distribution.mean, post.distribution.variance
    except NotImplementedError:
        z = post.sample(_MOMENT_DRAWS)
        return z.mean(0), z.var(0)


def blocks(n_thoughts: int, n_blocks: int) -> list[slice]:
    """Equal blocks of neighbouring thoughts, as layers have them; refused if not even."""
    if n_blocks < 1 or n_thoughts % n_blocks:
        raise InputError(
            f"{n_thoughts} thoughts cannot belong to {n_blocks} layers in equal blocks"
        )
    size = n_thoughts // n_blocks
    return [slice(start, start + size) for start in range(0, n_thoughts, size)]


def marginal(distribution: TorchDistribution, block: slice) -> TorchDistribution | None:
    """The distribution of n neighbouring thoughts by themselves; `None` if of unknown density.

    Batch shape (...) as given, event shape (K, D) to (n, D).
    """
    d: Any = distribution
    n_thoughts, dim = d.event_shape
    if block == slice(0, n_thoughts):
        return distribution
    out: TorchDistribution | None = None
    if is_factorised_normal(d):
        out = _normal(d.base_dist, block)
    elif isinstance(d, LowRankNormal):
        out = _low_rank(d, block)
    elif isinstance(d, BlockNormal):
        out = _of_blocks(d, block, dim)
    elif isinstance(d, FullNormal | NormalTree):
        out = _of_covariance(d, block, dim)
    elif isinstance(d, NormalMixture):
        out = NormalMixture(d.log_weights, d.loc[..., block, :], d.scale[..., block, :])
    elif isinstance(d, MixtureSameFamily) and is_factorised_normal(d.component_distribution):
        each = _normal(d.component_distribution.base_dist, block)
        out = MixtureSameFamily(d.mixture_distribution, each)
    elif isinstance(d, StationaryAR1):
        # Stationary: every stretch of the process is the same process, shorter.
        out = StationaryAR1(d.raw, block.stop - block.start, d.batch_shape)
    return out


def _normal(base: Any, block: slice) -> TorchDistribution:
    """Of independent normals (..., K, D)."""
    out: TorchDistribution = dist.Normal(
        base.loc[..., block, :], base.scale[..., block, :]
    ).to_event(2)
    return out


def _low_rank(d: LowRankNormal, block: slice) -> TorchDistribution:
    """Rows of S and A: of any number of dimensions, without their covariance."""
    flat: Any = d.flat
    shape = tuple(d.event_shape)
    diagonal = flat.cov_diag.unflatten(-1, shape)[..., block, :]
    columns = flat.cov_factor.unflatten(-2, shape)[..., block, :, :]
    scale = diagonal.sqrt()
    return LowRankNormal(d.mean[..., block, :], scale, columns / scale[..., None])


def _of_blocks(d: BlockNormal, block: slice, dim: int) -> TorchDistribution:
    """The blocks inside, or a part of the one around; from the whole covariance else."""
    flat: Any = d.flat
    scale_tril = flat.base_dist.scale_tril
    size = scale_tril.shape[-1]
    start, stop = block.start * dim, block.stop * dim
    if start % size or stop % size:
        return _of_covariance(d, block, dim)
    inside = scale_tril[..., start // size : stop // size, :, :]
    return BlockNormal(d.mean[..., block, :], inside)


def _of_covariance(d: Any, block: slice, dim: int) -> TorchDistribution:
    part = slice(block.start * dim, block.stop * dim)
    covariance = d.covariance[..., part, part]
    return FullNormal(d.mean[..., block, :], torch.linalg.cholesky(covariance))
