"""How the two clocks compute: compiled or not, in which precision, how many rows at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ltm_pyro.config import PRECISIONS, Precision
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.inference.freed import keep_freed
from ltm_pyro.models.base import Computes, LatentModel


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Choices that change what a step costs, and its result only in the rounding.

    Attributes:
        compile: Compile the likelihood of the fast loop.
        precision: Of the decoder's matrix products.
        micro_batch: Rows that both clocks take at a time; the whole batch by default. Slow
            gradients add up over the parts, and noise is that of the whole batch.
        checkpointing: Compute layers again in the slow step's backward pass.
    """

    compile: bool = False
    precision: Precision = "fp32"
    micro_batch: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", str(self.precision), PRECISIONS)
        rows = self.micro_batch
        whole = isinstance(rows, int) and not isinstance(rows, bool) and rows > 0
        if rows is not None and not whole:
            raise InputError(f"micro_batch is {rows!r}: must be a whole number above 0, or None")

    def prepare(self, model: LatentModel) -> None:
        """Compiles what is to be compiled; on the CPU, has freed memory kept.

        Raises:
            InputError: if the model knows one way to compute alone and another is asked for.
        """
        if not isinstance(model, Computes):
            if self.compile or self.checkpointing or self.precision != "fp32":
                raise InputError(
                    f"{type(model).__name__} has no decoder to compile, checkpoint or compute in "
                    "bf16: leave compile, checkpointing and precision at their defaults"
                )
        elif self.compile:
            model.compile_fast_loop()
        if model.device.type == "cpu":
            keep_freed()

    def computing(self, model: LatentModel) -> AbstractContextManager[None]:
        """Inside the block the model's likelihood is computed in this way."""
        if not isinstance(model, Computes):
            return nullcontext()
        return model.computing(self.precision, self.checkpointing)

    def parts(self, rows: int) -> list[slice]:
        """The batch's `rows` in parts of `micro_batch`."""
        size = rows if self.micro_batch is None else self.micro_batch
        return [slice(i, min(i + size, rows)) for i in range(0, rows, max(size, 1))]
