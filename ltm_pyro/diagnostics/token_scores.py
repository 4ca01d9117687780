"""Log scores token by token, on the same draws as those of whole sequences, which they add up to.

With z_s ~ q(z), ratio r_s = p(z_s) / q(z_s) (1 where no KL is charged) and weights that take up one
token after another, w_s(t) = r_s prod_{u <= t} p(x_u | x_<u, z_s):

    log_score(t)     =  mean_s log p(x_t | x_<t, z_s)               adds up to -nll_given_z
    log_score_iw(t)  =  log mean_s w_s(t) - log mean_s w_s(t - 1)   adds up to log mean_s w_s(T)

The second is what the weighted draws predict of token t after those before it: sum_s w_s(t - 1)
p(x_t | x_<t, z_s) / sum_s w_s(t - 1). The first scored token also bears log mean_s r_s, the price
of draws that know the sequence (0 on average over many draws, and far below it where q is narrow).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.diagnostics.bounds import Likelihoods, fresh_draws


class _Sums:
    """What some rows' draws have come to so far."""

    def __init__(self, mask: Tensor) -> None:
        rows, tokens = mask.shape
        self.mask = mask
        self.total = torch.zeros(rows, tokens, dtype=torch.float64, device=mask.device)
        self.log_sum = torch.full_like(self.total, -torch.inf)
        self.log_ratios = torch.full_like(self.total[:, 0], -torch.inf)

    def add(self, log_p: Tensor, log_ratio: Tensor) -> None:
        """Takes draws up: log p (S, b, T) of each token, log r (S, b)."""
        self.total += log_p.sum(0)
        weights = log_ratio[..., None] + log_p.cumsum(-1)
        self.log_sum = torch.logaddexp(self.log_sum, weights.logsumexp(0))
        self.log_ratios = torch.logaddexp(self.log_ratios, log_ratio.logsumexp(0))

    def scores(self, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """`log_score` and `log_score_iw` (b, T), NaN where masked, and log mean r (b,)."""
        price = self.log_ratios - math.log(draws)
        after = self.log_sum - math.log(draws)
        weighted = after.diff(prepend=price[:, None])
        first = self.mask.long().argmax(1, keepdim=True)
        weighted = weighted.scatter_add(1, first, price[:, None])
        hidden = ~self.mask
        mean = (self.total / draws).masked_fill(hidden, torch.nan)
        return mean, weighted.masked_fill(hidden, torch.nan), price


@torch.no_grad()
def token_scores(
    likelihoods: Likelihoods,
    q: TorchDistribution,
    prior: TorchDistribution | None,
    draws: int,
    seed: int,
    *,
    ids: Tensor,
    rows: Tensor,
) -> dict[str, Tensor]:
    """Scores of each token of the n sequences at `rows`, of the draws that `score_terms` takes.

    Without `prior` no KL is charged. Gives `log_score` and `log_score_iw` (n, T), NaN where nothing
    is scored; `mask` (n, T), where something is; and `price` (n,).
    """
    batch, parts = likelihoods.batch, likelihoods.parts
    sums = [_Sums(batch.mask[part]) for part in parts]
    for drawn in fresh_draws(q, ids, draws, seed):
        ratio = torch.zeros(drawn.shape[:2], dtype=torch.float64, device=drawn.device)
        if prior is not None:
            ratio = prior.log_prob(drawn).double() - q.log_prob(drawn).double()
        z, ratio = drawn[:, rows], ratio[:, rows]
        for part, held in zip(parts, sums, strict=True):
            some = batch.select(part)
            for start in range(0, len(z), likelihoods.draws):
                few = slice(start, start + likelihoods.draws)
                log_p = likelihoods.model.token_log_likelihood(z[few, part], some)
                held.add(log_p.double(), ratio[few, part])
    found = zip(*(held.scores(draws) for held in sums), strict=True)
    names = ("log_score", "log_score_iw", "price")
    out = {n: likelihoods.gathered(torch.cat(p)) for n, p in zip(names, found, strict=True)}
    return {**out, "mask": batch.mask}
