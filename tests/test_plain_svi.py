"""Model and guide are ordinary Pyro programs: `pyro.infer.SVI` trains both."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pyro
import pytest
import torch
from known_models import LearnedOracle, make_language_model, make_oracle, make_tokens
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from ltm_pyro.config import Fast
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.objectives import build_objective

STEPS = 8


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    pyro.clear_param_store()


def unmoved(before: dict[str, torch.Tensor], module: nn.Module) -> list[str]:
    now = module.state_dict()
    return [name for name, value in before.items() if torch.equal(value, now[name])]


def svi_of(model: nn.Module, guide: object, loss: ELBO) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        build_objective("elbo"),
        build_objective("iwae", particles=2),
    ],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("family", ["mean_field", "full_rank", "amortized", "AutoNormal"])
def test_every_weight_of_model_and_guide_moves_and_the_loss_falls(family: str, loss: ELBO) -> None:
    model, batch = make_language_model(), make_tokens(4)
    guide = AutoNormal(model) if family == "AutoNormal" else build_guide(family, model)
    svi = svi_of(model, guide, copy.copy(loss))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [svi.step(batch)]
    start = {name: p.detach().clone() for name, p in guide.named_parameters()}
    losses += [svi.step(batch) for _ in range(STEPS)]
    assert unmoved(weights, model) == []
    assert unmoved(start, guide) == []
    # In nats over 41 tokens; the noise of a step is about 5.
    assert sum(losses[-3:]) / 3 < losses[0] - 5


def test_frozen_weights_stay_and_two_models_keep_apart() -> None:
    oracles = [LearnedOracle(make_oracle(seed=seed)) for seed in (0, 1)]
    batch = make_oracle().simulate(3)
    starts = [oracle.bias.detach().clone() for oracle in oracles]
    for oracle in oracles:
        svi_of(oracle, build_guide("mean_field", oracle), Trace_ELBO()).step(batch)
    for oracle, start in zip(oracles, starts, strict=True):
        assert not torch.equal(oracle.bias, start)
    oracles[0].bias.requires_grad_(False)
    kept = oracles[0].bias.clone()
    svi_of(oracles[0], build_guide("mean_field", oracles[0]), Trace_ELBO()).step(batch)
    assert torch.equal(oracles[0].bias, kept)


def test_one_batch_for_local_rows_and_any_for_an_encoder() -> None:
    oracle = LearnedOracle(make_oracle())
    first, other = (oracle.simulate(4).select(rows) for rows in (slice(0, 3), slice(1, 4)))
    local = build_guide("mean_field", oracle)
    svi = svi_of(oracle, local, Trace_ELBO())
    svi.step(first)
    with pytest.raises(InputError, match=r"other sequences.*DualRateSVI.*reset"):
        svi.step(other)
    local.reset(other)
    svi.step(other)
    encoder = build_guide("amortized", oracle)
    svi = svi_of(oracle, encoder, Trace_ELBO())
    for batch in (first, other, other.select(slice(0, 2))):
        svi.step(batch)
        assert encoder.n_rows == len(batch)


def test_a_posterior_is_not_moved_by_what_trains_its_guide_later() -> None:
    oracle = LearnedOracle(make_oracle())
    batch = oracle.simulate(3)
    guide = build_guide("mean_field", oracle)
    post = DualRateSVI(oracle, guide, Fast(steps=3)).infer(batch)
    mean = post.mean.clone()
    svi = svi_of(oracle, guide, Trace_ELBO())
    svi.step(batch)
    assert torch.equal(post.mean, mean)
    assert not torch.equal(guide.posterior().mean, mean)


def test_nothing_else_touches_pyro_s_global_store() -> None:
    model, batch = make_language_model(), make_tokens(3)
    guide = build_guide("amortized", model)
    svi = DualRateSVI(model, guide, Fast(steps=2))
    svi.step(batch)
    svi.infer(batch)
    pyro.poutine.trace(model).get_trace(batch)
    assert list(pyro.get_param_store().keys()) == []
