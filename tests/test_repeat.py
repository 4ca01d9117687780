"""Fast steps without Pyro's handlers: the same numbers, and only where nobody misses them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from known_models import TINY, make_language_model, make_oracle, make_tokens
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.fast_loop import frozen
from ltm_pyro.inference.guides import LocalGuide, build_guide, guide_families
from ltm_pyro.inference.guides.contract import moved_guide
from ltm_pyro.inference.objectives import (
    OBJECTIVES,
    KLWeight,
    Repeat,
    TermRecorder,
    build_objective,
)
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussian


def _terms(
    model: LatentModel, guide: LocalGuide, batch: Batch, name: str, particles: int
) -> list[Tensor]:
    """An objective, its gradient, its recorded terms, and the random number after them."""
    elbo = build_objective(name, particles=particles)
    torch.manual_seed(0)
    with KLWeight(0.3), TermRecorder() as recorder:
        loss = elbo(model, guide)(batch)
    gradients = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    moves = [g for g in gradients if g is not None]
    return [loss.detach(), *moves, recorder.nll(), recorder.kl(), torch.rand(1)]


@pytest.mark.parametrize("kind", ["oracle", "language"])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("family", guide_families())
def test_the_same_numbers_to_the_bit(family: str, particles: int, kind: str) -> None:
    model: Any = make_oracle() if kind == "oracle" else make_language_model()
    batch = make_tokens(4) if kind == "language" else model.simulate(4)
    guide = moved_guide(family, model, batch)
    for name in OBJECTIVES:
        with frozen(model.parameters()):
            traced = _terms(model, guide, batch, name, particles)
            with Repeat(model.prior()):
                assert Repeat.of(model, guide) is not None
                repeated = _terms(model, guide, batch, name, particles)
        for a, b in zip(traced, repeated, strict=True):
            assert torch.equal(a, b), name


class Listener(Messenger):
    """Another's handler."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        self.sites.append(msg["name"])


class Chatty(LinearGaussian):
    """A program of another's: it notes down when it runs."""

    runs = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.runs += 1
        return super().forward(*args, **kwargs)


def _program_runs(svi: DualRateSVI, batch: Batch) -> int:
    """Times that `infer` calls the guide as a Pyro program."""
    runs = []
    forward = svi.guide.forward
    svi.guide.forward = lambda *args: runs.append(0) or forward(*args)  # type: ignore[method-assign,func-returns-value]
    svi.guide.forward.standard_program = True  # type: ignore[attr-defined]
    svi.infer(batch)
    del svi.guide.forward
    return len(runs)


def test_pyro_runs_the_first_step_alone() -> None:
    model, batch = make_language_model(), make_tokens(4)
    svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=5))
    assert _program_runs(svi, batch) == 1
    assert _program_runs(svi, batch) == 0
    with Listener() as listener:
        assert _program_runs(svi, batch) == 5
    assert listener.sites.count("z") == 2 * 5  # of guide and model
    assert listener.sites.count("x") == 5


@pytest.mark.parametrize(("prior", "runs"), [("standard_normal", 1), ("mixture", 3)])
def test_pyro_runs_the_first_slow_step_alone(prior: str, runs: int) -> None:
    def fit(listen: bool) -> tuple[LatentThoughtModel, list[str]]:
        model = make_language_model(replace(TINY, prior=prior))
        svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=1))
        batch = make_tokens(4)
        svi.infer(batch)  # so that no fast step is left to Pyro
        sites = []
        sample = pyro.sample
        with pytest.MonkeyPatch.context() as patch, Listener() if listen else nullcontext():
            patch.setattr(pyro, "sample", lambda n, *a, **k: sites.append(n) or sample(n, *a, **k))
            for _ in range(3):
                svi.step(batch)
        return model, sites

    model, sites = fit(listen=False)
    expected, all_sites = fit(listen=True)
    assert sites.count("x") == runs
    assert all_sites.count("x") == 3 + 3
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_program_of_its_own_always_runs() -> None:
    oracle = make_oracle()
    own = Chatty(oracle.W, float(oracle.noise_scale), oracle.bias, oracle.thought_shape)
    batch = oracle.simulate(4)
    svi = DualRateSVI(own, build_guide("mean_field", own), Fast(steps=5))
    svi.infer(batch)
    assert own.runs == 5


@pytest.mark.parametrize("hooked", ["model", "guide"])
def test_a_hook_is_called_at_every_step(hooked: str) -> None:
    model, batch = make_language_model(), make_tokens(4)
    guide = build_guide("mean_field", model)
    calls = []
    module: torch.nn.Module = {"model": model, "guide": guide}[hooked]
    module.register_forward_hook(lambda *_: calls.append(0))
    DualRateSVI(model, guide, Fast(steps=5)).infer(batch)
    assert len(calls) == 5
