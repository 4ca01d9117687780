"""What the two clocks descend: objectives by name, or any Pyro ELBO.

| name | is maximised | gradient |
|---|---|---|
| `elbo` | E_q log p(x given z) - KL, closed form where there is one | through z and q |
| `stl` | the same by Monte Carlo | through z alone; no variance at the exact posterior |
| `iwae` | log mean_s w_s | through z and q |
| `dreg` | the same | twice reparametrised |
| `renyi` | log mean_s w_s^(1 - alpha) / (1 - alpha) | through z and q |
| `beta` | E_q log p(x given z) - weight KL | as `elbo` |
| `free_bits` | E_q log p(x given z) - sum_g max(nats, KL_g) | as `elbo` |
"""

from __future__ import annotations

import inspect
from typing import Any

from ltm_pyro.errors import unknown_name
from ltm_pyro.inference.objectives.base import Draws, Objective, stopped_log_prob
from ltm_pyro.inference.objectives.by_hand import ElboByHand
from ltm_pyro.inference.objectives.evidence import BetaElbo, Elbo, FreeBits, StickingTheLanding
from ltm_pyro.inference.objectives.handlers import (
    KLWeight,
    Repeat,
    TermRecorder,
    over_particles,
    quiet_about_nan,
    repeating,
)
from ltm_pyro.inference.objectives.importance import (
    DoublyReparametrised,
    ImportanceWeighted,
    Renyi,
)
from ltm_pyro.inference.objectives.pyro_elbos import describe, differentiable, kl_estimator

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        Elbo, StickingTheLanding, ImportanceWeighted, Renyi, DoublyReparametrised, BetaElbo,
        FreeBits,
    )
}  # fmt: skip


def build_objective(name: str, **options: Any) -> Objective:
    """The objective called `name`.

    Args:
        name: One of `OBJECTIVES`, e.g. `"iwae"`.
        **options: Its options, e.g. `particles=8`.

    Raises:
        InputError: for an unknown name or option, with the nearest offered, or one out of range.
    """
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, OBJECTIVES)
    cls = OBJECTIVES[name]
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "options")]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of objective {name!r}", option, known)
    return cls(**options)


__all__ = [
    "OBJECTIVES",
    "BetaElbo",
    "DoublyReparametrised",
    "Draws",
    "Elbo",
    "ElboByHand",
    "FreeBits",
    "ImportanceWeighted",
    "KLWeight",
    "Objective",
    "Renyi",
    "Repeat",
    "StickingTheLanding",
    "TermRecorder",
    "build_objective",
    "describe",
    "differentiable",
    "kl_estimator",
    "over_particles",
    "quiet_about_nan",
    "repeating",
    "stopped_log_prob",
]
