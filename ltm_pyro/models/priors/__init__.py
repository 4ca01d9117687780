"""Priors over thought vectors, fixed or learned; one family per file, registered by name."""

from ltm_pyro.models.priors.autoregressive import AutoregressivePrior
from ltm_pyro.models.priors.base import ThoughtPrior, build_prior, prior_names, register_prior
from ltm_pyro.models.priors.flow import FlowPrior
from ltm_pyro.models.priors.mixture import MixturePrior
from ltm_pyro.models.priors.standard_normal import StandardNormal
from ltm_pyro.models.priors.tree import HierarchicalPrior, NormalTree, StateSpacePrior

__all__ = [
    "AutoregressivePrior",
    "FlowPrior",
    "HierarchicalPrior",
    "MixturePrior",
    "NormalTree",
    "StandardNormal",
    "StateSpacePrior",
    "ThoughtPrior",
    "build_prior",
    "prior_names",
    "register_prior",
]
