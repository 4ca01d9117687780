"""The slow clock: AdamW on decoder, prior and shared guide parameters.

What it descends is the objective at the fitted q, on fresh draws (`SlowObjective`); what it does
with the gradient, in one process or many, is `SlowClock`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ltm_pyro.config import Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.clocks.fast import frozen
from ltm_pyro.inference.clocks.schedules import learning_rate
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import Objective, kl_estimator
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.priors.base import ThoughtPrior
from ltm_pyro.random import Drawing, Noise


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
    """Builds a slow step's loss for the rows that the guide holds.

    Args:
        model: The model.
        guide: Its local parameters are fitted already.
        objective: What is ascended.
    """

    def __init__(self, model: LatentModel, guide: LocalGuide, objective: Objective) -> None:
        self.model, self.guide, self.objective = model, guide, objective

    def at_fitted(self, batch: Batch, read: Batch, weight: float, seed: int) -> SlowLoss:
        """At the fitted q, on fresh draws.

        Args:
            batch: The rows.
            read: The same after word dropout, or the same object without.
            weight: Of the KL.
            seed: Of the draws.
        """
        model, guide = self.model, self.guide
        draw = Drawing(Noise(seed, batch.ids), guide.anchor.dtype)

        def loss(rows: Batch) -> Tensor:
            return self.objective.descend(model, guide, rows, draw, weight)[0]

        with frozen(guide.local_parameters().values()), pyro.validation_enabled(False):
            objective, terms = self.objective.descend(model, guide, read, draw, weight)
            nll, kl = terms.report()
            extra = None
            if guide.shared_parameters():
                with frozen(model.parameters()):
                    extra = guide.shared_loss(loss, read)
            if read is not batch:
                nll = self._nll(terms.z, batch)
        descended = objective if extra is None else objective + extra
        return SlowLoss(descended, objective, nll, kl, terms.z.detach())

    def without_thoughts(self, batch: Batch, read: Batch) -> SlowLoss:
        """Before thoughts join: -log p(x | z = 0), no KL."""
        z = self.guide.anchor.new_zeros((len(batch), *self.model.thought_shape))
        losses = -self.model.log_likelihood(z, read)
        nll = losses.detach() if read is batch else self._nll(z[None], batch)
        return SlowLoss(losses.sum(), losses.sum(), nll, torch.zeros_like(nll))

    @cached_property
    def kl_estimator(self) -> str:
        """How the objective gets its KL; asked for while the guide holds rows."""
        return kl_estimator(self.objective, self.model, self.guide)

    @torch.no_grad()
    def _nll(self, z: Tensor, batch: Batch) -> Tensor:
        """-log p(x | z) per sequence, (B,), mean over draws (S, B, K, D)."""
        return -torch.stack([self.model.log_likelihood(each, batch) for each in z]).mean(0)


def show_prior(model: LatentModel, draws: list[Tensor], parallel: Parallel) -> None:
    """Shows a slow step's draws (S, B, K, D), of all processes, to a prior that learns."""
    prior = getattr(model, "thought_prior", None)
    if not draws or not isinstance(prior, ThoughtPrior):
        return
    if any(p.requires_grad for p in prior.parameters()):
        prior.observe(parallel.gather_rows(torch.cat(draws, dim=1), dim=1))


def embedding_weights(*parts: object) -> list[nn.Parameter]:
    """The embeddings in these modules: decay would make them forget rare tokens.

    And what a learned prior spares itself, see `ThoughtPrior.undecayed_parameters`.
    """
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    embeddings = [p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()]
    priors = [p for m in modules if isinstance(m, ThoughtPrior) for p in m.undecayed_parameters()]
    return embeddings + priors


Sums = dict[str, Tensor]
"""What a slow step reports by name, summed over sequences: of a part of a batch, or of all."""


