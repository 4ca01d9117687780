"""Draws that a learned prior is shown, of all processes together."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor

from ltm_pyro.inference.parallel.group import Parallel
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.priors.base import ThoughtPrior


class HeldDraws:
    """Inside the block draws for `ThoughtPrior.observe` wait, until `show` puts all together.

    They cannot be put together at once: a process that has met NaN would not take part, and a
    prior that moved between two parts of a batch would be another for each. Does nothing for one
    process that takes its batch whole, and for priors that keep no draws.

    Args:
        model: Its learned prior, if it has one, is shown the draws.
        parallel: The processes.
        parts: In which each takes its rows.
    """

    def __init__(self, model: LatentModel, parallel: Parallel, parts: int = 1) -> None:
        prior = getattr(model, "thought_prior", None)
        keeps = isinstance(prior, ThoughtPrior) and type(prior).observe is not ThoughtPrior.observe
        self.prior: ThoughtPrior | None = prior if keeps and parallel.size * parts > 1 else None
        self.parallel = parallel
        self.draws: list[Tensor] = []

    def __enter__(self) -> HeldDraws:
        if self.prior is not None:
            self.prior.held = self.draws
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.prior is not None:
            self.prior.held = None

    def show(self) -> None:
        """Shows the prior the draws of all processes, in the order of the whole batch."""
        if self.prior is not None:
            for z in self.draws:
                self.prior.observe(self.parallel.gather_rows(z, dim=z.dim() - 3))
