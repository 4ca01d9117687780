"""What each thought, and each layer's block of thoughts, says: KL and mutual information.

A total hides where a latent has collapsed. For a block z_g of thoughts, with N sequences,

    KL_g = mean_i KL(q_i(z_g) || p(z_g))
    I_g  = mean_i E_{z ~ q_i}[log q_i(z_g) - log mean_j q_j(z_g)]       <= log N

need the density of the block by itself. Where it is known (normals of any covariance, mixtures of
diagonal normals, the autoregressive prior) the values are those of the definition. Where it is not
(flows), normals r_i with q_i's moments take its place, and both values become lower bounds: among
all densities with these moments the normal has the highest entropy, and any r_i in place of q_i
gives a lower bound on I_g (Barber & Agakov 2003). They are then called `at least`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import MixtureSameFamily, TorchDistribution
from torch import Tensor
from torch.distributions import Independent

from ltm_pyro.errors import InputError
from ltm_pyro.exclusive import exclusive
from ltm_pyro.inference.gaussian_kl import gaussian_kl, is_factorised_normal
from ltm_pyro.inference.posterior import KL_DRAWS, Posterior
from ltm_pyro.inference.random import Stream, derive_seed, seeded
from ltm_pyro.models.full_normal import BlockNormal, FullNormal, LowRankNormal
from ltm_pyro.models.normal_mixture import NormalMixture
from ltm_pyro.models.priors.autoregressive import StationaryAR1

Kind = Literal["exact", "monte carlo", "at least", "unknown"]
_RANK: tuple[Kind, ...] = ("exact", "monte carlo", "at least", "unknown")
_MOMENT_DRAWS = 256  # for families that cannot state their marginal moments


def moments(post: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and marginal variance of each dimension of z, (B, K, D) each."""
    try:
        return post.distribution.mean, post.distribution.variance
    except NotImplementedError:
        z = post.sample(_MOMENT_DRAWS)
        return z.mean(0), z.var(0)


def blocks(n_thoughts: int, n_blocks: int) -> list[slice]:
    """Equal blocks of neighbouring thoughts, as layers have them.

    Raises:
        InputError: if they do not come out even.
    """
    if n_blocks < 1 or n_thoughts % n_blocks:
        raise InputError(
            f"{n_thoughts} thoughts cannot belong to {n_blocks} layers in equal blocks"
        )
    size = n_thoughts // n_blocks
    return [slice(start, start + size) for start in range(0, n_thoughts, size)]


