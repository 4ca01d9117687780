from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ltm_pyro.config import PRESETS, Fast, FitConfig, ModelConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics import cost
from ltm_pyro.diagnostics.cost import (
    activation_bytes,
    cost_report,
    count_weights,
    format_cost,
    paper_flops_per_token,
)
from ltm_pyro.errors import InputError
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel

SMALL = ModelConfig(
    vocab_size=64, seq_len=96, n_layers=2, width=32, n_heads=2, mlp_hidden=88, window=8,
    thoughts_per_layer=2, thought_dim=8,
)  # fmt: skip
SHORT = replace(PRESETS["nano"].model, seq_len=128)
VARIANTS = {
    "nano": SHORT,
    "full attention": replace(SHORT, window=128),
    "window of one token": replace(SHORT, window=1),
    "ragged blocks": replace(SHORT, seq_len=100, window=30),
}


def batch_for(model: ModelConfig, size: int) -> Batch:
    return Batch(torch.randint(model.vocab_size, (size, model.seq_len)))


@pytest.mark.parametrize("name", PRESETS)
def test_weights_equal_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = LatentThoughtModel(PRESETS[name].model)
    assert count_weights(PRESETS[name].model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "weights", "gflop"),
    [("ltm-small", 38.4e6, 4.07), ("ltm-medium", 51.0e6, 5.52), ("ltm-large", 76.3e6, 32.2)],
)
def test_paper_presets_give_the_papers_figures(name: str, weights: float, gflop: float) -> None:
    config = PRESETS[name]
    assert count_weights(config.model) == pytest.approx(weights, rel=0.01)
    assert paper_flops_per_token(config.model, config.fast) == pytest.approx(gflop * 1e9, rel=0.01)


def counted(step: FitConfig, fast_steps: int) -> float:
    """FLOPs of one training step as torch counts them, attention by its plain products."""
    model = LatentThoughtModel(step.model)
    guide = build_guide("mean_field", model)
    svi = DualRateSVI(model, guide, fast=replace(step.fast, steps=fast_steps))
    batch = batch_for(step.model, step.batch_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        svi.step(batch)
    return counter.get_total_flops() / (step.batch_size * step.model.seq_len)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_flops_equal_those_that_torch_counts(
    name: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = Fast(steps=2, noise=noise, fixed_draws=2)  # type: ignore[arg-type]
    config = replace(PRESETS["nano"], model=VARIANTS[name], fast=fast, batch_size=2)
    report = cost_report(config)
    torch_counts = counted(config, 2)
    assert report.flops_training_step == report.flops_fast_loop + report.flops_slow_step
    # Fused attention, which really runs, computes the scores once more in the backward pass; the
    # counter sees the plain one. That product is all that separates the two.
    assert report.flops_training_step == pytest.approx(torch_counts, rel=0.025)
    monkeypatch.setattr(cost, "_ATTENTION_BACKWARD", 4)
    assert cost_report(config).flops_training_step == pytest.approx(torch_counts, rel=0.005)


def test_logits_in_chunks_are_computed_twice() -> None:
    config = replace(
        PRESETS["nano"], model=replace(SMALL, vocab_size=50_000), fast=Fast(steps=1), batch_size=2
    )
    assert cost_report(config).flops_training_step == pytest.approx(counted(config, 1), rel=0.02)


def saved_bytes(model: LatentThoughtModel, batch: Batch, z: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd keeps, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.log_likelihood(z, batch).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["nano", "tiny", *list(VARIANTS)[1:]])
def test_activation_memory_is_what_autograd_keeps(name: str) -> None:
    config = VARIANTS[name] if name in VARIANTS else PRESETS[name].model
    model, size = LatentThoughtModel(config), 2
    batch = batch_for(config, size)
    z = torch.randn(size, *model.thought_shape)
    slow = saved_bytes(model, batch, z)
    assert activation_bytes(config, size) == pytest.approx(slow, rel=0.05)
    model.requires_grad_(False)
    fast = saved_bytes(model, model.prepare(batch), z.requires_grad_())
    assert activation_bytes(config, size, fast=True) == pytest.approx(fast, rel=0.05)
    assert fast < slow


def test_kl_floor_and_its_warning() -> None:
    # Sixteen cosine steps whose rates sum to 3, from log variance -5 to -2: an idle dimension then
    # costs (exp(-2) - 1 + 2) / 2 = 0.57 nats, and there are 12 of them for each token.
    paper = replace(PRESETS["ltm-small"], fast=Fast(steps=16, lr=0.34))
    report = cost_report(replace(paper, guide_options={"init_log_variance": -5.0}))
    assert report.kl_floor_per_token == pytest.approx(12 * 0.568, rel=0.02)
    assert report.warning is not None
    assert report.warning in format_cost(report)
    assert cost_report(paper, start_log_variance=-5.0) == report
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
    for phrase in (
        "weights",
        "per token",
        "fast loop",
        "slow step",
        "paper's count",
        "KL floor",
        "B",
    ):
        assert phrase in text
    assert max(map(len, text.splitlines())) <= 100
