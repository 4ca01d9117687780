"""Ctrl-C and SIGTERM: the step under way is finished, so that what is saved is a whole step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ltm_pyro.cli.processes import many
from ltm_pyro.cli.streams import tell

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 3.0
"""Seconds in which many processes take a second signal for the first: a terminal sends Ctrl-C to
all of them, and `torchrun` passes it on once more."""


class StopSignals:
    """Inside the block a first signal is noted as `received`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def status(self) -> int:
        """The exit status that says which signal it was; 130 for Ctrl-C."""
        return 128 + (signal.SIGINT if self.received is None else self.received)

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; elsewhere signals are somebody else's business.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            if many() and time.monotonic() < self._when + _SAME:
                return
            raise KeyboardInterrupt
        self.received, self._when = number, time.monotonic()
        if many():
            return  # it may be `torchrun`, which ends all because one is gone
        tell("stopping after this step; once more stops at once")
