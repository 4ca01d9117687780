"""The clauses of a model's contract, one function each; `check_model` asks them in turn.

Every failure is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import ContractError, InputError, shown
from ltm_pyro.models.base import PLATE, SITE_X, SITE_Z, LatentModel, exact_evidence

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative, and absolute in nats, for two ways to the same log density."""

_DRAWS = 3


def _broken(model: object, what: str) -> ContractError:
    return ContractError(f"model {type(model).__name__}: {what}")


def copied(batch: Batch) -> Batch:
    """With tensors of its own: a model that writes into its data spoils no one's."""
    return batch.select(torch.arange(len(batch), device=batch.device))


def prior_has_a_shape(model: LatentModel, batch: Batch) -> None:
    """`prior()` is a distribution over R^(K x D), one for all rows."""
    prior = model.prior()
    _is_distribution(model, "prior()", prior)
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
    far = 8.0 * torch.randn(_DRAWS, *event, device=model.device)
    with suppress(NotImplementedError):
        if prior.support is not None and not bool(prior.support.check(far).all()):
            raise _broken(
                model,
                f"prior() has support {shown(str(prior.support))}, expected all of R^(K x D), as "
                "guides have: draw z from a normal, and transform it in the likelihood",
            )


def likelihood_is_one(model: LatentModel, batch: Batch) -> None:
    """`likelihood(z, batch)` is a distribution."""
    found: object = None
    try:
        found = model.likelihood(_z(model, len(batch)), batch)
    except Exception:
        return  # the program fails too, and tells of it
    _is_distribution(model, "likelihood(z, batch)", found)


def _is_distribution(model: LatentModel, what: str, found: object) -> None:
    if not isinstance(found, Distribution):
        raise _broken(
            model, f"{what} returns {shown(found)}, expected a distribution of pyro.distributions"
        )


def _trace(model: LatentModel, batch: Batch) -> dict[str, Any]:
    """The sites of one run."""
    program: Any = poutine.trace(model)
    try:
        trace = program.get_trace(batch)
        trace.compute_log_prob()
    except Exception as error:
        # Pyro appends a table of the sites to whatever is raised within a program.
        why = " ".join(str(error).partition("Trace Shapes:")[0].split())
        if isinstance(error, InputError):
            raise InputError(why) from None
        latent = _latent_sites(program.msngr.trace.nodes)
        others = [name for name in latent if name not in (SITE_Z, SITE_X)]
        hint = f" (beside z it draws {shown(others)}: expected no other site)" if others else ""
        raise _broken(
            model,
            f"its program fails on {len(batch)} rows with {type(error).__name__}: {shown(why, 200)}"
            f"{hint}; run model(batch) to see where",
        ) from error
    nodes: dict[str, Any] = trace.nodes
    return nodes


def _latent_sites(nodes: dict[str, Any]) -> list[str]:
    return [
        name
        for name, site in nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["is_observed"]
    ]


