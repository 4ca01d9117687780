"""Seeding: the noise of a purpose is its own, and everything else is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ltm_pyro.random import Stream, derive_seed, seeded

CPU = torch.device("cpu")


def test_the_same_seed_draws_the_same_and_the_generator_is_put_back() -> None:
    before = torch.get_rng_state()
    with seeded(3, CPU):
        first = torch.randn(5)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3, CPU):
        assert torch.equal(torch.randn(5), first)
    with seeded(4, CPU):
        assert not torch.equal(torch.randn(5), first)


def test_the_generator_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="Trying to create tensor"), seeded(3, CPU):
        torch.randn(torch.randint(1, 5, ()), -1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_program_on_the_cpu_leaves_accelerators_generators_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"seeded an accelerator with {seed}")

    for module in (torch.cuda, torch.xpu, torch.mps):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    with pytest.raises(AssertionError, match="accelerator"):
        torch.manual_seed(3)  # what `seeded` must not do
    with seeded(3, CPU):
        drawn = torch.randn(5)
    assert torch.equal(drawn, torch.randn(5, generator=torch.Generator().manual_seed(3)))


def test_streams_and_steps_have_seeds_of_their_own() -> None:
    seeds = [derive_seed(seed, s, step) for seed in (0, 1) for s in Stream for step in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < np.iinfo(np.int64).max for seed in seeds)
