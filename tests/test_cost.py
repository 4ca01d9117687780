from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ltm_pyro as ltm
from ltm_pyro.config import PRESETS, Fast, FitConfig, ModelConfig, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics import cost
from ltm_pyro.diagnostics.cost import cost_report, format_cost, paper_flops_per_token
from ltm_pyro.doors import meet
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.latent_thought import LatentThoughtModel

SMALL = ModelConfig(
    vocab_size=64, seq_len=96, n_layers=2, width=32, n_heads=2, mlp_hidden=88, window=8,
    thoughts_per_layer=2, thought_dim=8,
)  # fmt: skip
SHORT = ModelConfig()
VARIANTS = {
    "banded attention": SHORT,
    "full attention": replace(SHORT, window=128),
    "window of one token": replace(SHORT, window=1),
    "ragged blocks": replace(SHORT, seq_len=100, window=30),
}


def batch_for(model: ModelConfig, size: int) -> Batch:
    return Batch(torch.randint(model.vocab_size, (size, model.seq_len)))


@pytest.mark.parametrize("name", PRESETS)
def test_weights_equal_those_of_the_decoder(name: str) -> None:
    with torch.device("meta"):
        model = LatentThoughtModel(PRESETS[name].model)
    assert PRESETS[name].model.n_weights == sum(p.numel() for p in model.decoder.parameters())


@pytest.mark.parametrize(
    ("name", "weights", "gflop"),
    [("ltm-small", 38.4e6, 4.07), ("ltm-medium", 51.0e6, 5.52), ("ltm-large", 76.3e6, 32.2)],
)
def test_paper_presets_give_the_papers_figures(name: str, weights: float, gflop: float) -> None:
    config = PRESETS[name]
    assert config.model.n_weights == pytest.approx(weights, rel=0.01)
    assert paper_flops_per_token(config.model, config.fast) == pytest.approx(gflop * 1e9, rel=0.01)


def counted(config: FitConfig) -> float:
    """FLOPs of one training step as torch counts them, attention by its plain products."""
    model = LatentThoughtModel(config.model)
    svi = DualRateSVI(
        model,
        build_guide("mean_field", model),
        fast=config.fast,
        slow=config.slow,
        elbo=build_objective(config.objective, **config.objective_options),
        execution=ltm.Execution(
            micro_batch=config.micro_batch or None, checkpointing=config.checkpointing
        ),
    )
    batch = batch_for(config.model, config.batch_size)
    meet(model, batch)  # holds a new model to its contract
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        svi.step(batch)
    return counter.get_total_flops() / (config.batch_size * config.model.seq_len)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_flops_equal_those_that_torch_counts(
    name: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Fast(steps=2, noise=noise, fixed_draws=2)  # type: ignore[arg-type]
    config = replace(PRESETS["nano"], model=VARIANTS[name], fast=fast, batch_size=2)
    report = cost_report(config)
    torch_counts = counted(config)
    assert report.flops_training_step == report.flops_fast_loop + report.flops_slow_step
    # Fused attention, which really runs, computes the scores once more in the backward pass; the
    # counter sees the plain one. That product is all that separates the two.
    assert report.flops_training_step == pytest.approx(torch_counts, rel=0.025)
    monkeypatch.setattr(cost, "fused", lambda window, length: False)
    assert cost_report(config).flops_training_step == pytest.approx(torch_counts, rel=0.001)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing": True},
        {"micro_batch": 2},
        {"slow": Slow(word_dropout=0.5)},
        {"objective": "iwae", "objective_options": {"particles": 3}},
        {"model": replace(SMALL, vocab_size=400_000)},  # several chunks of logits
        {"fast": Fast(steps=0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_flops_of_other_ways_to_compute(changes: dict[str, Any]) -> None:
    base = replace(PRESETS["nano"], model=SMALL, fast=Fast(steps=2), batch_size=3)
    config = replace(base, **changes)
    assert cost_report(config).flops_training_step == pytest.approx(counted(config), rel=0.001)


def test_kl_floor_and_its_warning() -> None:
    # Sixteen cosine steps whose rates sum to 3, from log variance -5 to -2: an idle dimension then
    # costs (exp(-2) - 1 + 2) / 2 = 0.57 nats, and there are 12 of them for each token.
    paper = replace(PRESETS["ltm-small"], fast=Fast(steps=16, optimizer="adam", lr=0.34))
    report = cost_report(replace(paper, guide_options={"init_log_variance": -5.0}))
    assert report.kl_floor_per_token == pytest.approx(12 * 0.568, rel=0.02)
    assert report.warning is not None
    assert report.warning in format_cost(report)
    at_prior = cost_report(paper)
    assert at_prior.kl_floor_per_token == 0.0
    assert at_prior.warning is None
    assert "warning" not in format_cost(at_prior)


def test_a_guide_without_variances_has_no_floor() -> None:
    report = cost_report(replace(PRESETS["nano"], guide="delta"))
    assert report.start_log_variance is None
    assert report.kl_floor_per_token == 0.0


def test_unknown_guide_is_named() -> None:
    with pytest.raises(InputError, match="mean_field"):
        cost_report(replace(PRESETS["nano"], guide="meanfield"))


@pytest.mark.parametrize("name", PRESETS)
def test_text_names_every_quantity_with_its_unit(name: str) -> None:
    text = format_cost(cost_report(PRESETS[name]))
    for phrase in ("weights", "per token", "fast loop", "slow step", "paper's count", "KL floor"):
        assert phrase in text
    assert max(map(len, text.splitlines())) <= 100
