"""Whether thoughts know who wrote a text: a linear probe on books that the fit has not seen.

    .venv/bin/python benchmarks/author_recovery.py NOVELS
    .venv/bin/python benchmarks/author_recovery.py NOVELS --design --seeds 0 --steps 100
    .venv/bin/python benchmarks/author_recovery.py NOVELS --markdown docs/thoughts.md

NOVELS is a folder of text files called AUTHOR__BOOK. The design of the study (length of a text,
context, steps) was chosen on the first two books, by name, of every author who has more than two:
`--design` takes these alone. Otherwise they are never asked about, and help to fit. The other books
are dealt into two halves, author by author: one half is fitted, without authors' names, the other
asked about, and then the other way round, so that each book is asked about once by a fit that has
not seen it; and all of it again with another seed.

A linear probe (ridge regression on the authors' indicators, its penalty chosen by leaving out one
fitted book at a time) learns authors from the posterior means that `ltm.embed` finds for texts of
fitted books, and names those of the others. It learns from equally many texts of each author and is
asked about equally many, so that one name for all is right for exactly one in so many authors.
Errors are clustered by book, over all seeds. Beside it stand two probes without a model, on how
often each byte occurs and each pair of bytes.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray

import ltm_pyro as ltm
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.estimates import clustered_mean

BEGIN, END = "<!-- authors:begin -->", "<!-- authors:end -->"
HEADER = 2000
"""Bytes at a book's start that no text is taken from: title page and author stand there."""
DESIGN_BOOKS = 2
SHARES = (0.98, 0.01, 0.01)
"""Of train, val and test: books are parted here, so that all of a book may be used."""
PENALTIES = 10.0 ** np.arange(5, -3, -1)
"""The heaviest first: it is taken where left-out books do not tell."""
MEANS, BYTES, PAIRS = "posterior means", "bytes, no model", "pairs of bytes, no model"
Features = NDArray[np.float64]
Labels = NDArray[np.str_]


def author_of(file: str) -> str:
    return file.partition("__")[0].replace("_", " ")


def by_author(books: list[Path]) -> dict[str, list[Path]]:
    authors = sorted({author_of(book.name) for book in books})
    return {a: [book for book in books if author_of(book.name) == a] for a in authors}


def design_books(books: list[Path]) -> list[Path]:
    """The first books of each author who has others too."""
    return [
        book
        for mine in by_author(books).values()
        if len(mine) > DESIGN_BOOKS
        for book in mine[:DESIGN_BOOKS]
    ]


