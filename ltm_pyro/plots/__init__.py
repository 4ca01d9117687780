"""Pictures of a fit: each function takes results and returns a Matplotlib `Figure`.

Every figure has units on its axes, a legend, and below it what it shows and what to conclude. The
figures are free-standing: nothing is registered with pyplot, and no style outlives a call.
"""

from __future__ import annotations

from ltm_pyro.plots.calibration import contraction_plot, rank_plot
from ltm_pyro.plots.collapse import collapse_bars, elbo_split, layer_reconstruction
from ltm_pyro.plots.comparison import guide_comparison, run_comparison
from ltm_pyro.plots.fit import fast_loop_traces, two_clock_curves
from ltm_pyro.plots.gaps import convergence_curves, gap_bars
from ltm_pyro.plots.live import LiveFigure
from ltm_pyro.plots.map import thought_map
from ltm_pyro.plots.scores import document_gains, khat_histogram, score_panel
from ltm_pyro.plots.style import save_figure
from ltm_pyro.plots.thoughts import posterior_against_prior, thought_intervals
from ltm_pyro.plots.tokens import interpolation_strip, token_surprise
from ltm_pyro.plots.tradeoff import own_against_fresh, rate_distortion, score_against_steps

__all__ = [
    "LiveFigure",
    "collapse_bars",
    "contraction_plot",
    "convergence_curves",
    "document_gains",
    "elbo_split",
    "fast_loop_traces",
    "gap_bars",
    "guide_comparison",
    "interpolation_strip",
    "khat_histogram",
    "layer_reconstruction",
    "own_against_fresh",
    "posterior_against_prior",
    "rank_plot",
    "rate_distortion",
    "run_comparison",
    "save_figure",
    "score_against_steps",
    "score_panel",
    "thought_intervals",
    "thought_map",
    "token_surprise",
    "two_clock_curves",
]
