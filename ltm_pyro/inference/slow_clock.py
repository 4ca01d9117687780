"""The slow clock: AdamW on decoder, prior and shared guide parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ltm_pyro.config import Slow
from ltm_pyro.inference.schedules import learning_rate
from ltm_pyro.models.priors.base import ThoughtPrior


def embedding_weights(*parts: object) -> list[nn.Parameter]:
    """The embeddings in these modules: decay would make them forget rare tokens.

    And what a learned prior spares itself, see `ThoughtPrior.undecayed_parameters`.
    """
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    embeddings = [p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()]
    priors = [p for m in modules if isinstance(m, ThoughtPrior) for p in m.undecayed_parameters()]
    return embeddings + priors


class SlowClock:
    """AdamW with its schedule and gradient clipping.

    Args:
        parameters: The slow parameters. Matrices of linear maps decay; gains, vectors and
            embeddings do not.
        slow: Settings.
        spare: Matrices that do not decay all the same; see `embedding_weights`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Slow,
        spare: Iterable[nn.Parameter] = (),
    ) -> None:
        self.slow = slow
        self.parameters = list(parameters)
        spared = {id(p) for p in spare}
        matrices = [p for p in self.parameters if p.dim() >= 2 and id(p) not in spared]
        rest = [p for p in self.parameters if p.dim() < 2 or id(p) in spared]
        groups = [
            {"params": matrices, "weight_decay": slow.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]] or [{"params": [torch.zeros(0)]}],
            lr=slow.lr,
            betas=slow.betas,
        )

    def gradient(self, loss: Tensor) -> Tensor:
        """Writes the gradient of `loss` into `.grad`, clipped; returns its norm before clipping."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        return nn.utils.clip_grad_norm_(self.parameters, self.slow.clip_norm)

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
            # Step counts stay on the CPU, where AdamW keeps them.
            moments[name] = value.clone() if name == "step" else value.to(p).clone()