def halves(books: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Each author's books, drawn, in two parts."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[Path], list[Path]] = [], []
    for mine in by_author(books).values():
        for place, i in enumerate(rng.permutation(len(mine))):
            parts[place % 2].append(mine[i])
    return parts


def texts_of(corpus: Corpus, per_author: int, seed: int) -> pd.DataFrame:
    """As many texts of each author, from all of the author's books alike.

    Returns:
        Their ids, past the title pages, with `book` and `author`.
    """
    rng = np.random.default_rng(seed)
    known = corpus.train.metadata
    whole = corpus.train.batch(range(len(corpus.train))).n_tokens.numpy() == corpus.seq_len
    files = known.loc[whole & (known["offset"] > HEADER), "file"].astype(str)
    parts = []
    for author, mine in files.groupby(files.map(author_of)):
        books = sorted(mine.unique())
        for place, book in enumerate(books):
            wanted = per_author // len(books) + (place < per_author % len(books))
            ids = mine.index[mine == book]
            if len(ids) < wanted:
                raise SystemExit(f"{book} has {len(ids)} texts and {wanted} are wanted: ask fewer")
            drawn = rng.permutation(ids)[:wanted]
            parts.append(pd.DataFrame({"id": drawn, "book": book, "author": author}))
    return pd.concat(parts, ignore_index=True)


def probe(x: Features, y: Labels, books: Labels) -> Callable[[Features], Labels]:
    """A linear probe, of features in units of their spread."""
    names = np.unique(y)
    targets = (y[:, None] == names).astype(float)
    used = x.std(0) > 1e-9
    centre, scale = x[:, used].mean(0), x[:, used].std(0)
    axes = np.eye(int(used.sum()))
    if len(axes) > len(x):  # the same ridge regression in as many dimensions as there are texts
        axes = np.linalg.svd((x[:, used] - centre) / scale, full_matrices=False)[2].T

    def turned(z: Features) -> Features:
        return ((z[:, used] - centre) / scale) @ axes

    a = turned(x)

    def named(z: Features, rows: NDArray[np.bool_]) -> list[Labels]:
        """Authors of `z`, by each penalty, learned from `rows`."""
        middle, share = a[rows].mean(0), targets[rows].mean(0)  # the intercept is not penalised
        inner, outer = a[rows] - middle, targets[rows] - share
        gram, cross = inner.T @ inner, inner.T @ outer
        slopes = [np.linalg.solve(gram + p * np.eye(len(gram)), cross) for p in PENALTIES]
        return [names[((z - middle) @ slope + share).argmax(1)] for slope in slopes]

    right = np.zeros(len(PENALTIES))
    for book in np.unique(books):
        mine = books == book
        if (y[~mine] == y[mine][0]).any():  # else no author to find
            right += [(each == y[mine]).sum() for each in named(a[mine], ~mine)]
    best = int(right.argmax())
    return lambda z: named(turned(z), np.ones(len(a), bool))[best]


def counts(texts: list[str], length: int) -> Features:
    """How often each byte, or pair of bytes of 64 classes, occurs; square roots of shares."""
    out = []
    for text in texts:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if length == 2:
            data = (data[:-1] & 63) * 64 + (data[1:] & 63)
        out.append(np.bincount(data, minlength=256 if length == 1 else 4096) / len(data))
    return np.sqrt(np.array(out))


def fit(corpus: Corpus, options: argparse.Namespace, seed: int) -> ltm.DualRateSVI:
    """A decoder that sees one token at a time: what lasts over a text is left to thoughts."""
    torch.manual_seed(seed)
    model = ltm.LatentThoughtModel.from_preset(
        "nano", vocab_size=corpus.vocab_size, seq_len=corpus.seq_len, n_layers=1, width=32,
        n_heads=2, mlp_hidden=64, window=1,
    )  # fmt: skip
    slow = ltm.Slow(lr=1e-2, thoughts_start=0.1, kl_start=0.02, kl_hold=0.3, kl_full=0.8)
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=4), slow, seed=seed)
    svi.fit(corpus.train, options.steps, options.batch_size, progress=False)
    return svi


def use(svi: ltm.DualRateSVI, batch: ltm.Batch, steps: int) -> dict[str, float]:
    """What thoughts of some texts cost, and what another text's cost more."""
    some = batch.select(slice(None, None, 4))
    scores = ltm.evaluate(svi.model, svi.infer(some, steps), some, 16)
    return {
        "kl": float(scores.kl.mean()),
        "shuffled": float((scores.nll_shuffled - scores.nll_given_z).mean()),
        "bytes": scores.attrs["n_bytes"] / len(some),
    }


