"""Scores per token, byte and word: exact counts of the raw text, whatever cut it into tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import xarray as xr
from cli_helpers import MICRO, write_text

import ltm_pyro as ltm
from ltm_pyro.cli import main
from ltm_pyro.cli.printing import format_table
from ltm_pyro.diagnostics.decomposition import reconstruction_by_block
from ltm_pyro.diagnostics.estimates import clustered_ratio
from ltm_pyro.errors import InputError

# Characters and spaces of one to four bytes, so that sequences cut them in two.
PIECES = ["the ", "cat\n", "é", "\N{IDEOGRAPHIC SPACE}", "日本", " a", "\t", "dog ", "😀", "\xa0"]


def documents(n: int = 24) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randint(20, 60))) for _ in range(n)]


def wordpiece(texts: list[str]) -> tokenizers.Tokenizer:
    """A pipeline that loses case, accents and white space."""
    engine = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = tokenizers.normalizers.BertNormalizer()
    engine.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    return engine


TOKENIZERS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "bytes": lambda _: {},
    "bpe": lambda _: {"tokenizer": "bpe", "vocab_size": 290},
    "wordpiece": lambda texts: {"tokenizer": wordpiece(texts)},
}


def test_a_perplexity_of_many_digits_is_printed_by_its_power_of_ten() -> None:
    """A word of a model that knows little: exp(70) has 31 digits."""
    columns = {"elbo": [-70.0, -70.0], "n_tokens": [9, 9], "n_words": [1, 1]}
    data = xr.Dataset({name: ("sequence", values) for name, values in columns.items()})
    data = data.assign_coords(file=("sequence", ["a", "b"]), sequence=[0, 1])
    told = format_table(ltm.score_table(data, "word", by="file"))
    assert f"ppl {math.exp(70):.3e}" in told
    assert "70.000 nats" in told


def test_a_field_may_be_called_as_a_column_of_any_diagnostic() -> None:
    fields = {"gap": "a", "lower": "b", "total": "c", "objective": "d", "family": "e", "nll": "f"}
    records = [{"text": f"some words of text number {i}", **fields} for i in range(20)]
    corpus = ltm.load_corpus(records, seq_len=8)
    batch = corpus.train.batch(range(4))
    config = {"n_layers": 1, "width": 8, "n_heads": 1, "mlp_hidden": 8, "thought_dim": 2}
    model = ltm.LatentThoughtModel(
        ltm.ModelConfig(vocab_size=corpus.vocab_size, seq_len=8, window=4, **config)
    )
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=2))
    post = svi.infer(batch)
    quiet = {"progress": False}
    found = {
        "gap": ltm.diagnose(model, post, batch, draws=100, steps=0, chains=0, **quiet).data,
        "lower": ltm.annealed_bound(model, batch, chains=2, rungs=2),
        "total": ltm.gap_decomposition(svi, batch, converged_steps=2, draws=16),
        "objective": ltm.fast_convergence(svi, batch, draws=16),
        "family": ltm.compare(model, batch, ["mean_field", "delta"], budget=4, **quiet).dataset,
        "nll": reconstruction_by_block(model, post, batch),
    }
    for name, data in found.items():
        assert name in data.data_vars
        assert set(data[f"record.{name}"].values) == {fields[name]}
    assert set(found["gap"]["total"].values) == {"c"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_a_document_have_its_bytes_and_words(name: str) -> None:
    texts = documents()
    corpus = ltm.load_corpus(texts, seq_len=7, **TOKENIZERS[name](texts))
    batch = corpus.train.batch(range(len(corpus.train)))
    sizes = batch.text_sizes
    assert sizes is not None
    for document in np.unique(corpus.train.documents):
        text = texts[document]
        mine = batch.documents == document
        assert int(sizes[0][mine].sum()) == len(text.encode())
        assert int(sizes[1][mine].sum()) == len(text.split())
    # What is seen and what is scored of a sequence are its whole.
    parts = [part.text_sizes for part in (batch.prefix(3), batch.suffix(3))]
    for whole, first, rest in zip(sizes, *parts, strict=True):  # type: ignore[misc]
        assert torch.equal(whole, first + rest)


def small_model(vocab_size: int, seq_len: int) -> ltm.LatentThoughtModel:
    config = ltm.ModelConfig(
        vocab_size=vocab_size, seq_len=seq_len, n_layers=1, width=8, n_heads=2, mlp_hidden=8,
        window=2, thought_dim=2,
    )  # fmt: skip
    return ltm.LatentThoughtModel(config)


def test_symbols_and_batches_by_hand_have_no_text() -> None:
    symbols = ltm.load_corpus("mixture", seq_len=8, n_sequences=64).val.batch([0, 1])
    assert symbols.text_sizes is None
    assert ltm.Batch(symbols.x).text_sizes is None
    scores = ltm.evaluate(small_model(16, 8), None, ltm.Batch(symbols.x), 2, mode="prior")
    assert "n_bytes" not in scores
    with pytest.raises(InputError, match="corpus of text"):
        ltm.score_table(scores, "word")


def uniform(corpus: Any) -> xr.Dataset:
    """Scores by a decoder that gives every token the same probability: known exactly."""
    model = small_model(corpus.vocab_size, corpus.seq_len)
    torch.nn.init.zeros_(model.decoder.norm.weight)
    batch = corpus.train.batch(range(len(corpus.train)))
    return ltm.evaluate(model, None, batch, draws=2, mode="prior")


def test_two_tokenizers_are_about_the_same_bytes_and_words() -> None:
    texts = [{"text": t, "who": f"author {i % 3}", "elbo": i} for i, t in enumerate(documents())]
    whole = "".join(str(t["text"]) for t in texts)
    found = {}
    for name in ("bytes", "bpe"):
        corpus = ltm.load_corpus(texts, seq_len=16, **TOKENIZERS[name]([]))
        scores = uniform(corpus)
        nats = math.log(corpus.vocab_size)
        for per in ("token", "byte", "word"):
            row = ltm.score_table(scores, per).loc["elbo"]
            total = scores.attrs["n_tokens"] * nats
            assert row[f"nats_per_{per}"] == pytest.approx(total / row[f"n_{per}s"], rel=1e-5)
            rate = clustered_ratio(-scores.elbo, scores[f"n_{per}s"], scores.document)
            assert row[f"nats_per_{per}_sampling_se"] == pytest.approx(rate.error)
            assert row[f"bits_per_{per}"] == pytest.approx(row[f"nats_per_{per}"] / math.log(2))
            assert row[f"ppl_per_{per}"] == pytest.approx(math.exp(row[f"nats_per_{per}"]))
        assert scores.attrs["bits_per_byte_elbo"] == pytest.approx(
            ltm.score_table(scores, "byte").loc["elbo", "bits_per_byte"]
        )
        found[name] = scores
    sizes = [(s.attrs["n_bytes"], s.attrs["n_words"]) for s in found.values()]
    assert sizes[0] == sizes[1]
    assert sizes[0][0] < len(whole.encode())


def test_scores_are_grouped_by_what_is_known_of_the_sequences() -> None:
    texts = [{"text": t, "who": f"author {i % 3}", "elbo": i} for i, t in enumerate(documents())]
    scores = uniform(ltm.load_corpus(texts, seq_len=16))
    assert set(scores.coords) >= {"document", "file", "offset", "position", "who", "record.elbo"}
    means = scores.elbo.groupby("document").mean()
    assert means.sizes["document"] == len(np.unique(scores.document))
    table = ltm.score_table(scores, "byte", by="who")
    for author in ("author 0", "author 1", "author 2"):
        part = scores.where(scores.who == author, drop=True)
        rate = clustered_ratio(-part.elbo, part.n_bytes, part.document)
        row = table.loc[(author, "elbo")]
        assert row["nats_per_byte"] == pytest.approx(rate.value)
        assert row["nats_per_byte_sampling_se"] == pytest.approx(rate.error)
        assert row["n_clusters"] == rate.documents
    # Authors are fewer than documents: a cluster of one has no error.
    alone = ltm.score_table(scores, by="who", cluster="who")
    assert alone["nats_per_token_sampling_se"].isna().all()
    with pytest.raises(InputError, match="did you mean 'who'"):
        ltm.score_table(scores, by="whom")
    with pytest.raises(InputError, match=r"unknown unit 'bite'.*'byte'"):
        ltm.score_table(scores, "bite")


def test_metadata_are_coordinates_of_exports(tmp_path: Any) -> None:
    texts = [{"text": t, "year": i, "tags": ["a", i]} for i, t in enumerate(documents())]
    corpus = ltm.load_corpus(texts, seq_len=12)
    model = small_model(256, 12)
    batch = corpus.val.batch([0, 1, 2])
    svi = ltm.DualRateSVI(model, "mean_field", fast=ltm.Fast(steps=1))
    post = svi.infer(batch)
    scores = ltm.evaluate(model, post, batch, draws=2)
    tree = ltm.to_datatree(post, batch, scores, draws=2, model=model)
    ltm.export.save_datatree(tree, tmp_path / "posterior.nc")
    back = ltm.export.load_datatree(tmp_path / "posterior.nc")
    year = batch.metadata["year"].tolist()
    for group in ("posterior", "scores", "observed_data"):
        assert back[group].coords["year"].values.tolist() == year
        assert json.loads(back[group].coords["tags"].values[0]) == ["a", year[0]]


def test_a_run_is_scored_per_unit_and_by_group(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ann", "bob", "cat", "dan"):
        write_text(tmp_path / f"{name}.txt", 6 + len(name))
    run = str(tmp_path / "run")
    corpus = (
        "--corpus",
        str(tmp_path / "*.txt"),
        "--eval_sequences",
        "9",
        "--eval_fast_steps",
        "2",
    )
    assert main(["fit", *MICRO, *corpus, "--steps", "2", "--out", run]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, "--per", "word", "--by", "file", "--by_position"]) == 0
    told = capsys.readouterr().out
    assert "ppl_elbo per word" in told
    assert "control" in told
    assert "By file, per word" in told
    assert "by position" in told
    assert main(["evaluate", run, "--by", "file", "--by_position", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    positions = found["by_position"]
    assert [row["position"] for row in positions] == [0, 1, 2, 4, 8]
    total = sum(row["nats_per_token"] * row["n_tokens"] for row in positions)
    reconstruction = found["nats_per_sequence"]["nll_given_z"] * found["n_sequences"]
    assert total == pytest.approx(reconstruction)
    units = found["per_unit"]
    for unit in ("token", "byte", "word"):
        row = units[unit]["scores"]["elbo"]
        assert row[f"nats_per_{unit}"] * row[f"n_{unit}s"] == pytest.approx(
            -found["nats_per_sequence"]["elbo"] * found["n_sequences"]
        )
        assert f"difference_per_{unit}" in units[unit]["against_control"]["ppl_elbo"]
    assert units["byte"]["scores"]["elbo"]["ppl_elbo_per_byte"] == pytest.approx(found["ppl_elbo"])
    assert sum(r["n_sequences"] for r in found["by"] if r["score"] == "elbo") == 9
    for wrong in (["--per", "letter"], ["--by", "author"]):
        assert main(["evaluate", run, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_loss_that_no_float_can_raise_e_to_is_infinite() -> None:
    nats = np.array([-1e4, -2e4])
    scores = xr.Dataset({"elbo": ("sequence", nats), "n_tokens": ("sequence", [1, 1])})
    row = ltm.score_table(scores.assign_coords(sequence=[0, 1])).loc["elbo"]
    assert row["nats_per_token"] == 1.5e4
    assert row["ppl_per_token"] == math.inf
