"""KL(q || p) group by group, for distributions that are independent between groups of thoughts."""

from __future__ import annotations

import math

from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from ltm_pyro.inference.gaussian_kl import is_factorised_normal
from ltm_pyro.models.shaped import Shaped


def kl_by_group(
    q: TorchDistribution, prior: TorchDistribution, z: Tensor, groups: int
) -> Tensor | None:
    """KL in nats of each of `groups` equal blocks of thoughts, (B, groups).

    Against a factorised normal prior in closed form, since the cross-entropy needs q's marginal
    moments alone; else the mean over the draws `z`.

    Args:
        q: Batch shape (B,), event shape (K, D).
        prior: Event shape (K, D).
        z: (S, B, K, D) draws from q.
        groups: G, a divisor of K.

    Returns:
        `None` where q or the prior is not a product over groups.
    """
    q_factors = _factors(q, groups)
    if q_factors is None:
        return None
    if is_factorised_normal(prior):
        try:
            entropy = _grouped(q_factors.entropy(), 1, groups)
        except NotImplementedError:
            pass
        else:
            squares = (q.variance + (q.mean - prior.mean).square()) / prior.variance
            cross = 0.5 * (squares + prior.variance.log() + math.log(2 * math.pi))
            return _grouped(cross, 1, groups) - entropy
    p = prior.expand(q.batch_shape)
    p_factors = _factors(p, groups)
    if p_factors is None:
        return None
    log_q = q_factors.log_prob(_flat(q, z))
    log_p = p_factors.log_prob(_flat(p, z))
    return (_grouped(log_q, 2, groups) - _grouped(log_p, 2, groups)).mean(0)


def _factors(d: Distribution, groups: int) -> Distribution | None:
    """`d` with its independent parts as batch dimensions, if none of them spans two groups."""
    whole = d.flat if isinstance(d, Shaped) else d
    if not isinstance(whole, Independent):
        return None
    parts = whole.base_dist.batch_shape[len(d.batch_shape) :].numel()
    return None if parts % groups else whole.base_dist


def _flat(d: Distribution, z: Tensor) -> Tensor:
    """`z` in the shape that `d`'s parts score."""
    return d.flatten(z) if isinstance(d, Shaped) else z


def _grouped(values: Tensor, lead: int, groups: int) -> Tensor:
    """Sums what follows the `lead` leading dimensions into equal groups."""
    return values.flatten(lead).unflatten(-1, (groups, -1)).sum(-1)