def adamw(decayed: list[Tensor], rest: list[Tensor], slow: Slow) -> torch.optim.AdamW:
    """AdamW that decays the one and spares the other, in one pass over the weights."""
    groups = [
        {"params": decayed, "weight_decay": slow.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]] or [{"params": [torch.zeros(0)]}],
        lr=slow.lr,
        betas=slow.betas,
        fused=all(p.device.type in ("cpu", "cuda") for p in [*decayed, *rest]),
    )


class SlowClock:
    """AdamW with its schedule and gradient clipping.

    Args:
        parameters: The slow parameters. Matrices of linear maps decay; gains, vectors and
            embeddings do not.
        slow: Settings.
        spare: Matrices that do not decay all the same; see `embedding_weights`.
        parallel: The processes, each with the same weights, gradients and moments; this one alone
            by default.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Slow,
        spare: Iterable[nn.Parameter] = (),
        parallel: Parallel | None = None,
    ) -> None:
        self.slow = slow
        self.parallel = parallel or Parallel()
        self.parameters = list(parameters)
        spared = {id(p) for p in spare}
        self.decays = [p.dim() >= 2 and id(p) not in spared for p in self.parameters]
        pairs = list(zip(self.parameters, self.decays, strict=True))
        self.optimizer = adamw([p for p, d in pairs if d], [p for p, d in pairs if not d], slow)

    def retune(self, slow: Slow) -> None:
        """Goes on with other settings, and with the moments that it has."""
        decayed = {id(p) for p, d in zip(self.parameters, self.decays, strict=True) if d}
        for group in self.optimizer.param_groups:
            group["betas"] = slow.betas
            decays = any(id(p) in decayed for p in group["params"])
            group["weight_decay"] = slow.weight_decay if decays else 0.0
        self.slow = slow

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
            NonFiniteError: in all processes, on NaN in one; nothing is written any more then.
            ProcessLostError: if a process is gone.
        """
        numbers = [torch.stack([part[name].double() for part in parts]).sum() for name in parts[0]]
        total = self._agreed(torch.stack(numbers), [], step)
        sums = dict(zip(parts[0], total.tolist(), strict=True))
        self.parallel.sum_gradients(self.parameters)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(sums["n_tokens"])
        norm = float(self.clip())
        if not math.isfinite(norm):
            raise NonFiniteError([], step)
        return sums, norm

    def report(self, error: NonFiniteError, step: int) -> NonFiniteError:
        """Tells the others of NaN in this process; the error that all processes then raise."""
        try:
            self._agreed(torch.empty(0), error.ids, step)
        except NonFiniteError as of_all:
            return of_all
        return error

    def _agreed(self, numbers: Tensor, ids: list[int], step: int) -> Tensor:
        """The numbers summed over processes, which step, fail and stop together."""
        total, failed = self.parallel.agree(numbers, ids)
        if failed is not None:
            raise NonFiniteError(failed, step)
        return total

    def clip(self) -> Tensor:
        """Shortens the written gradient to its largest norm; returns the norm before."""
        if not self.parameters:
            return torch.zeros(())
        longest = self.slow.clip_norm
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # Asked first: a factor of 1 would be another pass over all gradients.
        if bool(norm + 1e-6 > longest):
            nn.utils.clip_grads_with_norm_(self.parameters, longest, norm)
        return norm

    def step(self, step: int, total: int) -> float:
        """One step of AdamW along the written gradient; returns the learning rate."""
        lr = learning_rate(self.slow, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()
        return lr

    def discard(self) -> None:
        """Forgets the written gradient."""
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts as flat names to tensors."""
        index = {id(p): i for i, p in enumerate(self.parameters)}
        return {
            f"{index[id(p)]}.{name}": value
            for p, moments in self.optimizer.state.items()
            for name, value in moments.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        for key, value in state.items():
            number, name = key.split(".", 1)
            p = self.parameters[int(number)]
            moments: dict[str, Any] = self.optimizer.state[p]
            moments[name] = value.to(p.device).clone() if name == "step" else value.to(p).clone()
