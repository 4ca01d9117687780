"""Tokenizers of the library `tokenizers`: learned byte-pair encoding, GPT-2's, and any other.

Byte-pair encoding has no normaliser, no added space, no special tokens: the pieces are cut by
GPT-2's regular expression (Radford et al., 2019) and every one of the 256 bytes is in the
vocabulary, so any UTF-8 survives the round trip exactly. Of other pipelines that is not promised.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from ltm_pyro.checks import whole_number
from ltm_pyro.data.tokenizer import Part, Unit, checked_ids, utf8
from ltm_pyro.errors import InputError, shown

GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""What GPT-2's vocabulary and merges are called, by its authors and by Hugging Face."""
_MOST_BYTES = 2**28  # of a file; the largest vocabularies known take 40 MB
_LONGEST_RULE = 10_000  # characters that a step of the pipeline may put in a text
_MIN_FREQUENCY = 2  # a pair seen once is not worth an id
# Encoded at a time: some 40 MB in the library, which keeps about 100 bytes per token for a while.
_BATCH_CHARACTERS = 2**20
_PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
# GPT-2's vocabulary writes each byte as a character: its own where that can be printed, and the
# others in turn from U+0100 on.
_BYTES = {chr(b): b for b in _PRINTED} | {
    chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTED)
}


