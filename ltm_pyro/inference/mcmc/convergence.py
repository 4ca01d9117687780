"""Have the chains converged, and how much are their draws worth: R-hat and ESS, many at once.

Vehtari, Gelman, Simpson, Carpenter & Buerkner (2021), "Rank-normalization, folding, and
localization: an improved R-hat". The same numbers as ArviZ's, for thousands of quantities in one
pass: arrays are (chains, draws, Q) and answers (Q,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_VALUES_AT_ONCE = 2**22
"""Draws sorted or transformed together, 32 MB in double precision."""


def rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded, (C, S, Q) to (Q,).

    Infinite where a quantity never moved or is not finite: nothing says that it converged.
    """
    return _in_pieces(_rhat, draws).nan_to_num(torch.inf, torch.inf)


def rhat_and_ess(draws: Tensor) -> tuple[Tensor, Tensor]:
    """`rhat`, and the smaller of `ess_bulk` and `ess_tail`, (Q,) each, ranking the draws once."""
    both = _in_pieces(_rhat_and_ess, draws)
    return both[0].nan_to_num(torch.inf, torch.inf), both[1].nan_to_num(0.0)


def ess_bulk(draws: Tensor) -> Tensor:
    """Effective draws for the bulk: ESS of the rank-normalised split chains, (Q,)."""
    return _in_pieces(lambda x: _ess(_normal_scores(_split(x))), draws).nan_to_num(0.0)


def ess_tail(draws: Tensor) -> Tensor:
    """Effective draws for the tails: the smaller ESS of the 5 % and 95 % quantiles, (Q,)."""
    return _in_pieces(_ess_tail, draws).nan_to_num(0.0)


def ess_mean(draws: Tensor) -> Tensor:
    """Effective draws for the mean: ESS of the split chains as they are, (Q,)."""
    return _in_pieces(lambda x: _ess(_split(x)), draws).nan_to_num(0.0)


def mean_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean, (Q,)."""
    return draws.double().flatten(0, 1).std(0) / ess_mean(draws).sqrt()


def variance_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the variance: that of the mean squared deviation, (Q,)."""
    flat = draws.double()
    return mean_error((flat - flat.flatten(0, 1).mean(0)).square())


def _in_pieces(measure: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    width = max(1, _VALUES_AT_ONCE // (draws.shape[0] * draws.shape[1]))
    return torch.cat([measure(piece.double()) for piece in draws.split(width, dim=-1)], -1)


def _split(draws: Tensor) -> Tensor:
    """(C, S, Q) to (2 C, S // 2, Q): halves of a chain that drifts disagree."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]])


def _normal_scores(draws: Tensor) -> Tensor:
    """Each draw's normal score by its rank among all chains' draws; ties share their mean rank."""
    flat = draws.flatten(0, 1).T.contiguous()
    ordered, order = flat.sort(-1)
    # A run of equal draws (refused proposals repeat the last one) gets its middle rank.
    place = torch.arange(flat.shape[-1], device=flat.device).expand_as(order)
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(differs[:, :1])
    first = (place * torch.cat([edge, differs], 1)).cummax(1).values
    last = torch.where(torch.cat([differs, edge], 1), place, place.shape[1])
    last = last.flip(1).cummin(1).values.flip(1)
    quantile = (0.5 * (first + last) + 1 - 0.375) / (flat.shape[-1] + 0.25)
    scores = torch.special.ndtri(torch.empty_like(flat).scatter_(1, order, quantile.to(flat)))
    return scores.T.reshape(draws.shape)


def _rhat(draws: Tensor) -> Tensor:
    split = _split(draws)
    return _ranked_rhat(split, _normal_scores(split))


def _rhat_and_ess(draws: Tensor) -> Tensor:
    split = _split(draws)
    scores = _normal_scores(split)
    ess = torch.minimum(_ess(scores), _ess_tail(draws))
    return torch.stack([_ranked_rhat(split, scores), ess])


def _ranked_rhat(split: Tensor, scores: Tensor) -> Tensor:
    folded = (split - split.flatten(0, 1).quantile(0.5, dim=0)).abs()
    worst = torch.maximum(_plain_rhat(scores), _plain_rhat(_normal_scores(folded)))
    still = split.flatten(0, 1).std(0) == 0
    return torch.where(still | ~split.isfinite().all(0).all(0), torch.inf, worst)


def _plain_rhat(chains: Tensor) -> Tensor:
    n = chains.shape[1]
    within = chains.var(1).mean(0)
    between = chains.mean(1).var(0)
    return (between / within + (n - 1) / n).sqrt()


def _ess_tail(draws: Tensor) -> Tensor:
    levels = torch.tensor([0.05, 0.95], dtype=draws.dtype, device=draws.device)
    low, high = draws.flatten(0, 1).quantile(levels, dim=0)
    split = _split(draws)
    return torch.minimum(_ess((split <= low).double()), _ess((split <= high).double()))


def _ess(chains: Tensor) -> Tensor:
    """Effective sample size by Geyer's initial monotone sequence, (C, S, Q) to (Q,)."""
    m, n, _ = chains.shape
    autocovariance = _autocovariance(chains)
    within = autocovariance[:, 0].mean(0) * n / (n - 1)
    plus = within * (n - 1) / n + (chains.mean(1).var(0) if m > 1 else 0.0)
    rho = 1 - (within - autocovariance.mean(0)) / plus
    rho[0] = 1.0
    pairs = rho[: 2 * ((n - 3) // 2)].unflatten(0, (-1, 2)).sum(1)
    # Sums of neighbouring autocorrelations are positive and fall, up to noise: after the first
    # negative one everything is noise, except that the even one next to it still counts.
    positive = (pairs > 0).cumprod(0)
    last = positive.sum(0)
    smooth = (pairs * positive).cummin(0).values.clamp(min=0)
    next_even = rho.gather(0, (2 * last).clamp(max=n - 1)[None])[0].clamp(min=0)
    tau = -1 + 2 * smooth.sum(0) + next_even
    return m * n / tau.clamp(min=1 / math.log10(m * n))


def _autocovariance(chains: Tensor) -> Tensor:
    """Of each chain at each lag, (C, S, Q), with the divisor S."""
    n = chains.shape[1]
    length = 2 ** math.ceil(math.log2(2 * n))
    centred = chains - chains.mean(1, keepdim=True)
    power = torch.fft.rfft(centred, length, dim=1).abs().square()
    return torch.fft.irfft(power, length, dim=1)[:, :n] / n
