"""The contract of a guide family, for tests: the package's own and anyone's.

    from ltm_pyro.inference.guides.contract import CONTRACT

    @pytest.mark.parametrize("clause", CONTRACT)
    def test_my_family(clause):
        CONTRACT[clause]("my_family", model, batch)

or all clauses at once by `check_guide`. A clause raises `AssertionError` where it is broken. What a
family reaches on the oracle depends on the family: `LinearGaussian` has the exact answers for that.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import Distribution

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import exclusive
from ltm_pyro.errors import ContractError, InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import build_guide
from ltm_pyro.models.base import PLATE, SITE_X, SITE_Z, LatentModel
from ltm_pyro.random import seeded

Clause = Callable[..., None]
"""(family, model, batch, **options of the family) -> None, or `AssertionError`."""

CONTRACT: dict[str, Clause] = {}
"""Clauses by name."""

_LONGEST = 400  # characters of a comparison that did not hold
_KL_DRAWS = 4000
_SIGMAS = 5.0
"""Standard errors that a Monte Carlo mean may be off: one in two million by chance."""
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


@exclusive
def check_guide(family: str, model: LatentModel, batch: Batch, **options: Any) -> None:
    """Holds a registered family to every clause of the contract.

    Args:
        family: Its name.
        model: Any model; a small one, in double precision, shows most.
        batch: Sequences for it, at least 3; ids out of order and a ragged mask show more.
        **options: Options of the family.

    Raises:
        ContractError: where a clause is broken (an `InputError` and an `AssertionError`): its name,
            what was expected and what was found.
        InputError: if the family is unknown or the batch too small.
    """
    if not isinstance(family, str):
        kind = family.__name__ if isinstance(family, type) else shown(family)
        raise InputError(
            f"family is {kind}: must be a registered name: put @register_guide('name') on it "
            "and give 'name'"
        )
    if not isinstance(batch, Batch):
        raise InputError(f"batch is {shown(batch)}: must be a Batch, ltm_pyro.Batch(x)")
    if len(batch) < 3:
        raise InputError(f"{len(batch)} sequences: the contract needs at least 3 to permute")
    for name, clause in CONTRACT.items():
        try:
            clause(family, model, batch, **options)
        except AssertionError as error:
            found = " ".join(str(error).split()) or _failed_line(error)
            cut = found if len(found) <= _LONGEST else f"{found[: _LONGEST - 3]}..."
            meaning = " ".join((clause.__doc__ or "").split()).rstrip(".")
            broken = ContractError(f"guide {family!r} breaks {name!r} ({meaning}): {cut}")
            broken.add_note(f"guide {family!r} breaks {name!r}")
            raise broken from error


def _failed_line(error: AssertionError) -> str:
    """The expectation that did not hold, with what was found for each name in it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    known = {} if frame is None else frame.tb_frame.f_locals
    line = (last.line or "").removeprefix("assert ")
    named = [word for word in dict.fromkeys(re.findall(r"[a-zA-Z_]+", line)) if word in known]
    values = ", ".join(f"{word} is {_brief(known[word])}" for word in named)
    return f"expected {line}" + (f"; {values}" if values else "")


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Distribution):
        return (
            f"a distribution of batch shape {tuple(value.batch_shape)} and event shape "
            f"{tuple(value.event_shape)}"
        )
    return shown(value)


def _clause(check: Callable[[LocalGuide, LatentModel, Batch], None]) -> Clause:
    """Makes a check of a guide that has moved known as a clause."""

    @wraps(check)
    def clause(family: str, model: LatentModel, batch: Batch, **options: Any) -> None:
        guide = moved_guide(family, model, batch, **options)
        assert guide.family == family
        check(guide, model, batch)

    CONTRACT[check.__name__.removeprefix("_")] = clause
    return clause


