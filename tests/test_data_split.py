"""The split: by document, deterministic, and sharing no text."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ltm_pyro.data.split import SPLITS, split_documents
from ltm_pyro.errors import InputError


def digests_of(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    raw = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    sizes = np.array([len(text.encode()) for text in texts])
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 32), sizes


def split_texts(texts: list[str], **options: object) -> dict[str, list[str]]:
    split = split_documents(*digests_of(texts), **options)  # type: ignore[arg-type]
    assert tuple(split) == SPLITS
    together = np.concatenate(list(split.values()))
    assert sorted(together) == list(range(len(texts)))
    assert all((np.diff(part) > 0).all() for part in split.values())
    return {name: [texts[i] for i in part] for name, part in split.items()}


def test_shares_are_of_the_text_not_of_the_documents() -> None:
    rng = np.random.default_rng(0)
    texts = [f"{i} " + "x" * int(rng.integers(1, 400)) for i in range(2_000)]
    split = split_texts(texts, fractions=(0.7, 0.2, 0.1))
    total = sum(map(len, texts))
    shares = [sum(map(len, split[name])) / total for name in SPLITS]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.001)


def test_neither_order_nor_other_documents_decide_a_split() -> None:
    texts = [f"document {i}" for i in range(100)]
    split = split_texts(texts)
    again = split_texts(texts[::-1])
    assert {name: set(part) for name, part in split.items()} == {
        name: set(part) for name, part in again.items()
    }
    other = split_texts(texts, seed=1)
    assert set(other["val"]) != set(split["val"])


def test_no_text_is_in_two_splits() -> None:
    texts = [f"text {i % 40}" for i in range(400)]
    for seed in range(10):
        train, val, test = (set(part) for part in split_texts(texts, seed=seed).values())
        assert train.isdisjoint(val | test)
        assert val.isdisjoint(test)


@pytest.mark.parametrize("seed", range(10))
def test_three_texts_are_enough(seed: int) -> None:
    split = split_texts(["a" * 1_000, "b", "b", "c"], seed=seed)
    assert all(split.values())


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "b", "a", "b"]])
def test_fewer_are_not(texts: list[str]) -> None:
    digests, sizes = digests_of(texts)
    with pytest.raises(InputError, match=rf"'my.txt' has {len(set(texts))} different texts"):
        split_documents(digests, sizes, corpus="my.txt")


@pytest.mark.parametrize(
    "fractions",
    [
        (0.9, 0.1),
        (1.0, 0.0, 0.0),
        (0.9, 0.2, -0.1),
        (0.9, 0.05, 0.04),
        "abc",
        0.9,
        (float("nan"),) * 3,
    ],
)
def test_fractions_are_three_positive_shares(fractions: object) -> None:
    digests, sizes = digests_of(["a", "b", "c"])
    with pytest.raises(InputError, match="three numbers above 0 with sum 1"):
        split_documents(digests, sizes, fractions)  # type: ignore[arg-type]
