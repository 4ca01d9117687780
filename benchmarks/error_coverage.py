"""How often two errors on either side of `ppl_elbo` hold the truth, on redrawn splits.

    .venv/bin/python benchmarks/error_coverage.py
    .venv/bin/python benchmarks/error_coverage.py --splits 100 --markdown docs/errors.md

Every seed of the split draws another 5 % of the default corpus's documents for validation. Each is
scored by `evaluate`, on sequences chosen as `ltm-pyro evaluate` chooses them, and its error is held
against the perplexity of the whole corpus. The model is a byte trigram counted on a tenth of the
documents: exact without thoughts, and so cheap that hundreds of splits take minutes. Beside the
error that is printed stands the one that takes sequences for independent.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.models.base import LatentModel

BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"
SYMBOLS = 257
"""Bytes, and one that stands before the first."""
ALL = 10**9
"""More sequences than a split has."""


class Trigram(LatentModel):
    """Bytes given the two before them, by counts that fall back on shorter contexts.

    Args:
        batch: What is counted.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        _, before, last = contexts(batch)
        count = np.zeros((SYMBOLS * SYMBOLS, SYMBOLS))
        np.add.at(count, (before, last), 1.0)
        pairs = count.reshape(SYMBOLS, SYMBOLS, SYMBOLS).sum(0)
        single = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * SYMBOLS)
        pairs = (pairs + 20 * single) / (pairs.sum(1, keepdims=True) + 20)
        count = count.reshape(SYMBOLS, SYMBOLS, SYMBOLS) + 10 * pairs
        self.log_p = np.log(count / count.sum(2, keepdims=True)).reshape(-1, SYMBOLS)

    def prior(self) -> TorchDistribution:
        return dist.Normal(torch.zeros(1, 1), 1.0).to_event(2)

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return dist.Delta(batch.observed, self.log_likelihood(z, batch), event_dim=1)

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        rows, before, last = contexts(batch)
        nats = np.bincount(rows, weights=self.log_p[before, last], minlength=len(batch))
        return torch.from_numpy(nats).expand(z.shape[:-2])


def contexts(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every token that counts: its row, its two predecessors as one number, and itself."""
    x, mask = batch.observed.numpy(), batch.mask.numpy()
    padded = np.pad(x, ((0, 0), (2, 0)), constant_values=SYMBOLS - 1)
    rows = np.nonzero(mask)[0]
    return rows, (padded[:, :-2] * SYMBOLS + padded[:, 1:-1])[mask], x[mask]


def scores(model: Trigram, batch: Batch) -> dict[str, float]:
    """The attributes of `evaluate`: two draws, since the model ignores them."""
    return ltm.evaluate(model, None, batch, draws=2, mode="prior", controls=False).attrs


def whole(corpus: Corpus) -> Batch:
    """Every sequence of the corpus."""
    splits = [split.batch(range(len(split))) for split in (corpus.train, corpus.val, corpus.test)]
    names = ("x", "mask", "ids", "documents")
    joined: dict[str, Any] = {n: torch.cat([getattr(b, n) for b in splits]) for n in names}
    return Batch(**joined)


def counted(batch: Batch) -> Batch:
    """A tenth of the documents."""
    owners = np.asarray(batch.documents)
    documents = np.unique(owners)
    chosen = np.random.default_rng(0).permutation(documents)[: len(documents) // 10]
    return batch.select(torch.from_numpy(np.flatnonzero(np.isin(owners, chosen))))


def covered(splits: int, seed: int, counts: list[int]) -> tuple[list[str], str]:
    """The table, and what it is of."""
    everything = whole(ltm.load_corpus("pydoc", seq_len=256))
    model = Trigram(counted(everything))
    truth = scores(model, everything)["ppl_elbo"]
    found: dict[int, list[tuple[float, ...]]] = {count: [] for count in counts}
    for number in range(splits):
        held_out = ltm.load_corpus("pydoc", seq_len=256, seed=seed + number).val
        for count in counts:
            batch = spread(held_out, count)
            clustered, alone = (scores(model, b) for b in (batch, replace(batch, documents=None)))
            found[count].append(
                (
                    clustered["ppl_elbo"],
                    clustered["ppl_elbo_sampling_se"],
                    alone["ppl_elbo_sampling_se"],
                    clustered["n_documents"],
                    clustered["effective_documents"],
                )
            )
    rows = [
        "| sequences | documents (effective) | true sd | error: clustered | covers "
        "| error: sequences independent | covers |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in counts:
        ppl, error, naive, known, effective = np.array(found[count]).T
        hit, miss = (np.abs(ppl - truth) <= 2 * e for e in (error, naive))
        cells = (
            "all" if count == ALL else count,
            f"{known.mean():.0f} ({effective.mean():.0f})",
            f"{ppl.std():.3f}",
            f"{np.median(error):.3f}",
            f"**{hit.mean():.0%}**",
            f"{np.median(naive):.3f}",
            f"{miss.mean():.0%}",
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    documents = len(np.unique(np.asarray(everything.documents)))
    about = (
        f"{splits} splits, seeds {seed} to {seed + splits - 1}; {len(everything)} sequences of "
        f"{documents} documents, `ppl_elbo` of all {truth:.3f} per byte; errors are medians over "
        f"splits. Made by `python benchmarks/error_coverage.py --splits {splits} --seed {seed}`: "
        f"ltm_pyro {ltm.__version__}, torch {torch.__version__}, pyro {pyro.__version__}, numpy "
        f"{np.__version__}, Python {platform.python_version()}."
    )
    return rows, about


def main() -> None:
    """Prints the table, and puts it between the markers of a page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="a page with the table's markers")
    given = parser.parse_args()
    rows, about = covered(given.splits, given.seed, [64, 256, ALL])
    text = "\n".join([*rows, "", about])
    print(text)
    if given.markdown is not None:
        before, rest = given.markdown.read_text().split(BEGIN)
        after = rest.split(END)[1]
        given.markdown.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
