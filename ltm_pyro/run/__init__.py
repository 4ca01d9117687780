"""The run folder: settings, checkpoints and metrics of a fit that outlives its process."""

from __future__ import annotations

from ltm_pyro.run.folder import Run
from ltm_pyro.run.opening import create_run, load_run
from ltm_pyro.run.training import Interrupted, train, train_control

__all__ = ["Interrupted", "Run", "create_run", "load_run", "train", "train_control"]
