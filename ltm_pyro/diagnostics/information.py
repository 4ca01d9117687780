"""What each thought, and each layer's block of thoughts, says: KL and mutual information.

A total hides where a latent has collapsed. For a block z_g of thoughts, with N sequences,

    KL_g = mean_i KL(q_i(z_g) || p(z_g))
    I_g >= mean_i E_{z ~ q_i}[log q_i(z_g) - log mean_j q_j(z_g)]               j = 1..N
    I_g <= mean_i E_{z ~ q_i}[log q_i(z_g) - log mean_{j != i} q_j(z_g)]

in expectation over sequences (Poole et al. 2019, arXiv 1905.06922, section 2). The first never
exceeds log N, however much z says; where the two are apart, N sequences show no more than that I_g
is at least the first. Both take z for a function of the text: what the noise of a short fast loop
moved each q_i by tells sequences apart too. Sequences of the same text are therefore one, whose q
is the mixture of theirs; and scored with the densities q'_i of a second, independent inference the
first line is a lower bound on what the text alone says.

Densities of a block by itself: where they are known (normals of any covariance, mixtures of
diagonal normals, the autoregressive prior) the values are those of the definition. Where they are
not (flows), normals r_i with q_i's moments take its place, and KL and I become lower bounds: among
all densities with these moments the normal has the highest entropy, and any r_i in place of q_i
gives a lower bound on I_g (Barber & Agakov 2003). They are then called `at least`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent

from ltm_pyro.checks import refuse_other_sequences, whole_number
from ltm_pyro.diagnostics.estimates import columns
from ltm_pyro.diagnostics.marginals import blocks, marginal, moments
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import KL_DRAWS, Posterior
from ltm_pyro.models.full_normal import (
    BlockNormal,
    FullNormal,
    LowRankNormal,
    gaussian_kl,
    is_factorised_normal,
)
from ltm_pyro.random import Stream, derive_seed, seeded

Kind = Literal["exact", "monte carlo", "at least", "unknown"]
_RANK: tuple[Kind, ...] = get_args(Kind)
Densities = Callable[[Tensor], Tensor]
"""From z (S, 1, K, D) to log densities (S, N, C) of C parts of it under every q."""

TIGHT = 0.1
"""Nats between the bounds on a mutual information up to which the lower one is called its value."""


def kl_by_block(post: Posterior, parts: list[slice]) -> tuple[Tensor, Kind]:
    """KL(q_i(z_g) || p(z_g)) of each block, (B, G) nats, `nan` where `unknown`.

    And the least certain kind of number among them.
    """
    found, kinds, z = [], [], None
    for part in parts:
        q, p = marginal(post.distribution, part), marginal(post.prior, part)
        kind: Kind = "exact"
        if not post.has_density:
            kl = torch.full(post.ids.shape, torch.inf, device=post.ids.device)
        elif q is not None and p is not None:
            closed = _closed_form(q, p)
            if closed is not None:
                kl = closed
            else:
                z = post.sample(KL_DRAWS) if z is None else z
                drawn = z[..., part, :]
                kl, kind = (q.log_prob(drawn) - p.log_prob(drawn)).mean(0), "monte carlo"
        elif p is not None and is_factorised_normal(p):
            # Independent normals with q's moments: among all q with these they have the highest
            # entropy, and the cross entropy to a factorised normal depends on moments alone.
            mean, variance = (value[:, part] for value in moments(post))
            ratio, shift = variance / p.variance, (mean - p.mean).square() / p.variance
            kl, kind = 0.5 * (ratio + shift - 1.0 - ratio.log()).sum((1, 2)), "at least"
        else:
            kl, kind = torch.full(post.ids.shape, torch.nan, device=post.ids.device), "unknown"
        found.append(kl.double())
        kinds.append(kind)
    return torch.stack(found, dim=1), max(kinds, key=_RANK.index)


def _closed_form(q: TorchDistribution, p: TorchDistribution) -> Tensor | None:
    normal = isinstance(q, FullNormal | BlockNormal | LowRankNormal) or is_factorised_normal(q)
    return gaussian_kl(q, p) if normal else None


@dataclass(frozen=True)
class Information:
    """Bounds on the mutual information between text and z in nats, (1 + K + L,) each.

    Of all thoughts, of each thought by itself, and of each layer's block.

    Attributes:
        value: From below, in expectation over sequences; at most `cap`, log N for N texts.
        error: Its Monte Carlo standard error given these sequences and fits.
        upper: From above; `nan` for parts without a known density, and where all are of one text.
        as_fitted: From below, of z and the fit that it comes from: what the fast loop's noise tells
            apart included, copies of a text too.
        cap: The entropy of the texts.
        kind: How densities of parts are known; those of all thoughts always are.
    """

    value: Tensor
    error: Tensor
    upper: Tensor
    as_fitted: Tensor
    cap: float
    kind: Kind

    @property
    def strength(self) -> str:
        """Of the total: `at least` where the upper bound is far or not known, or `estimate`."""
        return "estimate" if bool(self.upper[0] - self.value[0] <= TIGHT) else "at least"


def mutual_information(
    post: Posterior, layers: list[slice], draws: int, again: Posterior | None = None
) -> Information:
    """I between text and z on S draws per sequence, from torch's global generator.

    Costs S N N densities of z, and for families with correlated thoughts as many of every block;
    twice that with a second inference.

    Raises:
        InputError: if the second inference is of other sequences, or a point mass.
    """
    if again is not None:
        refuse_other_sequences(again, post, ("again", "post"))
        if again.has_density != post.has_density:
            raise InputError("again and post must both have a density, or neither")
    n_thoughts, n, texts = post.prior.event_shape[0], len(post), _texts(post)
    share = torch.bincount(texts).double() / n
    cap = max(0.0, -float((share * share.log()).sum()))  # one text: 0, not -0
    if not post.has_density:
        unknown = torch.full((1 + n_thoughts + len(layers),), torch.nan)
        return Information(unknown, unknown, unknown, unknown, cap, "unknown")
    parts = blocks(n_thoughts, n_thoughts)
    score, kind = _densities(post, parts, layers)
    second = score if again is None else _densities(again, parts, layers)[0]
    z = post.sample(draws)
    gains = []
    for i in range(n):  # one sequence at a time, so that memory grows with S N and not S N N
        same = texts == texts[i]
        log_q = score(z[:, i, None]).double()
        of_text, other = _gains(log_q, same)
        of_fit = log_q[:, i] - (log_q.logsumexp(1) - math.log(n))
        if again is not None:
            of_text = _gains(second(z[:, i, None]).double(), same)[0]
        gains.append(torch.stack([of_text, other, of_fit]))
    gain = torch.stack(gains, dim=2)  # (3, S, N, 1 + K + L)
    value, upper, as_fitted = gain.mean((1, 2)).cpu()
    if kind == "at least":
        upper[1:] = torch.nan  # with normals in place of q it bounds nothing from above
    error = (gain[0].var(0).sum(0) / draws).sqrt().cpu() / n if draws > 1 else value * torch.nan
    # Without information a second inference agrees with the first on nothing: less than 0.
    value = value if again is None else value.clamp_min(0.0)
    return Information(value, error, upper, as_fitted, cap, kind)


def _gains(log_q: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """What draws of a text tell about it: bounds from below and above, (S, C) each.

    By their densities (S, N, C) under every q, `same` (N,) being of that text, itself included.
    """
    n, copies = len(same), int(same.sum())
    own = log_q[:, same].logsumexp(1) - math.log(copies)
    lower = own - (log_q.logsumexp(1) - math.log(n))
    if copies == n:
        return lower, torch.full_like(lower, torch.nan)
    return lower, own - (log_q[:, ~same].logsumexp(1) - math.log(n - copies))


def _texts(post: Posterior) -> Tensor:
    """(N,) equal numbers for sequences that q was fitted to the same observations of."""
    if post.x is None:
        return torch.arange(len(post), device=post.ids.device)
    mask = post.mask.to(post.x.device)
    seen = torch.where(mask, post.x, torch.zeros_like(post.x))
    parts = [seen, mask, *post.covariates.values()]
    numbers = [part.to(seen.device, torch.float64).reshape(len(post), -1) for part in parts]
    rows = torch.cat(numbers, dim=1).nan_to_num()
    return torch.unique(rows, dim=0, return_inverse=True)[1].to(post.ids.device)


def _densities(
    post: Posterior, thoughts: list[slice], layers: list[slice]
) -> tuple[Densities, Kind]:
    """Of all thoughts, each thought and each layer, C = 1 + K + L; and how they are known."""
    q: Any = post.distribution
    factorised = is_factorised_normal(q)
    parts = [marginal(q, part) for part in (*thoughts, *layers)]
    known = [d for d in parts if d is not None]
    if len(known) == len(parts) and not factorised:

        def of_marginals(z: Tensor) -> Tensor:
            places = zip(known, (*thoughts, *layers), strict=True)
            each = [d.log_prob(z[..., part, :]) for d, part in places]
            return torch.stack([q.log_prob(z), *each], dim=-1)

        return of_marginals, "monte carlo"
    if factorised:
        normal = q.base_dist
    else:
        mean, variance = moments(post)
        normal = dist.Normal(mean, variance.sqrt())
    apart = Independent(normal, 1)

    def of_thoughts(z: Tensor) -> Tensor:
        each = apart.log_prob(z)
        whole = each.sum(-1, keepdim=True) if factorised else q.log_prob(z)[..., None]
        by_layer = each.unflatten(-1, (max(len(layers), 1), -1)).sum(-1)
        return torch.cat([whole, each, by_layer if layers else each[..., :0]], dim=-1)

    return of_thoughts, "monte carlo" if factorised else "at least"


@door
def information_by_block(
    post: Posterior,
    *,
    n_layers: int | None = None,
    draws: int = 16,
    seed: int = 0,
    again: Posterior | None = None,
) -> xr.Dataset:
    """KL and mutual information of every thought, every layer and all together.

    Args:
        post: q for N sequences, at least 2.
        n_layers: L; thoughts belong to layers in equal blocks. Without it no layers are listed.
        draws: S, draws per sequence for the mutual information.
        seed: Of the draws.
        again: A second inference of the same sequences, `svi.infer(batch, seed=...)`. Without it
            the noise of a short fast loop counts as information about the text.

    Returns:
        Dataset in nats: `kl_thought` (sequence, thought) and `kl_layer` (sequence, layer);
        `mutual_information`, `mutual_information_thought` (thought) and `mutual_information_layer`
        (layer), each with its Monte Carlo standard error `_se` given these sequences, and with the
        bound from above `_upper`, `nan` where that is not known.

        Attributes: `mutual_information_is`, of the total: `estimate`, or `at least` where the bound
        from above is not near, since N sequences cannot show more; `mutual_information_cap`, which
        no value can exceed, log N for N texts; `mutual_information_counts`, what it takes for
        information. `kl_kind` and `mutual_information_kind`, how densities by block are known:
        `exact`, `monte carlo`, `at least`, or `unknown`; `reason` for what is not known.

    Raises:
        InputError: for one sequence, thoughts that do not divide into layers, or a second inference
            of other sequences.
    """
    if len(post) < 2:
        raise InputError("mutual information needs at least 2 sequences: it tells them apart")
    each = 8 * len(post) * math.prod(post.prior.event_shape)
    whole_number("draws", draws, 1, bytes_each=each)
    return measured(post, n_layers, draws, seed, again)[0]


def measured(
    post: Posterior, n_layers: int | None, draws: int, seed: int, again: Posterior | None
) -> tuple[xr.Dataset, float]:
    """What `information_by_block` returns, and how far the fits behind z are told apart, nats."""
    K = post.prior.event_shape[0]
    layers = [] if n_layers is None else blocks(K, n_layers)
    with torch.no_grad(), seeded(derive_seed(seed, Stream.SCORE), post.ids.device):
        found = mutual_information(post, layers, draws, again)
        kl, kind = kl_by_block(post, [*blocks(K, K), *layers])
    variables = columns(("sequence", "thought"), "nats", kl_thought=kl[:, :K])
    variables |= columns(("sequence", "layer"), "nats", kl_layer=kl[:, K:])
    places: dict[str, Any] = {"": 0, "thought": slice(1, 1 + K), "layer": slice(1 + K, None)}
    for dim, part in places.items():
        for ending, bound in (("", found.value), ("_se", found.error), ("_upper", found.upper)):
            name = f"mutual_information{dim and f'_{dim}'}{ending}"
            variables |= columns(dim or (), "nats", **{name: bound[part]})
    noise = "whatever tells these fits apart, the noise of the fast loop included"
    attrs = {
        "kl_kind": kind,
        "mutual_information_kind": found.kind,
        "mutual_information_is": found.strength,
        "mutual_information_cap": found.cap,
        "mutual_information_counts": noise
        if again is None
        else "what a second inference, with noise of its own, tells apart too",
        "reason": _reason(post, kind),
        "guide": post.family,
        "draws": draws,
        "seed": seed,
    }
    coords = {
        "sequence": post.ids.cpu().numpy(),
        "thought": np.arange(K),
        "layer": np.arange(len(layers)),
    }
    return xr.Dataset(variables, coords, attrs), float(found.as_fitted[0])


def _reason(post: Posterior, kind: Kind) -> str:
    """Why values by block are bounds, or not known; empty where they are neither."""
    if kind == "at least":
        return f"the density of a part of z under {post.family!r} is not known: normals bound it"
    if kind == "unknown":
        whose = "the prior" if marginal(post.prior, slice(0, 1)) is None else repr(post.family)
        return f"the density of a part of z under {whose} has no closed form"
    return ""
