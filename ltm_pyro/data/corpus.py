"""`load_corpus`: from a name or a path to sequences."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.data.base import Corpus, fingerprint_of
from ltm_pyro.data.cache import Cache
from ltm_pyro.data.hub import PREFIX, HubSource
from ltm_pyro.data.mixture import MixtureCorpus, make_mixture
from ltm_pyro.data.reference import PydocSource
from ltm_pyro.data.sequences import SequenceLayout, SequenceSet, whole_number
from ltm_pyro.data.sources import SUFFIXES, FileSource, Source
from ltm_pyro.data.split import FRACTIONS, check_fractions, split_documents
from ltm_pyro.data.store import TextStore, TokenStore, store_text, store_tokens, training_texts
from ltm_pyro.data.tokenizer import ByteTokenizer, SymbolTokenizer, Tokenizer, load_tokenizer
from ltm_pyro.errors import InputError, unknown_name

BUILT_IN = ("pydoc", "mixture")
VOCABULARY = 8192
_ARGUMENTS = ("seq_len", "tokenizer", "seed", "encoding", "cache_dir")
_TEXT_OPTIONS = ("fractions", "vocab_size")
_HUB_OPTIONS = ("config", "split")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@overload
def load_corpus(
    name_or_path: Literal["mixture"],
    *,
    seq_len: int = ...,
    tokenizer: str | os.PathLike[str] | Tokenizer = ...,
    seed: int = ...,
    encoding: str = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
    **options: object,
) -> MixtureCorpus: ...
@overload
def load_corpus(
    name_or_path: str | os.PathLike[str],
    *,
    seq_len: int = ...,
    tokenizer: str | os.PathLike[str] | Tokenizer = ...,
    seed: int = ...,
    encoding: str = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
    **options: object,
) -> Corpus: ...
def load_corpus(
    name_or_path: str | os.PathLike[str],
    *,
    seq_len: int = 128,
    tokenizer: str | os.PathLike[str] | Tokenizer = "bytes",
    seed: int = 0,
    encoding: str = "utf-8",
    cache_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Corpus:
    """Loads a corpus, cut into sequences and split by document.

    The text is read as a stream and kept, with its tokens, in a cache of memory-mapped arrays, so a
    corpus may be larger than memory and loads at once the second time. Delete the cache folder to
    clear it.

    Args:
        name_or_path: `pydoc` (English reference prose, from this Python); `mixture` (synthetic,
            with exact likelihoods); the path of a .txt, .md or .jsonl file (one JSON object with a
            string `text` per line) or of a folder of them; or a Hugging Face dataset, `hf:NAME` or
            `OWNER/NAME`.
        seq_len: T, 2 or more.
        tokenizer: `bytes`; `bpe`, learned from the training split; a folder with GPT-2's
            `encoder.json` and `vocab.bpe`; or a `Tokenizer`, e.g. the one that a run was fitted
            with. `mixture` has symbols of its own.
        seed: Of the split, and of everything in `mixture`.
        encoding: Of text files.
        cache_dir: Instead of `$LTM_PYRO_CACHE` or the user's cache folder.
        **options: For text, `fractions` (shares of train, val and test, by default 0.9, 0.05 and
            0.05) and, with `tokenizer="bpe"`, `vocab_size` (8192). For a Hugging Face dataset also
            its `config` and `split`. For `mixture`, those of `make_mixture`.

    Returns:
        Corpus, or MixtureCorpus for `mixture`.

    Raises:
        InputError: if there is no such corpus, it cannot be read, it is too short to give a
            sequence and three splits, or an argument cannot be used.
    """
    seq_len = whole_number("seq_len", seq_len, at_least=2)
    seed = whole_number("seed", seed, at_least=0)
    if name_or_path == "mixture":
        known = [o for o in inspect.signature(make_mixture).parameters if o not in _ARGUMENTS]
        _check_options("mixture", options, known)
        corpus = make_mixture(seq_len=seq_len, seed=seed, **options)
        if tokenizer not in ("bytes", "symbols", corpus.tokenizer):
            raise InputError(
                f"corpus 'mixture' cannot be read by tokenizer {tokenizer!r}: it consists of "
                "symbols; leave the tokenizer out"
            )
        return corpus
    hub_options = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    source = _source(name_or_path, encoding, hub_options)
    known = [*_TEXT_OPTIONS, *(_HUB_OPTIONS if isinstance(source, HubSource) else ())]
    _check_options(source.name, {**hub_options, **options}, known)
    return _text_corpus(
        source, str(name_or_path), seq_len, tokenizer, seed, Cache(cache_dir), **options
    )


def _text_corpus(
    source: Source,
    given: str,
    seq_len: int,
    tokenizer: str | os.PathLike[str] | Tokenizer,
    seed: int,
    cache: Cache,
    fractions: Sequence[float] = FRACTIONS,
    vocab_size: int | None = None,
) -> Corpus:
    shares = check_fractions(fractions)
    chosen = _tokenizer(tokenizer, vocab_size)
    text = store_text(cache, source)
    _check_length(given, len(text.text), seq_len)
    documents = split_documents(text.digests, text.lengths, shares, seed, corpus=given)
    settings: dict[str, Any] = {"source": given, "seed": seed, "fractions": list(shares)}
    if chosen is None:
        size = VOCABULARY if vocab_size is None else vocab_size
        settings["vocab_size"] = size
        store = _learned(cache, text, source.name, documents["train"], size, settings)
        chosen = load_tokenizer(store.tokenizer)
    else:
        store = _encoded(cache, text, source.name, chosen)
    _check_length(given, len(store.tokens), seq_len)
    fingerprint = fingerprint_of(text.sha256, chosen, seq_len)
    layout = SequenceLayout(store.tokens, store.lengths, seq_len, fingerprint)
    return Corpus(
        name=source.name,
        seq_len=seq_len,
        tokenizer=chosen,
        **{name: SequenceSet(layout, part, name) for name, part in documents.items()},
        sha256=text.sha256["text"],
        n_tokens=len(store.tokens),
        n_bytes=len(text.text),
        settings=settings,
    )


def _learned(
    cache: Cache,
    text: TextStore,
    label: str,
    training: NDArray[np.int64],
    vocab_size: int,
    settings: Mapping[str, Any],
) -> TokenStore:
    """Tokens by byte-pair encoding learned from the documents `training`."""
    # Deferred here and below: the compiled library is needed for byte-pair encoding only.
    from ltm_pyro.data.bpe import BPETokenizer, check_vocab_size

    check_vocab_size(vocab_size)
    recipe = {
        "learned": "bpe",
        **{key: settings[key] for key in ("seed", "fractions", "vocab_size")},
    }
    return store_tokens(
        cache,
        text,
        f"{label}-bpe",
        recipe,
        lambda: BPETokenizer.train(training_texts(text, training), vocab_size),
        vocab_size,
    )


def _encoded(cache: Cache, text: TextStore, label: str, tokenizer: Tokenizer) -> TokenStore:
    """Tokens by a tokenizer at hand."""
    saved = tokenizer.to_json()
    if isinstance(tokenizer, ByteTokenizer):
        return TokenStore(text.text, text.lengths, saved)
    name, size = f"{label}-{tokenizer.name}", tokenizer.vocab_size
    return store_tokens(cache, text, name, saved, lambda: tokenizer, size)


def _source(
    name_or_path: str | os.PathLike[str], encoding: str, hub_options: Mapping[str, Any]
) -> Source:
    """Where the documents of `name_or_path` come from."""
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if isinstance(name_or_path, str):
        if name == "pydoc":
            return PydocSource()
        if name.startswith(PREFIX):
            return HubSource(name.removeprefix(PREFIX), **hub_options)
        if _is_hub_name(name) and not os.path.lexists(path):
            return HubSource(name, **hub_options)
        if not name or not (os.path.lexists(path) or "." in name or len(path.parts) > 1):
            raise InputError(
                f"{unknown_name('corpus', name, BUILT_IN)}, or give the path of a file or folder, "
                f"or a Hugging Face dataset as {PREFIX}NAME"
            )
    return FileSource(path, encoding)


def _is_hub_name(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME rather than as a path with a slip in it."""
    owner = name.partition("/")[0]
    is_text_file = name.lower().endswith(SUFFIXES)
    return bool(_HUB_NAME.fullmatch(name)) and not is_text_file and not os.path.isdir(owner)


