"""The contract of a model, for tests and for the first batch that a model meets.

    check_model(model, batch)

The twin of `check_guide`. Every failure is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakSet

import pyro
import torch
from pyro import poutine
from torch import nn

from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import exclusive, require_model
from ltm_pyro.errors import InputError, shown
from ltm_pyro.models import clauses
from ltm_pyro.models.base import LatentModel

Clause = Callable[[LatentModel, Batch], None]

_DENSITIES: tuple[Clause, ...] = (
    clauses.prior_has_a_shape, clauses.likelihood_is_one, clauses.program_has_the_sites,
)  # fmt: skip
"""What scores depend on."""

_CLAUSES: tuple[Clause, ...] = (
    *_DENSITIES, clauses.draws_stack, clauses.scoring_repeats, clauses.data_stay_as_they_are,
    clauses.rows_are_independent, clauses.masked_does_not_count, clauses.gradient_reaches_z,
    clauses.preparing_changes_nothing, clauses.optional_parts_agree, clauses.runs_forward,
)  # fmt: skip


@exclusive
def check_model(model: LatentModel, batch: Batch) -> None:
    """Holds a model to every clause of the contract.

    A Pyro program with one latent site `z` and one observed site `x` in the plate `sequences`;
    rows independent; `log_likelihood` equal to the trace's; gradients that reach z; data left as
    they are, and what is masked not counted; a program that runs forward.

    Args:
        model: The model; in double precision it shows most.
        batch: At least 2 rows of data for it, with masks and covariates as they come.

    Raises:
        ContractError: where a clause is broken (an `InputError` and an `AssertionError`): what was
            found, what was expected, what to do.
        InputError: if this is no model, or it cannot score the batch.
    """
    require_model(model)
    if not isinstance(batch, Batch):
        raise InputError(f"batch is {shown(batch)}: must be a Batch, ltm_pyro.Batch(x)")
    if len(batch) < 2:
        raise InputError(f"{len(batch)} row: check_model needs at least 2 rows to tell them apart")
    batch = batch.to(model.device)
    model.check(batch)
    for clause in _CLAUSES:
        _run(clause, model, clauses.copied(batch))


_MET: WeakSet[nn.Module] = WeakSet()


def first_use(model: LatentModel, batch: Batch) -> None:
    """Holds a model to what scores depend on, on two rows of the first batch that it meets.

    That are its sites, their names, and a `log_likelihood` that is the program's.
    """
    if model in _MET or not batch.holds_numbers:
        return
    rows = batch.select(slice(0, 2))
    for clause in _DENSITIES:
        _run(clause, model, rows)
    _MET.add(model)


def _run(clause: Clause, model: LatentModel, batch: Batch) -> None:
    devices = [] if model.device.type == "cpu" else [model.device]
    with (
        poutine.block(),  # no handler of the caller's sees the program, or counts it
        pyro.get_param_store().scope(),
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        pyro.validation_enabled(True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Encountered (NaN|.inf)", UserWarning)
        torch.manual_seed(0)
        clause(model, batch)
