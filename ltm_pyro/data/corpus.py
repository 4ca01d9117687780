"""`load_corpus`: from whatever holds text to sequences."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.checks import whole_number
from ltm_pyro.data.arrays import ArraySource
from ltm_pyro.data.base import Corpus, fingerprint_of
from ltm_pyro.data.cache import Cache
from ltm_pyro.data.files import Newlines
from ltm_pyro.data.finding import BUILT_IN as BUILT_IN
from ltm_pyro.data.finding import HUB_OPTIONS, IN_MEMORY, absolute_path, find_source
from ltm_pyro.data.grouping import SplitKind, check_split, group_labels
from ltm_pyro.data.hub import HubSource
from ltm_pyro.data.memory import is_ids
from ltm_pyro.data.mixture import MixtureCorpus, make_mixture
from ltm_pyro.data.records import Reading, Source
from ltm_pyro.data.sequences import SequenceLayout, SequenceSet
from ltm_pyro.data.split import (
    FRACTIONS,
    SPLITS,
    check_fractions,
    given_splits,
    split_documents,
    warn_of_shares,
)
from ltm_pyro.data.store import TextStore, TokenStore, store_text, store_tokens, training_texts
from ltm_pyro.data.tokenizer import ByteTokenizer, SymbolTokenizer, Tokenizer, load_tokenizer
from ltm_pyro.data.vocabularies import Given, open_tokenizer
from ltm_pyro.errors import InputError, shown, unknown_name

VOCABULARY = 8192
ARGUMENTS = (
    *("seq_len", "tokenizer", "seed", "encoding", "cache_dir", "text_field", "turn_separator"),
    *("newlines", "split", "split_by"),
)
_TEXT_OPTIONS = ("fractions", "vocab_size")


@overload
def load_corpus(data: Literal["mixture"], **options: Any) -> MixtureCorpus: ...
@overload
def load_corpus(
    data: object,
    *,
    seq_len: int = ...,
    tokenizer: Given = ...,
    seed: int = ...,
    encoding: str = ...,
    cache_dir: str | os.PathLike[str] | None = ...,
    text_field: str = ...,
    turn_separator: str = ...,
    newlines: Newlines = ...,
    split: SplitKind | None = ...,
    split_by: str | None = ...,
    **options: object,
) -> Corpus: ...
def load_corpus(
    data: object,
    *,
    seq_len: int = 128,
    tokenizer: Given = "bytes",
    seed: int = 0,
    encoding: str = "utf-8",
    cache_dir: str | os.PathLike[str] | None = None,
    text_field: str = "text",
    turn_separator: str = "\n",
    newlines: Newlines = None,
    split: SplitKind | None = None,
    split_by: str | None = None,
    **options: Any,
) -> Corpus:
    """Loads a corpus, cut into sequences and split by document.

    The text is read as a stream and kept, with its tokens, in a cache of memory-mapped arrays, so a
    corpus may be larger than memory and loads at once the second time. Delete the cache folder to
    clear it.

    Args:
        data: `pydoc` (English reference prose, from this Python); `mixture` (synthetic, with exact
            likelihoods); the path of a file (.txt, .md, .jsonl, .json, .csv, .tsv, each also as .gz
            or .zst, or .parquet) or of a folder of them, several paths in a list, or a pattern such
            as `books/*.md`; a Hugging Face dataset, `hf:NAME`, `hf:NAME@REVISION` or `OWNER/NAME`.
            Or what a program holds: strings or dicts, in a list or any iterable (one or two strings
            are cut into documents as a text file is); a pandas frame; a `datasets.Dataset`; a dict
            of such by split; an array of token ids, (n,) or (documents, n).
        seq_len: T, 2 or more.
        tokenizer: `bytes`; `bpe`, learned from the training split; a folder with GPT-2's
            `encoder.json` and `vocab.bpe` (or `vocab.json` and `merges.txt`); a `tokenizer.json`,
            or its folder; a `tokenizers.Tokenizer`; one registered by `register_tokenizer`, by its
            name; or a `Tokenizer`, e.g. the one that a run was fitted with. `mixture` has symbols
            of its own.
        seed: Of the split, and of everything in `mixture`.
        encoding: Of text files that do not begin with a mark of their own.
        cache_dir: Instead of `$LTM_PYRO_CACHE` or the user's cache folder.
        text_field: The field of a record that is its text; dots lead into nested objects and
            through lists, as in `turns.text`.
        turn_separator: Between the strings of a list.
        newlines: By default files are read as Python reads text: their line ends become line feeds,
            and strings (what JSON escapes, a parquet table or data in memory hold) stay as they
            are. `lf` makes those line feeds too, `keep` leaves files as they are.
        split: `document` deals whole documents out; `group` keeps all documents together that agree
            in `split_by`; `given` leaves the splits as they are: files, or their folders, that are
            called after train, val (valid, validation, dev) and test, the splits of a Hugging Face
            dataset, or of a dict, for which it is the default. Otherwise the default is `document`.
        split_by: For `group`: a field of the records; `file`; or `file:PATTERN`, what the first
            group of a regular expression finds in the file's name.
        **options: For text, `fractions` (shares of train, val and test, by default 0.9, 0.05 and
            0.05) and, with `tokenizer="bpe"`, `vocab_size` (8192). For a Hugging Face dataset also
            its `config`, and `hub_split`, the split of it to read (`train`). For what a program
            holds, a `name`. For `mixture`, those of `make_mixture`.

    Returns:
        Corpus, or MixtureCorpus for `mixture`.

    Raises:
        InputError: if there is no such corpus, it cannot be read, it is too short to give a
            sequence and three splits, or an argument cannot be used.
    """
    seq_len = whole_number("seq_len", seq_len, at_least=2)
    seed = whole_number("seed", seed, at_least=0)
    kind = check_split(split, split_by, is_dict=isinstance(data, Mapping))
    reading = Reading(encoding, newlines, text_field, turn_separator, kind == "given")
    if isinstance(data, str) and data in BUILT_IN:
        _refuse_reading(data, reading, kind)
    if isinstance(data, str) and data == "mixture":
        return _mixture(seq_len, tokenizer, seed, options)
    settings: dict[str, Any] = {"seed": seed, "split": kind, "split_by": split_by}
    settings |= {"encoding": encoding, **reading.identity()}
    cutter = _Cutter(Cache(cache_dir), seq_len, seed, kind, split_by)
    hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    name = options.pop("name", None)
    if name is not None and not (isinstance(name, str) and name.isprintable() and name):
        raise InputError(f"name is {shown(name)}: must be a word or two")
    source: Source
    if is_ids(data):
        source, again, known = _token_ids(data, tokenizer, seq_len, name), None, ["fractions"]
    else:
        source, again = find_source(data, reading, hub, name)
        known = [*_TEXT_OPTIONS, *(HUB_OPTIONS if isinstance(source, HubSource) else ())]
    _check_options(source.name, {**hub, **options}, [*known, *(() if again else ("name",))])
    if again is not None and name is not None:
        raise InputError("name is for data that a program holds: files and datasets have theirs")
    recipe = None
    if again is not None:  # what was asked for, so that the same settings give the same recipe
        shares = {k: list(check_fractions(options[k])) for k in ("fractions",) if k in options}
        asked = {**settings, "split": split, "options": {**hub, **options, **shares}}
        if isinstance(tokenizer, str | os.PathLike):  # one at hand is a run's own
            asked["tokenizer"] = absolute_path(os.fspath(tokenizer))
        recipe = {"name": again, **asked}
    label = os.fspath(data) if isinstance(data, str | os.PathLike) else source.name
    return cutter.cut(source, label, recipe, tokenizer, {**settings, **hub}, **options)


class _Cutter:
    """Cuts texts into sequences, and deals them out."""

    def __init__(
        self, cache: Cache, seq_len: int, seed: int, kind: SplitKind, split_by: str | None
    ) -> None:
        self.cache, self.seq_len, self.seed = cache, seq_len, seed
        self.kind, self.split_by = kind, split_by

    def cut(
        self,
        source: Source,
        label: str,
        recipe: Mapping[str, Any] | None,
        tokenizer: Given,
        settings: dict[str, Any],
        fractions: Sequence[float] = FRACTIONS,
        vocab_size: int | None = None,
    ) -> Corpus:
        """The corpus of `source`, which messages call `label`; `recipe` loads it again."""
        shares, ids = check_fractions(fractions), isinstance(source, ArraySource)
        chosen = None if ids else open_tokenizer(tokenizer, vocab_size)
        text = store_text(self.cache, source)
        if not ids:
            _check_length(label, len(text.text), self.seq_len)
        parts = self._parts(text, shares, label)
        settings = {"source": label, "fractions": list(shares), **settings}
        if isinstance(source, ArraySource):
            chosen = source.tokenizer
            store = TokenStore(source.tokens, source.lengths, chosen.to_json())
        elif chosen is None:
            size = VOCABULARY if vocab_size is None else vocab_size
            settings["vocab_size"] = size
            store = _learned(self.cache, text, source.name, parts["train"], size)
            chosen = load_tokenizer(store.tokenizer)
        else:
            store = _encoded(self.cache, text, source.name, chosen)
        return self._corpus(source, recipe, text, store, chosen, parts, settings)

    def _parts(
        self, text: TextStore, shares: Sequence[float], label: str
    ) -> dict[str, NDArray[np.int64]]:
        """The documents of each split."""
        if self.kind == "given":
            return given_splits(text.given, label)
        together = [np.ascontiguousarray(text.near).view("V16")[:, 0]]
        if self.kind == "group":
            together.append(group_labels(text.table, str(self.split_by)))
        return split_documents(text.digests, text.lengths, shares, self.seed, label, together)

    def _corpus(
        self,
        source: Source,
        recipe: Mapping[str, Any] | None,
        text: TextStore,
        store: TokenStore,
        tokenizer: Tokenizer,
        parts: Mapping[str, NDArray[np.int64]],
        settings: Mapping[str, Any],
    ) -> Corpus:
        _check_length(source.name, len(store.tokens), self.seq_len)
        asked = dict(zip(SPLITS, settings["fractions"], strict=True))
        wanted = None if self.kind == "given" else asked
        notes = warn_of_shares(parts, text.lengths, wanted, source.name)
        fingerprint = fingerprint_of(text.sha256, tokenizer, self.seq_len)
        table = replace(text.table, group_by=self.split_by)
        layout = SequenceLayout(
            store.tokens, store.lengths, self.seq_len, fingerprint, tokenizer, table, text
        )
        symbols = tokenizer.unit == "byte" or isinstance(tokenizer, SymbolTokenizer)
        sets: dict[str, Any] = {k: SequenceSet(layout, part, k) for k, part in parts.items()}
        return Corpus(
            name=source.name,
            seq_len=self.seq_len,
            tokenizer=tokenizer,
            **sets,
            sha256=text.sha256["text"],
            n_tokens=len(store.tokens),
            n_bytes=len(store.tokens) if symbols else len(text.text),
            settings=settings,
            recipe=recipe,
            text=text,
            parts=parts,
            skipped=getattr(source, "skipped", {}),
            notes=tuple(notes),
        )


def _token_ids(data: object, tokenizer: Given, seq_len: int, name: str | None) -> ArraySource:
    chosen = tokenizer if isinstance(tokenizer, SymbolTokenizer) else open_tokenizer(tokenizer)
    if chosen is None:
        raise InputError("token ids have their tokenizer already: give it instead of 'bpe'")
    return ArraySource(data, chosen, seq_len, name or IN_MEMORY)


def _mixture(
    seq_len: int, tokenizer: Given, seed: int, options: Mapping[str, Any]
) -> MixtureCorpus:
    check_options("mixture", options)
    corpus = make_mixture(seq_len=seq_len, seed=seed, **options)
    named = isinstance(tokenizer, str) and tokenizer in ("bytes", "symbols")
    if not named and tokenizer != corpus.tokenizer:
        raise InputError(
            f"corpus 'mixture' cannot be read by tokenizer {shown(tokenizer)}: it consists of "
            "symbols; leave the tokenizer out"
        )
    return corpus


def _learned(
    cache: Cache, text: TextStore, label: str, training: NDArray[np.int64], vocab_size: int
) -> TokenStore:
    """Tokens by byte-pair encoding learned from the documents `training`."""
    # Deferred: the compiled library is needed for byte-pair encoding only.
    from ltm_pyro.data.bpe import BPETokenizer, check_vocab_size

    check_vocab_size(vocab_size)
    documents = hashlib.sha256(training.tobytes()).hexdigest()
    recipe = {"learned": "bpe", "vocab_size": vocab_size, "training": documents}

    def learn() -> Tokenizer:
        return BPETokenizer.train(training_texts(text, training), vocab_size)

    return store_tokens(cache, text, f"{label}-bpe", recipe, learn, vocab_size)


def _encoded(cache: Cache, text: TextStore, label: str, tokenizer: Tokenizer) -> TokenStore:
    """Tokens by a tokenizer at hand."""
    saved = tokenizer.to_json()
    if isinstance(tokenizer, ByteTokenizer):
        return TokenStore(text.text, text.lengths, saved)
    name, size = f"{label}-{tokenizer.name}", tokenizer.vocab_size
    return store_tokens(cache, text, name, saved, lambda: tokenizer, size)


def _refuse_reading(name: str, reading: Reading, kind: SplitKind) -> None:
    """Refuses what the built-in corpora have no use for."""
    if reading != Reading(reading.encoding) or kind != "document":
        raise InputError(
            f"corpus {name!r} has neither fields, line ends nor splits of its own: leave out "
            "text_field, turn_separator, newlines, split and split_by"
        )


def check_options(corpus: str, options: Mapping[str, Any]) -> None:
    """Refuses options that no corpus called `corpus` can have, whatever it turns out to be."""
    known = [*_TEXT_OPTIONS, *HUB_OPTIONS]
    if corpus == "mixture":
        known = [o for o in inspect.signature(make_mixture).parameters if o not in ARGUMENTS]
    _check_options(corpus, options, known)


def _check_options(corpus: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    for option in options:
        if option not in known:
            raise unknown_name(f"option of corpus {shown(corpus)},", option, [*known, *ARGUMENTS])


def _check_length(corpus: str, n_tokens: int, seq_len: int) -> None:
    if n_tokens < seq_len:
        raise InputError(
            f"corpus {shown(corpus, 200)} holds {n_tokens} tokens, fewer than one sequence of "
            f"{seq_len}: give more text or a smaller seq_len"
        )
