"""Whether thoughts know who wrote a passage: a linear probe on books that the fit has not seen.

    .venv/bin/python benchmarks/author_recovery.py NOVELS
    .venv/bin/python benchmarks/author_recovery.py NOVELS --seed 1 --markdown docs/embeddings.md

NOVELS is a folder of text files called AUTHOR__BOOK. Half of each author's books (rounded up) are
fitted, without their authors' names; passages of both halves are embedded by `ltm.embed`. A linear
probe (ridge regression on the authors' indicators, its penalty chosen by leaving out one book at a
time) learns authors from the fitted books' passages and names those of the others. Its accuracy is
held against the share of the commonest author among the passages that it is asked about, as one
paired difference whose error is clustered by book; beside it stand two probes without a model, on
how often each byte and how often each pair of bytes occurs.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray

import ltm_pyro as ltm
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.estimates import clustered_mean, clustered_ratio

BEGIN, END = "<!-- authors:begin -->", "<!-- authors:end -->"
HEADER = 2000
"""Bytes at a book's start that no passage is taken from: title page and author stand there."""
PENALTIES = 10.0 ** np.arange(-2, 6)
Features = NDArray[np.float64]
Labels = NDArray[Any]


def author_of(file: str) -> str:
    return file.partition("__")[0].replace("_", " ")


