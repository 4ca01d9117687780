"""The control: the same decoder without thoughts, trained on the slow clock alone.

At z = 0 cross-attention adds exactly nothing, so the control is a plain autoregressive model with
the same weights elsewhere, the same start, the same batches and the same schedule. Whatever a
latent-thought model gains must show against it.
"""

from __future__ import annotations

from dataclasses import replace

from ltm_pyro.config import Slow
from ltm_pyro.engine.execution import Execution
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel


def control(
    model: LatentThoughtModel,
    slow: Slow,
    steps: int,
    seed: int = 0,
    execution: Execution | None = None,
) -> DualRateSVI:
    """A fit whose thoughts never start: its `elbo` is log p(x | z = 0), exactly.

    Args:
        model: A freshly initialised model; trained in place.
        slow: The slow clock of the fit that this is the control of.
        steps: Slow steps over which its schedules run.
        seed: Of the order of batches.
        execution: How it is computed; as the fit that this is the control of.
    """
    slow = replace(slow, thoughts_start=1.0, kl_start=1.0, word_dropout=0.0)
    svi = DualRateSVI(model, "mean_field", slow=slow, seed=seed, execution=execution)
    svi.horizon = steps
    return svi
