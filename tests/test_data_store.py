"""Text and tokens on disk: the same tokens however they are cut, in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ltm_pyro.data import store
from ltm_pyro.data.bpe import BPETokenizer
from ltm_pyro.data.cache import Cache
from ltm_pyro.data.records import Document
from ltm_pyro.data.store import TextStore, store_text, store_tokens, training_texts
from ltm_pyro.data.tokenizer import ByteTokenizer

SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
MARKS = ".,!?'\u2019\"()\x00\x7f\u200b\u0301\ufeff。、「」中文日本語éñß0123९abcxyzABCvλ\U0001f600"


def nasty(seed: int, n: int = 400) -> str:
    """Words, marks and every kind of white space, in runs of any length."""
    rng = random.Random(seed)
    words = ["the", "don't", "we'll", "cat", "x1y2", "...", "'s", "中文。", "déjà"]
    parts = []
    for _ in range(n):
        kind = rng.random()
        if kind < 0.4:
            parts.append(rng.choice(words))
        elif kind < 0.7:
            parts.append("".join(rng.choices(SPACES, k=rng.choice([1, 1, 1, 2, 5]))))
        else:
            parts.append("".join(rng.choices(MARKS + " ", k=rng.randrange(1, 5))))
    return "".join(parts)


def stored(tmp_path: Path, documents: list[str]) -> TextStore:
    source = SimpleNamespace(
        name="test",
        files=("",),
        identity=lambda: {"n": documents},
        documents=lambda: map(Document, documents),
    )
    return store_text(Cache(tmp_path), source)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([nasty(seed) for seed in range(20)], 600)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pieces_put_together_are_the_documents(tmp_path: Path, size: int) -> None:
    documents = [nasty(1), "", "x" * 500, nasty(2), "a", " "]
    text = stored(tmp_path, documents)
    together, part = [], ""
    for piece, last in text.pieces(size=size):
        assert piece
        part += piece
        if last:
            together.append(part)
            part = ""
    kept = [document for document in documents if document]
    assert part == ""
    assert together == kept == list(text.documents())
    assert list(text.documents(np.array([3, 0]))) == [kept[3], kept[0]]


@pytest.mark.parametrize("size", [1, 5, 64])
def test_cut_or_whole_the_tokens_are_the_same(
    tmp_path: Path, bpe: BPETokenizer, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltm_pyro.data.bpe._BATCH_CHARACTERS", 150)
    documents = [nasty(seed) for seed in range(100, 130)] + ["x" * 500, "a"]
    text = stored(tmp_path, documents)
    n_pieces = sum(1 for _ in text.pieces(size=size))
    assert n_pieces > 10 * len(documents) / size**0.5
    parts = list(bpe.encode_pieces(text.pieces(size=size)))
    assert len(parts) > len(documents)  # a document may begin in one batch and end in another
    expected = [bpe.encode(document) for document in documents]
    assert np.array_equal(np.concatenate([t for t, _ in parts]), np.concatenate(expected))
    assert [n for _, lengths in parts for n in lengths] == [len(ids) for ids in expected]


def test_learning_from_pieces_gives_the_same_merges(
    tmp_path: Path, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PIECE_BYTES", 50)
    text = stored(tmp_path, [nasty(seed) for seed in range(20)])
    assert BPETokenizer.train(training_texts(text, np.arange(20)), 600) == bpe


def test_only_known_cutting_is_trusted(tmp_path: Path, bpe: BPETokenizer) -> None:
    assert bpe.cuts_between_words
    state = bpe.to_json()["tokenizer"]
    other = BPETokenizer({**state, "normalizer": {"type": "NFC"}})
    assert not other.cuts_between_words
    text = stored(tmp_path, ["one two three " * 4_000, "four"])
    tokens = store_tokens(Cache(tmp_path), text, "other", {}, lambda: other, 600)
    assert tokens.lengths.tolist() == [len(other.encode(d)) for d in text.documents()]


def test_any_tokenizer_will_do(tmp_path: Path) -> None:
    text = stored(tmp_path, ["some text", "more"])
    tokens = store_tokens(Cache(tmp_path), text, "x", {}, ByteTokenizer, 256)
    assert tokens.tokens.tobytes() == b"some textmore"
    assert tokens.lengths.tolist() == [9, 4]


def test_an_interrupt_leaves_nothing_half_written(
    tmp_path: Path, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(documents: list[str]) -> Iterator[str]:
        yield from documents
        raise KeyboardInterrupt

    source = SimpleNamespace(
        name="test",
        files=("",),
        identity=dict,
        documents=lambda: map(Document, interrupted(["word " * 10**6])),
    )
    with pytest.raises(KeyboardInterrupt):
        store_text(Cache(tmp_path), source)
    assert not list(tmp_path.iterdir())
    text = stored(tmp_path, ["word " * 1_000, "more"])
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        BPETokenizer, "encode_pieces", lambda self, pieces: interrupted([(np.arange(1, 4),) * 2])
    )
    with pytest.raises(KeyboardInterrupt):
        store_tokens(Cache(tmp_path), text, "x", {}, lambda: bpe, 600)
    assert sorted(tmp_path.iterdir()) == before


def test_a_long_document_is_never_taken_whole(
    tmp_path: Path, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library needs some hundred bytes per token for what it is given at a time."""
    text = stored(tmp_path, ["first", "word and word, " * 300_000, "last"])
    real, batches = BPETokenizer._encoded, []

    def spy(self: BPETokenizer, texts: list[str], *rest: object) -> object:
        batches.append([len(piece) for piece in texts])
        return real(self, texts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BPETokenizer, "_encoded", spy)
    tokens = store_tokens(Cache(tmp_path), text, "x", {}, lambda: bpe, 600)
    assert len(tokens.lengths) == 3
    assert max(map(max, batches)) < 1.1 * store._PIECE_BYTES
    assert max(map(sum, batches)) < 1.1 * 2**20
    assert len(batches) == 5
    assert max(map(len, training_texts(text, np.arange(3)))) < 1.1 * store._PIECE_BYTES


def test_reading_does_not_keep_the_text_mapped(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if "RssFile" not in (status.read_text() if status.exists() else ""):
        pytest.skip("resident memory by kind is asked of Linux")

    def mapped_kilobytes() -> int:
        return int(status.read_text().partition("RssFile:")[2].split()[0])

    text = stored(tmp_path, ["word " * 200_000] * 64)
    before = mapped_kilobytes()
    most = 0
    for number, (_, _) in enumerate(text.pieces(size=2**20)):
        most = max(most, mapped_kilobytes() if number % 4 == 0 else 0)
    assert most - before < 24_000  # of 64,000
