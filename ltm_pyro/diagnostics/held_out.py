"""The bound on held-out text while a fit goes on, and a fit that stops when it no longer rises."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ltm_pyro.callbacks import Callback
from ltm_pyro.checks import MOST, whole_number
from ltm_pyro.config import MOST_FAST_STEPS
from ltm_pyro.course import Metrics
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of, monte_carlo
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.random import Stream, derive_seed

PREFIX = "held_out_"


class HeldOutBound:
    """The plain ELBO of a fixed set of held-out sequences, every some slow steps.

    q is fitted to them anew each time and scored on draws that it has not seen, KL weight 1,
    decoder and clocks untouched. All noise is a function of (seed, slow step, sequence id), so a
    fit that was interrupted finds the same numbers. Joins the step's metrics as `held_out_elbo`
    (nats per sequence), `held_out_elbo_se` (Monte Carlo error), `held_out_elbo_sampling_se` (error
    of having sampled these documents: two on either side hold 95 %), `held_out_kl` and
    `held_out_elbo_per_token`; of a point mass `held_out_log_joint`, which is no bound.

    Args:
        data: Where the sequences come from: `corpus.val`, or a batch, of which all are taken.
        every: Slow steps between bounds; the last step of a fit has one too.
        sequences: How many, drawn over the documents.
        draws: S, fresh draws per sequence, 2 or more.
        fast_steps: T_fast when they are inferred.
    """

    def __init__(
        self,
        data: SequenceSet | Batch,
        every: int = 50,
        sequences: int = 32,
        draws: int = 8,
        fast_steps: int = 16,
    ) -> None:
        if not isinstance(data, SequenceSet | Batch):
            raise InputError(f"data is {shown(data)}: must be corpus.val, or a Batch")
        self.every = whole_number("every", every, 1, MOST)
        self.draws = whole_number("draws", draws, 2, MOST)
        self.fast_steps = whole_number("fast_steps", fast_steps, 1, MOST_FAST_STEPS)
        whole_number("sequences", sequences, 1, MOST)
        self.batch = data if isinstance(data, Batch) else spread(data, sequences)

    def __repr__(self) -> str:
        return f"HeldOutBound({len(self.batch)} sequences every {self.every} slow steps)"

    def due(self, step: int, last: int) -> bool:
        """Whether to score after slow step `step` of a fit that ends with `last`."""
        return step % self.every == 0 or step == last

    def score(self, svi: DualRateSVI) -> Metrics:
        """The bound of the fit as it stands, and its errors."""
        noise = derive_seed(svi.seed, Stream.HELD_OUT, svi.slow_step)
        batch = self.batch.to(svi.model.device)
        post = svi.infer(batch, self.fast_steps, seed=noise, progress=False)
        scores = evaluate(
            svi.model, post, batch, self.draws, controls=False, seed=noise, parallel=svi.parallel
        )
        name = "elbo" if post.has_density else "log_joint"
        values = scores[name].values
        bound = clustered_mean(values, documents_of(scores))
        found = (
            bound.value,
            monte_carlo(scores, name) / len(values),
            bound.error,
            float(scores["kl"].mean()),
            float(values.sum() / scores["n_tokens"].sum()),
        )
        columns = zip(held_out_columns(post.has_density), found, strict=True)
        return {column: value for column, value in columns if math.isfinite(value)}


class EarlyStopping(Callback):
    """Stops a fit whose held-out bound has not risen for some time.

    The bound is on one fixed set of sequences, so its sampling error does not tell two of its
    values apart; the Monte Carlo error does.

    Args:
        patience: Bounds in a row that are no better than the best before them.
    """

    def __init__(self, patience: int = 5) -> None:
        self.patience = whole_number("patience", patience, 1, MOST)

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self.patience})"

    def on_evaluate(self, svi: DualRateSVI, row: Metrics) -> bool:
        """Whether patience is at its end: a function of `svi.metrics`, so that nothing is kept."""
        del row
        return self.over(svi.metrics)

    def over(self, metrics: Iterable[Metrics]) -> bool:
        """Whether a fit with these metrics has been stopped."""
        bounds = list(held_out_bounds(metrics).values())
        return bool(bounds) and len(bounds) - 1 - int(np.argmax(bounds)) >= self.patience


def held_out_columns(has_density: bool) -> tuple[str, ...]:
    """Names of what a held-out bound adds to a step's metrics."""
    name = "elbo" if has_density else "log_joint"
    parts = (name, f"{name}_se", f"{name}_sampling_se", "kl", f"{name}_per_token")
    return tuple(f"{PREFIX}{part}" for part in parts)


def held_out_bounds(metrics: Iterable[Metrics]) -> dict[int, float]:
    """The held-out bound in nats per sequence by slow step, where it was scored."""
    names = [f"{PREFIX}elbo", f"{PREFIX}log_joint"]
    return {int(row["step"]): row[name] for row in metrics for name in names if name in row}


def best_step(metrics: Iterable[Metrics]) -> int | None:
    """The slow step with the highest held-out bound; `None` where none was scored."""
    bounds = held_out_bounds(metrics)
    return max(bounds, key=lambda step: bounds[step]) if bounds else None


def spread(split: SequenceSet, count: int) -> Batch:
    """`count` sequences, 1 or more, drawn over the documents of a split; all where there are fewer.

    Each document gives its share, to within one: as much of the draw as it is of the split, at even
    distances. So the draw holds as many documents as it can, and its perplexity estimates that of
    the split.
    """
    if count < 1:
        raise InputError(f"{count} sequences: must be 1 or more")
    n = len(split)
    # Sequences stand in the order of their documents, so even distances are shares of documents.
    return split.batch(np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(np.int64)))
