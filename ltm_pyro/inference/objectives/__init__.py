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

from typing import Any

from pyro.infer import ELBO

from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.guides.stopped import stopped_log_prob
from ltm_pyro.inference.objectives.evidence import Elbo, Objective, Terms
from ltm_pyro.inference.objectives.free_bits import BetaElbo, FreeBits
from ltm_pyro.inference.objectives.importance import (
    DoublyReparametrised,
    ImportanceWeighted,
    Renyi,
    StickingTheLanding,
)
from ltm_pyro.inference.objectives.pyro_elbos import PyroElbo, describe, kl_estimator
from ltm_pyro.registry import Registry

OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective", "register_objective", needs=Objective, label="name"
)
register_objective = OBJECTIVES.register
"""Class decorator: makes an objective known to `build_objective`; see `Registry.register`."""

for _built_in in (
    Elbo, StickingTheLanding, ImportanceWeighted, Renyi, DoublyReparametrised, BetaElbo, FreeBits,
):  # fmt: skip
    register_objective(_built_in.name)(_built_in)


def build_objective(name: str, /, **options: Any) -> Objective:
    """The objective called `name`.

    Args:
        name: One of `OBJECTIVES`, e.g. `"iwae"`.
        **options: Its options, e.g. `particles=8`.

    Raises:
        InputError: for an unknown name or option, with the nearest offered, or one out of range.
    """
    return OBJECTIVES.build(name, options=options)


def as_objective(elbo: ELBO | str | None) -> Objective:
    """An objective by its name, `elbo` by default, or any Pyro ELBO as one of ours."""
    if elbo is None or isinstance(elbo, str):
        return build_objective("elbo" if elbo is None else elbo)
    if not isinstance(elbo, ELBO):
        raise InputError(
            f"elbo is {shown(elbo)}: must be the name of an objective, e.g. 'elbo', what "
            "build_objective(name) returns, or an instance of a Pyro ELBO"
        )
    return elbo if isinstance(elbo, Objective) else PyroElbo(elbo)


__all__ = [
    "OBJECTIVES", "Elbo", "Objective", "PyroElbo", "Terms", "as_objective", "build_objective",
    "describe", "kl_estimator", "register_objective", "stopped_log_prob",
]  # fmt: skip