def _tokenizer(
    tokenizer: str | os.PathLike[str] | Tokenizer, vocab_size: int | None
) -> Tokenizer | None:
    """The tokenizer asked for; `None` where it is to be learned."""
    if isinstance(tokenizer, SymbolTokenizer):
        raise InputError("text cannot be written in the symbols of 'mixture': use bytes or bpe")
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    name = os.fspath(tokenizer)
    if name == "bpe":
        return None
    if vocab_size is not None:
        raise InputError(
            f"vocab_size is for tokenizer 'bpe': {name!r} has a vocabulary of its own; leave "
            "vocab_size out"
        )
    if name == "bytes":
        return ByteTokenizer()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{unknown_name('tokenizer', name, ('bytes', 'bpe'))}, or give the folder that holds "
            "GPT-2's encoder.json and vocab.bpe"
        )
    from ltm_pyro.data.bpe import BPETokenizer

    return BPETokenizer.from_folder(folder)


def _check_options(corpus: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    for option in options:
        if option not in known:
            raise unknown_name(f"option of corpus {corpus!r},", option, [*known, *_ARGUMENTS])


def _check_length(corpus: str, n_tokens: int, seq_len: int) -> None:
    if n_tokens < seq_len:
        raise InputError(
            f"corpus {corpus!r} holds {n_tokens} tokens, fewer than one sequence of {seq_len}: "
            "give more text or a smaller seq_len"
        )
