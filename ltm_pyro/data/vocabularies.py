"""A tokenizer from what a person gives: a name, a file, a folder, an object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ltm_pyro.data.sources import as_path
from ltm_pyro.data.tokenizer import (
    TOKENIZERS,
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    load_tokenizer,
)
from ltm_pyro.errors import InputError, shown, unknown_name

LEARNED = "bpe"
_STATE = "tokenizer.json"
Given = str | os.PathLike[str] | Tokenizer


def open_tokenizer(given: Given, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer asked for; `None` where one of V = `vocab_size` is to be learned from the text.

    `given` is `bytes`; `bpe`; the name of a registered one; a `tokenizer.json`, or a folder with
    one or with GPT-2's vocabulary; a `Tokenizer`, or a `tokenizers.Tokenizer`.
    """
    if isinstance(given, SymbolTokenizer):
        raise InputError("text cannot be written in the symbols of 'mixture': use bytes or bpe")
    if isinstance(given, str) and given == LEARNED:
        return None
    if isinstance(given, Tokenizer) and not isinstance(given, type):
        return given
    if vocab_size is not None:
        raise InputError(
            f"vocab_size is for tokenizer 'bpe': {shown(given)} has a vocabulary of its own; leave "
            "vocab_size out"
        )
    if not isinstance(given, str | os.PathLike):
        return _from_object(given)
    name = os.fspath(given)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name in TOKENIZERS and name != "symbols":
        return load_tokenizer({"type": name})
    path = as_path(name)
    if not os.path.lexists(path):
        names = [LEARNED, *(name for name in TOKENIZERS if name != "symbols")]
        raise InputError(
            f"{unknown_name('tokenizer', shown(name)[1:-1], names)}, or give the folder that "
            "holds GPT-2's encoder.json and vocab.bpe (or vocab.json and merges.txt), or a "
            f"{_STATE}"
        )
    return _from_path(path)


def _from_path(path: Path) -> Tokenizer:
    # Deferred here and below: the compiled library is needed for these families only.
    from ltm_pyro.data.bpe import GPT2_FILES, BPETokenizer, HuggingFaceTokenizer

    if not os.path.isdir(path):
        return HuggingFaceTokenizer.from_file(path)
    has_pair = any(all((path / name).is_file() for name in pair) for pair in GPT2_FILES)
    if (path / _STATE).is_file() and not has_pair:
        return HuggingFaceTokenizer.from_file(path / _STATE)
    return BPETokenizer.from_folder(path)


def _from_object(given: Any) -> Tokenizer:
    from tokenizers import Tokenizer as Engine

    from ltm_pyro.data.bpe import HuggingFaceTokenizer

    # What `transformers` calls a fast tokenizer holds one of the library's.
    engine = getattr(given, "backend_tokenizer", given)
    if isinstance(engine, Engine):
        return HuggingFaceTokenizer.from_engine(engine)
    parts = ("name", "unit", "vocab_size", "encode", "decode", "to_json")
    lacking = [part for part in parts if not hasattr(given, part)]
    raise InputError(
        f"tokenizer is {shown(given)}: must be a name, a path or a Tokenizer, which it is not for "
        f"want of {', '.join(lacking)}"
    )
