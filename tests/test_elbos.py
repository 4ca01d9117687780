"""Any Pyro ELBO drives the two clocks, and each has the gradient that its formula has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from known_models import (
    LearnedOracle,
    exact_elbo,
    loss_on_noise,
    make_language_model,
    make_oracle,
    make_tokens,
)
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.inference.objectives import PyroElbo
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.random import Drawing, Noise, draw

PARTICLES = 3


class MinusLogJoint(ELBO):  # type: ignore[misc]  # Pyro is untyped
    """A custom objective: -log p(x, z) without the entropy."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        joint = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args, **kwargs)
        return joint, guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any) -> Tensor:
        joints = [joint for joint, _ in self._get_traces(model, guide, args, {})]
        return -sum(joint.log_prob_sum() for joint in joints) / self.num_particles


ELBOS: dict[str, Callable[[], ELBO]] = {
    "mean field": TraceMeanField_ELBO,
    "trace": Trace_ELBO,
    "particles in a loop": lambda: Trace_ELBO(num_particles=PARTICLES),
    "particles at once": lambda: TraceMeanField_ELBO(PARTICLES, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=PARTICLES),
    "renyi at once": lambda: RenyiELBO(0, PARTICLES, vectorize_particles=True),
    "custom": lambda: MinusLogJoint(num_particles=PARTICLES),
}


@pytest.mark.parametrize("name", ELBOS)
@pytest.mark.parametrize("kind", ["oracle", "language"])
def test_any_elbo_plugs_in(name: str, kind: str) -> None:
    if kind == "oracle":
        model, batch = LearnedOracle(make_oracle()), make_oracle().simulate(3)
    else:
        model, batch = make_language_model(), make_tokens(3)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), Fast(steps=20, lr=0.3), Slow(), elbo=ELBOS[name]()
    )
    post = svi.infer(batch)
    # The first call is not special: an ELBO that inspects the model must not use up its noise.
    assert torch.equal(svi.infer(batch).mean, post.mean)
    assert post.trace is not None
    assert post.trace.nll.shape == post.trace.kl.shape == (20, 3)
    if isinstance(model, LinearGaussian):
        start = exact_elbo(model, model.prior().expand(torch.Size([3])), batch)
        assert exact_elbo(model, post.distribution, batch).mean() > start.mean() + 5
    row = svi.step(batch)
    assert row["elbo"] == pytest.approx(-row["nll"] - row["kl"])
    assert math.isfinite(row["objective"])


def _set_up() -> tuple[LinearGaussian, LocalGuide, Batch]:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    guide = build_guide("mean_field", oracle)
    guide.reset(batch)
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return oracle, guide, batch


def _value_and_gradient(loss: Tensor, guide: LocalGuide) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(guide.parameters()))]


def _log_weights(oracle: LinearGaussian, guide: LocalGuide, batch: Batch, weight: float) -> Tensor:
    """log p(x | z) + weight * (log p(z) - log q(z)) at reparametrised draws, (P, B)."""
    q = guide.posterior()
    z = draw(q, Noise(0, batch.ids), PARTICLES)
    kl = q.log_prob(z) - oracle.prior().log_prob(z)
    return oracle.log_likelihood(z, batch) - weight * kl


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_renyi_is_the_importance_weighted_bound_by_hand(
    vectorized: bool, alpha: float, weight: float
) -> None:
    oracle, guide, batch = _set_up()
    elbo = PyroElbo(
        RenyiELBO(alpha, PARTICLES, max_plate_nesting=1, vectorize_particles=vectorized)
    )
    ours = _value_and_gradient(loss_on_noise(elbo, oracle, guide, batch, weight), guide)
    log_w = _log_weights(oracle, guide, batch, weight)
    # alpha = 0 is the importance-weighted bound of Burda et al. (2016).
    bound = ((1 - alpha) * log_w).logsumexp(0) - math.log(PARTICLES)
    by_hand = _value_and_gradient(-bound.sum() / (1 - alpha), guide)
    for a, b in zip(ours, by_hand, strict=True):
        EXACT.assert_close(a, b)


def test_renyi_agrees_with_pyros_own_loss() -> None:
    oracle, guide, batch = _set_up()
    theirs = RenyiELBO(0.0, PARTICLES, max_plate_nesting=1)
    torch.manual_seed(0)
    expected = theirs.loss(oracle, guide, batch)
    torch.manual_seed(0)
    assert PyroElbo(theirs)(oracle, guide)(batch).item() == pytest.approx(expected)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["trace", "closed kl"])
def test_kl_weight_scales_the_kl_and_nothing_else(elbo: ELBO, weight: float) -> None:
    oracle, guide, batch = _set_up()
    ours = _value_and_gradient(loss_on_noise(PyroElbo(elbo), oracle, guide, batch, weight), guide)
    q = guide.posterior()
    z = draw(q, Noise(0, batch.ids), 1)[0]
    kl = guide.kl(oracle.prior())
    if isinstance(elbo, Trace_ELBO) and not isinstance(elbo, TraceMeanField_ELBO):
        kl = q.log_prob(z) - oracle.prior().log_prob(z)
    assert kl is not None
    loss = weight * kl.sum() - oracle.log_likelihood(z, batch).sum()
    for a, b in zip(ours, _value_and_gradient(loss, guide), strict=True):
        EXACT.assert_close(a, b)


@pytest.mark.parametrize("vectorized", [False, True])
def test_recorded_terms_are_those_of_the_elbo(vectorized: bool) -> None:
    oracle, guide, batch = _set_up()
    elbo = Trace_ELBO(PARTICLES, max_plate_nesting=1, vectorize_particles=vectorized)
    loss, terms = PyroElbo(elbo).descend(oracle, guide, batch, Drawing(Noise(0, batch.ids)))
    assert terms.log_lik.shape == (PARTICLES, len(batch))
    EXACT.assert_close(-terms.log_weight().detach().mean(0).sum(), loss.detach())
    EXACT.assert_close(terms.log_lik, oracle.log_likelihood(terms.z, batch))


def test_gradient_with_particles_estimates_the_exact_one() -> None:
    oracle, guide, batch = _set_up()
    loc, log_variance = (guide.local[name] for name in ("loc", "log_variance"))
    error = batch.observed - oracle.bias - loc.flatten(1) @ oracle.W.T
    squares = error.square() + log_variance.exp().flatten(1) @ oracle.W.T.square()
    kl = guide.kl(oracle.prior())
    assert kl is not None
    exact = torch.autograd.grad(
        0.5 * squares.sum() / oracle.noise_scale**2 + kl.sum(), list(guide.parameters())
    )
    loss = TraceMeanField_ELBO()(oracle, guide)
    repeats = [torch.autograd.grad(loss(batch), list(guide.parameters())) for _ in range(400)]
    for i, expected in enumerate(exact):
        draws = torch.stack([gradient[i] for gradient in repeats])
        MC.assert_close(draws.mean(0), draws.std(0) / 20 + 1e-12, expected, draws=400)


def test_an_object_without_a_gradient_is_refused() -> None:
    class NoGradient(ELBO):  # type: ignore[misc]
        def _get_trace(self, *args: Any) -> Any:
            raise NotImplementedError

    oracle = make_oracle()
    with pytest.raises(InputError, match="NoGradient has no differentiable_loss"):
        DualRateSVI(oracle, build_guide("mean_field", oracle), elbo=NoGradient())


def test_the_global_parameter_store_stays_empty() -> None:
    model = make_language_model()
    svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=2))
    svi.step(make_tokens(2))
    assert len(pyro.get_param_store()) == 0
