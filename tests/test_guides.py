"""The contract of `LocalGuide`, asked of every registered family.

A family is checked as soon as it is registered. What is known exactly about its optimum on the
oracle is its row in `EXPECTED`; a family without a row fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from known_models import make_language_model, make_oracle, make_tokens
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.errors import InputError
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.guides import (
    LocalGuide,
    base,
    build_guide,
    guide_families,
    register_guide,
)
from ltm_pyro.models.base import PLATE, LatentModel
from ltm_pyro.models.linear_gaussian import LinearGaussian

TRUNCATION = 0.01
"""Nats per sequence that a long fast loop may leave to the optimum."""


@dataclass(frozen=True)
class Optimum:
    """What a family reaches on the oracle, in nats per sequence."""

    score: str
    """The column of `evaluate` that the family maximises."""
    best: Callable[[LinearGaussian, Batch], Tensor]
    """Its exact maximum, (B,)."""
    ceiling: Callable[[LinearGaussian, Batch], Tensor] | None = None
    """What no member exceeds, (B,), where the maximum is not known and `best` is a member."""
    options: Mapping[str, int] = field(default_factory=dict)
    """Options of the family with which that holds."""
    slow_steps: int = 0
    """Slow steps that its shared parameters need first."""
    truncation: float = TRUNCATION
    """Nats per sequence that all this may leave to the optimum."""


def _joint_at_the_mode(oracle: LinearGaussian, batch: Batch) -> Tensor:
    mode = oracle.posterior(batch).mean
    return oracle.prior().log_prob(mode) + oracle.log_likelihood(mode, batch)


EXPECTED = {
    "amortized": Optimum("elbo", LinearGaussian.best_mean_field_elbo, slow_steps=200),
    "delta": Optimum("log_joint", _joint_at_the_mode),
    # Its correlations are learned by noisy slow steps; mean field ends 0.7 nats below.
    "flow": Optimum(
        "elbo",
        LinearGaussian.log_evidence,
        options={"transforms": 1, "hidden": 16},
        slow_steps=40,
        truncation=0.05,
    ),
    "full_rank": Optimum("elbo", LinearGaussian.log_evidence),
    "low_rank": Optimum("elbo", LinearGaussian.log_evidence, options={"rank": 4}),
    "mean_field": Optimum("elbo", LinearGaussian.best_mean_field_elbo),
    "mixture": Optimum(
        "elbo", LinearGaussian.best_mean_field_elbo, ceiling=LinearGaussian.log_evidence
    ),
    "semi_amortized": Optimum("elbo", LinearGaussian.best_mean_field_elbo, slow_steps=10),
}


@pytest.fixture(params=["oracle", "language"])
def case(request: pytest.FixtureRequest) -> tuple[LatentModel, Batch]:
    """A model and a batch of 4 for it, ids not sorted, in double precision."""
    if request.param == "language":
        return make_language_model(), make_tokens(4)
    oracle = make_oracle()
    x = oracle.simulate(4, seed=1).observed
    return oracle, Batch(x, ids=torch.tensor([7, 3, 9, 1]))


def _moved(family: str, model: LatentModel, batch: Batch) -> LocalGuide:
    """A guide away from its start, rows unlike each other."""
    guide = build_guide(family, model)
    guide.reset(batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return guide


def check_shapes(family: str, model: LatentModel, batch: Batch) -> None:
    guide, rows = _moved(family, model, batch), len(batch)
    assert guide.family == family
    assert guide.n_rows == rows
    assert all(len(p) == rows for p in guide.local_parameters().values())
    assert guide.local_parameters() or guide.shared_parameters()
    q = guide.posterior()
    assert q.batch_shape == (rows,)
    assert q.event_shape == model.thought_shape
    z = q.rsample(torch.Size([3]))
    assert z.shape == (3, rows, *model.thought_shape)
    assert z.dtype == torch.float64
    assert q.log_prob(z).shape == (3, rows)
    assert q.mean.shape == (rows, *model.thought_shape)
    guide.reset(batch.select(slice(1)))
    assert guide.posterior().batch_shape == (1,)


def check_every_parameter_gets_a_gradient(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    TraceMeanField_ELBO()(model, guide)(batch).backward()
    for name, p in guide.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        # Each row of a local parameter moves.
        moves = p.grad.flatten(1) if name.startswith("local.") else p.grad.flatten()[None]
        assert bool((moves != 0).any(1).all()), name


def check_sites_match_the_model(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    q = poutine.trace(guide).get_trace(batch)
    p = poutine.trace(model).get_trace(batch)
    assert [name for name in q.stochastic_nodes if name != PLATE] == ["z"]
    for trace in (p, q):
        z = trace.nodes["z"]
        assert [(f.name, f.dim, f.size) for f in z["cond_indep_stack"]] == [(PLATE, -1, len(batch))]
    assert p.nodes["z"]["fn"].event_shape == q.nodes["z"]["fn"].event_shape
    assert p.nodes["x"]["is_observed"]


def check_log_prob_agrees_with_pyros_trace(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    trace = poutine.trace(guide).get_trace(batch)
    trace.compute_log_prob()
    z = trace.nodes["z"]
    EXACT.assert_close(guide.posterior().log_prob(z["value"]), z["unscaled_log_prob"])


def check_rows_are_independent(family: str, model: LatentModel, batch: Batch) -> None:
    order = torch.tensor([2, 0, 3, 1])
    # One guide for both, so that shared parameters are the same, and away from their start.
    svi = DualRateSVI(model, _moved(family, model, batch), Fast(steps=5))
    straight = svi.infer(batch)
    shuffled = svi.infer(batch.select(order))
    for name, value in straight.parameters.items():
        EXACT.assert_close(shuffled.parameters[name], value[order])
    EXACT.assert_close(shuffled.mean, straight.mean[order])
    assert torch.equal(shuffled.ids, straight.ids[order])
    if straight.has_density:
        z = straight.sample(3)
        EXACT.assert_close(shuffled.log_prob(z[:, order]), straight.log_prob(z)[:, order])


def check_no_row_reads_another(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    second = guide.posterior().rsample()[1].sum() + guide.posterior().mean[1].sum()
    local = list(guide.local_parameters().values())
    gradients = torch.autograd.grad(second, local, allow_unused=True) if local else ()
    for p, g in zip(local, gradients, strict=True):
        if g is not None:
            g = g.clone()
            g[1] = 0
            assert not g.any(), p.shape


def check_state_dict_round_trip(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    fresh = build_guide(family, model)
    fresh.load_state_dict(guide.state_dict())
    assert fresh.state_dict().keys() == guide.state_dict().keys()
    for name, value in guide.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert fresh(batch).shape == guide(batch).shape
    assert torch.equal(fresh.posterior().mean, guide.posterior().mean)
    # One that holds other rows already takes these.
    other = build_guide(family, model)
    other.reset(batch.select(slice(2)))
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.posterior().mean, guide.posterior().mean)


def check_reset_is_eager_and_repeats(family: str, model: LatentModel, batch: Batch) -> None:
    guide = build_guide(family, model)
    with pytest.raises(InputError, match="reset"):
        guide(batch)
    guide.reset(batch)
    start = guide.rows()
    assert guide.n_rows == len(batch)
    guide.reset(batch)
    assert guide.rows().keys() == start.keys()
    for name, value in guide.rows().items():
        assert torch.equal(value, start[name])
    with pytest.raises(InputError, match="holds 4 sequences and the batch 2"):
        guide(batch.select(slice(2)))


def check_parameters_are_local_or_shared(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    local = {id(p) for p in guide.local_parameters().values()}
    shared = {id(p) for p in guide.shared_parameters()}
    assert local.isdisjoint(shared)
    assert local | shared == {id(p) for p in guide.parameters()}


def check_closed_form_kl(family: str, model: LatentModel, batch: Batch) -> None:
    guide = _moved(family, model, batch)
    kl = guide.kl(model.prior())
    if kl is None:
        return
    assert kl.shape == (len(batch),)
    q, draws = guide.posterior(), 4000
    z = q.sample(torch.Size([draws]))
    terms = q.log_prob(z) - model.prior().log_prob(z)
    error = terms.std(0) / draws**0.5
    MC.assert_close(terms.mean(0).detach(), error.detach(), kl.detach(), draws=draws)


CONTRACT = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("family", guide_families())
def test_contract(family: str, check: Callable[..., None], case: tuple[LatentModel, Batch]) -> None:
    check(family, *case)


@pytest.mark.parametrize("family", guide_families())
def test_optimum_on_the_oracle(family: str) -> None:
    assert family in EXPECTED, f"give {family!r} its row in EXPECTED"
    oracle, expected = make_oracle(), EXPECTED[family]
    batch = oracle.simulate(32, seed=1)
    # Many draws a step, because the question is the family and not the noise of the fast loop.
    guide = build_guide(family, oracle, **expected.options)
    elbo_class = TraceMeanField_ELBO if guide.has_density else Trace_ELBO
    elbo = elbo_class(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    if expected.slow_steps:
        # Kept from visit to visit, rows and network converge together.
        short = Fast(steps=8, lr=0.1, final_fraction=0.0)
        slow = Slow(lr=1e-2, weight_decay=0.0)
        few = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
        learning = DualRateSVI(oracle, guide, short, slow, elbo=few, persistent=True)
        learning.fit_guide(batch, expected.slow_steps, batch_size=32, progress=False)
    fast = Fast(steps=300, lr=0.2, final_fraction=0.0)
    post = DualRateSVI(oracle, guide, fast, elbo=elbo).infer(batch)
    scores = evaluate(oracle, post, batch, draws=1000)
    reached = scores[expected.score].mean().item()
    ceiling = (expected.ceiling or expected.best)(oracle, batch).mean().item()
    error = 0.0
    if post.has_density:
        error = float(np.sqrt(np.square(scores["elbo_se"]).sum())) / len(batch)
    best = expected.best(oracle, batch).mean().item()
    MC.assert_at_most(best - reached, error + 1e-9, bound=expected.truncation)
    MC.assert_at_most(reached - ceiling, error + 1e-9, bound=0.0)


def test_another_packages_family_meets_the_contract(case: tuple[LatentModel, Batch]) -> None:
    known = guide_families()

    @register_guide("laplace_marginals")
    class LaplaceMarginals(LocalGuide):
        """Independent Laplace marginals, as a user might add them."""

        def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
            shape = (len(batch), *self.thought_shape)
            return {"loc": self.anchor.new_zeros(shape), "log_scale": self.anchor.new_zeros(shape)}

        def posterior(self) -> TorchDistribution:
            scale = self.local["log_scale"].exp()
            return dist.Laplace(self.local["loc"], scale).to_event(2)

    try:
        assert set(guide_families()) == {*known, "laplace_marginals"}
        for check in CONTRACT:
            check("laplace_marginals", *case)
        model, batch = case
        post = DualRateSVI(model, build_guide("laplace_marginals", model), Fast(steps=3)).infer(
            batch
        )
        assert post.kl_estimator == "monte_carlo"
        assert post.kl().isfinite().all()
    finally:
        del base._FAMILIES["laplace_marginals"]


def test_unknown_names_offer_the_nearest() -> None:
    oracle = make_oracle()
    with pytest.raises(InputError, match="unknown guide 'meanfield': did you mean 'mean_field'"):
        build_guide("meanfield", oracle)
    with pytest.raises(InputError, match="did you mean 'init_log_variance'"):
        build_guide("mean_field", oracle, init_log_var=0.0)
    with pytest.raises(InputError, match="init_log_variance is nan"):
        build_guide("mean_field", oracle, init_log_variance=float("nan"))


def test_mean_field_starts_at_the_prior_or_where_told() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(2)
    for options, expected in (({}, 0.0), ({"init_log_variance": -5.0}, -5.0)):
        guide = build_guide("mean_field", oracle, **options)
        guide.reset(batch)
        assert guide.start_log_variance == expected
        variance = guide.posterior().variance
        EXACT.assert_close(variance.log(), torch.full_like(variance, expected))
        assert not guide.posterior().mean.any()


def test_mean_field_has_no_closed_kl_against_another_prior() -> None:
    oracle = make_oracle()
    guide = build_guide("mean_field", oracle)
    guide.reset(oracle.simulate(2))
    assert guide.kl(dist.Laplace(torch.zeros(2, 2), torch.ones(2, 2)).to_event(2)) is None


def test_a_point_mass_has_no_elbo() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    post = DualRateSVI(oracle, build_guide("delta", oracle), Fast(steps=3)).infer(batch)
    assert not post.has_density
    assert bool(post.kl().isposinf().all())
    assert bool(torch.from_numpy(evaluate(oracle, post, batch)["elbo"].values).isneginf().all())
