"""A fit's metrics for TensorBoard, an extra: `pip install 'ltm-pyro[tensorboard]'`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltm_pyro.callbacks import Callback, StopReason
from ltm_pyro.course import Metrics
from ltm_pyro.diagnostics.held_out import PREFIX
from ltm_pyro.errors import InputError
from ltm_pyro.reading import as_path
from ltm_pyro.run.files import refuse_protected

if TYPE_CHECKING:
    from ltm_pyro.inference.clocks.svi import DualRateSVI


def require_tensorboard() -> None:
    """Refuses to go on without the extra."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "TensorBoard is not installed: pip install 'ltm-pyro[tensorboard]', or leave it out"
        )


class TensorBoard(Callback):
    """Writes the metrics of each slow step as scalars: `fit/elbo`, `held_out/elbo` and so on.

    A fit that goes on continues the same curves: what a killed process wrote beyond its checkpoint
    is taken back.

    Args:
        folder: Where the event files go; look at it with `tensorboard --logdir FOLDER`.

    Raises:
        InputError: if TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path("folder", folder)
        refuse_protected(self.folder)
        require_tensorboard()
        self._writer: Any = None

    def on_step(self, svi: DualRateSVI, row: Metrics) -> None:
        """Writes one step; the first process alone does."""
        if not svi.parallel.is_rank_0:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds

            self._writer = SummaryWriter(str(self.folder), purge_step=svi.slow_step)
        for name, value in row.items():
            if name != "step":
                held_out = name.startswith(PREFIX)
                tag = f"held_out/{name.removeprefix(PREFIX)}" if held_out else f"fit/{name}"
                self._writer.add_scalar(tag, value, svi.slow_step)

    def on_stop(self, svi: DualRateSVI, reason: StopReason) -> None:
        """Brings what is written to the disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
