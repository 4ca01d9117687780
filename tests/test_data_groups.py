"""Splits to be trusted: twins and groups on one side, given splits kept, a card of the rest."""

from __future__ import annotations

import json
import pickle
import random
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ltm_pyro.data import Batch, ByteTokenizer, Corpus, load_corpus
from ltm_pyro.data.split import near_form
from ltm_pyro.errors import InputError

SPLITS = ("train", "val", "test")


def prose(seed: int, words: int = 40) -> str:
    rng = random.Random(seed)
    return " ".join(f"déjà{rng.randrange(300)}" for _ in range(words))


TEXTS = [prose(i) for i in range(60)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path / "cache"))


def sides(corpus: Corpus, column: str) -> dict[Any, set[str]]:
    """The splits in which each value of a column of the metadata is found."""
    found: dict[Any, set[str]] = {}
    for name in SPLITS:
        for value in getattr(corpus, name).metadata[column].unique():
            found.setdefault(value, set()).add(name)
    return found


TWINS = {
    "form": lambda text: unicodedata.normalize("NFD", text),
    "case": str.upper,
    "white space": lambda text: text.replace(" ", "\n\n") + " \t",
    "width": lambda text: text.replace("1", "\uff11"),
    "nothing": lambda text: text,
}


@pytest.mark.parametrize("twin", TWINS)
def test_near_duplicates_stay_together(twin: str) -> None:
    texts = [*TEXTS, *(TWINS[twin](text) for text in TEXTS)]
    corpus = load_corpus(
        [{"text": t, "of": i % 60} for i, t in enumerate(texts)],
        seq_len=16,
        fractions=(0.6, 0.2, 0.2),
    )
    assert all(len(found) == 1 for found in sides(corpus, "of").values())
    card = corpus.card()
    assert card["repeats"]["near"] == 60
    assert card["repeats"]["exact"] == (60 if twin == "nothing" else 0)
    assert card["crossing"] == {"val": 0, "test": 0}
    # And the split is the one of the texts without their twins, where these do not come first.
    assert near_form(texts[0]) == near_form(texts[60])


def test_a_split_without_twins_is_the_old_one() -> None:
    """Documents of each split, as the split by exact texts alone gave them."""
    corpus = load_corpus(TEXTS, seq_len=16, fractions=(0.6, 0.2, 0.2))
    assert np.unique(corpus.val.documents).tolist() == VAL
    assert np.unique(corpus.test.documents).tolist() == TEST


VAL = [1, 10, 15, 20, 30, 31, 37, 39, 42, 49, 53, 58]
TEST = [0, 2, 4, 8, 18, 21, 22, 26, 36, 41, 45, 57]


def test_groups_stay_on_one_side() -> None:
    records = [{"text": t, "who": {"name": f"author {i % 12}"}} for i, t in enumerate(TEXTS)]
    corpus = load_corpus(records, seq_len=16, split_by="who.name", fractions=(0.5, 0.25, 0.25))
    found = sides(corpus, "who.name")
    assert len(found) == 12
    assert all(len(names) == 1 for names in found.values())
    assert sides(corpus, "group") == found
    shares = corpus.card()["shares"]
    assert shares == pytest.approx({"train": 0.5, "val": 0.25, "test": 0.25}, abs=0.09)
    # Twins of two authors join them.
    joined = [*records, {"text": TEXTS[0].upper(), "who": {"name": "author 1"}}]
    corpus = load_corpus(joined, seq_len=16, split_by="who.name", fractions=(0.5, 0.25, 0.25))
    found = sides(corpus, "who.name")
    assert found["author 0"] == found["author 1"]
    assert all(len(names) == 1 for names in found.values())


def test_a_document_without_the_field_is_a_group_of_its_own() -> None:
    records: list[Any] = [
        {"text": t} if i % 2 else {"text": t, "who": "one"} for i, t in enumerate(TEXTS)
    ]
    corpus = load_corpus(records, seq_len=16, split_by="who", fractions=(0.4, 0.3, 0.3))
    parts = (corpus.train, corpus.val, corpus.test)
    assert sum(bool(part.metadata["who"].isna().any()) for part in parts) > 1
    with pytest.raises(InputError, match="has 2 different groups"):
        load_corpus([{"text": t, "who": i % 2} for i, t in enumerate(TEXTS)], split_by="who")


def test_authors_are_found_in_file_names(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for author in ("Jane_Austen", "Mark_Twain", "Charles_Dickens", "Conan_Doyle"):
        for book in ("One", "Two"):
            text = "\n\n".join(prose(hash_of(author + book + str(i))) for i in range(20))
            (folder / f"{author}__{book}.md").write_text(text)
    corpus = load_corpus(folder, seq_len=32, split="group", split_by="file:^(.*?)__")
    assert set(sides(corpus, "group")) == {
        "Jane_Austen",
        "Mark_Twain",
        "Charles_Dickens",
        "Conan_Doyle",
    }
    assert all(len(names) == 1 for names in sides(corpus, "group").values())
    by_file = load_corpus(folder, seq_len=32, split_by="file")
    assert len(sides(by_file, "file")) == 8
    assert all(len(names) == 1 for names in sides(by_file, "file").values())
    with pytest.raises(InputError, match=r"not found in the file name .*Dickens"):
        load_corpus(folder, seq_len=32, split_by="file:^([0-9]+)_")


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % 2**31


def test_given_splits_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    (folder / "dev").mkdir(parents=True)
    (folder / "wiki.train.txt").write_text("\n\n".join(TEXTS[:40]))
    (folder / "dev" / "part-1.txt").write_text("\n\n".join(TEXTS[40:50]))
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[50:]))
    (folder / "notes.md").write_text("about these data")
    with pytest.warns(UserWarning, match=r"notes\.md \(of no split\)"):
        corpus = load_corpus(folder, seq_len=16, split="given")
    assert sides(corpus, "file") == {
        "wiki.train.txt": {"train"},
        "dev/part-1.txt": {"val"},
        "test.jsonl": {"test"},
    }
    assert corpus.val.n_tokens == len("\n\n".join(TEXTS[40:50]).encode())
    assert corpus.test.n_documents == 10
    assert corpus.card()["asked"] is None
    with pytest.raises(InputError, match=r"notes\.md. tells no split"):
        load_corpus(folder / "notes.md", split="given")
    (folder / "train_test.txt").write_text("text")
    with pytest.raises(InputError, match="two splits"):
        load_corpus(folder, split="given")