def halves(books: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Each author's books, drawn: those that are fitted, and those that are not."""
    rng = np.random.default_rng(seed)
    fitted, unseen = [], []
    for author in sorted({author_of(book.name) for book in books}):
        mine = [book for book in books if author_of(book.name) == author]
        order = rng.permutation(len(mine))
        for place, i in enumerate(order):
            (fitted if place < (len(mine) + 1) // 2 else unseen).append(mine[i])
    return fitted, unseen


def passages(corpus: Corpus, per_book: int, seed: int) -> ltm.Batch:
    """As many whole sequences of each book, drawn, past its title page."""
    known = corpus.train.metadata
    whole = corpus.train.batch(range(len(corpus.train))).n_tokens.numpy() == corpus.seq_len
    rows = known[whole & (known["offset"] > HEADER)]
    drawn = rows.groupby("file", observed=True).sample(per_book, random_state=seed)
    return corpus.train.batch(ids=np.sort(drawn.index.to_numpy()))


def probe(x: Features, y: Labels, books: Labels) -> Callable[[Features], Labels]:
    """A linear probe; authors weigh the same, however many of their books there are."""
    names = np.unique(y)
    scale = x.std(0) + 1e-12
    weight = 1.0 / np.array([(y == author).sum() for author in y])
    targets = (y[:, None] == names).astype(float)
    Solution = tuple[Features, Features, Features]

    def solve(rows: Labels, penalty: float) -> Solution:
        w = weight[rows] / weight[rows].sum()
        a, t = x[rows] / scale, targets[rows]
        centre, share = w @ a, w @ t  # so that the intercept is not penalised
        a, t = np.sqrt(w)[:, None] * (a - centre), np.sqrt(w)[:, None] * (t - share)
        ridge = penalty / (len(x) * weight[rows].sum())
        if a.shape[1] <= len(a):
            return centre, share, np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ t)
        return centre, share, a.T @ np.linalg.solve(a @ a.T + ridge * np.eye(len(a)), t)

    def name(z: Features, solution: Solution) -> Labels:
        centre, share, slopes = solution
        return names[((z / scale - centre) @ slopes + share).argmax(1)]

    def left_out(penalty: float) -> float:
        right = [
            name(x[books == book], solve(books != book, penalty)) == y[books == book]
            for book in np.unique(books)
            if (y[books != book] == y[books == book][0]).any()  # else no author to find
        ]
        return float(np.concatenate(right).mean())

    best = max(PENALTIES, key=left_out)
    solution = solve(np.ones(len(x), bool), best)
    return lambda z: name(z, solution)


def counts(texts: list[str], length: int) -> Features:
    """How often each byte, or pair of bytes of 64 classes, occurs; square roots of shares."""
    out = []
    for text in texts:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if length == 2:
            data = (data[:-1] & 63) * 64 + (data[1:] & 63)
        out.append(np.bincount(data, minlength=256 if length == 1 else 4096) / len(data))
    return np.sqrt(np.array(out))


def fit(corpus: Corpus, options: argparse.Namespace) -> ltm.DualRateSVI:
    """A decoder that sees few tokens at a time: what lasts over a passage is left to thoughts."""
    torch.manual_seed(options.seed)
    model = ltm.LatentThoughtModel.from_preset(
        "nano", vocab_size=corpus.vocab_size, seq_len=corpus.seq_len, n_layers=2, width=64,
        n_heads=2, mlp_hidden=172, window=4,
    )  # fmt: skip
    slow = ltm.Slow(lr=4e-3, thoughts_start=0.2, kl_start=0.02, kl_hold=0.3, kl_full=0.8)
    fast = ltm.Fast(steps=4, lr=0.3)
    svi = ltm.DualRateSVI(model, "mean_field", fast, slow, seed=options.seed)
    svi.fit(corpus.train, steps=options.steps, batch_size=16)
    return svi


def accuracy(named: Labels, authors: Labels, books: Labels) -> dict[str, Any]:
    """How many are right, beside the commonest author's share, with errors clustered by book."""
    commonest = pd.Series(authors).mode()[0]
    right, constant = named == authors, authors == commonest
    gain = clustered_mean(right.astype(float) - constant, books)
    weight = 1.0 / np.array([(authors == author).sum() for author in authors])
    balanced = clustered_ratio(weight * right, weight, books)
    recall = {a: float(right[authors == a].mean()) for a in np.unique(authors)}
    return {
        "accuracy": float(right.mean()),
        "error": clustered_mean(right, books).error,
        "share": float(constant.mean()),
        "commonest": commonest,
        "gain": gain.value,
        "gain_error": gain.error,
        "balanced": balanced.value,
        "balanced_error": balanced.error,
        "recall": recall,
    }


def table(rows: dict[str, dict[str, Any]], facts: str) -> str:
    first = next(iter(rows.values()))
    authors = list(first["recall"])
    head = [
        "features of a passage",
        "right",
        f"above the commonest author's share ({first['share']:.1%})",
        f"authors weighing the same (one author: {1 / len(authors):.0%})",
        *(f"{a.split()[-1]} found" for a in authors),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [
            name,
            f"{row['accuracy']:.1%} ± {row['error']:.1%}",
            f"{100 * row['gain']:+.1f} ± {100 * row['gain_error']:.1f} points",
            f"{row['balanced']:.1%} ± {row['balanced_error']:.1%}",
            *(f"{row['recall'][a]:.0%}" for a in authors),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", facts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("novels", type=Path, help="a folder of files AUTHOR__BOOK.md or .txt")
    parser.add_argument("--steps", type=int, default=500, help="slow steps")
    parser.add_argument("--embed_steps", type=int, default=32, help="fast steps of a passage")
    parser.add_argument("--per_book", type=int, default=50, help="passages of each book")
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a passage")
    parser.add_argument("--seed", type=int, default=0, help="of books, passages and fit")
    parser.add_argument("--markdown", type=Path, help="put the table into this file")
    options = parser.parse_args()
    began = time.process_time()
    books = sorted(p for p in options.novels.glob("*__*") if p.suffix in (".md", ".txt"))
    fitted, unseen = halves(books, options.seed)
    learned = ltm.load_corpus(fitted, seq_len=options.seq_len, tokenizer="bpe", vocab_size=1024)
    other = ltm.load_corpus(unseen, seq_len=options.seq_len, tokenizer=learned.tokenizer)
    svi = fit(learned, options)
    batches = [passages(c, options.per_book, options.seed) for c in (learned, other)]
    files = [batch.metadata["file"].astype(str).to_numpy() for batch in batches]
    authors = [np.array([author_of(file) for file in names]) for names in files]
    embedded = [ltm.embed(svi, batch, options.embed_steps) for batch in batches]
    texts = [batch.texts() for batch in batches]
    features: dict[str, list[Features]] = {
        "posterior means": [f.filter(like="mean_").to_numpy(float) for f in embedded],
        "bytes, no model": [counts(t, 1) for t in texts],
        "pairs of bytes, no model": [counts(t, 2) for t in texts],
    }
    rows = {}
    for name, (seen, new) in features.items():
        named = probe(seen, authors[0], files[0])(new)
        rows[name] = accuracy(named, authors[1], files[1])
    some = batches[1].select(slice(None, None, 8))
    scores = ltm.evaluate(svi.model, svi.infer(some, options.embed_steps), some, 16)
    kl, shuffled = float(scores.kl.mean()), float((scores.nll_shuffled - scores.nll_given_z).mean())
    minutes = (time.process_time() - began) / 60
    facts = (
        f"{len(batches[1])} passages of {options.seq_len} tokens "
        f"({scores.attrs['n_bytes'] / len(some):.0f} bytes) of {len(unseen)} unseen books; "
        f"the probe learned from {len(batches[0])} of the {len(fitted)} fitted books. Two errors "
        f"on either side hold 95 %, clustered by book. One fit of {options.steps} slow steps, "
        f"seed {options.seed}: KL {kl:.1f} nats per passage, another passage's thoughts cost "
        f"{shuffled:.1f}. Made by `python benchmarks/author_recovery.py NOVELS --steps "
        f"{options.steps} --seed {options.seed}` in {minutes:.0f} min of one core's time "
        f"({platform.machine()}): ltm_pyro {ltm.__version__}, "
        f"torch {torch.__version__}, pyro {pyro.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}."
    )
    text = table(rows, facts)
    print(text)
    if options.markdown is not None:
        old = options.markdown.read_text()
        before, rest = old.split(BEGIN)
        options.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
