"""What fitting a guide costs, in decoder evaluations; objectives count what they have made.

One decoder evaluation is log p(x_i | z_i) of one sequence at one draw, with its gradient. It is the
unit in which families with unlike parameters can be given the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides import LocalGuide


@dataclass(frozen=True)
class Plan:
    """How a guide spends its budget.

    Attributes:
        training_steps: Slow steps on the shared parameters, before the local fit.
        training_fast_steps: T_fast within each of them.
        local_steps: T_fast of the local fit on the compared sequences.
    """

    training_steps: int
    training_fast_steps: int
    local_steps: int


def plan_budget(
    guide: LocalGuide,
    *,
    per_sequence: int,
    rows: int,
    batch_size: int,
    training_fast_steps: int,
    training_share: float,
    particles: int = 1,
) -> Plan:
    """Divides the budget between shared and local parameters.

    A family without shared parameters spends all of it on its fast loop, one without local
    parameters all of it on training; the others the `training_share` of it on training.

    Args:
        guide: Reset for the compared sequences.
        per_sequence: Decoder evaluations per compared sequence, training included.
        rows: Compared sequences.
        batch_size: B of the training steps.
        training_fast_steps: T_fast within a training step.
        training_share: For families with both kinds of parameters.
        particles: Draws of the objective per step.

    Raises:
        InputError: if the budget does not suffice for one step of each kind.
    """
    local, shared = bool(guide.local_parameters()), bool(guide.shared_parameters())
    total = per_sequence * rows
    steps, inner, spent = 0, 0, 0
    if shared:
        inner = training_fast_steps if local else 0
        passes = inner + 1 + (type(guide).shared_loss is not LocalGuide.shared_loss)
        each = batch_size * particles * passes
        steps = int((training_share if local else 1.0) * total) // each
        spent = steps * each
        if not steps:
            raise _too_small(guide, per_sequence, -(-each // rows))
    local_steps = (total - spent) // (rows * particles) if local else 0
    if local and not local_steps:
        raise _too_small(guide, per_sequence, 2 * particles)
    return Plan(steps, inner, local_steps)


def _too_small(guide: LocalGuide, per_sequence: int, least: int) -> InputError:
    return InputError(
        f"a budget of {per_sequence} decoder evaluations per sequence does not pay for one step of "
        f"{guide.family!r}: give at least {least}, or more sequences"
    )
