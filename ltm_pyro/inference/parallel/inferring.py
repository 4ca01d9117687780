"""The fast loop of a batch, its sequences shared over processes and then put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.parallel.group import Parallel
from ltm_pyro.inference.parallel.row_noise import RowNoise

if TYPE_CHECKING:
    from ltm_pyro.inference.fast_loop import FastResult


def fit_shared(
    parallel: Parallel,
    guide: LocalGuide,
    batch: Batch,
    fit: Callable[[Batch], FastResult],
) -> FastResult:
    """Fits the guide to a batch, each process its part; in the end every process holds all rows.

    Parts need not be equal. Noise is that of the whole batch, so the answer is that of one process.

    Args:
        parallel: The processes.
        guide: Holds the B rows of `batch` afterwards.
        batch: The sequences, the same ones in every process.
        fit: Resets the guide for some rows and fits them.

    Raises:
        NonFiniteError: in all processes, if there was NaN in one.
        ProcessLostError: if a process is gone.
    """
    total = len(batch)
    if parallel.size == 1 or total < parallel.size:
        return fit(batch)
    mine = parallel.share(total)
    failed: NonFiniteError | None = None
    try:
        with RowNoise(mine.start, mine.stop - mine.start, total):
            result = fit(batch.select(mine))
    except NonFiniteError as error:
        failed = error
    ids = parallel.gather(None if failed is None else failed.ids)
    if any(some is not None for some in ids):
        raise NonFiniteError([i for some in ids for i in some or ()], -1)
    rows = {name: parallel.gather_rows(value) for name, value in guide.rows().items()}
    guide.reset(batch)
    guide.load_rows(rows)
    return _put_together(parallel, result)


def _put_together(parallel: Parallel, mine: FastResult) -> FastResult:
    """What all processes report: sums of the sums, and the rows of all."""
    trace, own = mine.trace, mine.own_draw_elbo
    if trace is not None:
        names = ("elbo", "nll", "kl", "grad_norm")
        whole = {name: parallel.gather_rows(getattr(trace, name), dim=1) for name in names}
        trace = replace(trace, **whole)
    return replace(
        mine,
        first=parallel.sum(mine.first.clone()),
        last=parallel.sum(mine.last.clone()),
        own_draw_elbo=None if own is None else parallel.gather_rows(own),
        trace=trace,
    )
