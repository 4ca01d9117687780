"""Local posteriors q(z_i), one family per file."""

from ltm_pyro.inference.guides.base import (
    LocalGuide,
    build_guide,
    guide_families,
    register_guide,
)
from ltm_pyro.inference.guides.delta import Delta
from ltm_pyro.inference.guides.mean_field import MeanField

__all__ = [
    "Delta",
    "LocalGuide",
    "MeanField",
    "build_guide",
    "guide_families",
    "register_guide",
]
