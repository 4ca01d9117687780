"""Whatever a public function is given: a result, or one line that says what is wrong with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ltm_pyro as ltm
from ltm_pyro.engine.execution import Execution
from ltm_pyro.engine.processes import Parallel

HOSTILE: dict[str, Any] = {
    "None": None, "list": [], "numbers": [1, 2], "nested": [[[1]]], "text": "text", "no text": "",
    "NUL": "a\0b\x1b[2J", "long": "x" * 20000, "surrogate": "\ud800", "bytes": b"abc",
    "float": 1.5, "nan": float("nan"), "inf": float("inf"), "negative": -1, "zero": 0,
    "huge": 10**20, "true": True, "complex": 1j, "dict": {"a": 1}, "set": {1}, "object": object(),
    "class": dict, "function": lambda *_: None, "numpy": np.ones(3), "numpy number": np.array(3),
    "tensor": torch.ones(2, 3), "no rows": torch.zeros(0, 4), "number": torch.tensor(2.0),
    "meta": torch.zeros(2, 3, device="meta"), "complex tensor": torch.ones(2) * 1j,
}  # fmt: skip

Call = tuple[Callable[..., Any], dict[str, Any]]


def _named(build: Callable[..., Any], *first: str) -> Callable[..., Any]:
    """`build` with its positional arguments given by name."""
    return lambda **given: build(*[given.pop(name) for name in first], **given)


def _of(**arguments: Any) -> dict[str, Any]:
    return arguments


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Call]:
    """Every function with arguments that it takes."""
    folder = tmp_path_factory.mktemp("arguments")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"text {i} " + f"word{i} " * 20 for i in range(20)))
    torch.manual_seed(0)
    model = ltm.LatentThoughtModel(
        ltm.ModelConfig(
            seq_len=12, n_layers=1, width=16, n_heads=2, mlp_hidden=16, thought_dim=3, window=4
        )
    )
    corpus = ltm.load_corpus(str(text), seq_len=12, cache_dir=folder)
    batch = corpus.train.batch([0, 1, 2])
    svi = ltm.DualRateSVI(model, "mean_field", fast=ltm.Fast(steps=2))
    svi.tokenizer = corpus.tokenizer
    post = svi.infer(batch)
    scores = ltm.evaluate(model, post, batch, draws=2, per_token=True)
    oracle = ltm.LinearGaussian(torch.randn(4, 2), 0.5)
    drawn = ltm.simulate(oracle, 3)
    rows = drawn.batch
    fit = ltm.DualRateSVI(oracle, "full_rank", fast=ltm.Fast(steps=2))
    q = fit.infer(rows)
    return _scores(svi, post, batch, scores) | _oracle(oracle, fit, q, drawn) | {
        "load_corpus": (
            ltm.load_corpus,
            _of(
                data=str(text), seq_len=12, tokenizer="bytes", seed=0, encoding="utf-8",
                cache_dir=folder, text_field="text", turn_separator="\n", newlines="keep",
                split=None, split_by=None, fractions=(0.8, 0.1, 0.1),
            ),
        ),
        "generate": (
            ltm.generate,
            _of(
                model=model, tokenizer=corpus.tokenizer, prompt="a", z=None, n=1, seed=0, length=5,
                max_new_tokens=None, svi=svi, greedy=False, temperature=1.0, top_k=None, top_p=None,
            ),
        ),
        "embed": (ltm.embed, _of(fitted=svi, texts=["a"], steps=1, seed=0, progress=False)),
        "interpolate": (
            ltm.interpolate,
            _of(fitted=svi, first="a", second="b", n=2, seed=0, steps=1, length=3),
        ),
        "load_run": (ltm.load_run, _of(folder=folder / "none", device=None, parallel=None)),
    }  # fmt: skip


def _scores(svi: Any, post: Any, batch: Any, scores: Any) -> dict[str, Call]:
    x, model = batch.x, svi.model
    return {
        "Batch": (
            ltm.Batch,
            _of(x=x, mask=None, ids=torch.arange(3), documents=torch.arange(3), corpus="c"),
        ),
        "infer": (svi.infer, _of(batch=batch, steps=2, seed=1, warm_start=False)),
        "fit": (
            svi.fit,
            _of(data=batch, steps=1, batch_size=2, progress=False, callbacks=[], held_out=None),
        ),
        "DualRateSVI": (
            ltm.DualRateSVI,
            _of(
                model=model, guide="mean_field", fast=None, slow=None, elbo=None, seed=0,
                persistent=False, execution=None,
            ),
        ),
        "Execution": (
            Execution,
            _of(
                compile=False, precision="fp32", micro_batch=None, checkpointing=False,
                parallel=Parallel(),
            ),
        ),
        "evaluate": (
            ltm.evaluate,
            _of(
                model=model, post=post, batch=batch, draws=2, mode="oracle", controls=True,
                seed=0, per_token=True, parallel=None,
            ),
        ),
        "loss_by_position": (ltm.loss_by_position, _of(scores=scores, doubling=True)),
        "score_table": (
            ltm.score_table, _of(scores=scores, per="byte", by="document", cluster="file")
        ),
        "to_datatree": (
            ltm.to_datatree,
            _of(
                post=post, batch=batch, scores=scores, draws=2, model=model, fit_trace=None,
                predictive_draws=1, seed=0,
            ),
        ),
        "as_published": (
            ltm.as_published,
            _of(svi=svi, batch=batch, fast_steps=1, steps=1, draws=2, seed=0),
        ),
        "score_on_own_draws": (ltm.score_on_own_draws, _of(svi=svi, batch=batch, draws=2)),
        "information_by_block": (
            ltm.information_by_block,
            _of(post=post, n_layers=None, draws=2, seed=0, again=None),
        ),
        "build_guide": (
            _named(ltm.build_guide, "name", "model"),
            _of(name="low_rank", model=model, rank=2, init_log_variance=0.0),
        ),
        "build_objective": (_named(ltm.build_objective, "name"), _of(name="stl", particles=2)),
        "build_prior": (
            _named(ltm.build_prior, "name", "n_thoughts", "thought_dim"),
            _of(name="mixture", n_thoughts=2, thought_dim=3, components=2),
        ),
    }  # fmt: skip


def _oracle(oracle: Any, fit: Any, q: Any, drawn: Any) -> dict[str, Call]:
    rows = drawn.batch
    short = _of(chains=2, rungs=3, max_leapfrog=2, seed=0, progress=False)
    return {
        "LinearGaussian": (
            ltm.LinearGaussian,
            _of(W=torch.ones(4, 2), noise_scale=0.5, bias=None, shape=None),
        ),
        "simulate": (ltm.simulate, _of(model=oracle, n=3, seed=0)),
        "check_model": (ltm.check_model, _of(model=oracle, batch=rows)),
        "check_guide": (
            _named(ltm.check_guide, "family", "model", "batch"),
            _of(family="delta", model=oracle, batch=rows),
        ),
        "compare": (
            ltm.compare,
            _of(
                model=oracle, batch=rows, guides=["mean_field"], options=None, budget=2, draws=2,
                fast=None, slow=None, elbo="elbo", train=None, training_share=0.5, restarts=1,
                reference=None, subset=None, reference_options=None, gaps=False, seed=0,
                progress=False,
            ),
        ),
        "diagnose": (
            ltm.diagnose,
            _of(
                model=oracle, post=q, batch=rows, draws=100, steps=1, chains=0, rungs=4, seed=0,
                progress=False,
            ),
        ),
        "importance_bound": (
            ltm.importance_bound,
            _of(model=oracle, post=q, batch=rows, draws=4, seed=0),
        ),
        "annealed_bound": (
            ltm.annealed_bound, _of(model=oracle, batch=rows, start=None, **short)
        ),
        "evidence_bracket": (
            ltm.evidence_bracket, _of(model=oracle, simulated=drawn, **short)
        ),
        "sample_posterior": (
            ltm.sample_posterior,
            _of(
                model=oracle, batch=rows, kernel="hmc", start=None, chains=2, warmup=0, draws=8,
                mass="identity", step_size=0.1, max_leapfrog=1, seed=0, progress=False,
            ),
        ),
        "sbc": (
            ltm.sbc,
            _of(
                model=oracle, infer=fit.infer, replications=3, draws=9, statistics=None, seed=0
            ),
        ),
        "gap_decomposition": (
            ltm.gap_decomposition,
            _of(
                svi=fit, batch=rows, steps=2, converged_steps=4, draws=8, evidence=None,
                tolerance=0.1, seed=0,
            ),
        ),
        "fast_convergence": (
            ltm.fast_convergence,
            _of(svi=fit, batch=rows, steps=2, draws=8, tolerance=0.1, seed=0),
        ),
        "gradient_noise": (
            ltm.gradient_noise,
            _of(
                model=oracle, guide=fit.guide, batch=rows, objectives=("elbo",), draws=4,
                slow=False, seed=0,
            ),
        ),
    }  # fmt: skip


def _surprises(calls: dict[str, Call], share: float, seed: int) -> list[str]:
    """What ends otherwise than in a result or one short line."""
    chosen = random.Random(seed)
    found = []
    for function, (call, usual) in calls.items():
        for name in usual:
            for kind, value in HOSTILE.items():
                if chosen.random() >= share:
                    continue
                case = f"{function}({name}=<{kind}>)"
                try:
                    call(**{**usual, name: value})
                except (ltm.InputError, ltm.NonFiniteError) as error:
                    line = str(error)
                    if len(line) > 500 or not line.isprintable():
                        found.append(f"{case}: {line[:200]!r}")
                except Exception as error:
                    found.append(f"{case}: {type(error).__name__}: {error}"[:200])
    return found


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache_dir="text"` is a folder of that name."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.filterwarnings("ignore")
def test_any_argument(calls: dict[str, Call]) -> None:
    found = _surprises(calls, share=0.08, seed=0)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.filterwarnings("ignore")
def test_any_argument_often(calls: dict[str, Call]) -> None:
    found = _surprises(calls, share=1.0, seed=0)
    assert not found, "\n".join(found)


def test_a_course_whose_rows_differ_in_their_names_is_exported_whole() -> None:
    model = ltm.LinearGaussian(torch.ones(3, 2), 0.5)
    svi = ltm.DualRateSVI(model, "delta", fast=ltm.Fast(steps=1))
    post = svi.infer(ltm.simulate(model, 2).batch)
    rows = [{"step": 0, "elbo": -1.0}, {"step": 1, "log_joint": -2.0}]
    trace = ltm.to_datatree(post, draws=2, fit_trace=rows)["fit_trace"]
    np.testing.assert_array_equal(trace["elbo"].values, [-1.0, np.nan])
    np.testing.assert_array_equal(trace["log_joint"].values, [np.nan, -2.0])
