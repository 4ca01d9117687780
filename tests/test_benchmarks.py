"""The loops that the benchmark compares solve the same problem; its output is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fast_loop
import pytest
import torch
from lean_loop import LeanLoop, gradient, noise_of
from loop_memory import peak_bytes
from loop_scaling import axis_points, linearity
from matrix_rate import fast_step_products
from published_loop import PublishedLoop, published_likelihood
from speed_tables import block
from tolerances import EXACT

import ltm_pyro as ltm
from ltm_pyro.diagnostics.cost import cost_report
from ltm_pyro.engine.execution import frozen
from ltm_pyro.random import Drawing, Noise


def small_model(**overrides: Any) -> ltm.LatentThoughtModel:
    """Thoughts matter from the start."""
    shape = {"seq_len": 24, "width": 16, "n_heads": 2, "mlp_hidden": 24, "n_layers": 2}
    model = ltm.LatentThoughtModel.from_preset("nano", **{**shape, "thought_dim": 4, **overrides})
    for name, p in model.named_parameters():
        if name.endswith("cross_attention.out.weight"):
            torch.nn.init.normal_(p, std=0.3)
    return model


def ragged_batch() -> ltm.Batch:
    """Three sequences of unequal length."""
    mask = torch.arange(24) < torch.tensor([24, 17, 9])[:, None]
    return ltm.Batch(torch.randint(0, 256, (3, 24)), mask)


@pytest.mark.parametrize("window", [1, 5, 24])
def test_published_likelihood_is_the_models(window: int) -> None:
    model, batch = small_model(window=window), ragged_batch()
    z = torch.randn(3, *model.thought_shape)
    published = published_likelihood(model.decoder, batch.observed, batch.mask)(z)
    expected = model.log_likelihood(z, batch)
    assert ((published - expected).abs() <= 1e-5 * expected.abs()).all()


@pytest.mark.parametrize("prior", ["standard_normal", "mixture"])
def test_published_loop_and_dual_rate_agree_on_the_same_noise(prior: str) -> None:
    """With fixed noise both use plain Adam, so the fitted parameters are the same numbers."""
    model, batch = small_model(prior=prior), ragged_batch()
    fast, slow = ltm.Fast(steps=6, optimizer="adam", lr=0.1, noise="fixed"), ltm.Slow()
    guide = ltm.build_guide("mean_field", model)
    ltm.DualRateSVI(model, guide, fast, slow).infer(batch)
    mu, log_variance = PublishedLoop(model, fast, slow).infer(batch)
    assert mu.abs().max() > 0.1
    EXACT.assert_close(mu, guide.local["loc"].detach())
    EXACT.assert_close(log_variance, guide.local["log_variance"].detach())


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_lean_loop_and_dual_rate_agree(noise: str) -> None:
    model, batch = small_model(), ragged_batch()
    fast, slow = ltm.Fast(steps=6, optimizer="adam", lr=0.1, noise=noise), ltm.Slow()  # type: ignore[arg-type]
    guide = ltm.build_guide("mean_field", model)
    ltm.DualRateSVI(model, guide, fast, slow).infer(batch)
    mu, log_variance = LeanLoop(model, fast, slow).infer(batch)
    EXACT.assert_close(mu, guide.local["loc"].detach())
    EXACT.assert_close(log_variance, guide.local["log_variance"].detach())


def test_lean_gradient_is_that_of_the_objective() -> None:
    model, batch = small_model(), ragged_batch()
    guide = ltm.build_guide("mean_field", model)
    guide.reset(batch)
    mu, log_variance = (torch.randn(3, *model.thought_shape) * 0.3 for _ in range(2))
    guide.load_rows({"loc": mu, "log_variance": log_variance})
    with frozen(model.parameters()):
        prepared = model.prepare(batch)
        draw = Drawing(Noise(1, batch.ids))
        loss, _ = ltm.build_objective("elbo").descend(model, guide, prepared, draw)
        expected = torch.autograd.grad(loss, list(guide.local.values()))
        noise = noise_of(batch, mu, 1, 1)[0]
        nll, by_mu, by_variance = gradient(model, prepared, mu, log_variance, noise)
    kl = guide.kl(model.prior())
    assert kl is not None
    EXACT.assert_close(nll + kl.sum().detach(), loss.detach())
    EXACT.assert_close(by_mu, expected[0])
    EXACT.assert_close(by_variance, expected[1])


def test_slow_steps_have_the_same_loss_and_move_the_weights() -> None:
    losses = []
    batch = ragged_batch()
    for build in (PublishedLoop, LeanLoop, None):
        torch.manual_seed(0)
        model = small_model()
        fast, slow = ltm.Fast(steps=4, optimizer="adam", lr=0.1, noise="fixed"), ltm.Slow()
        before = [p.detach().clone() for p in model.parameters()]
        if build is None:
            svi = ltm.DualRateSVI(model, ltm.build_guide("mean_field", model), fast, slow)
            losses.append(-svi.step(batch)["elbo_per_token"])
        else:
            losses.append(build(model, fast, slow).step(batch))
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(moved)
        assert all(p.grad is None for p in model.parameters())
    EXACT.assert_close(torch.tensor(losses), torch.full((3,), losses[-1]))


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    def run() -> None:
        for _ in range(3):
            a = torch.ones(1000)
            b = a + 1
            del a, b

    two = 2 * 4000
    assert two <= peak_bytes(run, torch.device("cpu")) < two + 100  # and a few scalars


def test_products_are_those_that_the_cost_report_counts() -> None:
    """But for cross-attention, and what fused attention computes twice."""
    config = ltm.config.preset("tiny")
    products = fast_step_products(config.model, 8, 256)
    counted = sum(p.flops for p in products) / (8 * 256)
    report = cost_report(config)
    assert 0.8 * report.flops_fast_step < counted <= report.flops_fast_step


def test_linearity_knows_a_line() -> None:
    line = linearity([1, 2, 4], [3.0, 5.0, 9.0])
    EXACT.assert_close(
        torch.tensor([line["intercept"], line["slope"], line["residual"]]),
        torch.tensor([1.0, 2.0, 0.0]),
    )
    assert line["spread"] == pytest.approx(3 / 2.25 - 1)
    assert linearity([1, 2, 4], [1.0, 4.0, 16.0])["residual"] > 0.15


def test_axes_change_one_thing_at_a_time() -> None:
    args = fast_loop.parse([])
    base = fast_loop.case(args, "tiny", "fp32")
    lengths = axis_points("length", base)
    for point in lengths:
        assert (point.case.length, point.case.model["seq_len"]) == (point.value, point.value)
    assert {(p.case.batch_size, p.case.fast_steps) for p in lengths} == {(4, 8)}
    vocabularies = [p.case.model["vocab_size"] for p in axis_points("vocab_size", base)]
    assert vocabularies == [2**n for n in range(10, 17)]


SMALL = ["--rounds", "1", "--batch-size", "2", "--length", "16", "--fast-steps", "2"]


@pytest.fixture
def threads() -> str:
    """Torch's present number, so that the benchmark leaves it."""
    return str(torch.get_num_threads())


