"""Corpora of what a program holds: strings, dicts, frames, datasets, ids; and what is none."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ltm_pyro.data import ByteTokenizer, SymbolTokenizer, load_corpus
from ltm_pyro.errors import InputError


def prose(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"word{rng.randrange(400)}" for _ in range(30))


TEXTS = [prose(i) for i in range(40)]
RECORDS = [{"text": text, "year": i, "who": {"name": f"a{i % 5}"}} for i, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path / "cache"))


KINDS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(TEXTS),
    "iterator": lambda: iter(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "array": lambda: np.array(TEXTS),
    "series": lambda: pd.Series(TEXTS),
    "dicts": lambda: RECORDS,
    "records of a frame": lambda: pd.DataFrame(RECORDS),
    "marked": lambda: ["\ufeff" + text for text in TEXTS],
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_any_shape_are_one_corpus(kind: str) -> None:
    expected = load_corpus(TEXTS, seq_len=16)
    found = load_corpus(KINDS[kind](), seq_len=16)
    assert (found.sha256, found.fingerprint) == (expected.sha256, expected.fingerprint)
    assert np.array_equal(found.val.ids, expected.val.ids)
    assert found.recipe is None
    assert found.name == "in-memory"


def test_a_dataset_is_a_corpus() -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package is not installed")
    expected = load_corpus(RECORDS, seq_len=16)
    dataset = datasets.Dataset.from_list(RECORDS)
    assert load_corpus(dataset, seq_len=16).fingerprint == expected.fingerprint
    parts = datasets.DatasetDict({"train": dataset, "validation": dataset, "test": dataset})
    corpus = load_corpus(parts, seq_len=16)
    assert len(corpus.train) == len(corpus.val) == len(corpus.test)
    assert corpus.card()["crossing"] == {"val": 40, "test": 40}


@pytest.mark.parametrize("option", [{"config": 3}, {"hub_split": b"train"}, {"hub_split": None}])
def test_options_of_a_dataset_are_names(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))} is .*must be a name"):
        load_corpus("hf:owner/data", **option)


def test_a_dataset_saved_to_disk_is_a_corpus(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package is not installed")
    expected = load_corpus(RECORDS, seq_len=16)
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.save_to_disk(str(tmp_path / "one"))
    parts = datasets.DatasetDict({"train": dataset, "valid": dataset, "test": dataset})
    parts.save_to_disk(str(tmp_path / "three"))
    assert load_corpus(tmp_path / "one", seq_len=16).fingerprint == expected.fingerprint
    assert load_corpus(tmp_path / "three", seq_len=16).fingerprint == expected.fingerprint
    given = load_corpus(tmp_path / "three", seq_len=16, split="given")
    assert given.val.n_documents == 40
    assert given.recipe is not None
    assert given.recipe["name"] == str((tmp_path / "three").resolve())
    with pytest.raises(InputError, match="no splits of its own"):
        load_corpus(tmp_path / "one", seq_len=16, split="given")
    with pytest.raises(InputError, match="unknown hub_split 'tests'"):
        load_corpus(tmp_path / "three", seq_len=16, hub_split="tests")


def test_fields_and_turns_are_found_by_dots() -> None:
    dialogues = [
        {"id": i, "turns": [{"who": "a", "said": TEXTS[i]}, {"who": "b", "said": "yes"}]}
        for i in range(20)
    ]
    corpus = load_corpus(dialogues, seq_len=16, text_field="turns.said", turn_separator=" | ")
    plain = load_corpus([f"{TEXTS[i]} | yes" for i in range(20)], seq_len=16)
    assert corpus.sha256 == plain.sha256
    row = corpus.val.metadata.iloc[0]
    assert row["turns.who"] == ["a", "b"]
    assert row["id"] == row["document"]
    assert "turns.said" not in corpus.val.metadata
    nested = load_corpus([{"data": {"text": t, "n": 1}} for t in TEXTS], text_field="data.text")
    assert set(nested.val.metadata["data.n"]) == {1}
    flat = load_corpus([{"data.text": t} for t in TEXTS], text_field="data.text")
    assert flat.sha256 == nested.sha256


def test_one_long_text_is_cut_as_a_file_is(tmp_path: Path) -> None:
    text = "\n\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    expected = load_corpus(tmp_path / "a.txt", seq_len=16)
    assert load_corpus([text], seq_len=16).fingerprint == expected.fingerprint


def test_a_name_is_recorded() -> None:
    corpus = load_corpus(TEXTS, seq_len=16, name="my letters")
    assert corpus.name == "my letters"
    facts = json.loads(json.dumps(corpus.describe()))
    assert (facts["name"], facts["recipe"]) == ("my letters", None)
    assert facts["settings"]["source"] == "my letters"


def test_what_is_named_can_be_loaded_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    options: dict[str, Any] = {"split_by": "who.name", "seed": 3, "newlines": "lf"}
    corpus = load_corpus(tmp_path / "a.jsonl", seq_len=16, fractions=(0.6, 0.2, 0.2), **options)
    assert corpus.recipe is not None
    recipe = json.loads(json.dumps(corpus.recipe))
    again = load_corpus(recipe.pop("name"), seq_len=16, **recipe.pop("options"), **recipe)
    assert again.fingerprint == corpus.fingerprint
    assert np.array_equal(again.test.ids, corpus.test.ids)
    learned = load_corpus(tmp_path / "a.jsonl", seq_len=16, tokenizer="bpe", vocab_size=300)
    assert learned.recipe is not None
    recipe = dict(learned.recipe)
    again = load_corpus(recipe.pop("name"), seq_len=16, **recipe.pop("options"), **recipe)
    assert again.fingerprint == learned.fingerprint
    mixture = load_corpus("mixture", seq_len=16, n_sequences=64, seed=2)
    assert mixture.recipe is not None
    recipe = dict(mixture.recipe)
    again = load_corpus(recipe.pop("name"), seq_len=16, **recipe.pop("options"), **recipe)
    assert again.fingerprint == mixture.fingerprint


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_ids_are_a_corpus_of_their_tokenizer(library: Callable[[Any], Any]) -> None:
    ids = np.frombuffer("\n\n".join(TEXTS).encode(), dtype=np.uint8).astype(np.int64)
    corpus = load_corpus(library(ids), seq_len=16)
    assert (corpus.n_tokens, corpus.n_bytes) == (len(ids), len(ids))
    batches = [getattr(corpus, name).batch(slice(None)) for name in ("train", "val", "test")]
    by_id = {
        int(i): x[mask]
        for b in batches
        for i, x, mask in zip(b.ids, b.observed, b.mask, strict=True)
    }
    assert torch.cat([by_id[i] for i in sorted(by_id)]).tolist() == ids.tolist()
    rows = load_corpus(library(ids[: 40 * 32].reshape(40, 32)), seq_len=16)
    assert rows.train.n_documents + rows.val.n_documents + rows.test.n_documents == 40
    symbols = load_corpus(library(ids % 7), seq_len=16, tokenizer=SymbolTokenizer(7))
    assert symbols.n_bytes == len(ids)
    assert symbols.fingerprint != corpus.fingerprint


def test_given_splits_of_a_dict_are_kept() -> None:
    corpus = load_corpus(
        {"train": TEXTS[:20], "valid": TEXTS[20:30], "test": TEXTS[30:]}, seq_len=16
    )
    assert corpus.settings["split"] == "given"
    documents = [np.unique(part.documents).tolist() for part in (corpus.train, corpus.val)]
    assert documents == [list(range(20)), list(range(20, 30))]
    with pytest.warns(UserWarning, match="split val .* is empty"):
        corpus = load_corpus({"train": TEXTS[:30], "test": TEXTS[30:]}, seq_len=16)
    assert (len(corpus.val), len(corpus.val.metadata)) == (0, 0)
    assert corpus.train.n_documents == 30
    assert corpus.held_out() == "test"
    for ask in (
        lambda: corpus.val.batch([0]),
        lambda: corpus.val.batch(ids=[0]),
        lambda: corpus.val.training_batch(0, 4),
    ):
        with pytest.raises(InputError, match="the val split is empty"):
            ask()
    assert list(corpus.val.batches(4)) == []
    with pytest.warns(UserWarning, match="is empty"):
        alone = load_corpus({"train": TEXTS}, seq_len=16)
    with pytest.raises(InputError, match="neither a val nor a test split"):
        alone.held_out()
    dealt = load_corpus({"train": TEXTS[:30], "test": TEXTS[30:]}, seq_len=16, split="document")
    assert len(dealt.val) > 0


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "numbers": (lambda: [1, 2, 3], "a list of numbers such as 1"),
    "fractions": (lambda: [0.5], "a list of numbers"),
    "mixed": (lambda: ["a", 3], "item 1 .*int 3"),
    "mixed dicts": (lambda: [{"text": "a"}, "b", None], "item 2 .*null"),
    "empty list": (list, "is empty"),
    "empty iterator": (lambda: iter(()), "is empty"),
    "empty texts": (lambda: ["", ""], "is empty"),
    "empty frame": (lambda: pd.DataFrame({"text": []}), "is empty"),
    "frame of nothing": (pd.DataFrame, "its columns are none"),
    "a set": (lambda: set(TEXTS), "no order.*list"),
    "frame without the field": (
        lambda: pd.DataFrame({"body": TEXTS}),
        "no column .*body.*text_field",
    ),
    "frame of numbers": (lambda: pd.DataFrame({"text": [1, 2]}), "item 0 .*int 1"),
    "dicts without the field": (lambda: [{"Text": "a"}], "did you mean 'Text'"),
    "lists": (lambda: [["a"], ["b"]], "item 0 .*list"),
    "a text": (lambda: "\n".join(TEXTS), r"reads as a text.*\[\.\.\.\]"),
    "a sentence": (
        lambda: "It was the best of times, it was the worst of times",
        "reads as a text",
    ),
    "None": (lambda: None, "NoneType"),
    "a number": (lambda: 5, "int 5"),
    "bytes": (lambda: b"text", "bytes"),
    "a class": (lambda: str, "type"),
    "bytes of a file": (lambda: iter([b"text"]), "item 0 .*bytes"),
    "columns": (lambda: {"text": TEXTS}, "splits train, val and test"),
    "empty dict": (dict, "splits train, val and test"),
    "a split twice": (lambda: {"val": TEXTS, "valid": TEXTS, "train": TEXTS}, "twice"),
    "no train": (lambda: {"test": TEXTS}, "no split train"),
    "a number as split": (lambda: {"train": 5}, "int 5"),
    "real numbers": (lambda: np.ones(500), "float64"),
    "truth values": (lambda: np.ones(500, dtype=bool), "bool"),
    "three dimensions": (lambda: np.zeros((2, 2, 2), dtype=int), r"\(2, 2, 2\)"),
    "ids without tokenizer": (lambda: np.arange(1000), "token id 256 .*give tokenizer"),
    "negative ids": (lambda: -np.ones(500, dtype=int), "token id -1"),
    "surrogates": (lambda: ["\ud800"], "lone surrogate"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_corpus_is_refused_in_one_line(kind: str) -> None:
    make, message = WRONG[kind]
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(make(), seq_len=16)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300  # no text is echoed whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_field": ""}, "text_field is ''"),
        ({"text_field": 3}, "text_field is 3"),
        ({"turn_separator": None}, "turn_separator is None"),
        ({"newlines": "crlf"}, "newlines"),
        ({"split": "random"}, "unknown split 'random'"),
        ({"split": "group"}, "needs split_by"),
        ({"split": "given", "split_by": "year"}, "leave one of them out"),
        ({"split": "given"}, "no splits of its own"),
        ({"split_by": "yaer"}, "no field 'yaer': did you mean 'year'"),
        ({"split_by": "file:("}, "no regular expression"),
        ({"name": 3}, "name is 3"),
        ({"config": "x"}, "unknown option"),
        ({"vocab_size": 300}, "vocab_size is for tokenizer 'bpe'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(RECORDS, seq_len=16, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="instead of 'bpe'"):
        load_corpus(np.arange(200), tokenizer="bpe")
    with pytest.raises(InputError, match="corpus 'pydoc' has neither"):
        load_corpus("pydoc", split="given")


def test_a_million_documents_cost_no_object_each() -> None:
    # A hundredth of a million: what is kept per document would show.
    n = 10_000
    rows = ({"text": f"text {i}", "who": f"name {i}", "year": i} for i in range(n))
    gc.collect()
    before = len(gc.get_objects())
    corpus = load_corpus(rows, seq_len=4)
    gc.collect()
    assert len(gc.get_objects()) - before < n / 10
    assert isinstance(corpus.text.table.rows, np.memmap)  # type: ignore[union-attr]
    frame = corpus.val.metadata
    assert (frame["who"] == "name " + frame["year"].astype(str)).all()
    assert (frame["year"] == frame["document"]).all()
    assert corpus.tokenizer == ByteTokenizer()
