"""The slow clock: AdamW on decoder, prior and shared guide parameters, at the fitted q."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor, nn

from ltm_pyro.config import Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import frozen
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.engine.rows.finite import tell_non_finite
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.clocks.schedules import learning_rate
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import Objective
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Drawing, Noise

Sums = dict[str, Tensor]
"""What a slow step reports by name, summed over sequences: of a part of a batch, or of all."""


@dataclass(frozen=True)
class SlowLoss:
    """What a slow step descends, and what it reports.

    Attributes:
        descended: In nats, summed over the batch.
        objective: The part of it that is the objective at the fitted q.
        nll: (B,) -log p(x | z), every input token read.
        kl: (B,).
        z: (S, B, K, D) the draws; `None` before thoughts join.
    """

    descended: Tensor
    objective: Tensor
    nll: Tensor
    kl: Tensor
    z: Tensor | None = None


class SlowObjective:
    """Builds a slow step's loss for the rows that the guide holds, already fitted."""

    def __init__(self, model: LatentModel, guide: LocalGuide, objective: Objective) -> None:
        self.model, self.guide, self.objective = model, guide, objective

    def at_fitted(self, batch: Batch, read: Batch, weight: float, seed: int) -> SlowLoss:
        """At the fitted q, on fresh draws by `seed`, with the KL's weight.

        `read` is the batch after word dropout, or the same object without.
        """
        model, guide = self.model, self.guide
        draw = Drawing(Noise(seed, batch.ids), guide.anchor.dtype)

        def loss(rows: Batch) -> Tensor:
            return self.objective.descend(model, guide, rows, draw, weight)[0]

        local, extra = guide.local_parameters().values(), None
        with frozen(local), pyro.validation_enabled(False):
            try:
                objective, terms = self.objective.descend(model, guide, read, draw, weight)
                nll, kl = terms.report()
                if guide.shared_parameters():
                    with frozen(model.parameters()):
                        extra = guide.shared_loss(loss, read)
                if read is not batch:
                    nll = self._nll(terms.z, batch)
            except (RuntimeError, ValueError) as error:
                tell_non_finite(error, local, batch.ids)
                raise
        descended = objective if extra is None else objective + extra
        return SlowLoss(descended, objective, nll, kl, terms.z.detach())

    def without_thoughts(self, batch: Batch, read: Batch) -> SlowLoss:
        """Before thoughts join: -log p(x | z = 0), no KL."""
        z = self.guide.anchor.new_zeros((len(batch), *self.model.thought_shape))
        losses = -self.model.log_likelihood(z, read)
        nll = losses.detach() if read is batch else self._nll(z[None], batch)
        return SlowLoss(losses.sum(), losses.sum(), nll, torch.zeros_like(nll))

    @torch.no_grad()
    def _nll(self, z: Tensor, batch: Batch) -> Tensor:
        """-log p(x | z) per sequence, (B,), mean over draws (S, B, K, D)."""
        return -torch.stack([self.model.log_likelihood(each, batch) for each in z]).mean(0)


class SlowClock:
    """AdamW with its schedule and gradient clipping.

    Args:
        parameters: The slow parameters. Matrices decay; gains and vectors do not.
        slow: Settings; may be replaced between steps.
        spare: Matrices that do not decay all the same; see `embedding_weights`.
        parallel: The processes, each with the same weights and moments; by default this one alone.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Slow,
        spare: Iterable[nn.Parameter] = (),
        parallel: Parallel | None = None,
    ) -> None:
        self.slow, self.parallel = slow, parallel or Parallel()
        self.parameters = list(parameters)
        spared = {id(p) for p in spare}
        groups: dict[float, list[Tensor]] = {1.0: [], 0.0: []}
        for p in self.parameters:
            groups[float(p.dim() >= 2 and id(p) not in spared)].append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "decay": decay} for decay, group in groups.items() if group]
            or [{"params": [torch.zeros(0)], "decay": 0.0}],
            fused=all(p.device.type in ("cpu", "cuda") for p in self.parameters),
        )

    def add_gradient(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, summed over sequences, to what is written in `.grad`."""
        if not self.parameters:
            return
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for p, g in zip(self.parameters, gradients, strict=True):
            # Laid out as the weight is: torch's fused AdamW on the CPU reads by place in memory.
            g = None if g is None else g.contiguous()
            p.grad = g if p.grad is None or g is None else p.grad + g

    def exchange(self, parts: list[Sums], step: int) -> tuple[dict[str, float], float]:
        """Ends the gradient's collection: the sums of the whole batch, and the gradient's norm.

        What is written in the end is of the loss per token, and clipped; the norm is that before.

        Args:
            parts: Of this process's rows.
            step: Slow steps done, for the error.

        Raises:
            NonFiniteError: in all processes, on NaN in one.
            ProcessLostError: if a process is gone.
        """
        sums = self.parallel.total(parts, step)
        self.parallel.sum_gradients(self.parameters)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(sums["n_tokens"])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.slow.clip_norm)
        if not math.isfinite(norm):
            raise NonFiniteError([], step)
        return sums, float(norm)

    def step(self, step: int, total: int) -> float:
        """One step of AdamW along the written gradient; returns the learning rate."""
        slow, lr = self.slow, learning_rate(self.slow, step, total)
        for group in self.optimizer.param_groups:
            decay = slow.weight_decay * group["decay"]
            group.update(lr=lr, betas=slow.betas, weight_decay=decay)
        self.optimizer.step()
        self.discard()
        return lr

    def discard(self) -> None:
        """Forgets the written gradient."""
        for p in self.parameters:
            p.grad = None