def one_fit(
    fitted: list[Path], unseen: list[Path], options: argparse.Namespace, seed: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """What is named right in the books `unseen`: a row for each text and kind of features."""
    learned = ltm.load_corpus(
        fitted, seq_len=options.seq_len, tokenizer="bpe", vocab_size=options.vocab_size,
        fractions=SHARES,
    )  # fmt: skip
    other = ltm.load_corpus(
        unseen, seq_len=options.seq_len, tokenizer=learned.tokenizer, fractions=SHARES
    )
    svi = fit(learned, options, seed)
    drawn, features = [], []
    for corpus, per_author in ((learned, options.learn_from), (other, options.ask)):
        drawn.append(texts_of(corpus, per_author, seed))
        batch = corpus.train.batch(ids=drawn[-1]["id"].to_numpy())
        means = ltm.embed(svi, batch, options.embed_steps, progress=False).filter(like="mean_")
        texts = batch.texts()
        kinds = {MEANS: means.to_numpy(float), BYTES: counts(texts, 1), PAIRS: counts(texts, 2)}
        features.append(kinds)
    known, asked = drawn
    y, books = (known[column].to_numpy(str) for column in ("author", "book"))
    rows = []
    for name in (MEANS, BYTES, PAIRS):
        seen, new = (kinds[name] for kinds in features)
        right = probe(seen, y, books)(new) == asked["author"].to_numpy(str)
        rows.append(asked.assign(features=name, seed=seed, right=right))
    return pd.concat(rows, ignore_index=True), use(svi, batch, options.embed_steps)


def table(results: pd.DataFrame, facts: str) -> str:
    authors = sorted(results["author"].unique())
    chance = 1 / len(authors)
    head = [
        "features of a text",
        "right",
        f"above one name for all ({chance:.0%})",
        "less pairs of bytes",
        "books above that",
        "each seed",
        *(f"{a.split()[-1]} found" for a in authors),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    pairs = results.loc[results["features"] == PAIRS, "right"].to_numpy(float)
    for name, rows in results.groupby("features", sort=False):
        books, right = rows["book"].to_numpy(), rows["right"].to_numpy(float)
        score, less = clustered_mean(right, books), clustered_mean(right - pairs, books)
        of_book = rows.groupby("book")["right"].mean()
        cells = [
            str(name),
            f"{score.value:.1%} ± {score.error:.1%}",
            f"{100 * (score.value - chance):+.1f} ± {100 * score.error:.1f} points",
            "" if name == PAIRS else f"{100 * less.value:+.1f} ± {100 * less.error:.1f} points",
            f"{(of_book > chance).sum()} of {len(of_book)}",
            ", ".join(f"{each:.0%}" for each in rows.groupby("seed")["right"].mean()),
            *(f"{rows.loc[rows['author'] == a, 'right'].mean():.0%}" for a in authors),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", facts])


def options_of(arguments: list[str] | None) -> tuple[argparse.Namespace, str]:
    """The settings; and those that are not the usual ones, as they were given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("novels", type=Path, help="a folder of files AUTHOR__BOOK.md or .txt")
    parser.add_argument("--design", action="store_true", help="the books for choosing the design")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="all")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--vocab_size", type=int, default=512, help="byte pairs")
    parser.add_argument("--steps", type=int, default=500, help="slow steps of a fit")
    parser.add_argument("--batch_size", type=int, default=4, help="texts of a slow step")
    parser.add_argument("--embed_steps", type=int, default=8, help="fast steps of a text")
    parser.add_argument("--learn_from", type=int, default=48, help="texts of each author")
    parser.add_argument("--ask", type=int, default=16, help="texts of each author")
    parser.add_argument("--markdown", type=Path, help="put the table into this file")
    options = parser.parse_args(arguments)
    given = []
    for name, value in vars(options).items():
        if name not in ("novels", "markdown") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            given += [f"--{name}", *([] if value is True else map(str, values))]
    return options, " ".join(["python benchmarks/author_recovery.py NOVELS", *given])


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Prints the table; returns what was named right, text by text."""
    options, command = options_of(arguments)
    began = time.process_time()
    books = sorted(p for p in options.novels.glob("*__*") if p.suffix in (".md", ".txt"))
    design = design_books(books)
    asked = design if options.design else [book for book in books if book not in design]
    always = [] if options.design else design
    parts, uses = [], []
    for seed in options.seeds:
        one, two = halves(asked, seed)
        for fitted, unseen in ((one, two), (two, one)):
            rows, used = one_fit([*always, *fitted], unseen, options, seed)
            parts.append(rows)
            uses.append(used)
    results, usual = pd.concat(parts, ignore_index=True), pd.DataFrame(uses).mean()
    facts = (
        f"{results['book'].nunique()} books, each asked about by fits of the other half of them"
        f"{f' and of {len(always)} more' if always else ''}: {len(uses)} fits of {options.steps} "
        f"slow steps, seeds {', '.join(map(str, options.seeds))}; for each fit {options.ask} texts "
        f"of each author are named, and {options.learn_from} learned from. A text is "
        f"{options.seq_len} tokens ({usual['bytes']:.0f} bytes). Two errors on either side hold "
        f"95 %, clustered by book over all seeds. Thoughts: KL {usual['kl']:.1f} nats per text, "
        f"another text's thoughts cost {usual['shuffled']:.1f} nats. Made by `{command}` in "
        f"{(time.process_time() - began) / 60:.0f} min of one core's time "
        f"({platform.machine()}): ltm_pyro {ltm.__version__}, torch {torch.__version__}, "
        f"pyro {pyro.__version__}, numpy {np.__version__}, Python {platform.python_version()}."
    )
    text = table(results, facts)
    print(text)
    if options.markdown is not None:
        old = options.markdown.read_text("utf-8")
        before, rest = old.split(BEGIN)
        options.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")
    return results


if __name__ == "__main__":
    main()
