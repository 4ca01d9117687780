"""Byte-pair encoding over bytes: learned from a corpus, or GPT-2's from its two files.

No normaliser, no added space, no special tokens: the pieces are cut by GPT-2's regular expression
(Radford et al., 2019) and every one of the 256 bytes is in the vocabulary, so any UTF-8 survives
the round trip exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from ltm_pyro.data.tokenizer import Part, Unit, checked_ids, utf8
from ltm_pyro.errors import InputError

_VOCABULARY, _MERGES = "encoder.json", "vocab.bpe"
_MIN_FREQUENCY = 2  # a pair seen once is not worth an id
# Encoded at a time: some 40 MB in the library, which keeps about 100 bytes per token for a while.
_BATCH_CHARACTERS = 2**20


class BPETokenizer:
    """Byte-level byte-pair encoding.

    Args:
        state: The JSON state of a `tokenizers.Tokenizer`, as `to_json` holds it.

    Raises:
        InputError: if `state` is damaged, or its vocabulary cannot write every byte.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        try:
            self._engine = Engine.from_str(json.dumps(state))
        except Exception as error:  # the library raises bare `Exception`
            raise InputError(f"saved bpe tokenizer is damaged: {error}") from None
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

        Raises:
            InputError: if `vocab_size` is not a whole number of 256 or more.
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
        """GPT-2's vocabulary, or one in its format.

        Args:
            folder: Holds `encoder.json` and `vocab.bpe`.

        Raises:
            InputError: if a file is missing or damaged.
        """
        for name in (_VOCABULARY, _MERGES):
            if not (folder / name).is_file():
                raise InputError(
                    f"tokenizer folder {str(folder)!r} has no {name}: it must hold GPT-2's "
                    f"{_VOCABULARY} and {_MERGES}"
                )
        try:
            model = models.BPE.from_file(str(folder / _VOCABULARY), str(folder / _MERGES))
        except Exception as error:  # the library raises bare `Exception`
            raise InputError(f"cannot read the tokenizer in {str(folder)!r}: {error}") from None
        return cls(json.loads(_engine(model).to_str()))

    @property
    def name(self) -> str:
        """`bpe-V`."""
        return f"bpe-{self.vocab_size}"

    @property
    def unit(self) -> Unit:
        """`token`."""
        return "token"

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self._engine.get_vocab_size())

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

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[Part]:
        """The tokens of documents that come in pieces, encoded in batches on all cores.

        Args:
            pieces: Texts, each with whether its document ends there.

        Yields:
            Tokens (n,) and the lengths (m,) of the documents that end in them.
        """
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
        """`{"type": "bpe", "tokenizer": state}`."""
        return {"type": "bpe", "tokenizer": json.loads(self._engine.to_str())}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self._engine.to_str())

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size})"


def check_vocab_size(vocab_size: int) -> None:
    """Refuses a vocabulary too small for the bytes.

    Raises:
        InputError: if `vocab_size` is not a whole number of 256 or more.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 256:
        raise InputError(
            f"vocab_size is {vocab_size!r}: must be a whole number, 256 or more, since every byte "
            "needs an id"
        )


def _engine(model: models.BPE) -> Engine:
    """A `tokenizers` pipeline around `model` that changes no byte."""
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    engine.decoder = decoders.ByteLevel()
    return engine
