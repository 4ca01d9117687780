"""The seam between the idea and the engine: how a fit is computed, and not what.

Compiled or not, in which precision, how many rows at a time, what is computed again to save memory,
in which processes. Choices here change what a step costs, and its result only in the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from ltm_pyro.checks import one_of, switch, whole_number
from ltm_pyro.config import Precision
from ltm_pyro.data.batches import Batch, TrainingData
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import InputError, NonFiniteError, shown

TOKENS_AT_ONCE = 2**14
"""Positions computed together where nothing else is said: enough to keep a processor busy."""


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters ask for no gradient, so none is computed for them."""
    kept = [(p, p.requires_grad) for p in parameters]
    for p, _ in kept:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in kept:
            p.requires_grad_(flag)


@runtime_checkable
class Computes(Protocol):
    """A model whose likelihood can be computed in several ways; the language model's can."""

    def computing(
        self, precision: Precision = "fp32", checkpointing: bool = False
    ) -> AbstractContextManager[None]:
        """Inside the block the likelihood is computed in this way."""
        ...

    def compile_fast_loop(self) -> None:
        """Compiles the likelihood that the fast loop calls."""
        ...


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a fit is computed.

    Attributes:
        compile: Compile the likelihood of both clocks (tens of seconds, once per shape; kept in the
            cache folder), with a warning where no compiler works.
        precision: `fp32`, or `bf16` for the decoder's matrix products.
        micro_batch: Rows that both clocks take at a time, to save memory; the whole batch by
            default. Slow gradients add up over the parts.
        checkpointing: Compute layers again in the slow step's backward pass, to save memory.
        parallel: The processes that share the fit, each with its rows of every batch; this one
            alone by default.
    """

    compile: bool = False
    precision: Precision = "fp32"
    micro_batch: int | None = None
    checkpointing: bool = False
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        for name in ("compile", "checkpointing"):
            switch(name, getattr(self, name))
        one_of("precision", self.precision, get_args(Precision))
        if self.micro_batch is not None:
            whole_number("micro_batch", self.micro_batch, at_least=1)
        if not isinstance(self.parallel, Parallel):
            raise InputError(
                f"parallel is {shown(self.parallel)}: must be the processes that share the fit, "
                "ltm_pyro.engine.processes.join(...)"
            )

    def prepare(self, model: Any) -> None:
        """Compiles what is to be; refuses a model that knows another way to compute alone."""
        if not isinstance(model, Computes):
            if self.compile or self.checkpointing or self.precision != "fp32":
                raise InputError(
                    f"{type(model).__name__} has no decoder to compile, checkpoint or compute in "
                    "bf16: leave compile, checkpointing and precision at their defaults"
                )
        elif self.compile:
            model.compile_fast_loop()

    def computing(self, model: Any) -> AbstractContextManager[None]:
        """Inside the block the model's likelihood is computed in this way."""
        if isinstance(model, Computes):
            return model.computing(self.precision, self.checkpointing)
        return nullcontext()

    def batch_of_step(
        self, data: TrainingData, step: int, batch_size: int, seed: int, *, lanes: bool = False
    ) -> Batch:
        """This process's rows of the batch of one slow step.

        Args:
            data: The training sequences.
            step: The slow step.
            batch_size: B, of all processes together.
            seed: Of the order.
            lanes: Keep every sequence to its lane of the batch, and so to its process: rows that
                are stored need it.

        Raises:
            InputError: if the processes cannot have equally many rows.
        """
        # Only what is asked for, so that data of one's own need know neither.
        asked: dict[str, Any] = {"lanes": True} if lanes else {}
        if self.parallel.size > 1:
            asked["rows"] = self.parallel.rows(min(batch_size, len(data)))
        return data.training_batch(step, batch_size, seed, **asked)

    def parts(self, rows: int) -> list[slice]:
        """The batch's `rows` in parts of `micro_batch`."""
        return _cut(slice(0, rows), self.micro_batch or rows)

    def by_rows(
        self, batch: Batch, work: Callable[[Batch], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `work` gives for some rows of any batch, (rows, ...) by name, of all of them.

        Parts that memory has room for follow one another, and processes share the rows, not
        necessarily equally; in the end every process holds all.

        Raises:
            NonFiniteError: in all processes, if there was NaN in one.
            ProcessLostError: if a process is gone.
        """
        parallel, total = self.parallel, len(batch)
        alone = parallel.size == 1 or total < parallel.size
        parts = self.parts_of(batch, slice(0, total) if alone else parallel.share(total))
        done, failed = [], None
        try:
            done = [work(batch.select(rows)) for rows in parts]
        except NonFiniteError as error:
            if alone:
                raise
            failed = error.ids
        told = [None] if alone else parallel.gather(failed)
        if any(ids is not None for ids in told):
            raise NonFiniteError([i for ids in told for i in ids or ()], -1)
        whole = {name: torch.cat([part[name] for part in done]) for name in done[0]}
        return whole if alone else {k: parallel.gather_rows(v) for k, v in whole.items()}

    def parts_of(self, batch: Batch, rows: slice) -> list[slice]:
        """These rows of a batch of any size in parts that memory has room for."""
        return _cut(rows, self.micro_batch or max(1, TOKENS_AT_ONCE // batch.mask[0].numel()))


def _cut(rows: slice, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]