def test_the_card_counts_what_splits_share() -> None:
    first, rest = TEXTS[:20], TEXTS[20:40]
    halves = [f"{text} {prose(1000 + i)}" for i, text in enumerate(rest[:10])]
    corpus = load_corpus(
        {"train": first + rest, "val": [*first[:5], TEXTS[50]], "test": halves}, seq_len=16
    )
    card = corpus.card()
    assert json.loads(json.dumps(card)) == card == corpus.describe()["card"]
    assert card["crossing"] == {"val": 5, "test": 0}
    # Of 40 words 33 runs of 8: five of six documents of val, 33 of 73 runs in each one of test.
    assert card["overlap"]["val_in_train"] == pytest.approx(5 / 6)
    assert card["overlap"]["test_in_train"] == pytest.approx(33 / 73)
    assert card["overlap"]["test_in_val"] == 0
    assert card["overlap"]["n"] == 8


def test_a_split_that_is_far_from_what_was_asked_is_told() -> None:
    repeated = [TEXTS[0]] * 500 + TEXTS[1:21]
    with pytest.warns(UserWarning, match="where .* was asked for") as caught:
        corpus = load_corpus(repeated, seq_len=16)
    told = [str(w.message) for w in caught if "asked for" in str(w.message)]
    assert told == list(corpus.card()["warnings"])
    assert told
    assert all("split val" in line or "split test" in line for line in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_corpus(TEXTS, seq_len=16).card()["warnings"] == []


def test_each_sequence_knows_where_it_is_from(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    text = "\n\n".join(TEXTS[:30])
    (folder / "a.txt").write_bytes(text.encode())
    records = [{"text": t, "year": 1900 + i, "file": "own"} for i, t in enumerate(TEXTS[30:])]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    corpus = load_corpus(folder, seq_len=16)
    frame = corpus.train.metadata
    assert list(frame.columns) == ["document", "file", "offset", "position", "year", "record.file"]
    assert frame.index.equals(pd.Index(corpus.train.ids, name="id"))
    batch = corpus.train.batch(slice(None))
    known = batch.metadata
    pd.testing.assert_frame_equal(known, frame)
    data = text.encode()
    for row, x, mask in zip(frame.itertuples(), batch.observed, batch.mask, strict=True):
        tokens = bytes(x[mask].tolist())
        if row.file == "a.txt":
            start = row.offset + row.position
            assert data[start : start + len(tokens)] == tokens
        else:
            assert row.year == 1900 + row.offset
            own = records[row.offset]["text"].encode()
            assert own[row.position : row.position + len(tokens)] == tokens
    assert corpus.val.metadata is corpus.val.metadata
    scores = pd.Series(np.arange(len(frame)), index=frame.index)
    assert scores.groupby(frame["document"]).size().sum() == len(frame)


def test_a_batch_gives_its_texts_and_rows() -> None:
    corpus = load_corpus([{"text": t, "n": i} for i, t in enumerate(TEXTS)], seq_len=24)
    batch = corpus.val.batch(range(4))
    assert batch.select([2, 0]).texts() == [batch.texts()[2], batch.texts()[0]]  # type: ignore[arg-type]
    ids = batch.ids[[3, 1]]
    assert batch.select(torch.tensor([3, 1])).metadata.index.tolist() == ids.tolist()
    assert "".join(corpus.test.batch(slice(None)).prefix(24 - 1).texts())
    by_hand = Batch(torch.tensor([[104, 105]]), ids=torch.tensor([7]))
    assert by_hand.texts(ByteTokenizer()) == ["hi"]
    assert by_hand.metadata.index.tolist() == [7]
    with pytest.raises(InputError, match=r"texts\(tokenizer\)"):
        by_hand.texts()
    # The corpus stays behind.
    assert len(pickle.dumps(batch)) < 10_000
    assert pickle.loads(pickle.dumps(batch)).corpus == corpus.fingerprint


def test_rows_of_any_type_become_columns() -> None:
    records = [
        {
            "text": text,
            "n": i,
            "share": i / 7 if i % 3 else None,
            "tags": ["x"] * (i % 3),
            "mixed": i if i % 2 else str(i),
            "day": pd.Timestamp("2020-01-01") + pd.Timedelta(days=i),
            "raw": b"abc",
            "deep": {"a": {"b": i}},
            "surrogate": "\udcff",
        }
        for i, text in enumerate(TEXTS)
    ]
    frame = load_corpus(records, seq_len=16).train.metadata
    assert frame["n"].dtype == np.int64
    assert frame["share"].dtype == np.float64
    assert frame["deep.a.b"].tolist() == frame["n"].tolist()
    row = frame[frame["n"] == 5].iloc[0]
    assert row["tags"] == ["x", "x"]
    assert row["mixed"] == 5
    assert row["day"].startswith("2020-01-06")
    assert row["raw"] == "<3 bytes>"
