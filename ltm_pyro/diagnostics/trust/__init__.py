"""Can this posterior be trusted? Evidence against q(z_i), without knowing the truth."""

from ltm_pyro.diagnostics.trust.diagnosis import Diagnosis, Flag
from ltm_pyro.diagnostics.trust.examine import diagnose

__all__ = ["Diagnosis", "Flag", "diagnose"]
