"""The peak memory that is told before a fit is the one that the fit then has."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.cli import main
from ltm_pyro.config import PRESETS, Fast, FitConfig, ModelConfig, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics import memory
from ltm_pyro.diagnostics.cost import cost_report
from ltm_pyro.diagnostics.memory import LEAST_SHARE, measured_bytes, memory_report
from ltm_pyro.engine.kernels.vocabulary import MOST_LOGITS
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide, guide_families
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.priors import prior_names
from ltm_pyro.run.limits import refuse_oversize

NANO = ModelConfig(
    vocab_size=256, seq_len=96, n_layers=2, width=64, n_heads=4, mlp_hidden=172, window=8,
    thoughts_per_layer=2, thought_dim=8,
)  # fmt: skip
FIT = FitConfig(model=NANO, fast=Fast(steps=2), batch_size=4)
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "memory.py"


def svi_for(config: FitConfig) -> DualRateSVI:
    model = LatentThoughtModel(config.model)
    return DualRateSVI(
        model,
        build_guide(config.guide, model, **config.guide_options),
        fast=config.fast,
        slow=config.slow,
        elbo=build_objective(config.objective, **config.objective_options),
        execution=ltm.Execution(
            precision=config.precision,
            micro_batch=config.micro_batch or None,
            checkpointing=config.checkpointing,
        ),
    )


def tokens(config: FitConfig) -> Batch:
    return Batch(torch.randint(config.model.vocab_size, (config.batch_size, config.model.seq_len)))


def measured(config: FitConfig) -> tuple[int, int]:
    """(peak, before) in bytes of tensors of a real training step, not the first."""
    svi, batch = svi_for(config), tokens(config)
    svi.step(batch)
    moments = [m for s in svi.clock.optimizer.state.values() for m in s.values()]
    with LiveTensors(*svi.clock.parameters, *moments) as live:
        stays = live.live_bytes
        live.add(batch.observed, batch.mask)
        svi.step(batch)
    return live.peak_bytes, stays


QUICK: list[dict[str, Any]] = [
    {},
    {"micro_batch": 3, "checkpointing": True},
    {"guide": "semi_amortized", "precision": "bf16"},
]
THOROUGH: list[dict[str, Any]] = [
    {"checkpointing": True},
    {"micro_batch": 1},
    {"precision": "bf16"},
    {"model": replace(NANO, window=96)},
    {"model": replace(NANO, window=80)},
    {"model": replace(NANO, prior="mixture")},
    {"model": replace(NANO, prior="flow"), "guide": "flow"},
    {"objective": "iwae", "objective_options": {"particles": 3}},
    {"slow": Slow(word_dropout=0.3)},
    {"fast": Fast(steps=2, noise="fixed", fixed_draws=2)},
    *({"guide": family} for family in guide_families()),
    *({"model": replace(NANO, prior=name)} for name in prior_names()),
]


@pytest.mark.parametrize(
    "changes",
    [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in THOROUGH)],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_real_step_stays_below_the_formula(changes: dict[str, Any]) -> None:
    """The tensors' part; and no size is refused that would fit."""
    config = replace(FIT, eval_sequences=1, eval_draws=2, **changes)
    told, real = memory_report(config).tensor_bytes, measured(config)[0]
    assert real <= told <= 2.6 * real
    refuse_oversize(config, most=real)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    config = replace(FIT, batch_size=64)
    with pytest.raises(InputError, match=r"batch_size is 64.* at most \d\d fit"):
        refuse_oversize(config, most=LEAST_SHARE * memory.decoder_bytes(config) / 2)
    with pytest.raises(InputError, match="choose a smaller model"):
        refuse_oversize(config, most=1e6)


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"checkpointing": True}, 0.8), ({"micro_batch": 1}, 0.5), ({"precision": "bf16"}, 0.9)],
    ids=str,
)
def test_saving_memory_saves_memory(changes: dict[str, Any], share: float) -> None:
    # What is saved are activations; on few rows the fast loop's arranged weights weigh as much.
    fit = replace(FIT, batch_size=8)
    assert measured(replace(fit, **changes))[0] < share * measured(fit)[0]


