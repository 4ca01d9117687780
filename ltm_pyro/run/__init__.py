"""The run folder: settings, checkpoints and metrics of a fit that outlives its process."""

from __future__ import annotations

from ltm_pyro.run.comparing import compare_runs
from ltm_pyro.run.folder import Run
from ltm_pyro.run.opening import create_run, load_run
from ltm_pyro.run.run_comparison import RunComparison
from ltm_pyro.run.saving import save_run
from ltm_pyro.run.sweeping import sweep
from ltm_pyro.run.training import Interrupted, train, train_control

__all__ = [
    "Interrupted",
    "Run",
    "RunComparison",
    "compare_runs",
    "create_run",
    "load_run",
    "save_run",
    "sweep",
    "train",
    "train_control",
]
