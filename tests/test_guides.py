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
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.errors import ContractError, InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import (
    LocalGuide,
    MeanField,
    build_guide,
    guide_families,
    register_guide,
)
from ltm_pyro.inference.guides.contract import CONTRACT, check_guide
from ltm_pyro.inference.guides.registry import GUIDES
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.random import Noise, draw

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


@pytest.mark.parametrize("clause", CONTRACT)
@pytest.mark.parametrize("family", guide_families())
def test_contract(family: str, clause: str, case: tuple[LatentModel, Batch]) -> None:
    CONTRACT[clause](family, *case)


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
        check_guide("laplace_marginals", *case)
        model, batch = case
        post = DualRateSVI(model, build_guide("laplace_marginals", model), Fast(steps=3)).infer(
            batch
        )
        assert post.kl_estimator == "analytic"  # torch knows it; `check_guide` holds it to draws
        assert post.kl().isfinite().all()
    finally:
        GUIDES.remove("laplace_marginals")


class Broken(MeanField):
    """A mean field with one thing wrong at a time, told by its name."""

    def posterior(self) -> TorchDistribution:
        scale = torch.exp(0.5 * self.local["log_variance"])
        loc = self.local["loc"]
        if self.family == "reads_others":
            loc = loc + loc.mean(0)
        if self.family == "no_gradient":
            scale = scale.detach()
        return dist.Normal(loc, scale).to_event(2)

    def kl(self, prior: TorchDistribution) -> Tensor | None:
        closed = super().kl(prior)
        return closed + 1.0 if self.family == "wrong_kl" and closed is not None else closed

    def reset(self, batch: Batch) -> None:
        super().reset(batch)
        if self.family == "random_start":
            self.load_rows({n: torch.randn_like(p) for n, p in self.rows().items()})


@pytest.mark.parametrize(
    ("family", "clause"),
    [
        ("reads_others", "no_row_reads_another"),
        ("no_gradient", "every_parameter_gets_a_gradient"),
        ("wrong_kl", "closed_form_kl"),
        ("random_start", "reset_is_eager_and_repeats"),
    ],
)
def test_a_broken_family_breaks_its_clause(family: str, clause: str) -> None:
    oracle = make_oracle()
    register_guide(family)(type(family, (Broken,), {}))
    try:
        with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError):
            CONTRACT[clause](family, oracle, oracle.simulate(4))
        with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError) as caught:
            check_guide(family, oracle, oracle.simulate(4))
        assert f"guide {family!r} breaks" in caught.value.__notes__[0]
    finally:
        GUIDES.remove(family)
    with pytest.raises(InputError, match="at least 3 to permute"):
        check_guide("mean_field", oracle, oracle.simulate(2))


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


def test_the_kl_is_closed_where_torch_knows_it() -> None:
    oracle = make_oracle()
    guide = build_guide("mean_field", oracle)
    guide.reset(oracle.simulate(2))
    zero = torch.zeros(2, 2).double()
    assert guide.kl(dist.StudentT(3.0, zero, 1.0).to_event(2)) is None
    laplace = dist.Laplace(zero, 1.0).to_event(2)
    closed, q = guide.kl(laplace), guide.posterior()
    assert closed is not None
    z = draw(q, Noise(0, torch.arange(2)), 4000)
    terms = q.log_prob(z) - laplace.log_prob(z)
    assert ((terms.mean(0) - closed).abs() < 5 * terms.std(0) / 4000**0.5).all()


def test_a_point_mass_has_no_elbo() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    post = DualRateSVI(oracle, build_guide("delta", oracle), Fast(steps=3)).infer(batch)
    assert not post.has_density
    assert bool(post.kl().isposinf().all())
    assert bool(torch.from_numpy(evaluate(oracle, post, batch)["elbo"].values).isneginf().all())


class NoBatchAxis(MeanField):
    def posterior(self) -> TorchDistribution:
        return dist.Normal(self.local["loc"], 1.0).to_event(3)


def test_a_broken_guide_is_told_with_what_was_found_and_a_class_how_to_be_checked() -> None:
    oracle = make_oracle()
    register_guide("no_batch_axis")(NoBatchAxis)
    try:
        with pytest.raises(ContractError, match="'no_batch_axis' breaks 'shapes'") as caught:
            check_guide("no_batch_axis", oracle, oracle.simulate(4))
    finally:
        GUIDES.remove("no_batch_axis")
    assert "batch shape () and event shape (4, 2, 2)" in str(caught.value)
    assert "rows is 4" in str(caught.value)
    with pytest.raises(InputError, match="register_guide"):
        check_guide(MeanField, oracle, oracle.simulate(4))  # type: ignore[arg-type]
