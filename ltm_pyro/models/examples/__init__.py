"""Models that are not about language: what a `LatentModel` of one's own looks like."""

from ltm_pyro.models.examples.bernoulli_factors import BernoulliFactors
from ltm_pyro.models.examples.poisson_effects import PoissonEffects

__all__ = ["BernoulliFactors", "PoissonEffects"]