def moved_guide(family: str, model: LatentModel, batch: Batch, **options: Any) -> LocalGuide:
    """A guide away from its start, shared parameters too, rows unlike each other."""
    guide = build_guide(family, model, **options)
    guide.reset(batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in guide.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(0.5 * noise.to(p.device))
    return guide


@_clause
def _shapes(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """Rows of everything, and a distribution of batch shape (B,) and event shape (K, D)."""
    rows = len(batch)
    assert guide.n_rows == rows
    assert all(len(p) == rows for p in guide.local_parameters().values())
    assert guide.local_parameters() or guide.shared_parameters()
    q = guide.posterior()
    assert q.batch_shape == (rows,)
    assert q.event_shape == model.thought_shape
    z = _draw(q, 3, batch)
    assert z.shape == (3, rows, *model.thought_shape)
    assert z.dtype == model.prior().sample().dtype
    assert q.log_prob(z).shape == (3, rows)
    assert q.mean.shape == (rows, *model.thought_shape)
    guide.reset(batch.select(slice(1)))
    assert guide.posterior().batch_shape == (1,)


@_clause
def _every_parameter_gets_a_gradient(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """In every row of the local ones."""
    with seeded(0, batch.device):
        loss = TraceMeanField_ELBO()(cast("nn.Module", model), guide)(batch)
    names, params = zip(*guide.named_parameters(), strict=True)
    for name, g in zip(names, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
        assert g is not None, name
        assert g.isfinite().all(), name
        moves = g.flatten(1) if name.startswith("local.") else g.flatten()[None]
        assert bool((moves != 0).any(1).all()), name


@_clause
def _sites_match_the_model(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """One site `z`, in the same plate and of the same shape as the model's."""
    q: Any = poutine.trace(guide).get_trace(batch)
    p: Any = poutine.trace(model).get_trace(batch)
    assert [name for name in q.stochastic_nodes if name != PLATE] == [SITE_Z]
    for trace in (p, q):
        stack = trace.nodes[SITE_Z]["cond_indep_stack"]
        assert [(f.name, f.dim, f.size) for f in stack] == [(PLATE, -1, len(batch))]
    assert p.nodes[SITE_Z]["fn"].event_shape == q.nodes[SITE_Z]["fn"].event_shape
    assert p.nodes[SITE_X]["is_observed"]


@_clause
def _log_prob_agrees_with_pyros_trace(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """At the value that was drawn."""
    trace: Any = poutine.trace(guide).get_trace(batch)
    trace.compute_log_prob()
    z = trace.nodes[SITE_Z]
    _assert_close(guide.posterior().log_prob(z["value"]), z["unscaled_log_prob"])


@_clause
def _rows_are_independent(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """A permuted batch gets the permuted posterior."""
    order = torch.arange(len(batch), device=batch.device).roll(1)
    order[-2:] = order[-2:].flip(0)
    svi = DualRateSVI(model, guide, Fast(steps=5))
    straight = svi.infer(batch)
    permuted = svi.infer(batch.select(order))
    for name, value in straight.parameters.items():
        _assert_close(permuted.parameters[name], value[order])
    _assert_close(permuted.mean, straight.mean[order])
    assert torch.equal(permuted.ids, straight.ids[order])
    if straight.has_density:
        z = _draw(straight.distribution, 3, batch)
        _assert_close(permuted.log_prob(z[:, order]), straight.log_prob(z)[:, order])


@_clause
def _no_row_reads_another(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """One sequence's draws and mean have no gradient by another's local parameters."""
    drawn = _draw(guide.posterior(), 1, batch)[0]
    second = drawn[1].sum() + guide.posterior().mean[1].sum()
    local = list(guide.local_parameters().values())
    gradients = torch.autograd.grad(second, local, allow_unused=True) if local else ()
    for g in gradients:
        if g is not None:
            others = torch.arange(len(g)) != 1
            assert not g[others.to(g.device)].any(), tuple(g.shape)


@_clause
def _state_dict_round_trip(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """Into a fresh guide, and into one that holds other rows already."""
    fresh, other = _built_again(guide, model), _built_again(guide, model)
    other.reset(batch.select(slice(2)))
    for target in (fresh, other):
        target.load_state_dict(guide.state_dict())
        assert target.state_dict().keys() == guide.state_dict().keys()
        for name, value in guide.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name
        assert target(batch).shape == guide(batch).shape
        assert torch.equal(target.posterior().mean, guide.posterior().mean)


@_clause
def _reset_is_eager_and_repeats(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """Rows exist after `reset` and not before, the same each time; another batch is refused."""
    guide = _built_again(guide, model)
    _assert_refused(guide, batch)
    guide.reset(batch)
    start = guide.rows()
    assert guide.n_rows == len(batch)
    guide.reset(batch)
    assert guide.rows().keys() == start.keys()
    for name, value in guide.rows().items():
        assert torch.equal(value, start[name]), name
    _assert_refused(guide, batch.select(slice(2)))


@_clause
def _parameters_are_local_or_shared(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """And never both."""
    local = {id(p) for p in guide.local_parameters().values()}
    shared = {id(p) for p in guide.shared_parameters()}
    assert local.isdisjoint(shared)
    assert local | shared == {id(p) for p in guide.parameters()}


@_clause
def _closed_form_kl(guide: LocalGuide, model: LatentModel, batch: Batch) -> None:
    """Where the family states one, draws from q agree with it."""
    with torch.no_grad():
        kl = guide.kl(model.prior())
        if kl is None:
            return
        assert kl.shape == (len(batch),)
        q = guide.posterior()
        z = _draw(q, _KL_DRAWS, batch)
        terms = q.log_prob(z) - model.prior().log_prob(z)
    error = terms.std(0) / math.sqrt(_KL_DRAWS)
    assert ((terms.mean(0) - kl).abs() <= _SIGMAS * error).all(), (terms.mean(0), kl, error)


def _built_again(guide: LocalGuide, model: LatentModel) -> LocalGuide:
    return build_guide(guide.family, model, **(guide.built_with or {}))


def _draw(q: Any, draws: int, batch: Batch) -> Tensor:
    """Draws (S, B, K, D), with a path for the gradient where there is one; the same each time."""
    with seeded(0, batch.device):
        shape = torch.Size([draws])
        z: Tensor = q.rsample(shape) if q.has_rsample else q.sample(shape)
    return z


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = _ROUNDING.get(actual.dtype, 1e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _assert_refused(guide: LocalGuide, batch: Batch) -> None:
    told = ""
    try:
        guide(batch)
    except InputError as error:
        told = str(error)
    assert "reset" in told, "a guide that was not reset for this batch must refuse it and say so"