class HuggingFaceTokenizer:
    """Any pipeline of the library, as a `tokenizer.json` holds it.

    Nothing is added to a text: no special tokens, no padding; nothing is cut off or left to chance.

    Args:
        state: The JSON state of a `tokenizers.Tokenizer`, as `to_json` holds it; refused where it
            is damaged, or would take up memory without limit.
    """

    kind = "huggingface"
    unit: Unit = "token"

    def __init__(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise InputError(f"saved {self.kind} tokenizer is damaged: it is no JSON object")
        _refuse_long_rules(state)
        plain = {**state, "padding": None, "truncation": None}
        if isinstance(state.get("model"), Mapping) and "dropout" in state["model"]:
            plain["model"] = {**state["model"], "dropout": None}
        try:
            self._engine = Engine.from_str(json.dumps(plain))
        except Exception as error:  # the library raises bare `Exception`
            raise InputError(
                f"saved {self.kind} tokenizer is damaged: {shown(str(error), 200)[1:-1]}"
            ) from None
        # Names of special tokens in a text are text.
        self._engine.encode_special_tokens = True
        ids = self._engine.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not ids or self.vocab_size > 2 * len(ids) + 1000:
            raise InputError(
                f"the vocabulary has {len(ids)} pieces with ids up to {self.vocab_size - 1}: they "
                "must be numbered without large gaps"
            )

    @classmethod
    def from_file(cls, file: Path) -> HuggingFaceTokenizer:
        """A pipeline from its `tokenizer.json`."""
        try:
            _refuse_large(file)
            state = json.loads(file.read_text(encoding="utf-8"))
        except InputError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the tokenizer {str(file)!r}: {why}") from None
        try:
            return cls(state)
        except InputError as error:
            raise InputError(f"{str(file)!r} is no tokenizer.json ({error}): give one") from None

    @classmethod
    def from_engine(cls, engine: Engine) -> HuggingFaceTokenizer:
        """The pipeline of a `tokenizers.Tokenizer`."""
        return cls(json.loads(engine.to_str()))

    @property
    def name(self) -> str:
        """The kind of its model and V, e.g. `wordpiece-30522`."""
        return f"{type(self._engine.model).__name__.lower()}-{self.vocab_size}"

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids (T,) of `text`; names of special tokens are ordinary text."""
        utf8(text)  # refuses what the library would replace
        return np.array(self._engine.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    @property
    def cuts_between_words(self) -> bool:
        """Whether no token reaches over the start of white space: so it is with GPT-2's cutting."""
        state = json.loads(self._engine.to_str())
        plain = json.loads(_engine(models.BPE()).to_str())
        parts = ("normalizer", "pre_tokenizer", "post_processor", "truncation", "added_tokens")
        return all(state.get(part) == plain.get(part) for part in parts)

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """What each id writes, where every token is a run of bytes, as GPT-2's cutting makes it."""
        if not self.cuts_between_words:
            return None
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        written = [b""] * self.vocab_size
        for token, number in vocabulary.items():
            known = all(c in _BYTES for c in token)
            written[number] = bytes(_BYTES[c] for c in token) if known else token.encode()
        return written

    def starts(self, text: str) -> NDArray[np.int64]:
        """Where each token (T,) of `text` begins in it, in characters."""
        offsets = self._engine.encode(text, add_special_tokens=False).offsets
        return np.array([start for start, _ in offsets], dtype=np.int64)

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[Part]:
        """See `StreamTokenizer`; pieces are encoded in batches, on all cores."""
        texts: list[str] = []
        ends: list[bool] = []
        size = length = 0
        for text, last in pieces:
            utf8(text)  # refuses what the library would replace
            texts.append(text)
            ends.append(last)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                part, length = self._encoded(texts, ends, length)
                yield part
                texts, ends, size = [], [], 0
        if texts:
            yield self._encoded(texts, ends, length)[0]

    def _encoded(self, texts: list[str], ends: list[bool], length: int) -> tuple[Part, int]:
        """One batch; `length` tokens of its first document came before, and some may follow it."""
        # The fast variant leaves out the offsets of tokens, which nobody asks for.
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        tokens, lengths = [], []
        for encoding, last in zip(encodings, ends, strict=True):
            tokens.append(np.array(encoding.ids, dtype=np.int64))
            length += len(tokens[-1])
            if last:
                lengths.append(length)
                length = 0
        return (np.concatenate(tokens), np.array(lengths, dtype=np.int64)), length

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` (T,); bytes that are no valid UTF-8 become U+FFFD."""
        checked = checked_ids(ids, self.vocab_size)
        return str(self._engine.decode(checked.tolist(), skip_special_tokens=False))

    def to_json(self) -> dict[str, Any]:
        """`{"type": "bpe", "tokenizer": state}`, or `huggingface`."""
        return {"type": self.kind, "tokenizer": json.loads(self._engine.to_str())}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceTokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self._engine.to_str())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class BPETokenizer(HuggingFaceTokenizer):
    """Byte-level byte-pair encoding.

    As `HuggingFaceTokenizer`; a vocabulary that cannot write every byte is refused too.
    """

    kind = "bpe"

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        missing = set(pre_tokenizers.ByteLevel.alphabet()) - self._engine.get_vocab().keys()
        if missing:
            raise InputError(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, so some text could not be "
                "written in it: use a byte-level vocabulary such as GPT-2's"
            )

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learns the merges from `documents`, which are streamed and not kept.

        Args:
            documents: Texts of the training split; no others, or held-out text would leak.
            vocab_size: V to aim at, 256 or more; a small corpus may yield fewer.
        """
        check_vocab_size(vocab_size)
        engine = _engine(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_FREQUENCY,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        engine.train_from_iterator(documents, trainer)
        return cls(json.loads(engine.to_str()))

    @classmethod
    def from_folder(cls, folder: Path) -> BPETokenizer:
        """GPT-2's vocabulary, or one in its format: a folder with a pair of `GPT2_FILES`."""
        for vocabulary, merges in GPT2_FILES:
            if (folder / vocabulary).is_file() and (folder / merges).is_file():
                break
        else:
            pairs = " or ".join(" and ".join(pair) for pair in GPT2_FILES)
            there = [n for pair in GPT2_FILES for n in pair if (folder / n).is_file()]
            lone = next((p for p in GPT2_FILES if set(p) & set(there)), GPT2_FILES[0])
            lacking = next(n for n in lone if n not in there)
            raise InputError(
                f"tokenizer folder {str(folder)!r} has no {lacking}: it must hold GPT-2's {pairs}, "
                "or a tokenizer.json"
            )
        for name in (vocabulary, merges):
            _refuse_large(folder / name)
        try:
            model = models.BPE.from_file(str(folder / vocabulary), str(folder / merges))
        except Exception as error:  # the library raises bare `Exception`
            raise InputError(f"cannot read the tokenizer in {str(folder)!r}: {error}") from None
        return cls(json.loads(_engine(model).to_str()))


def check_vocab_size(vocab_size: int) -> None:
    """Refuses a vocabulary too small for the bytes."""
    whole_number("vocab_size", vocab_size, 256, limit="since every byte needs an id")


def _engine(model: models.BPE) -> Engine:
    """A `tokenizers` pipeline around `model` that changes no byte."""
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    return engine


def _refuse_large(file: Path) -> None:
    """Refuses a tokenizer file of hundreds of megabytes, and what is no regular file."""
    info = file.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > _MOST_BYTES:
        raise InputError(
            f"tokenizer file {str(file)!r} has {info.st_size} bytes: must be a regular file of "
            f"{_MOST_BYTES} at most"
        )


def _refuse_long_rules(state: Mapping[str, Any]) -> None:
    """Refuses steps that put long texts in place of short ones, which multiplies any text."""
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    left: list[Any] = [state.get(step) for step in steps]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += [inner for key, inner in value.items() if key != "precompiled_charsmap"]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and len(value) > _LONGEST_RULE:
            raise InputError(
                f"the tokenizer's pipeline holds a rule of {len(value)} characters: must be "
                f"{_LONGEST_RULE} at most"
            )
