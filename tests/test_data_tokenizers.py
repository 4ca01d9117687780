"""Tokenizers: exact round trips, honest refusals, nothing lost in saving."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Engine
from tokenizers import models, normalizers, pre_tokenizers

from ltm_pyro.data import (
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    load_corpus,
    load_tokenizer,
    register_tokenizer,
)
from ltm_pyro.data.bpe import BPETokenizer, HuggingFaceTokenizer
from ltm_pyro.data.tokenizer import TOKENIZERS, check_restorable
from ltm_pyro.data.vocabularies import open_tokenizer
from ltm_pyro.errors import InputError

TRAINING = [
    "the cat sat on the mat, the cat sat. " * 8,
    "déjà vu 中文中文 \U0001f600\U0001f600 " * 8,
]

NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\ufeffbyte order mark",
    "\x00\x01\x7f\x80\x85\u2028\u2029",
    "a\r\nb\rc\n\n\td",
    "e\u0301 and \u00e9 are different texts",
    "\u212b is no \u00c5, \ufb01 is no fi",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ufffd \ufffe",
    "مرحبا नमस्ते \u202eright to left",
    "<|endoftext|> <s> [CLS] are plain text",
    "Ġ Ċ ł look like the inside of a vocabulary",
    "x" * 5_000,
]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TRAINING, 300)


def random_text(seed: int) -> str:
    """Any code points but surrogates, more of the short ones."""
    rng = random.Random(seed)
    tops = [rng.choice([0x7F, 0x7FF, 0xFFFF, 0x10FFFF]) for _ in range(rng.randrange(200))]
    codes = [rng.randint(0, top) for top in tops]
    return "".join(chr(c) for c in codes if not 0xD800 <= c <= 0xDFFF)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_any_text_survives_the_round_trip(kind: str, bpe: BPETokenizer) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    for text in [*NASTY, *TRAINING, *(random_text(seed) for seed in range(200))]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert not ids.size or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_bytes_are_utf8() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.unit, tokenizer.name) == (256, "byte", "bytes")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_ids_that_are_no_text_decode_to_replacement_characters(
    kind: str, bpe: BPETokenizer
) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    ids = tokenizer.encode("\U0010ffff")
    assert set(tokenizer.decode(ids[:-1])) == {"\ufffd"}


def test_decode_takes_lists_arrays_and_tensors(bpe: BPETokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe, SymbolTokenizer(4)):
        ids = tokenizer.encode("abba")
        assert tokenizer.decode(ids.tolist()) == "abba"
        assert tokenizer.decode(torch.from_numpy(ids)) == "abba"
        assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("wrong", [[256_000], [-1], [0.5], [[1, 2]]])
def test_decode_refuses_what_are_no_ids(wrong: list[object], bpe: BPETokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe, SymbolTokenizer(4)):
        with pytest.raises(InputError, match="token id"):
            tokenizer.decode(wrong)


def test_lone_surrogates_are_refused(bpe: BPETokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(InputError, match=r"character 2 .* lone surrogate"):
            tokenizer.encode("ab\udc80")


@pytest.mark.parametrize("size", [1, 16, 62, 63, 4096])
def test_every_symbol_has_its_letter(size: int) -> None:
    tokenizer = SymbolTokenizer(size)
    text = tokenizer.decode(range(size))
    assert len(set(text)) == len(text) == size
    assert tokenizer.encode(text).tolist() == list(range(size))
    assert tokenizer.unit == "token"


def test_symbols_refuse_other_letters_and_sizes() -> None:
    with pytest.raises(InputError, match=r"'e' is no symbol .* a \.\. d"):
        SymbolTokenizer(4).encode("abe")
    for size in (0, 5000, True, "4"):
        with pytest.raises(InputError, match="1 or more and at most 4096"):
            SymbolTokenizer(size)  # type: ignore[arg-type]


def test_a_saved_tokenizer_is_restored_whole(bpe: BPETokenizer) -> None:
    for tokenizer in (ByteTokenizer(), SymbolTokenizer(16), bpe):
        restored = load_tokenizer(json.loads(json.dumps(tokenizer.to_json())))
        assert restored == tokenizer
        assert hash(restored) == hash(tokenizer)
        assert repr(restored) == repr(tokenizer)
        assert restored.name == tokenizer.name
        assert restored.encode("abba").tolist() == tokenizer.encode("abba").tolist()
        assert isinstance(restored, Tokenizer)


def test_damaged_saves_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'bytes'"):
        load_tokenizer({"type": "byte"})
    with pytest.raises(InputError, match="lacks 'vocab_size'"):
        load_tokenizer({"type": "symbols"})
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer({"type": "bpe", "tokenizer": {"version": "1.0"}})
    with pytest.raises(InputError, match="unknown tokenizer type"):
        load_tokenizer({})


def test_learning_is_deterministic_and_compresses(bpe: BPETokenizer) -> None:
    assert BPETokenizer.train(TRAINING, 300) == bpe
    assert 256 < bpe.vocab_size <= 300
    assert len(bpe.encode(TRAINING[0])) < len(TRAINING[0]) / 2
    assert bpe != ByteTokenizer()


@pytest.mark.parametrize("size", [255, 0, 300.0, True, "300"])
def test_a_vocabulary_must_hold_the_bytes(size: object) -> None:
    with pytest.raises(InputError, match="256 or more"):
        BPETokenizer.train(TRAINING, size)  # type: ignore[arg-type]


def write_gpt2_folder(folder: Path, alphabet: list[str], merges: list[str]) -> Path:
    """A vocabulary in GPT-2's two files."""
    pieces = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_gpt2_files(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder = write_gpt2_folder(tmp_path, alphabet, ["t h", "Ġ th", "Ġth e"])
    tokenizer = BPETokenizer.from_folder(folder)
    assert tokenizer.vocab_size == 256 + 3 + 1
    assert tokenizer.encode("the the").tolist() == [256, alphabet.index("e"), 258]
    # Held by the vocabulary, but only ever text here.
    assert tokenizer.encode("<|endoftext|>").size > 1
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no encoder\.json"):
        BPETokenizer.from_folder(tmp_path)
    write_gpt2_folder(tmp_path, ["a", "b"], [])
    with pytest.raises(InputError, match="lacks 254 of the 256 bytes"):
        BPETokenizer.from_folder(tmp_path)
    (tmp_path / "encoder.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        BPETokenizer.from_folder(tmp_path)


def test_gpt2_files_under_the_names_of_hugging_face(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write_gpt2_folder(ours, alphabet, ["t h", "Ġ th", "Ġth e"])
    theirs.mkdir()
    (theirs / "vocab.json").write_bytes((ours / "encoder.json").read_bytes())
    (theirs / "merges.txt").write_bytes((ours / "vocab.bpe").read_bytes())
    assert open_tokenizer(theirs) == open_tokenizer(ours) == BPETokenizer.from_folder(theirs)
    (theirs / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"has no merges\.txt"):
        open_tokenizer(theirs)


def word_pieces() -> Engine:
    """A pipeline of another kind: lower case, words, an unknown one."""
    engine = Engine(models.WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]"))
    engine.normalizer = normalizers.Lowercase()
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    return engine


def test_any_pipeline_of_the_library(tmp_path: Path, bpe: BPETokenizer) -> None:
    engine = word_pieces()
    engine.enable_padding(length=10**9)
    engine.enable_truncation(1)
    engine.add_special_tokens(["<end>"])
    file = tmp_path / "tokenizer.json"
    file.write_text(engine.to_str())
    for given in (engine, file, str(tmp_path), SimpleNamespace(backend_tokenizer=engine)):
        tokenizer = open_tokenizer(given)  # type: ignore[arg-type]
        assert tokenizer is not None
        assert tokenizer.encode("The cat sat the <end>").tolist()[:4] == [0, 1, 2, 0]
        assert (tokenizer.name, tokenizer.vocab_size) == ("wordlevel-4", 4)
        assert 3 not in tokenizer.encode("<end>")  # the names of special tokens are text
        restored = load_tokenizer(json.loads(json.dumps(tokenizer.to_json())))
        assert restored == tokenizer
        check_restorable(tokenizer)
    plain = open_tokenizer(Engine.from_str(json.dumps(bpe.to_json()["tokenizer"])))  # type: ignore[arg-type]
    assert plain is not None
    for text in NASTY:
        assert plain.decode(plain.encode(text)) == text
        assert plain.encode(text).tolist() == bpe.encode(text).tolist()


def test_a_text_of_which_no_token_is_made_is_refused(tmp_path: Path) -> None:
    engine = Engine(models.BPE({"a": 0, "b": 1}, []))
    texts = ["ab" * i for i in range(10, 30)]
    corpus = load_corpus(texts, tokenizer=engine, seq_len=8, cache_dir=tmp_path)  # type: ignore[arg-type]
    assert corpus.n_tokens == corpus.n_bytes
    with pytest.raises(InputError, match="makes no token of document 20"):
        load_corpus([*texts, "xyz"], tokenizer=engine, seq_len=8, cache_dir=tmp_path)  # type: ignore[arg-type]


def test_a_tokenizer_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    state = json.loads(word_pieces().to_str())
    gaps = {**state, "model": {**state["model"], "vocab": {"a": 0, "[UNK]": 4_000_000_000}}}
    with pytest.raises(InputError, match="ids up to 4000000000"):
        HuggingFaceTokenizer(gaps)
    long = {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 10**6}
    with pytest.raises(InputError, match="rule of 1000000 characters"):
        HuggingFaceTokenizer({**state, "normalizer": long})
    sparse = tmp_path / "tokenizer.json"
    with open(sparse, "wb") as stream:
        stream.truncate(2**40)  # a terabyte that takes no room
    with pytest.raises(InputError, match="bytes: must be a regular file"):
        open_tokenizer(sparse)
    with pytest.raises(InputError, match="must be a regular file"):
        open_tokenizer("/dev/zero")
    # Chance has no part in a text's tokens.
    state = BPETokenizer.train(TRAINING, 300).to_json()["tokenizer"]
    chance = BPETokenizer({**state, "model": {**state["model"], "dropout": 0.9}})
    assert chance.encode(TRAINING[0]).tolist() == BPETokenizer(state).encode(TRAINING[0]).tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "tokenizer is 3: must be a name"),
        (None, "tokenizer is None"),
        ("gpt2", r"unknown tokenizer 'gpt2'.*encoder\.json and vocab\.bpe"),
        ("word\n" * 500, "unknown tokenizer"),
        ("a\0b", "cannot be the path"),
        (BPETokenizer, "tokenizer is"),
    ],
)
def test_what_is_no_tokenizer_is_refused(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_tokenizer(given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_damaged_tokenizer_files(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": "1.0"}', "[" * 100_000, "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match=r"tokenizer\.json") as caught:
            open_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


class Words:
    """Somebody's own tokenizer: one id for each word it was given, one for all others."""

    unit = "token"

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.name = f"words-{len(words)}"
        self.vocab_size = len(words) + 1

    def encode(self, text: str) -> np.ndarray:
        known = {word: i for i, word in enumerate(self.words)}
        return np.array([known.get(word, len(self.words)) for word in text.split()])

    def decode(self, ids: Any) -> str:
        return " ".join([*self.words, "?"][int(i)] for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"type": "words", "words": self.words}

    @classmethod
    def from_json(cls, saved: Any) -> Words:
        return cls(saved.get("words", ["the", "cat"]))


@pytest.fixture
def _registered() -> Iterator[None]:
    register_tokenizer("words")(Words)
    yield
    TOKENIZERS.remove("words")


@pytest.mark.usefixtures("_registered")
def test_a_registered_tokenizer_is_known_by_name_and_restored(tmp_path: Path) -> None:
    texts = [f"the cat sat {i} times {'on the mat ' * i}" for i in range(20)]
    corpus = load_corpus(texts, tokenizer="words", seq_len=8, cache_dir=tmp_path)
    assert corpus.vocab_size == 3
    own = Words(["the", "on"])
    corpus = load_corpus(texts, tokenizer=own, seq_len=8, cache_dir=tmp_path)  # type: ignore[arg-type]
    assert corpus.tokenizer is own
    check_restorable(corpus.tokenizer)
    restored = load_tokenizer(own.to_json())
    assert isinstance(restored, Words)
    assert restored.words == own.words
    with pytest.raises(InputError, match="'words' is taken"):
        register_tokenizer("words")(type("Other", (Words,), {}))


def test_a_tokenizer_that_is_not_registered_cannot_be_restored() -> None:
    with pytest.raises(InputError, match="register_tokenizer"):
        check_restorable(Words(["a"]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'bytes' is taken"):
        register_tokenizer("bytes")(Words)
    with pytest.raises(InputError, match="'bpe' is built in"):
        register_tokenizer("bpe")
    with pytest.raises(InputError, match="lacks to_json"):
        register_tokenizer("nothing")(int)
    with pytest.raises(InputError, match="needs a name"):
        register_tokenizer(Words)  # type: ignore[arg-type]
