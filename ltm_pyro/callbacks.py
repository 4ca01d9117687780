"""Following a fit: what is called after each slow step, sees held-out bounds, and may stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

from ltm_pyro.course import Metrics
from ltm_pyro.errors import InputError, shown

StopReason = Literal["finished", "stopped", "interrupted", "failed"]
"""Why a fit ends: all steps are done, a callback said so, Ctrl-C, or an error."""


class Callback:
    """Follows a fit; a subclass overrides what it needs.

    Called between slow steps, in the order of `callbacks`. Nothing that it reads of `svi`, and no
    inference that it makes, changes the fit. Where processes share the fit each calls its own:
    what writes or prints asks `svi.parallel.is_rank_0`, and a fit that is to stop does so one step
    later.
    """

    def on_step(self, svi: Any, row: Metrics) -> bool | None:
        """After a slow step; `True` stops the fit here.

        Args:
            svi: The fit, a `DualRateSVI`.
            row: The step's metrics (see `DualRateSVI.step`), with those of the held-out bound
                where it was scored; the last of `svi.metrics`.
        """

    def on_evaluate(self, svi: Any, row: Metrics) -> bool | None:
        """After `on_step`, where the held-out bound was scored; arguments and answer as there."""

    def on_stop(self, svi: Any, reason: StopReason) -> None:
        """Once, when the fit ends, in whatever way."""


@runtime_checkable
class Evaluation(Protocol):
    """What scores held-out text as a fit goes on; `HeldOutBound` is one."""

    def due(self, step: int, last: int) -> bool:
        """Whether to score after slow step `step` of a fit that ends with `last`."""
        ...

    def score(self, svi: Any) -> Metrics:
        """Numbers that join the metrics of the slow step just done, by names of their own."""
        ...


@contextmanager
def followed(
    svi: Any, callbacks: Sequence[Callback], held_out: Evaluation | None, last: int
) -> Iterator[Callable[[Metrics], bool]]:
    """Gives what is called with the metrics of each slow step up to `last`: whether to stop."""
    reason: StopReason = "failed"
    stopping, asks_to_stop = False, svi.parallel.asks_to_stop

    def after(row: Metrics) -> bool:
        nonlocal stopping
        scored = held_out is not None and held_out.due(svi.slow_step, last)
        if held_out is not None and scored:
            row |= held_out.score(svi)
        answers = [one.on_step(svi, row) for one in callbacks]
        if scored:
            answers += [one.on_evaluate(svi, row) for one in callbacks]
        stopping = any(answers)
        if svi.parallel.size > 1:  # they stop together: the next slow step asks all of them
            if stopping:
                svi.parallel.asks_to_stop = lambda: True
            stopping = svi.parallel.stopping
        return stopping

    try:
        yield after
        reason = "stopped" if stopping else "finished"
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    finally:
        svi.parallel.asks_to_stop = asks_to_stop
        for one in callbacks:
            one.on_stop(svi, reason)


def followers(callbacks: object, held_out: object) -> Sequence[Callback]:
    """The callbacks, known to be such, as `held_out` is then known to be one."""
    callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
    if not isinstance(callbacks, list | tuple):
        raise InputError(f"callbacks is {shown(callbacks)}: must be a list of ltm_pyro.Callback")
    for one in callbacks:
        if not isinstance(one, Callback):
            what = f"the class {one.__name__}: make one" if isinstance(one, type) else shown(one)
            raise InputError(f"callbacks holds {what}: each must be an ltm_pyro.Callback")
    known = isinstance(held_out, Evaluation) and not isinstance(held_out, type)
    if held_out is not None and not known:
        raise InputError(
            f"held_out is {shown(held_out)}: must be ltm_pyro.HeldOutBound(corpus.val, every=50)"
        )
    return callbacks