def test_the_process_is_told_apart_from_the_tensors() -> None:
    report = memory_report(replace(FIT, compile=False))
    compiled = memory_report(replace(FIT, compile=True))
    around = report.process_bytes + report.allocator_bytes
    assert report.peak_bytes == report.tensor_bytes + around
    assert compiled.process_bytes > report.process_bytes
    assert compiled.tensor_bytes == report.tensor_bytes


def test_draws_that_are_scored_count_where_they_are_more() -> None:
    few, many = (memory_report(replace(FIT, eval_draws=n)) for n in (2, 100_000))
    assert few.tensor_bytes == few.weights_bytes + few.activations_bytes + few.rows_bytes
    assert many.tensor_bytes == many.weights_bytes + many.scoring_bytes


def test_unknown_objective_is_named() -> None:
    with pytest.raises(InputError, match="elbo"):
        memory_report(replace(FIT, objective="elb"))


def fast_loop_bytes(vocab_size: int) -> int:
    """Beyond the weights, at the worst moment of a real fast loop."""
    config = replace(FIT, model=replace(NANO, vocab_size=vocab_size, width=16, mlp_hidden=24))
    svi, batch = svi_for(config), tokens(config)
    with LiveTensors(*svi.clock.parameters, batch.observed, batch.mask) as live:
        before = live.live_bytes
        svi.infer(batch)
    return live.peak_bytes - before


def test_the_fast_loop_holds_few_logits_of_a_large_vocabulary() -> None:
    large, larger = (fast_loop_bytes(v) for v in (256_000, 512_000))
    assert FIT.batch_size * NANO.seq_len * 256_000 > 2 * MOST_LOGITS
    assert larger <= large + 4 * MOST_LOGITS


def test_live_tensors_counts_storages_once_and_forgets_the_dead() -> None:
    held = torch.zeros(100)
    with LiveTensors(held) as live:
        assert live.live_bytes == 400
        a = torch.ones(1000)
        views = a.view(10, 100), a[::2], held[:5], a.add_(1.0)
        assert live.live_bytes == 4400
        b = a * 2.0
        assert live.live_bytes == 8400
        del a, views
        assert live.live_bytes == 4400
        c: Tensor = b.half()
        assert live.live_bytes == 6400
    assert live.peak_bytes == 8400
    assert c.numel() == 1000
    del b
    assert live.live_bytes == 2400


def test_cost_takes_the_settings_of_a_fit(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*options: str) -> dict[str, Any]:
        assert main(["cost", "mixture", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    told_of = told("--no-compile", "--micro_batch", "2", "--checkpointing", "--model.seq_len=32")
    config = replace(
        PRESETS["mixture"], compile=False, micro_batch=2, checkpointing=True,
        model=replace(PRESETS["mixture"].model, seq_len=32),
    )  # fmt: skip
    assert told_of["memory"] == memory_report(config).as_dict()
    assert told_of["flops_slow_step"] == cost_report(config).flops_slow_step


def test_the_formula_allocates_nothing_of_what_it_counts() -> None:
    long = replace(FIT, model=replace(NANO, seq_len=10**8))
    assert memory_report(long).activations_bytes > 4 * 10**8
    with pytest.raises(InputError, match=r"2000000000 thoughts of 8: .*choose fewer"):
        memory_report(replace(FIT, model=replace(NANO, thoughts_per_layer=10**9)))


def test_a_step_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"the measured step failed: .*smaller settings"):
        measured_bytes(replace(FIT, guide="full_rank", batch_size=10**9))


@pytest.mark.slow
def test_resident_memory_is_what_cost_says() -> None:
    """In processes of their own: below the formula, and within 15 % of `cost --measure`."""
    out = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--json", "-"],
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    cases = json.loads(out)["cases"]
    assert len(cases) >= 4
    for case in cases:
        real = case["trained_bytes"]
        assert 0.4 * case["formula_bytes"] <= real <= case["formula_bytes"], case["case"]
        assert case["measured_bytes"] == pytest.approx(real, rel=0.15), case["case"]
