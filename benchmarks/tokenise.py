"""Measures how fast a large text becomes tokens, and in how much memory.

    .venv/bin/python benchmarks/tokenise.py --gpt2 FOLDER
    .venv/bin/python benchmarks/tokenise.py --quick --json tokenise.json

Makes a text (made-up words by Zipf's law, with the built-in reference prose strewn in; seeded) and
has `load_corpus` read, learn and encode it, in a process of its own for each tokenizer, with an
empty cache: byte by byte, by byte-pair encoding learned from it (V = 8192), and by GPT-2's
vocabulary where its folder is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import ltm_pyro
from ltm_pyro.data import load_corpus
from ltm_pyro.data.reference import PydocSource

MEGABYTES, QUICK = 1000, 50
WORDS, LONGEST = 200_000, 12
PARAGRAPH, PARAGRAPHS = 80, 250  # words; paragraphs made at a time
MB = 10**6


def main() -> None:
    """Makes the text, measures each tokenizer, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help="of text to make")
    parser.add_argument("--gpt2", type=Path, help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--only", help="one tokenizer: bytes, bpe or gpt2")
    parser.add_argument("--one-document", action="store_true", help="all in one line of JSON")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} MB")
    parser.add_argument("--folder", type=Path, help="where to put text and tokens (4 times as big)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(*arguments.measure)))
        return
    size = MB * (QUICK if arguments.quick else arguments.megabytes)
    tokenizers = {"bytes": "bytes", "bpe": "bpe"}
    if arguments.gpt2 is not None:
        tokenizers["gpt2"] = str(arguments.gpt2)
    if arguments.only is not None:
        tokenizers = {arguments.only: tokenizers[arguments.only]}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        file = Path(folder, "text.jsonl" if arguments.one_document else "text.txt")
        make_text(file, size, arguments.one_document)
        rows = [in_child(name, given, file) for name, given in tokenizers.items()]
    print("\n".join(table(rows)))
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"versions": versions(), "tokenizers": rows}, indent=2)
        )


def make_text(file: Path, size: int, one_document: bool) -> None:
    """Writes about `size` bytes of text, the same ones each time but for the reference prose."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    weights = 1 / np.arange(2, len(letters) + 2)
    lengths = rng.integers(2, LONGEST + 1, WORDS)
    drawn = rng.choice(letters, size=int(lengths.sum()), p=weights / weights.sum())
    words = ["".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    words.sort(key=len)  # frequent words are short
    pages = (page.text for page in PydocSource().documents())
    prose = [text for text in pages if text.isprintable() or "\n" in text]
    written = 0
    with open(file, "w", encoding="utf-8") as stream:
        if one_document:
            stream.write('{"text": "short"}\n{"text": "too"}\n{"text": "and one that is long"}\n')
            stream.write('{"text": "')
        while written < size:
            # exp of a uniform number: a word's frequency is one over its rank
            ranks = np.exp(rng.random((PARAGRAPHS, PARAGRAPH)) * np.log(WORDS)).astype(int) - 1
            parts = [" ".join([words[r] for r in row]) for row in ranks.tolist()]
            chunk = ".\n\n".join([*parts, prose[int(rng.integers(len(prose)))], ""])
            written += stream.write(json.dumps(chunk)[1:-1] if one_document else chunk)
        if one_document:
            stream.write('"}\n')


def in_child(name: str, given: str, file: Path) -> dict[str, Any]:
    """The figures of one tokenizer, from a fresh process so that its peak memory is its own."""
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        command = [sys.executable, __file__, "--measure", str(file), given, cache]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"tokenizer": name, **json.loads(done.stdout.splitlines()[-1])}


def measure(file: str, tokenizer: str, cache: str) -> dict[str, Any]:
    """Reads the text, then learns and encodes; a second load finds all of it in the cache."""
    load_corpus("pydoc", tokenizer=tokenizer, cache_dir=cache)  # imports and compiled code
    before = peak_bytes()
    fractions = (0.5, 0.25, 0.25) if file.endswith(".jsonl") else (0.9, 0.05, 0.05)
    began = time.perf_counter()
    load_corpus(file, tokenizer="bytes", cache_dir=cache, fractions=fractions)
    read = time.perf_counter()
    corpus = load_corpus(file, tokenizer=tokenizer, cache_dir=cache, fractions=fractions)
    done = time.perf_counter()
    load_corpus(file, tokenizer=tokenizer, cache_dir=cache, fractions=fractions)
    return {
        "vocab_size": corpus.vocab_size,
        "bytes": corpus.n_bytes,
        "tokens": corpus.n_tokens,
        "read_s": read - began,
        "tokens_s": done - read,
        "again_s": time.perf_counter() - done,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
    }


def peak_bytes() -> int:
    """Peak resident memory of this process; pages of mapped files count while they are mapped."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One row per tokenizer, as Markdown."""
    head = (
        "| tokenizer | V | text, MB | tokens, M | read, MB/s | learn and encode, MB/s | "
        "second load, s | peak memory, MB |"
    )
    lines = [head, "|---|" + "---:|" * 7]
    for r in rows:
        size = r["bytes"] / MB
        cells = [
            f"`{r['tokenizer']}`",
            f"{r['vocab_size']}",
            f"{size:.0f}",
            f"{r['tokens'] / 1e6:.1f}",
            f"{size / r['read_s']:.0f}",
            "-" if r["tokenizer"] == "bytes" else f"{size / r['tokens_s']:.1f}",
            f"{r['again_s']:.2f}",
            f"{r['peak_bytes'] / MB:.0f} ({r['peak_bytes_before'] / MB:.0f} before)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"{versions()}."]


def versions() -> str:
    """What the figures were made with."""
    import os

    import tokenizers

    return (
        f"ltm_pyro {ltm_pyro.__version__}, tokenizers {tokenizers.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores ({platform.machine()})"
    )


if __name__ == "__main__":
    main()
