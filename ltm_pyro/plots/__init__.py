"""Pictures of a fit: each function takes results and returns a Matplotlib `Figure`.

Every figure has units on its axes, a legend, and below it what it shows and what to conclude. The
figures are free-standing: nothing is registered with pyplot, and no style outlives a call.
"""

from __future__ import annotations

from ltm_pyro.plots.calibration import rank_plot
from ltm_pyro.plots.collapse import collapse_bars
from ltm_pyro.plots.comparison import guide_comparison
from ltm_pyro.plots.documents import document_gains, khat_histogram
from ltm_pyro.plots.fit import fast_loop_traces, two_clock_curves
from ltm_pyro.plots.gaps import convergence_curves, gap_bars
from ltm_pyro.plots.map import thought_map
from ltm_pyro.plots.runs import run_comparison
from ltm_pyro.plots.scores import score_panel
from ltm_pyro.plots.style import save_figure
from ltm_pyro.plots.thoughts import thought_intervals

__all__ = [
    "collapse_bars",
    "convergence_curves",
    "document_gains",
    "fast_loop_traces",
    "gap_bars",
    "guide_comparison",
    "khat_histogram",
    "rank_plot",
    "run_comparison",
    "save_figure",
    "score_panel",
    "thought_intervals",
    "thought_map",
    "two_clock_curves",
]
