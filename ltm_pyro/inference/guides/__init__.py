"""Local posteriors q(z_i), one family per file."""

from ltm_pyro.inference.guides.amortized import Amortized
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.delta import Delta
from ltm_pyro.inference.guides.flow import Flow
from ltm_pyro.inference.guides.full_rank import FullRank
from ltm_pyro.inference.guides.low_rank import LowRank
from ltm_pyro.inference.guides.mean_field import MeanField
from ltm_pyro.inference.guides.mixture import Mixture
from ltm_pyro.inference.guides.registry import build_guide, guide_families, register_guide
from ltm_pyro.inference.guides.semi_amortized import SemiAmortized

__all__ = [
    "Amortized",
    "Delta",
    "Flow",
    "FullRank",
    "LocalGuide",
    "LowRank",
    "MeanField",
    "Mixture",
    "SemiAmortized",
    "build_guide",
    "guide_families",
    "register_guide",
]
