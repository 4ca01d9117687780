"""Nothing is lost when a step, a disk or another process fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from cli_helpers import write_text

from ltm_pyro.config import CorpusConfig, Fast, FitConfig, ModelConfig
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.control import AutoregressiveFit
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.guides import guide_families
from ltm_pyro.run import Run, create_run, load_run, train, train_control


@pytest.fixture
def config(tmp_path: Path) -> FitConfig:
    """A fit of a second, with one checkpoint at its end."""
    return FitConfig(
        corpus=CorpusConfig(name=str(write_text(tmp_path / "text.txt"))),
        model=ModelConfig(
            seq_len=16, n_layers=1, width=16, n_heads=2, mlp_hidden=16, thought_dim=4, window=4
        ),
        fast=Fast(steps=2),
        steps=4,
        batch_size=4,
        compile=False,
        checkpoint_every=100,
        eval_sequences=5,
        eval_draws=4,
    )


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def spoil_rows(run: Run, number: int) -> None:
    """From slow step `number` on, the rows of the third sequence start out of range."""
    reset = run.guide.reset

    def spoiled(batch):
        reset(batch)
        if run.svi.slow_step >= number:
            for p in dict(run.guide.local_parameters()).values():
                p.data[2] = torch.nan

    run.guide.reset = spoiled


@pytest.mark.parametrize("family", [f for f in guide_families() if f != "amortized"])
def test_every_family_that_leaves_the_numbers_keeps_its_last_step(tmp_path, config, family):
    config = dataclasses.replace(config, guide=family)
    run = create_run(tmp_path / "run", config)
    spoil_rows(run, 3)
    with pytest.raises(NonFiniteError) as caught:
        train(run, run.corpus(), progress=False)
    assert caught.value.step == 3
    assert len(caught.value.ids) == 1
    again = load_run(run.folder)
    assert again.svi.slow_step == 3
    assert again.svi.whole
    for name, value in weights(run).items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize("family", ["low_rank", "full_rank", "mixture"])
def test_a_rate_too_high_is_told_with_the_sequences(tmp_path, config, family):
    fast = Fast(steps=16, lr=1e4, schedule="constant")
    config = dataclasses.replace(config, guide=family, fast=fast, steps=60)
    run = create_run(tmp_path / "run", config)
    with pytest.raises(NonFiniteError, match="lower the learning rates") as caught:
        train(run, run.corpus(), progress=False)
    assert caught.value.ids
    assert load_run(run.folder).svi.slow_step == caught.value.step == run.svi.slow_step


def fail_at(step: int, of: DualRateSVI | AutoregressiveFit, error: Exception, target, name: str):
    """`target.name` raises `error` once, in the step after `step` slow steps."""
    real, done = getattr(target, name), []

    def failing(*args, **kwargs):
        if of.slow_step == step and not done:
            done.append(step)
            raise error
        return real(*args, **kwargs)

    setattr(target, name, failing)


ERRORS = [RuntimeError("a bug"), MemoryError(), KeyError("name"), BrokenPipeError()]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_ends_a_step_the_steps_before_are_kept(tmp_path, config, error, persistent):
    config = dataclasses.replace(config, persistent=persistent, steps=6)
    whole = create_run(tmp_path / "whole", config)
    train(whole, whole.corpus(), progress=False)
    run = create_run(tmp_path / "run", config)
    # After the first part of a batch has left its gradient.
    fail_at(3, run.svi, error, run.svi.clock, "exchange")
    with pytest.raises(type(error)):
        train(run, run.corpus(), progress=False)
    again = load_run(run.folder)
    assert again.svi.slow_step == 3
    train(again, again.corpus(), progress=False)
    train(load_run(run.folder), run.corpus(), progress=False)
    for name, value in weights(whole).items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_a_gradient_left_by_an_error_is_not_added_to(tmp_path, config):
    whole = create_run(tmp_path / "whole", config)
    train(whole, whole.corpus(), progress=False)
    run = create_run(tmp_path / "run", config)
    fail_at(2, run.svi, RuntimeError("a bug"), run.svi.clock, "exchange")
    with pytest.raises(RuntimeError, match="a bug"):
        train(run, run.corpus(), progress=False)
    train(run, run.corpus(), progress=False)
    for name, value in weights(whole).items():
        assert torch.equal(value, run.model.state_dict()[name])


def test_a_step_that_failed_half_way_is_not_saved(tmp_path, config):
    config = dataclasses.replace(config, persistent=True, checkpoint_every=2)
    run = create_run(tmp_path / "run", config)
    fail_at(3, run.svi, RuntimeError("a bug"), run.svi.store, "scatter")
    with pytest.raises(RuntimeError, match="a bug"):
        train(run, run.corpus(), progress=False)
    assert not run.svi.whole
    assert load_run(run.folder).svi.slow_step == 2


def test_the_control_keeps_its_steps_too(tmp_path, config, monkeypatch):
    run = create_run(tmp_path / "run", config)
    train(run, run.corpus(), progress=False)
    fit = run.control()
    fail_at(2, fit, MemoryError(), fit.clock, "exchange")
    monkeypatch.setattr(run, "control", lambda: fit)
    with pytest.raises(MemoryError):
        train_control(run, run.corpus(), progress=False)
    assert load_run(run.folder).control().slow_step == 2
