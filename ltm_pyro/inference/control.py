"""The control: the same decoder without thoughts, trained on the slow clock alone.

At z = 0 cross-attention adds exactly nothing, so the control is a plain autoregressive model with
the same weights elsewhere, the same start, the same batches and the same schedule. Whatever a
latent-thought model gains must show against it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ltm_pyro.config import Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import Execution
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.clocks.slow import SlowClock, StepSums, embedding_weights
from ltm_pyro.inference.course import Metrics
from ltm_pyro.inference.training_data import TrainingData, rows_of_step
from ltm_pyro.models.latent_thought import LatentThoughtModel


def autoregressive_log_likelihood(model: LatentThoughtModel, batch: Batch) -> Tensor:
    """Log p(x | z = 0) per sequence in nats, (B,)."""
    z = torch.zeros((len(batch), *model.thought_shape), device=model.device)
    return model.log_likelihood(z.to(model.decoder.bos.dtype), batch)


class AutoregressiveFit:
    """Maximum likelihood of the decoder at z = 0.

    Args:
        model: A freshly initialised model; trained in place.
        slow: The slow clock of the fit that this is the control of.
        seed: Of the order of batches.
        execution: How it is computed; as the fit that this is the control of.
    """

    def __init__(
        self,
        model: LatentThoughtModel,
        slow: Slow,
        seed: int = 0,
        execution: Execution | None = None,
    ) -> None:
        self.execution = execution or Execution()
        self.model = model
        self.seed = seed
        self.slow_step = 0
        self.whole = True
        self.horizon: int | None = None
        self.parallel = self.execution.parallel
        self.clock = SlowClock(model.parameters(), slow, embedding_weights(model), self.parallel)

    def step(self, batch: Batch) -> Metrics:
        """One slow step.

        Args:
            batch: B sequences; this process's rows of them where processes share the fit.

        Returns:
            `step`, `nll` (nats per sequence, batch mean), `nll_per_token`, `lr_slow`,
            `grad_norm_slow`.

        Raises:
            NonFiniteError: on NaN in any process, before any weight has changed.
            ProcessLostError: if another process is gone, before any weight has changed.
        """
        batch = batch.to(self.model.device)
        self.model.check(batch)
        parts = []
        self.clock.discard()  # what a step that failed has left
        for rows in self.execution.parts(len(batch)):
            part = batch.select(rows)
            with self.execution.computing(self.model):
                nll = -autoregressive_log_likelihood(self.model, part)
            bad = ~nll.detach().isfinite()
            if bool(bad.any()):
                error = NonFiniteError(part.ids[bad].tolist(), self.slow_step)
                raise self.clock.report(error, self.slow_step)
            total, zero = nll.sum(), nll.new_zeros(())
            self.clock.add_gradient(total)
            total = total.detach()
            count = torch.tensor(len(part), device=part.device)
            parts.append(StepSums(total, zero, zero, total, zero, part.n_tokens.sum(), count))
        mine = StepSums.of(parts)
        sums, norm = self.clock.exchange(mine, self.slow_step)
        self.whole = False
        lr = self.clock.step(self.slow_step, self.horizon or 1)
        self.slow_step += 1
        self.whole = True
        return {
            "step": float(self.slow_step),
            "nll": float(sums.nll / sums.n_sequences),
            "nll_per_token": float(sums.objective / sums.n_tokens),
            "lr_slow": lr,
            "grad_norm_slow": float(norm),
        }

    def fit(
        self,
        data: TrainingData,
        steps: int,
        batch_size: int = 16,
        *,
        progress: bool = True,
        on_step: Callable[[Metrics], None] | None = None,
    ) -> None:
        """`steps` slow steps, on the batches that `DualRateSVI.fit` takes with the same seed."""
        if self.horizon is None:
            self.horizon = self.slow_step + steps
        with tqdm(total=steps, disable=not progress, desc="control", unit="step") as bar:
            for _ in range(steps):
                row = self.step(
                    rows_of_step(data, self.slow_step, batch_size, self.seed, self.parallel)
                )
                bar.update()
                bar.set_postfix(nll_per_token=f"{row['nll_per_token']:.3f}")
                if on_step is not None:
                    on_step(row)
