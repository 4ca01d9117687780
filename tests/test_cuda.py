"""On a GPU: the numbers are those of the CPU, and nothing stays behind on another device.

Noise is a function of the sequence and not of the device, so that what a GPU computes differs by
rounding alone. Without a GPU these tests are skipped; `benchmarks/gpu.py` runs them first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cli_helpers import write_text

import ltm_pyro as ltm
from ltm_pyro.config import CorpusConfig, Fast, FitConfig, ModelConfig
from ltm_pyro.run import Interrupted, create_run, load_run, train

DEVICE = os.environ.get("LTM_PYRO_TEST_DEVICE", "cuda")
"""Another device lets one try the tests themselves, e.g. `cpu`."""

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="this machine has no GPU"
    ),
]
CONFIG = ModelConfig(
    vocab_size=16, seq_len=32, n_layers=2, width=32, n_heads=2, mlp_hidden=64, window=8,
    thoughts_per_layer=2, thought_dim=8,
)  # fmt: skip
RELATIVE = 1e-4
"""Of sums in single precision taken in another order, over a dozen steps."""


def tokens(rows: int = 6) -> ltm.Batch:
    x = torch.randint(16, (rows, 32), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, 32, dtype=torch.bool)
    mask[1, 20:] = False
    return ltm.Batch(x, mask)


def fitted(device: str, family: str, steps: int = 3) -> ltm.DualRateSVI:
    torch.manual_seed(0)
    model = ltm.LatentThoughtModel(CONFIG).to(device)
    guide = ltm.build_guide(family, model)
    svi = ltm.DualRateSVI(model, guide, Fast(steps=4), ltm.Slow(lr=1e-3), seed=3)
    svi.fit(tokens(), steps=steps, batch_size=4, progress=False)
    return svi


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return bool((found - expected).norm() <= RELATIVE * expected.norm())


@pytest.mark.parametrize("family", ["mean_field", "low_rank", "full_rank", "flow"])
def test_a_fit_and_inference_have_the_numbers_of_the_cpu(family: str) -> None:
    there, here = fitted(DEVICE, family), fitted("cpu", family)
    for row, expected in zip(there.metrics, here.metrics, strict=True):
        assert row["elbo"] == pytest.approx(expected["elbo"], rel=RELATIVE)
    weights = zip(there.model.parameters(), here.model.parameters(), strict=True)
    assert all(near(a, b) for a, b in weights)
    q, expected_q = there.infer(tokens()), here.infer(tokens())
    assert q.mean.device.type == torch.device(DEVICE).type
    assert near(q.mean, expected_q.mean)
    scores, expected_scores = (
        ltm.evaluate(svi.model, svi.infer(tokens()), tokens(), draws=32) for svi in (there, here)
    )
    for name in ("elbo", "iw_bound", "nll_z0", "nll_shuffled"):
        difference = abs(scores[name] - expected_scores[name])
        assert bool((difference <= RELATIVE * abs(expected_scores[name])).all()), name


def test_a_text_is_the_text_of_the_cpu() -> None:
    texts = []
    for device in (DEVICE, "cpu"):
        svi = fitted(device, "mean_field")
        corpus = ltm.load_corpus("mixture", seq_len=32)
        texts.append(ltm.generate(svi.model, corpus.tokenizer, n=2, seed=5, svi=svi, length=12))
    assert texts[0] == texts[1]


def test_bf16_changes_the_rounding_alone() -> None:
    model = fitted(DEVICE, "mean_field", steps=10).model
    plain, coarse = (
        ltm.DualRateSVI(
            model, ltm.build_guide("mean_field", model), Fast(steps=4), execution=execution
        )
        for execution in (None, ltm.Execution(precision="bf16"))
    )
    a, b = plain.infer(tokens()), coarse.infer(tokens())
    # bf16 has eight bits: products of order one are off by up to 0.4 %.
    assert float((a.mean - b.mean).norm() / a.mean.norm()) < 0.05
    assert not torch.equal(a.mean, b.mean)


def test_a_killed_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = FitConfig(
        corpus=CorpusConfig(name=str(write_text(tmp_path / "text.txt", blocks=14))),
        model=ModelConfig(seq_len=32, n_layers=1, width=16, n_heads=2, mlp_hidden=16),
        fast=Fast(steps=2),
        steps=6,
        batch_size=4,
        compile=False,
        control=False,
        device=DEVICE,
    )
    whole = create_run(tmp_path / "whole", config)
    train(whole, whole.corpus(), progress=False)
    run = create_run(tmp_path / "halved", config)
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, after_step=lambda row: row["step"] == 3)
    again = load_run(tmp_path / "halved")
    train(again, again.corpus(), progress=False)
    expected = dict(whole.model.named_parameters())
    for name, value in again.model.named_parameters():
        assert torch.equal(value, expected[name]), name
