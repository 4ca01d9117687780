"""Objectives on log importance weights: their mean, and bounds that every particle tightens."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from ltm_pyro.checks import finite_number
from ltm_pyro.errors import InputError
from ltm_pyro.inference.objectives.evidence import Objective, Terms


class StickingTheLanding(Objective):
    """The ELBO, its gradient taken through z alone (Roeder, Wu & Duvenaud 2017, eq. 7).

    Log q is evaluated at stopped parameters, which leaves out the score of q, whose expectation is
    zero. The gradient stays unbiased; at the exact posterior log w is constant in z, so that every
    single draw's gradient is zero. Far from it the variance may be the larger one.
    """

    name: ClassVar[str] = "stl"

    def per_sequence(self, terms: Terms) -> Tensor:
        """(B,)."""
        return terms.log_weight(stopped=True).mean(0)


class Renyi(Objective):
    """The Renyi bound of order alpha on S particles (Li & Turner 2016, eq. 8).

    log mean_s w_s^(1 - alpha) / (1 - alpha), in expectation at most log p(x) for every alpha >= 0.
    Alpha 0 is the importance-weighted bound, alpha to 1 the ELBO, a larger alpha a lower bound that
    makes q cover less.

    Args:
        alpha: 0 or more, not 1.
        particles: S.
    """

    name: ClassVar[str] = "renyi"
    weighs_draws = True

    def __init__(self, alpha: float = 0.5, particles: int = 8) -> None:
        alpha = finite_number("alpha", alpha)
        if alpha < 0 or alpha == 1:
            raise InputError(
                f"alpha is {alpha:g}: must be 0 or more and not 1 (1 is the ELBO: objective "
                "'elbo'; below 0 it is no lower bound)"
            )
        super().__init__(particles, alpha=alpha)
        self.alpha = alpha

    def per_sequence(self, terms: Terms) -> Tensor:
        """(B,)."""
        return power_mean(terms.log_weight(), 1.0 - self.alpha)


class ImportanceWeighted(Objective):
    """log mean_s w_s (Burda, Grosse & Salakhutdinov 2016, eq. 8), at most log p(x) on average.

    Its gradient by the guide's parameters loses signal against noise as 1 / sqrt(S) (Rainforth et
    al. 2018): `dreg` has the same expectation and does not.

    Args:
        particles: S.
    """

    name: ClassVar[str] = "iwae"
    weighs_draws = True

    def __init__(self, particles: int = 8) -> None:
        super().__init__(particles)

    def per_sequence(self, terms: Terms) -> Tensor:
        """(B,)."""
        return power_mean(terms.log_weight())


class DoublyReparametrised(Objective):
    """The importance-weighted bound with the doubly reparametrised gradient (Tucker et al. 2019).

    With v_s = w_s / sum w, the guide's parameters, local and shared, get the gradient
    sum_s v_s^2 (d log w_s / d z_s)(d z_s / d phi) (their eq. 7), whose variance vanishes at the
    exact posterior. Decoder and prior get that of `iwae`. With KL weight c the factor v_s^2 is
    v_s (1 - c + c v_s), so that the gradient stays unbiased.

    Args:
        particles: S.
    """

    name: ClassVar[str] = "dreg"
    weighs_draws = True

    def __init__(self, particles: int = 8) -> None:
        super().__init__(particles)

    def per_sequence(self, terms: Terms) -> Tensor:
        """The bound (B,), with the gradient above."""
        log_w = terms.log_weight(stopped=True)
        share = log_w.detach().softmax(0)
        z = terms.z
        if z.requires_grad and terms.guide.has_density:
            factor = (1.0 - terms.weight * (1.0 - share))[..., None, None]
            z.register_hook(lambda gradient: factor * gradient)
        return power_mean(log_w)


def power_mean(log_w: Tensor, power: float = 1.0) -> Tensor:
    """Log mean_s w_s^power / power over the first dimension, (S, B) to (B,)."""
    return ((power * log_w).logsumexp(0) - math.log(len(log_w))) / power
