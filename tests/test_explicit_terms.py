"""The explicit terms of every objective are what Pyro's trace of model and guide scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from known_models import LearnedOracle, make_language_model, make_oracle, make_tokens
from pyro import plate, poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from tolerances import EXACT
from torch import Tensor, nn

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.guides import LocalGuide, guide_families
from ltm_pyro.inference.guides.contract import moved_guide
from ltm_pyro.inference.objectives import OBJECTIVES, PyroElbo, Terms, build_objective
from ltm_pyro.models.base import SITE_X, SITE_Z
from ltm_pyro.random import Drawing, Noise

PARTICLES = 3
WEIGHT = 0.3


def case(kind: str, family: str) -> tuple[Any, LocalGuide, Batch]:
    if kind == "oracle":
        model: Any = LearnedOracle(make_oracle())
        batch = make_oracle().simulate(4)
    else:
        model, batch = make_language_model(), make_tokens(4)
    return model, moved_guide(family, model, batch), batch


class TracedTerms(Terms):
    """The same draws, scored by Pyro: both programs run under its handlers, S at once."""

    def __init__(self, of: Terms) -> None:
        super().__init__(of.model, of.guide, of.prior, of.batch, of.q, of.z, of.weight)
        self.nodes = [self._nodes(self.guide), self._nodes(self.model)]

    def _nodes(self, program: Any) -> dict[str, Any]:
        at_z = poutine.condition(program, {SITE_Z: self.z})
        with plate("particles", len(self.z), dim=-2):
            trace = poutine.trace(at_z).get_trace(self.batch)
        trace.compute_log_prob()
        return dict(trace.nodes)

    @property
    def log_lik(self) -> Tensor:  # type: ignore[override]
        return self.nodes[1][SITE_X]["log_prob"]

    @property
    def _log_prior(self) -> Tensor:  # type: ignore[override]
        return self.nodes[1][SITE_Z]["log_prob"]

    @property
    def _log_q(self) -> Tensor:  # type: ignore[override]
        return self.nodes[0][SITE_Z]["log_prob"]


def value_and_gradient(loss: Tensor, model: nn.Module, guide: LocalGuide) -> list[Tensor]:
    parameters = [*guide.parameters(), *model.parameters()]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("kind", ["oracle", "language"])
@pytest.mark.parametrize("family", guide_families())
def test_explicit_terms_are_those_of_pyros_trace(family: str, kind: str) -> None:
    model, guide, batch = case(kind, family)
    for name in OBJECTIVES:
        objective = build_objective(name, particles=PARTICLES)
        found: list[list[Tensor]] = []
        for kind_of_terms in (lambda terms: terms, TracedTerms):
            draw = Drawing(Noise(0, batch.ids))  # the same draws each time
            terms = kind_of_terms(objective.terms(model, guide, batch, draw, WEIGHT))
            scored = [terms.log_lik, terms.log_prior, terms.log_q()]
            loss = objective.per_sequence(terms).sum()
            found.append([*scored, *value_and_gradient(loss, model, guide)])
        for a, b in zip(*found, strict=True):
            EXACT.assert_close(a, b)


@pytest.mark.parametrize("kind", ["oracle", "language"])
@pytest.mark.parametrize("particles", [1, PARTICLES])
@pytest.mark.parametrize(
    ("name", "options", "theirs", "families"),
    [
        ("elbo", {}, TraceMeanField_ELBO, ["mean_field", "flow", "amortized", "low_rank"]),
        ("beta", {"weight": 0.0}, None, ["mean_field"]),
        ("iwae", {}, 0.0, ["mean_field", "mixture", "flow"]),
        ("renyi", {"alpha": 0.5}, 0.5, ["full_rank", "semi_amortized"]),
        ("elbo", {}, Trace_ELBO, ["mixture", "flow", "delta"]),  # whose KL has no closed form
    ],
)
def test_objectives_are_pyros_own_on_the_same_draws(
    kind: str,
    particles: int,
    name: str,
    options: dict[str, float],
    theirs: Any,
    families: list[str],
) -> None:
    many = particles > 1
    ours = build_objective(name, particles=particles, **options)
    if theirs is None:
        pyros, weight = TraceMeanField_ELBO(particles, vectorize_particles=many), 0.0
    elif isinstance(theirs, float):
        pyros, weight = RenyiELBO(theirs, particles, vectorize_particles=many), WEIGHT
    else:
        pyros, weight = theirs(particles, vectorize_particles=many), WEIGHT
    for family in families:
        model, guide, batch = case(kind, family)
        found = []
        for objective in (ours, PyroElbo(pyros)):
            draw = Drawing(Noise(0, batch.ids))
            loss, terms = objective.descend(model, guide, batch, draw, weight)
            found.append([*value_and_gradient(loss, model, guide), *terms.report()])
        for a, b in zip(*found, strict=True):
            EXACT.assert_close(a, b)