def test_run_writes_everything(
    tmp_path: Path, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table, scaling = tmp_path / "table.json", tmp_path / "scaling.json"
    common = [*SMALL, "--no-compile", "--threads", threads, "--presets", "nano"]
    fast_loop.main([*common, "--json", str(table)])
    assert capsys.readouterr().out.count("| `nano`, 2 x 16, 2 |") == 4
    result = json.loads(table.read_text())
    assert {"command", "seed", "threads", "machine", "versions", "quick"} <= set(result["header"])
    assert str(tmp_path) not in result["header"]["command"]
    assert [row["precision"] for row in result["rows"]] == ["fp32", "bf16"]
    for row in result["rows"]:
        loops = {"a", "b", "c"} | ({"a16"} if row["precision"] == "bf16" else set())
        for part in ("infer", "step"):
            data = row[part]
            assert set(data["seconds"]) == set(data["peak_bytes"]) == loops
            assert all(len(s) == row["rounds"] for s in data["seconds"].values())
            for name in {"a/c", "c/b"}:
                assert 0 < data[name]["min"] <= data[name]["median"] <= data[name]["max"]
        assert row["matrix"]["weights"]["share"] > 0
        assert row["matrix"]["weights"]["flops_per_fast_step"] > 0

    figure = tmp_path / "figure.png"
    fast_loop.main(
        [*common, "--scaling", "--quick", "--axes", "fast_steps", "vocab_size", "--figure",
         str(figure), "--json", str(scaling)]
    )  # fmt: skip
    curves = json.loads(scaling.read_text())
    assert set(curves["axes"]) == {"fast_steps", "vocab_size"}
    assert {"residual", "spread"} <= set(curves["axes"]["fast_steps"]["linearity"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = block(result, curves)
    assert result["header"]["command"] in text
    assert "Peak memory" in text


@pytest.mark.parametrize("wrong", [["--presets", "nan"], ["--axes", "lenght"]])
def test_unknown_names_are_refused(wrong: list[str]) -> None:
    with pytest.raises(ltm.InputError, match=r"nano|length"):
        fast_loop.parse(wrong)
