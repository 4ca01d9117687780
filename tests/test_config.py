"""Configurations check themselves, and the presets are those that the README names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ltm_pyro as ltm
from ltm_pyro.config import PRESETS, FitConfig, from_dict, preset, to_dict


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_a_model_and_scores_with_it(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):  # shapes without memory: the large ones too
        model = ltm.LatentThoughtModel(config.model)
        batch = ltm.Batch(torch.zeros(2, config.model.seq_len, dtype=torch.long))
        z = torch.zeros(2, *model.thought_shape)
        assert model.log_likelihood(z, batch).shape == (2,)
    assert model.thought_shape[0] == config.model.n_layers * config.model.thoughts_per_layer


@pytest.mark.parametrize(
    ("name", "layers", "thoughts", "fast_steps", "millions"),
    [
        ("ltm-small", 3, 24, 16, 38.4),
        ("ltm-medium", 6, 24, 16, 51.0),
        ("ltm-large", 12, 96, 64, 76.3),
    ],
)
def test_paper_presets(
    name: str, layers: int, thoughts: int, fast_steps: int, millions: float
) -> None:
    """Kong et al. (2025), table 1 and appendix: the shapes and the weights."""
    config = preset(name)
    with torch.device("meta"):
        model = ltm.LatentThoughtModel(config.model)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    assert (config.model.n_layers, config.model.n_thoughts) == (layers, thoughts)
    assert config.fast.steps == fast_steps
    assert weights == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_configuration_survives_json(name: str) -> None:
    config = preset(name)
    assert from_dict(FitConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"setps": 3}, "did you mean 'steps'"),
        ({"fast": {"step": 3}}, "did you mean 'fast.steps'"),
        ({"steps": 0}, "above 0"),
        ({"steps": -5}, "above 0"),
        ({"fast": {"steps": -1}}, "0 or more"),
        ({"fast": {"lr": 0}}, "above 0"),
        ({"fast": {"noise": "frsh"}}, "did you mean 'fresh'"),
        ({"fast": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"fast": {"betas": [0.9, 1.0]}}, "below 1"),
        ({"slow": {"kl_hold": 0.8, "kl_full": 0.2}}, "kl_hold"),
        ({"model": {"width": 30, "n_heads": 4}}, "multiple"),
        ({"model": {"window": 0}}, "model.window"),
        ({"model": {"vocab_size": True}}, "whole number"),
        ({"model": {"n_layers": 9 * 10**18}}, "model.n_layers .* at most"),
        ({"eval_draws": 10**5000}, "eval_draws .* at most"),
        ({"fast": 3}, "fast is 3: must be a group"),
        ({"model": None}, "model is None: must be a group"),
        ({"corpus": "x"}, "corpus is 'x': must be a group"),
        ({"guide_options": [1]}, "guide_options .* must be a group"),
        ({"model": {"prior_options": {1: 2}}}, "model.prior_options"),
        ({"corpus": {"options": {"a": object()}}}, "corpus.options"),
        ({"device": 3}, "device is 3: must be a text"),
        ({1: 2}, "key 1: must be a text"),
    ],
)
def test_what_cannot_run_cannot_be_configured(values: dict[str, object], words: str) -> None:
    with pytest.raises(ltm.InputError, match=words):
        from_dict(FitConfig, values)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ltm.Fast(lr="a"), "fast.lr is 'a': must be a number above 0"),
        (lambda: ltm.Fast(lr=float("nan")), "fast.lr is nan"),
        (lambda: ltm.Fast(steps=1.5), "fast.steps is 1.5: must be a whole number"),
        (lambda: ltm.Fast(steps="3"), "fast.steps is '3'"),
        (lambda: ltm.Fast(betas=(0.9,)), "fast.betas .* two numbers from 0 to below 1"),
        (lambda: ltm.Fast(stps=3), "did you mean 'fast.steps'"),
        (lambda: ltm.Slow(lr=torch.tensor(1.0)), "slow.lr is tensor"),
        (lambda: ltm.FitConfig(corpus="x"), "corpus is 'x'"),
        (lambda: ltm.FitConfig(seed=-1), "seed is -1: must be a whole number, 0 or more"),
        (lambda: ltm.FitConfig(compile=1), "compile is 1: must be true or false"),
    ],
)
def test_settings_made_in_python_name_the_field(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ltm.InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(ltm.InputError, match="did you mean 'nano'"):
        ltm.LatentThoughtModel.from_preset("nanno")
    with pytest.raises(ltm.InputError, match="did you mean 'width'"):
        ltm.LatentThoughtModel.from_preset("nano", widht=3)


def test_a_schedule_of_ones_own_runs_but_is_not_written_down() -> None:
    fast = ltm.Fast(schedule=lambda step, total: 1.0 - step / total)
    with pytest.raises(ltm.InputError, match="named schedules"):
        to_dict(FitConfig(fast=fast))


def test_settings_refer_to_what_exists() -> None:
    # `fit --help` shows these docstrings; one named a function that was never written.
    root = Path(ltm.__file__).parent
    named = set(re.findall(r"see `(\w+)`", (root / "config.py").read_text()))
    code = "\n".join(path.read_text() for path in root.rglob("*.py"))
    assert "score_on_own_draws" in named
    assert [n for n in named if not re.search(rf"^(class|def) {n}\b", code, re.MULTILINE)] == []
