"""Sampling from p(z | x): batched chains, their convergence, and annealing between two densities.

Every row (chain and sequence) has its own accept decision: 64 sequences are 64 targets, not one.
"""

from ltm_pyro.inference.mcmc.draws import MCMCDraws
from ltm_pyro.inference.mcmc.mover import KERNELS
from ltm_pyro.inference.mcmc.sampler import sample_posterior

__all__ = ["KERNELS", "MCMCDraws", "sample_posterior"]
