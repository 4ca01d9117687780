"""The contract of a model, for tests and for the first batch that a model meets.

    check_model(model, batch)

The twin of `check_guide`. Every failure is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import exclusive, require_model
from ltm_pyro.errors import ContractError, InputError, shown
from ltm_pyro.models.base import PLATE, SITE_X, SITE_Z, LatentModel

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative, and absolute in nats, for two ways to the same log density."""

_DRAWS = 3


@exclusive
def check_model(model: LatentModel, batch: Batch) -> None:
    """Holds a model to every clause of the contract.

    A Pyro program with one latent site `z` and one observed site `x` in the plate `sequences`;
    rows independent; `log_likelihood` equal to the trace's; gradients that reach z; a program that
    runs forward.

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
    for clause in (
        _prior_has_a_shape, _program, _draws_stack, _scoring_repeats,
        _rows_are_independent, _gradient_reaches_z, _preparing_changes_nothing, _runs_forward,
    ):  # fmt: skip
        _run(clause, model, batch)


_MET: WeakSet[nn.Module] = WeakSet()


def first_use(model: LatentModel, batch: Batch) -> None:
    """Holds a model to what scores depend on, on two rows of the first batch that it meets.

    That are its sites, their names, and a `log_likelihood` that is the program's.
    """
    if model in _MET or not batch.holds_numbers:
        return
    rows = batch.select(slice(0, 2))
    for clause in (_prior_has_a_shape, _program):
        _run(clause, model, rows)
    _MET.add(model)


def _run(clause: Callable[[LatentModel, Batch], None], model: LatentModel, batch: Batch) -> None:
    devices = [] if model.device.type == "cpu" else [model.device]
    with (
        poutine.block(),  # no handler of the caller's sees the program, or counts it
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        pyro.validation_enabled(True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Encountered (NaN|.inf)", UserWarning)
        torch.manual_seed(0)
        clause(model, batch)


def _broken(model: object, what: str) -> ContractError:
    return ContractError(f"model {type(model).__name__}: {what}")


@contextmanager
def _failing(model: object, batch: Batch, what: str, remedy: str) -> Iterator[None]:
    """What the model stumbles over inside the block is part of the answer."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {shown(' '.join(str(error).split()), 200)}"
        raise _broken(model, f"{what} fails on {len(batch)} rows with {why}; {remedy}") from error


def _prior_has_a_shape(model: LatentModel, batch: Batch) -> None:
    prior = model.prior()
    event, lead = tuple(prior.event_shape), tuple(prior.batch_shape)
    if len(event) != 2 or lead:
        raise _broken(
            model,
            f"prior() has batch shape {lead} and event shape {event}, expected () and (K, D): use "
            ".to_event, once for each dimension of z",
        )
    if event != tuple(model.thought_shape):
        raise _broken(
            model, f"thought_shape is {model.thought_shape}, and prior() draws {event}: make equal"
        )


def _trace(model: LatentModel, batch: Batch) -> dict[str, Any]:
    """The sites of one run."""
    program: Any = poutine.trace(model)
    with _failing(model, batch, "its program", "run model(batch) to see where"):
        trace = program.get_trace(batch)
        trace.compute_log_prob()
    return trace.nodes


def _program(model: LatentModel, batch: Batch) -> None:
    """One latent site, one observed one, in one plate; `prior()` and `log_likelihood` theirs."""
    nodes = _trace(model, batch)
    _sites(model, batch, nodes)
    z = nodes[SITE_Z]["value"]
    _compare(model, batch, "prior().log_prob(z)", model.prior().log_prob(z), nodes, SITE_Z)
    scored = _scored(model, z, batch)
    _compare(model, batch, "log_likelihood(z, batch)", scored, nodes, SITE_X)