def program_has_the_sites(model: LatentModel, batch: Batch) -> None:
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
    latent = _latent_sites(nodes)
    observed = [name for name in sampled if name not in latent]
    if SITE_X in latent:
        raise _broken(
            model, "site 'x' is drawn though the batch has an x: give pyro.sample obs=batch.x"
        )
    if latent != [SITE_Z]:
        others = [name for name in latent if name != SITE_Z]
        what = "a second latent site" if SITE_Z in latent else "no latent site 'z'"
        raise _broken(
            model,
            f"{what}: found {shown(latent)}, expected ['z']: put all that is latent of a row into "
            f"z (K, D){_renamed(others) if SITE_Z not in latent else ''}",
        )
    if observed != [SITE_X]:
        raise _broken(
            model,
            f"observed sites {shown(observed)}, expected ['x']: put all that is observed of a row "
            "into one site 'x'",
        )
    own = {id(p) for p in model.parameters()}
    for name, site in nodes.items():
        value = site.get("value")
        free = getattr(value, "unconstrained", lambda value=value: value)()
        if site["type"] == "param" and id(free) not in own:
            raise _broken(
                model,
                f"pyro.param {name!r} is no weight of the model, and would not be learned: make it "
                "a torch.nn.Parameter of the model",
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


def _renamed(others: list[str]) -> str:
    return f", and call its site 'z' instead of {others[0]!r}" if len(others) == 1 else ""


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
    """`log_likelihood`; what it stumbles over is part of the answer."""
    try:
        value: object = model.log_likelihood(z, batch)
    except InputError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise _broken(
            model,
            f"log_likelihood of z {tuple(z.shape)} for {len(batch)} rows fails with "
            f"{type(error).__name__}: {shown(why, 200)}; it must take (..., B, K, D)",
        ) from error
    if not isinstance(value, Tensor):
        raise _broken(
            model, f"log_likelihood returns {shown(value)}, expected a tensor, nats of each row"
        )
    return value


def draws_stack(model: LatentModel, batch: Batch) -> None:
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


def scoring_repeats(model: LatentModel, batch: Batch) -> None:
    """A number, and the same one when asked again."""
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


def data_stay_as_they_are(model: LatentModel, batch: Batch) -> None:
    """The program writes into nothing that it is given."""
    before = copied(batch)
    _trace(model, batch)
    for name, was, now in (
        ("x", before.observed, batch.observed),
        ("mask", before.mask, batch.mask),
        *((f"covariate {n!r}", was, batch.covariates[n]) for n, was in before.covariates.items()),
    ):
        if not bool((was == now).logical_or(was != was).all()):
            raise _broken(model, f"scoring changes {name} of the batch: compute on a copy of it")


def masked_does_not_count(model: LatentModel, batch: Batch) -> None:
    """Values of other rows in place of what the mask hides."""
    x, mask = batch.observed, batch.mask
    least = x.amin(0).expand_as(x)
    other = torch.where(mask, x, torch.where(mask, x, least).amax(0).expand_as(x))
    filled = Batch(**{**batch.plain_fields(), "x": other})
    z = _z(model, len(batch))
    plain, changed = (_scored(model, z, b) for b in (batch, filled))
    ways = "as given", "with other values where the mask is false"
    _same(model, batch, plain, changed, ways, "score .mask(batch.mask), before .to_event")


def rows_are_independent(model: LatentModel, batch: Batch) -> None:
    """Each row scores alone as in company."""
    z = _z(model, len(batch))
    together = _scored(model, z, batch)
    for row in range(len(batch)):
        here = slice(row, row + 1)
        alone = _scored(model, z[here], one := batch.select(here))
        rule = "rows must not enter each other's (batch norm? a mean over the batch?)"
        _same(model, one, together[here], alone, ("in its batch", "alone"), rule)


def gradient_reaches_z(model: LatentModel, batch: Batch) -> None:
    """Its gradient is there, finite, and not 0 where the value moves."""
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
    if not bool(gradient.any()) and float(_scored(model, 2.0 * z.detach(), batch).sum()) != value:
        raise _broken(
            model,
            "log_likelihood changes with z and its gradient by z is 0 everywhere, expected one "
            "that moves z: it must not round z, compare it, or take an argmax",
        )


def preparing_changes_nothing(model: LatentModel, batch: Batch) -> None:
    """A prepared batch scores as the batch does."""
    z = _z(model, len(batch))
    ready = model.prepare(batch)
    if not isinstance(ready, Batch):
        raise _broken(model, f"prepare returns {shown(ready)}, expected a Batch: return the batch")
    plain, prepared = (_scored(model, z, b) for b in (batch, ready))
    ways = "of the batch", "of the prepared batch"
    _same(model, batch, plain, prepared, ways, "prepare must not change it")


def optional_parts_agree(model: LatentModel, batch: Batch) -> None:
    """What is given besides: `log_evidence`, and likelihoods of single elements."""
    exact_evidence(model, batch)
    z = _z(model, len(batch))
    try:
        each = model.token_log_likelihood(z, batch)
    except InputError:
        return
    ways = "in all", "as the sum of token_log_likelihood"
    _same(model, batch, _scored(model, z, batch), each.sum(-1), ways, "they must be equal")


def runs_forward(model: LatentModel, batch: Batch) -> None:
    """Without x, `site x` is drawn: such x as the batch holds."""
    nodes = _trace(model, batch.unobserved())
    x, returned = nodes[SITE_X], nodes["_RETURN"]["value"]
    if x["is_observed"]:
        raise _broken(model, "site 'x' is observed though the batch has no x: give obs=batch.x")
    drawn, given = x["value"], batch.observed
    if drawn.shape != given.shape:
        raise _broken(
            model,
            f"run forward it makes x {tuple(drawn.shape)}, expected {tuple(given.shape)} as in the "
            "batch",
        )
    if returned is not drawn:
        raise _broken(model, f"the program returns {shown(returned)}, expected x: return it")
