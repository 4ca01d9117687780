"""Tokenizers: exact round trips, honest refusals, nothing lost in saving."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from ltm_pyro.data import ByteTokenizer, SymbolTokenizer, Tokenizer, load_tokenizer
from ltm_pyro.data.bpe import BPETokenizer
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
        with pytest.raises(InputError, match="whole number from 1 to 4096"):
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
