"""What a page or a solution registers is taken out again behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro

from ltm_pyro.inference.guides.registry import GUIDES
from ltm_pyro.inference.objectives import OBJECTIVES
from ltm_pyro.models.priors.base import PRIORS
from ltm_pyro.registry import Registry

KNOWN: list[Registry[Any]] = [GUIDES, PRIORS, OBJECTIVES]


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Inside the block, code may register names and use Pyro's parameter store."""
    before = [set(registry) for registry in KNOWN]
    try:
        with pyro.get_param_store().scope():
            yield
    finally:
        for registry, names in zip(KNOWN, before, strict=True):
            for name in set(registry) - names:
                registry.remove(name)