def marginal(distribution: TorchDistribution, block: slice) -> TorchDistribution | None:
    """The distribution of some neighbouring thoughts by themselves.

    Args:
        distribution: Batch shape (...), event shape (K, D).
        block: Which thoughts, n of them.

    Returns:
        Batch shape (...), event shape (n, D); `None` where its density is not known.
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
    elif isinstance(d, FullNormal):
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


def _of_covariance(d: FullNormal | BlockNormal, block: slice, dim: int) -> TorchDistribution:
    part = slice(block.start * dim, block.stop * dim)
    covariance = d.covariance[..., part, part]
    return FullNormal(d.mean[..., block, :], torch.linalg.cholesky(covariance))


def kl_by_block(post: Posterior, parts: list[slice]) -> tuple[Tensor, Kind]:
    """KL(q_i(z_g) || p(z_g)) of each block, and what kind of number that is.

    Args:
        post: q for B sequences.
        parts: G blocks of thoughts.

    Returns:
        (B, G) nats, `nan` where `unknown`; and the least certain kind among the blocks.
    """
    columns, kinds, z = [], [], None
    for part in parts:
        q, p = marginal(post.distribution, part), marginal(post.prior, part)
        kind: Kind = "unknown"
        kl: Tensor | None = None
        if not post.has_density:
            kl, kind = torch.full(post.ids.shape, torch.inf, device=post.ids.device), "exact"
        elif q is not None and p is not None:
            kl, kind = _closed_form(q, p), "exact"
            if kl is None:
                z = post.sample(KL_DRAWS) if z is None else z
                drawn = z[..., part, :]
                kl, kind = (q.log_prob(drawn) - p.log_prob(drawn)).mean(0), "monte carlo"
        elif p is not None and is_factorised_normal(p):
            mean, variance = (value[:, part] for value in moments(post))
            kl, kind = _kl_of_moments(mean, variance, p), "at least"
        unknown = torch.full(post.ids.shape, torch.nan, device=post.ids.device)
        columns.append(unknown if kl is None else kl)
        kinds.append(kind)
    return torch.stack([c.double() for c in columns], dim=1), max(kinds, key=_RANK.index)


def _closed_form(q: TorchDistribution, p: TorchDistribution) -> Tensor | None:
    normal = isinstance(q, FullNormal | BlockNormal | LowRankNormal) or is_factorised_normal(q)
    return gaussian_kl(q, p) if normal else None


def _kl_of_moments(mean: Tensor, variance: Tensor, prior: TorchDistribution) -> Tensor:
    """KL from independent normals with these moments to a factorised normal prior, (B,).

    Among all q with given moments they have the highest entropy, and the cross entropy to a
    factorised normal depends on moments alone: so this never exceeds KL(q || prior).
    """
    ratio = variance / prior.variance
    shift = (mean - prior.mean).square() / prior.variance
    return 0.5 * (ratio + shift - 1.0 - ratio.log()).sum((1, 2))


@dataclass(frozen=True)
class MutualInformation:
    """Between sequence and z, mean over sequences in nats, with Monte Carlo standard errors.

    Attributes:
        total: Of all thoughts, and its standard error.
        thoughts: (K,) of each thought by itself, and standard errors (K,).
        layers: (L,) of each layer's block, and standard errors (L,).
        kind: Of `thoughts` and `layers`; `total` is always of the definition.
    """

    total: tuple[float, float]
    thoughts: tuple[Tensor, Tensor]
    layers: tuple[Tensor, Tensor]
    kind: Kind


def mutual_information(post: Posterior, layers: list[slice], draws: int) -> MutualInformation:
    """I between sequence and z on `draws` draws per sequence, from torch's global generator.

    Costs S N N densities of z, and for families with correlated thoughts as many of every block.

    Args:
        post: q for N sequences.
        layers: L blocks of thoughts, possibly none.
        draws: S.
    """
    n_thoughts = post.prior.event_shape[0]
    if not post.has_density:
        unknown = [torch.full((size,), torch.nan) for size in (n_thoughts, len(layers))]
        by_thought, by_layer = ((part, part) for part in unknown)
        return MutualInformation((math.nan, math.nan), by_thought, by_layer, "unknown")
    score, kind = _densities(post, blocks(n_thoughts, n_thoughts), layers)
    n = len(post)
    z = post.sample(draws)
    gains = []
    for i in range(n):  # one sequence at a time, so that memory grows with S N and not S N N
        log_q = score(z[:, i, None]).double()  # (S, N, 1 + K + L): draws of q_i under every q_j
        gains.append(log_q[:, i] - (log_q.logsumexp(1) - math.log(n)))
    gain = torch.stack(gains, dim=1)  # (S, N, 1 + K + L)
    mean = gain.mean((0, 1)).cpu()
    error = (gain.var(0).sum(0) / draws).sqrt().cpu() / n if draws > 1 else mean * torch.nan
    split = [1, n_thoughts, len(layers)]
    (total, thought, layer), (total_se, thought_se, layer_se) = (
        mean.split(split),
        error.split(split),
    )
    return MutualInformation(
        (float(total), float(total_se)), (thought, thought_se), (layer, layer_se), kind
    )


def _densities(post: Posterior, thoughts: list[slice], layers: list[slice]) -> tuple[Any, Kind]:
    """A function from z (S, 1, K, D) to log densities (S, N, 1 + K + L), and their kind."""
    q: Any = post.distribution
    first = [part.start for part in layers]

    def by_layer(each: Tensor) -> Tensor:
        """(S, N, K) of independent thoughts to (S, N, L)."""
        size = each.shape[-1] // max(len(first), 1)
        grouped: Tensor = each.unflatten(-1, (-1, size)).sum(-1)
        return grouped if first else grouped[..., :0]

    if is_factorised_normal(q):
        apart = Independent(q.base_dist, 1)

        def factorised(z: Tensor) -> Tensor:
            each = apart.log_prob(z)
            return torch.cat([each.sum(-1, keepdim=True), each, by_layer(each)], dim=-1)

        return factorised, "monte carlo"
    parts = [marginal(q, part) for part in (*thoughts, *layers)]
    if None not in parts:

        def of_marginals(z: Tensor) -> Tensor:
            each = [
                d.log_prob(z[..., part, :])
                for d, part in zip(parts, (*thoughts, *layers), strict=True)
                if d is not None
            ]
            return torch.stack([q.log_prob(z), *each], dim=-1)

        return of_marginals, "monte carlo"
    mean, variance = moments(post)
    normal = dist.Normal(mean, variance.sqrt()).to_event(1)

    def of_moments(z: Tensor) -> Tensor:
        each = normal.log_prob(z)
        return torch.cat([q.log_prob(z)[..., None], each, by_layer(each)], dim=-1)

    return of_moments, "at least"


@exclusive
def information_by_block(
    post: Posterior, *, n_layers: int | None = None, draws: int = 16, seed: int = 0
) -> xr.Dataset:
    """KL and mutual information of every thought, every layer and all together.

    Args:
        post: q for N sequences, at least 2.
        n_layers: L; thoughts belong to layers in equal blocks. Without it no layers are listed.
        draws: S, draws per sequence for the mutual information.
        seed: Of the draws.

    Returns:
        Dataset in nats: `kl_thought` (sequence, thought) and `kl_layer` (sequence, layer);
        `mutual_information`, `mutual_information_thought` (thought) and `mutual_information_layer`
        (layer), each with its Monte Carlo standard error `_se` given these sequences.

        Attributes: `kl_kind` and `mutual_information_kind`, how certain the values by block are:
        `exact`, `monte carlo`, `at least`, or `unknown`; `reason` for what is not known;
        `mutual_information_cap`, log N, which no value can exceed.

    Raises:
        InputError: for one sequence, or thoughts that do not divide into layers.
    """
    if len(post) < 2:
        raise InputError("mutual information needs at least 2 sequences: it tells them apart")
    if draws < 1:
        raise InputError(f"draws is {draws}: must be 1 or more")
    n_thoughts = post.prior.event_shape[0]
    layers = [] if n_layers is None else blocks(n_thoughts, n_layers)
    parts = [*blocks(n_thoughts, n_thoughts), *layers]
    with torch.no_grad(), seeded(derive_seed(seed, Stream.SCORE), post.ids.device):
        found = mutual_information(post, layers, draws)
        kl, kind = kl_by_block(post, parts)
    values = kl.cpu().numpy()
    data = xr.Dataset(
        {
            "kl_thought": (("sequence", "thought"), values[:, :n_thoughts]),
            "kl_layer": (("sequence", "layer"), values[:, n_thoughts:]),
            "mutual_information": ((), found.total[0]),
            "mutual_information_se": ((), found.total[1]),
        },
        coords={
            "sequence": post.ids.cpu().numpy(),
            "thought": np.arange(n_thoughts),
            "layer": np.arange(len(layers)),
        },
    )
    for name, pair in (("thought", found.thoughts), ("layer", found.layers)):
        for ending, value in zip(("", "_se"), pair, strict=True):
            data[f"mutual_information_{name}{ending}"] = (name, value.numpy())
    for column in data.data_vars.values():
        column.attrs["units"] = "nats"
    data.attrs = {
        "kl_kind": kind,
        "mutual_information_kind": found.kind,
        "mutual_information_cap": math.log(len(post)),
        "reason": reason(post, kind),
        "guide": post.family,
        "draws": draws,
        "seed": seed,
    }
    return data


def reason(post: Posterior, kind: Kind) -> str:
    """Why values by block are bounds, or not known; empty where they are neither."""
    if kind == "at least":
        return f"the density of a part of z under {post.family!r} is not known: normals bound it"
    if kind == "unknown":
        whose = "the prior" if marginal(post.prior, slice(0, 1)) is None else repr(post.family)
        return f"the density of a part of z under {whose} has no closed form"
    return ""
