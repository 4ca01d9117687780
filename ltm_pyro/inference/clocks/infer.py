"""The fast loop of a batch, its sequences shared over processes and then put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import Execution
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.guides.base import LocalGuide

if TYPE_CHECKING:
    from ltm_pyro.inference.clocks.fast import FastResult


TOKENS_AT_ONCE = 2**14
"""Positions fitted together where nothing else is said: enough to keep a processor busy."""


def parts_of(execution: Execution, batch: Batch, rows: int) -> list[slice]:
    """The first `rows` of a batch of any size in parts that memory has room for."""
    if execution.micro_batch is None:
        size = max(1, TOKENS_AT_ONCE // batch.mask[0].numel())
        execution = replace(execution, micro_batch=size)
    return execution.parts(rows)


def fit_shared(
    execution: Execution,
    guide: LocalGuide,
    batch: Batch,
    fit: Callable[[Batch], FastResult],
) -> FastResult:
    """Fits the guide to a batch, each process its rows; in the end every process holds all rows.

    Rows need not be shared equally. Noise belongs to a sequence, so the answer is that of one
    process that takes the batch at once.

    Args:
        execution: Processes, and how many rows are fitted at a time.
        guide: Holds the B rows of `batch` afterwards.
        batch: The sequences, the same ones in every process.
        fit: Resets the guide for some rows and fits them.

    Raises:
        NonFiniteError: in all processes, if there was NaN in one.
        ProcessLostError: if a process is gone.
    """
    parallel, total = execution.parallel, len(batch)
    alone = parallel.size == 1 or total < parallel.size
    mine = slice(0, total) if alone else parallel.share(total)
    parts = parts_of(execution, batch, mine.stop - mine.start)
    if alone and len(parts) == 1:
        return fit(batch)
    failed: NonFiniteError | None = None
    results, rows = [], []
    try:
        for part in parts:
            rows_of_part = slice(mine.start + part.start, mine.start + part.stop)
            results.append(fit(batch.select(rows_of_part)))
            rows.append(guide.rows())
    except NonFiniteError as error:
        failed = error
    ids = [None if failed is None else failed.ids]
    if not alone:
        ids = parallel.gather(ids[0])
    if any(some is not None for some in ids):
        raise NonFiniteError([i for some in ids for i in some or ()], -1)
    fitted = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    result = _one_after_another(results)
    if not alone:
        fitted = {name: parallel.gather_rows(value) for name, value in fitted.items()}
        result = _put_together(parallel, result)
    guide.reset(batch)
    guide.load_rows(fitted)
    return result


_TRACED = ("elbo", "nll", "kl", "grad_norm")


def _one_after_another(parts: list[FastResult]) -> FastResult:
    """What the parts of one process's rows report together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    trace, own = first.trace, None
    if trace is not None:
        traces = [part.trace for part in parts if part.trace is not None]
        whole = {n: torch.cat([getattr(t, n) for t in traces], dim=1) for n in _TRACED}
        trace = replace(trace, **whole)
    if first.own_draw_elbo is not None:
        own = torch.cat([p.own_draw_elbo for p in parts if p.own_draw_elbo is not None])
    return replace(
        first,
        first=torch.stack([part.first for part in parts]).sum(),
        last=torch.stack([part.last for part in parts]).sum(),
        own_draw_elbo=own,
        trace=trace,
    )


def _put_together(parallel: Parallel, mine: FastResult) -> FastResult:
    """What all processes report: sums of the sums, and the rows of all."""
    trace, own = mine.trace, mine.own_draw_elbo
    if trace is not None:
        whole = {n: parallel.gather_rows(getattr(trace, n), dim=1) for n in _TRACED}
        trace = replace(trace, **whole)
    return replace(
        mine,
        first=parallel.sum(mine.first.clone()),
        last=parallel.sum(mine.last.clone()),
        own_draw_elbo=None if own is None else parallel.gather_rows(own),
        trace=trace,
    )
