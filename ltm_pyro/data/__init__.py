"""Corpora, tokenizers and batches: from text to sequences with stable ids."""

from __future__ import annotations

from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.corpus import load_corpus
from ltm_pyro.data.markov import MarkovMixture
from ltm_pyro.data.mixture import MixtureCorpus
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.data.tokenizer import (
    ByteTokenizer,
    SymbolTokenizer,
    Tokenizer,
    load_tokenizer,
    register_tokenizer,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "MarkovMixture",
    "MixtureCorpus",
    "SequenceSet",
    "SymbolTokenizer",
    "Tokenizer",
    "load_corpus",
    "load_tokenizer",
    "register_tokenizer",
]
