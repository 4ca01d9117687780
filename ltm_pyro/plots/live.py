"""A figure in a notebook that follows a fit as it goes on."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ltm_pyro.callbacks import Callback, StopReason
from ltm_pyro.checks import whole_number
from ltm_pyro.course import Metrics
from ltm_pyro.errors import InputError
from ltm_pyro.plots.fit import two_clock_curves

if TYPE_CHECKING:
    from ltm_pyro.inference.clocks.svi import DualRateSVI


class LiveFigure(Callback):
    """Draws `two_clock_curves` in a notebook's cell, anew every some slow steps and at the end.

    Args:
        every: Slow steps between two drawings, each of which takes about half a second.

    Raises:
        InputError: if there is no notebook to draw in.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = whole_number("every", every, at_least=1)
        here = sys.modules.get("IPython")  # a notebook has imported it
        if here is None or here.get_ipython() is None:
            raise InputError(
                "a LiveFigure needs a notebook to draw in: in a terminal use ltm-pyro watch, in a "
                "script plots.two_clock_curves(svi.metrics) after the fit"
            )
        self._handle: Any = None

    def on_step(self, svi: DualRateSVI, row: Metrics) -> None:
        """Draws, if it is time."""
        if svi.slow_step % self.every == 0:
            self._draw(svi)

    def on_stop(self, svi: DualRateSVI, reason: StopReason) -> None:
        """Draws the whole course."""
        if svi.metrics:
            self._draw(svi)
        self._handle = None

    def _draw(self, svi: DualRateSVI) -> None:
        if not svi.parallel.is_rank_0:
            return
        display = importlib.import_module("IPython.display").display  # the notebook's own
        figure = two_clock_curves(svi.metrics)
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
