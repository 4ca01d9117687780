"""Posteriors as values (rows, quantiles, summaries) and texts as thoughts (embeddings, lines)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from cli_helpers import MICRO, write_text
from known_models import TINY, make_language_model, make_tokens
from tolerances import EXACT

import ltm_pyro as ltm
from ltm_pyro.cli import main
from ltm_pyro.data.tokenizer import ByteTokenizer, SymbolTokenizer
from ltm_pyro.engine import execution
from ltm_pyro.errors import InputError
from ltm_pyro.models.marginals import DRAWS


def posterior(family: str, rows: int = 4) -> ltm.Posterior:
    model, batch = make_language_model(), make_tokens(rows)
    torch.manual_seed(0)
    batch = ltm.Batch(batch.x, batch.mask, ids=torch.tensor([70, 10, 40, 20])[:rows])
    fast = ltm.Fast(steps=6, lr=0.3)
    return ltm.DualRateSVI(model, ltm.build_guide(family, model), fast).infer(batch)


@pytest.mark.parametrize("family", ltm.guide_families())
def test_some_rows_are_the_posterior_of_those_sequences(family: str) -> None:
    post = posterior(family)
    z = post.sample(5, seed=1)
    for which, rows in (
        (2, [2]),
        (-1, [3]),
        (slice(None, None, -2), [3, 1]),
        (torch.tensor([20, 70]), [3, 0]),
        (np.array([40]), [2]),
        (np.array([True, False, True, False]), [0, 2]),
    ):
        some = post[which]
        assert some.ids.tolist() == post.ids[rows].tolist()
        EXACT.assert_close(some.sample(5, seed=1), z[:, rows])
        EXACT.assert_close(some.mean, post.mean[rows])
        EXACT.assert_close(some.sd, post.sd[rows])
        if post.has_density:
            EXACT.assert_close(some.log_prob(z[:, rows]), post.log_prob(z)[:, rows])
        if post.closed_form_kl is not None:
            EXACT.assert_close(some.kl(), post.kl()[rows])
        if post.trace is not None and some.trace is not None:
            assert some.trace.elbo.shape == (len(post.trace.lr), len(rows))
    assert [int(one.ids) for one in post] == post.ids.tolist()


def test_rows_that_are_not_there_are_refused() -> None:
    post = posterior("mean_field")
    for which in (4, slice(4, None), [1], [], "a", None, [0.5], [True], [[70]]):
        with pytest.raises(InputError) as caught:
            post[which]
        assert "\n" not in str(caught.value)

    class Own(dist.TorchDistribution):
        arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    own = ltm.Posterior(Own(torch.Size([4]), TINY_EVENT), post.prior, post.ids, post.mask, "own")
    with pytest.raises(InputError, match="Own cannot be cut into rows"):
        own[0]


TINY_EVENT = torch.Size([TINY.n_thoughts, TINY.thought_dim])


@pytest.mark.parametrize("family", ["mean_field", "full_rank", "low_rank", "mixture", "flow"])
def test_quantiles_and_intervals_hold_what_they_say(family: str) -> None:
    post = posterior(family, rows=2)
    levels = (0.03, 0.5, 0.97)
    found = post.quantile(levels)
    z = post.sample(20_000, seed=5)
    below = (z <= found[:, None]).double().mean(1)
    # Of 20,000 draws and of the draws behind the quantiles, at five standard errors.
    for level, share in zip(levels, below, strict=True):
        error = (level * (1 - level) * (1 / 20_000 + 1 / DRAWS)) ** 0.5
        assert float((share - level).abs().max()) < 5 * error
    torch.testing.assert_close(post.quantile(0.5), found[1])
    frame = post.summary()
    assert list(frame.columns) == ["mean", "sd", "eti_3%", "eti_97%"]
    assert frame.index.names == ["sequence", "thought", "dim"]
    k, d = post.distribution.event_shape
    assert len(frame) == 2 * k * d
    row = frame.loc[(int(post.ids[1]), k - 1, d - 1)]
    np.testing.assert_allclose(row["mean"], float(post.mean[1, -1, -1]))
    np.testing.assert_allclose(row["eti_97%"], float(found[2, 1, -1, -1]))
    short = post.summary(prob=0.8, kind="hdi")
    width = short["hdi_90%"] - short["hdi_10%"]
    even = post.quantile([0.1, 0.9])
    assert (width.to_numpy() <= (even[1] - even[0]).flatten().numpy() + 1e-9).all()


def test_a_point_mass_has_its_point_as_every_quantile() -> None:
    post = posterior("delta")
    assert torch.equal(post.quantile([0.1, 0.9])[1], post.mean)
    assert float(post.summary()["sd"].max()) == 0


@pytest.mark.parametrize("q", [-0.1, 1.1, "a", [], [0.5, None]])
def test_quantiles_that_are_none(q: Any) -> None:
    with pytest.raises(InputError, match="quantile is"):
        posterior("delta").quantile(q)


def language_model() -> ltm.LatentThoughtModel:
    return make_language_model(
        ltm.ModelConfig(
            seq_len=24, n_layers=2, width=16, n_heads=2, mlp_hidden=16, thought_dim=3, window=4,
            thoughts_per_layer=1,
        )
    )  # fmt: skip


def text_fit(steps: int = 8) -> ltm.DualRateSVI:
    svi = ltm.DualRateSVI(language_model(), "mean_field", ltm.Fast(steps=steps))
    svi.tokenizer = ByteTokenizer()
    return svi


def test_an_embedding_is_the_posterior_of_the_text_alone() -> None:
    svi = text_fit()
    frame = ltm.embed(svi, ["one text", "another", "one text"])
    assert list(frame.columns[:2]) == ["mean_0_0", "mean_0_1"]
    assert frame.shape == (3, 2 * 2 * 3)
    np.testing.assert_array_equal(frame.iloc[0], frame.iloc[2])
    assert not np.allclose(frame.iloc[0], frame.iloc[1])
    np.testing.assert_allclose(ltm.embed(svi, "another").iloc[0], frame.iloc[1])
    column = pd.Series(["another", "one text"], index=["x", "y"])
    assert ltm.embed(svi, column).loc["y"].equals(frame.iloc[0].rename("y"))
    np.testing.assert_array_equal(ltm.embed(svi, column.to_numpy()), frame.iloc[[1, 0]])
    corpus = ltm.load_corpus([{"text": f"text {i}", "n": i} for i in range(20)], seq_len=24)
    rows = ltm.embed(svi, corpus.val)
    post = svi.infer(corpus.val.batch(slice(None)))
    np.testing.assert_allclose(rows.filter(like="mean_"), post.mean.flatten(1))
    np.testing.assert_allclose(rows.filter(like="sd_"), post.sd.flatten(1))
    assert rows.join(corpus.val.metadata)["n"].tolist() == corpus.val.metadata["n"].tolist()


@pytest.mark.parametrize(
    ("fitted", "texts", "message"),
    [
        (None, "a", "no fit"),
        (language_model(), "a", "no fit"),
        (text_fit(), [], "empty"),
        (text_fit(), ["a", ""], "text 1"),
        (text_fit(), ["a", 3], "batch is"),
        (text_fit(), np.arange(3), "batch is"),
        (text_fit(), "x" * 25, "25 tokens"),
        (ltm.DualRateSVI(language_model(), "mean_field"), "a", "no tokenizer"),
    ],
)
def test_what_cannot_be_embedded(fitted: Any, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ltm.embed(fitted, texts)


def test_the_way_between_two_texts_begins_and_ends_at_their_thoughts() -> None:
    svi = text_fit()
    model, tokenizer = svi.model, ByteTokenizer()
    assert isinstance(model, ltm.LatentThoughtModel)
    line = ltm.interpolate(svi, "aaaa", "zzzzzz", n=3, seed=2, max_new_tokens=9)
    means = ltm.embed(svi, ["aaaa", "zzzzzz"]).filter(like="mean_").to_numpy()
    a, b = torch.tensor(means).reshape(2, *model.thought_shape)
    for text, z in zip(line, (a, (a + b) / 2, b), strict=True):
        assert ltm.generate(model, tokenizer, z=z, seed=2, max_new_tokens=9) == [text]
    # The random numbers are one and the same: equal thoughts write equal texts.
    assert len(set(ltm.interpolate(svi, "aaaa", "aaaa", n=4, length=6))) == 1
    for wrong in ({"n": 1}, {"z": a}, {"greedy": 3}, {"seed": -1}, {"length": 0}):
        with pytest.raises(InputError):
            ltm.interpolate(svi, "a", "b", **wrong)


def test_new_tokens_are_counted_after_each_prompt() -> None:
    model, tokenizer = language_model(), SymbolTokenizer(256)  # one letter a token
    texts = ltm.generate(model, tokenizer, prompt=["ab", "abcdef"], max_new_tokens=3, n=2)
    assert [len(text) for text in texts] == [5, 5, 9, 9]
    z = torch.randn(3, *model.thought_shape).double()
    assert len(ltm.generate(model, tokenizer, z=z.numpy(), length=4)) == 3
    for wrong in (
        {"max_new_tokens": 0},
        {"max_new_tokens": 25},
        {"max_new_tokens": 2, "length": 4},
        {"z": [[1.0]]},
        {"z": z * torch.nan},
        {"z": "a"},
    ):
        with pytest.raises(InputError):
            ltm.generate(model, tokenizer, **wrong)


def test_a_set_of_any_size_is_inferred_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_language_model(), make_tokens(5)
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=3))
    whole = svi.infer(batch)
    monkeypatch.setattr(execution, "TOKENS_AT_ONCE", 2 * batch.mask.shape[1])
    parts = svi.infer(batch)
    EXACT.assert_close(parts.mean, whole.mean)
    assert parts.trace is not None
    assert whole.trace is not None
    EXACT.assert_close(parts.trace.elbo, whole.trace.elbo)


def test_thoughts_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    run = str(tmp_path / "run")
    options = ("--eval_fast_steps", "2", "--no-control", "--steps", "1")
    assert main(["fit", *MICRO, *options, "--corpus", str(text), "--out", run]) == 0
    fitted = ltm.load_run(run)
    means = ltm.embed(fitted, ["the cat", "a mat"]).filter(like="mean_").to_numpy()
    np.save(tmp_path / "z.npy", means.reshape(2, *fitted.model.thought_shape))
    capsys.readouterr()
    file = str(tmp_path / "z.npy")
    assert main(["generate", run, "--z", file, "--max_new_tokens", "5", "--greedy"]) == 0
    told = capsys.readouterr().out
    assert "text 2 of 2" in told
    between = ["generate", run, "--between", "the cat", "a mat", "--n", "2", "--length", "5"]
    assert main([*between, "--greedy"]) == 0
    assert capsys.readouterr().out == told
    assert main(["export", run, "--embed"]) == 0
    embedded = Path(run) / "embedding.csv"
    head = embedded.read_text().splitlines()[0].split(",")
    assert head[0] == "id"
    assert {"mean_0_0", "sd_0_3", "document", "file", "position"} <= set(head)
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.ones(2))
    for wrong in (
        ["--z", str(text)],
        ["--z", str(tmp_path / "none.npy")],
        ["--z", str(tmp_path / "objects.npy")],
        ["--z", str(tmp_path / "two.npz")],
        ["--z", str(tmp_path)],
        ["--z", file, "--between", "a", "b"],
        ["--between", "a", ""],
        ["--max_new_tokens", "3", "--length", "4"],
    ):
        assert main(["generate", run, *wrong]) == 2, wrong
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1
        assert "Error" not in told


def test_the_page_on_thoughts_runs_as_printed() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "thoughts.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    corpus = ltm.load_corpus([{"text": f"text {i}", "n": i} for i in range(20)], seq_len=24)
    names: dict[str, Any] = {"ltm": ltm, "svi": text_fit(), "corpus": corpus, "batch_ids": [1]}
    exec(compile(block, "thoughts.md", "exec"), names)
    assert {"mean_0_0", "sd_0_0", "n", "file"} <= set(names["known"].columns)
    assert len(names["classifier_inputs"]) == 2
