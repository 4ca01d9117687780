"""From text to token ids and back, exactly.

Every tokenizer reproduces any valid text from its ids, and can be written to JSON and restored, so
that a run folder holds all that is needed to read its tokens.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ltm_pyro.checks import whole_number
from ltm_pyro.errors import InputError, shown, unknown_name
from ltm_pyro.registry import Registry

K = TypeVar("K", bound=type[Any])
TOKENIZERS: Registry[type[Any]] = Registry("tokenizer", "register_tokenizer")
_DEFERRED = ("bpe", "huggingface")
Unit = Literal["byte", "token"]
Part = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens (n,) and the lengths (m,) of the documents that end in them."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer offers."""

    @property
    def name(self) -> str:
        """A short name for tables, e.g. `bytes` or `bpe-8192`."""
        ...

    @property
    def unit(self) -> Unit:
        """What one id stands for; scores are reported per unit."""
        ...

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 .. V - 1."""
        ...

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids (T,) of `text`; `InputError` if `text` cannot be written in this vocabulary."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids` (T,), all in the vocabulary; what is no valid UTF-8 becomes U+FFFD."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All there is to the tokenizer, as JSON types; `load_tokenizer` restores it."""
        ...


@runtime_checkable
class StreamTokenizer(Tokenizer, Protocol):
    """A tokenizer that encodes many texts at once, and in bounded memory."""

    @property
    def cuts_between_words(self) -> bool:
        """Whether a text cut as `TextStore.pieces` does has the tokens of its pieces."""
        ...

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[Part]:
        """The tokens of documents in pieces, each with whether its document ends there."""
        ...


@TOKENIZERS.register("bytes")
@dataclass(frozen=True)
class ByteTokenizer:
    """One id per byte of UTF-8."""

    name: str = "bytes"
    unit: Unit = "byte"
    vocab_size: int = 256

    @property
    def token_bytes(self) -> list[bytes]:
        """What each id writes."""
        return [bytes([i]) for i in range(256)]

    def encode(self, text: str) -> NDArray[np.int64]:
        """The bytes (T,) of `text`."""
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The text of the bytes `ids` (T,); a character cut in two becomes U+FFFD."""
        checked = checked_ids(ids, self.vocab_size)
        return checked.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        """`{"type": "bytes"}`."""
        return {"type": "bytes"}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> ByteTokenizer:
        """Restores what `to_json` wrote."""
        return cls()


_LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
_FURTHER_LETTERS = 0x0100  # Latin Extended-A onwards, for alphabets beyond letters and digits


@TOKENIZERS.register("symbols")
@dataclass(frozen=True)
class SymbolTokenizer:
    """The abstract symbols of a synthetic corpus, printed as letters."""

    vocab_size: int
    """V, from 1 to 4096."""
    unit: Unit = field(default="token", init=False, repr=False)

    def __post_init__(self) -> None:
        whole_number("vocab_size of symbols", self.vocab_size, 1, 4096)

    @property
    def name(self) -> str:
        """`symbols-V`."""
        return f"symbols-{self.vocab_size}"

    @property
    def alphabet(self) -> str:
        """The letter of each symbol, in order."""
        beyond = max(0, self.vocab_size - len(_LETTERS))
        further = "".join(map(chr, range(_FURTHER_LETTERS, _FURTHER_LETTERS + beyond)))
        return (_LETTERS + further)[: self.vocab_size]

    def encode(self, text: str) -> NDArray[np.int64]:
        """The symbols (T,) of the letters in `text`, all of the alphabet."""
        index = {letter: i for i, letter in enumerate(self.alphabet)}
        unknown = next((letter for letter in text if letter not in index), None)
        if unknown is not None:
            first, last = self.alphabet[0], self.alphabet[-1]
            raise InputError(
                f"{unknown!r} is no symbol of this corpus: its {self.vocab_size} symbols are "
                f"written {first} .. {last}"
            )
        return np.array([index[letter] for letter in text], dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The letters of the symbols `ids` (T,)."""
        alphabet = self.alphabet
        return "".join(alphabet[i] for i in checked_ids(ids, self.vocab_size))

    def to_json(self) -> dict[str, Any]:
        """`{"type": "symbols", "vocab_size": V}`."""
        return {"type": "symbols", "vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SymbolTokenizer:
        """Restores what `to_json` wrote."""
        return cls(saved["vocab_size"])


def register_tokenizer(name: str, *, override: bool = False) -> Callable[[K], K]:
    """Class decorator: makes a tokenizer of one's own known, so that runs with it can be loaded.

    The class is a `Tokenizer` whose `to_json` gives JSON types with `"type": name`, and has a class
    method `from_json` that restores it from them. Without further facts than its type it can be
    asked for by name: `load_corpus(..., tokenizer=name)`.

    Args:
        name: E.g. `"words"`.
        override: Replace a tokenizer of that name.

    Raises:
        InputError: if the name is taken, or the class has no `to_json` or `from_json`.
    """

    def add(cls: K) -> K:
        for method in ("to_json", "from_json", "encode", "decode"):
            if not callable(getattr(cls, method, None)):
                raise InputError(
                    f"tokenizer {shown(name)} ({shown(getattr(cls, '__name__', cls))}) lacks "
                    f"{method}: define it"
                )
        register(cls)
        return cls

    if isinstance(name, str) and name in _DEFERRED:
        raise InputError(f"tokenizer {name!r} is built in: choose another name")
    register = TOKENIZERS.register(name, override=override)
    return add


def load_tokenizer(saved: Mapping[str, Any]) -> Tokenizer:
    """Restores what `to_json` of a tokenizer known here wrote. Nothing is executed."""
    kind = saved.get("type") if isinstance(saved, Mapping) else None
    if not isinstance(kind, str) or kind not in (*TOKENIZERS, *_DEFERRED):
        raise InputError(
            f"{unknown_name('tokenizer type', str(kind), (*TOKENIZERS, *_DEFERRED))}; one's own is "
            "registered first, with register_tokenizer"
        )
    try:
        if kind in _DEFERRED:
            # Deferred: the compiled library is needed for these families only.
            from ltm_pyro.data import bpe

            made = bpe.BPETokenizer if kind == "bpe" else bpe.HuggingFaceTokenizer
            return made(saved["tokenizer"])
        restored: Tokenizer = TOKENIZERS[kind].from_json(saved)
    except KeyError as error:
        raise InputError(f"saved {kind} tokenizer lacks {error}: it is damaged") from None
    return restored


def check_restorable(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that `load_tokenizer` would not give back: a run could not be opened."""
    name = type(tokenizer).__name__
    try:
        saved = tokenizer.to_json()
        restored = load_tokenizer(json.loads(json.dumps(saved)))
    except (InputError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"tokenizer {name} cannot be saved with a run ({error}): put "
            f"@register_tokenizer('...') on its class, with to_json and from_json"
        ) from None
    if restored.to_json() != saved:
        raise InputError(f"tokenizer {name}: from_json does not give back what to_json wrote")


def utf8(text: str) -> bytes:
    """`text` in UTF-8; `InputError` if it holds a lone surrogate, which no UTF-8 can hold."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of the text is the lone surrogate "
            f"{text[error.start]!a}, which is not valid Unicode text: remove it"
        ) from None


def checked_ids(ids: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """`ids` as an int64 array (T,); `InputError` where one is outside the vocabulary."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"token ids must be whole numbers in one dimension, not {array.dtype} of shape "
            f"{array.shape}"
        )
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the vocabulary 0 .. {vocab_size - 1}")
    return array.astype(np.int64)