def _sites(model: LatentModel, batch: Batch, nodes: dict[str, Any]) -> None:
    sampled = {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
    latent = [name for name, site in sampled.items() if not site["is_observed"]]
    observed = [name for name, site in sampled.items() if site["is_observed"]]
    if SITE_X in latent:
        raise _broken(
            model, "site 'x' is drawn though the batch has an x: give pyro.sample obs=batch.x"
        )
    if latent != [SITE_Z]:
        what, renamed = "a second latent site", ""
        if SITE_Z not in latent:
            what = "no latent site 'z'"
            renamed = (
                f", and call its site 'z' instead of {latent[0]!r}" if len(latent) == 1 else ""
            )
        raise _broken(
            model,
            f"{what}: found {shown(latent)}, expected ['z']: put all that is latent of a row into "
            f"z (K, D){renamed}",
        )
    if observed != [SITE_X]:
        raise _broken(
            model,
            f"observed sites {shown(observed)}, expected ['x']: put all that is observed of a row "
            "into one site 'x'",
        )
    for name in (SITE_Z, SITE_X):
        plates = [(f.name, f.dim, f.size) for f in sampled[name]["cond_indep_stack"]]
        if plates != [(PLATE, -1, len(batch))]:
            raise _broken(
                model,
                f"site {name!r} is in plates {shown(plates)}, expected [('{PLATE}', -1, "
                f"{len(batch)})]: sample it inside `with sequences(batch)` alone, and use "
                ".to_event for other dimensions",
            )
    z = sampled[SITE_Z]["value"]
    if z.shape != (len(batch), *model.thought_shape):
        raise _broken(
            model,
            f"z is {tuple(z.shape)}, expected (B, K, D) = "
            f"{(len(batch), *model.thought_shape)}: sample it from prior()",
        )


def _compare(
    model: LatentModel, batch: Batch, what: str, own: Tensor, nodes: dict[str, Any], site: str
) -> None:
    # With what poutine.scale or the mask made of it: that is what a Pyro ELBO would charge.
    theirs: Tensor = nodes[site]["log_prob"]
    if own.shape != (len(batch),):
        raise _broken(
            model, f"{what} is {tuple(own.shape)}, expected one number per row, ({len(batch)},)"
        )
    if theirs.shape != own.shape:
        raise _broken(
            model,
            f"site {site!r} has a log density of shape {tuple(theirs.shape)}, expected one number "
            f"per row, ({len(batch)},): .to_event its other dimensions",
        )
    row = _first_difference(own, theirs)
    if row is not None:
        a, b = float(own[row]), float(theirs[row])
        factor = f" (a factor of {a / b:.3g})" if b else ""
        raise _broken(
            model,
            f"{what} of sequence id {int(batch.ids[row])} is {a:.6g} nats, and the program's site "
            f"{site!r} has {b:.6g}{factor}: they must be equal",
        )


def _first_difference(one: Tensor, other: Tensor) -> int | None:
    """The first row (over the last dimension) in which they differ by more than rounding.

    What is NaN does not count: `check_model` tells of it, and fits and chains name the sequences.
    """
    tolerance = _TOLERANCE.get(one.dtype, 5e-2)
    close = torch.isclose(one.double(), other.double(), tolerance, tolerance, equal_nan=True)
    bad = (~close & ~one.isnan()).reshape(-1, close.shape[-1]).any(0).nonzero()
    return int(bad[0]) if len(bad) else None


def _same(
    model: LatentModel, batch: Batch, one: Tensor, other: Tensor, ways: tuple[str, str], rule: str
) -> None:
    """Refuses two ways to the log likelihoods (..., B) that differ by more than rounding."""
    row = _first_difference(one, other)
    if row is not None:
        draws = torch.stack((one, other))[..., row].reshape(2, -1)
        a, b = draws[:, (draws[0] - draws[1]).abs().argmax()].tolist()
        raise _broken(
            model,
            f"log_likelihood of sequence id {int(batch.ids[row])} is {a:.6g} {ways[0]} and {b:.6g} "
            f"{ways[1]}: {rule}",
        )


def _z(model: LatentModel, *lead: int) -> Tensor:
    return model.prior().sample(torch.Size(lead))


def _scored(model: LatentModel, z: Tensor, batch: Batch) -> Tensor:
    what = f"log_likelihood of z {tuple(z.shape)}"
    with _failing(model, batch, what, "it must take (..., B, K, D)"):
        return model.log_likelihood(z, batch)


def _draws_stack(model: LatentModel, batch: Batch) -> None:
    """Leading dimensions of z are draws."""
    z = _z(model, _DRAWS, len(batch))
    stacked = _scored(model, z, batch)
    if stacked.shape != z.shape[:2]:
        raise _broken(
            model,
            f"log_likelihood of z {tuple(z.shape)} is {tuple(stacked.shape)}, expected "
            f"{tuple(z.shape[:2])}: let leading dimensions (S, B, K, D) pass",
        )
    each = torch.stack([_scored(model, one, batch) for one in z])
    ways = f"among {_DRAWS} draws", "with its draw alone"
    _same(model, batch, stacked, each, ways, "draws must not enter each other's")


def _scoring_repeats(model: LatentModel, batch: Batch) -> None:
    z = _z(model, len(batch))
    nan = _scored(model, z, batch).isnan()
    if bool(nan.any()):
        raise _broken(
            model,
            f"log_likelihood of sequence ids {batch.ids[nan].tolist()[:8]} is NaN at draws from "
            "the prior, expected a number: keep rates, scales and logits in range",
        )
    first, again = (_scored(model, z, batch) for _ in range(2))
    rule = "it must draw nothing (dropout?) and keep nothing"
    _same(model, batch, first, again, ("at first", "asked again"), rule)


def _rows_are_independent(model: LatentModel, batch: Batch) -> None:
    z = _z(model, len(batch))
    together = _scored(model, z, batch)
    for row in range(len(batch)):
        here = slice(row, row + 1)
        alone = _scored(model, z[here], one := batch.select(here))
        rule = "rows must not enter each other's (batch norm? a mean over the batch?)"
        _same(model, one, together[here], alone, ("in its batch", "alone"), rule)


def _gradient_reaches_z(model: LatentModel, batch: Batch) -> None:
    with torch.enable_grad():
        z = _z(model, len(batch)).requires_grad_()
        value = _scored(model, z, batch).sum()
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, z, allow_unused=True)
    if gradient is None:
        raise _broken(
            model,
            "no gradient of log_likelihood reaches z, expected one: compute it from z by torch's "
            "operations, without detach(), no_grad() or .item()",
        )
    if not bool(gradient.isfinite().all()):
        raise _broken(model, "the gradient of log_likelihood by z is not finite at prior draws")


def _preparing_changes_nothing(model: LatentModel, batch: Batch) -> None:
    z = _z(model, len(batch))
    plain, prepared = (_scored(model, z, b) for b in (batch, model.prepare(batch)))
    ways = "of the batch", "of the prepared batch"
    _same(model, batch, plain, prepared, ways, "prepare must not change it")


def _runs_forward(model: LatentModel, batch: Batch) -> None:
    """Without x, `site x` is drawn: such x as the batch holds."""
    x = _trace(model, batch.unobserved())[SITE_X]
    if x["is_observed"]:
        raise _broken(model, "site 'x' is observed though the batch has no x: give obs=batch.x")
    drawn, given = x["value"], batch.observed
    if drawn.shape != given.shape:
        raise _broken(
            model,
            f"run forward it makes x {tuple(drawn.shape)}, expected {tuple(given.shape)} as in the "
            "batch",
        )
