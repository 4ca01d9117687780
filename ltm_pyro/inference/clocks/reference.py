"""Algorithm 1 of Kong et al. (2025), and nothing else: dual-rate variational Bayes in plain Pyro.

    for each batch:
        fast:  T_fast steps of Adam on phi_i    of  -ELBO(phi_i; beta)      beta frozen
        slow:  one step of AdamW on beta        of  -ELBO(phi_i; beta)      fresh draws

    ELBO(phi_i; beta) = E_q log p(x_i | z_i; beta) - KL(q(z_i; phi_i) || p(z_i))

The whole program is `fit_reference`, top to bottom. Model and guide run as Pyro programs, Pyro's
`TraceMeanField_ELBO` scores them, and torch's optimisers step. `DualRateSVI` computes the same and
costs less; `tests/test_reference.py` holds it to these numbers. What it adds is not here: other
objectives, stored rows, word dropout, parts, processes, precision, compilation, and on fresh noise
an Adam that forgets the first gradients sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import frozen
from ltm_pyro.inference.clocks.schedules import learning_rate, slow_kl_weight
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.models.base import SITE_Z, LatentModel
from ltm_pyro.random import Drawing, Noise, Stream, derive_seed


def fit_reference(
    model: LatentModel,
    guide: LocalGuide,
    batches: Sequence[Batch],
    fast: Fast,
    slow: Slow,
    seed: int = 0,
) -> list[float]:
    """One slow step for each of `batches`; trains model and guide in place.

    Args:
        model: beta is all of its weights.
        guide: phi_i are its local parameters; what it shares belongs to beta.
        batches: The training batches in turn.
        fast: The fast clock.
        slow: The slow clock.
        seed: Of the noise.

    Returns:
        What each slow step descended, in nats per token.
    """
    beta = [*model.parameters(), *guide.shared_parameters()]
    slow_optimizer = torch.optim.AdamW(
        _decaying(beta, (model, guide), slow), lr=slow.lr, betas=slow.betas
    )
    losses = []
    for step, batch in enumerate(batches):
        kl_weight = slow_kl_weight(slow, step, len(batches))
        guide.reset(batch)  # a fresh phi_i for every sequence

        noise = Drawing(Noise(derive_seed(seed, Stream.FAST, step), batch.ids))
        phi = list(guide.local_parameters().values())
        fast_optimizer = torch.optim.Adam(phi, lr=fast.lr, betas=fast.betas) if phi else None
        with frozen(beta):
            for t in range(fast.steps if fast_optimizer is not None else 0):
                if fast.noise == "fixed":
                    noise.rewind()
                loss = _loss(model, guide, batch, noise, kl_weight)
                _descend(loss, phi, fast_optimizer, learning_rate(fast, t, fast.steps))

        noise = Drawing(Noise(derive_seed(seed, Stream.SLOW, step), batch.ids))
        with frozen(phi):
            loss = _loss(model, guide, batch, noise, kl_weight) / batch.n_tokens.sum()
            rate = learning_rate(slow, step, len(batches))
            _descend(loss, beta, slow_optimizer, rate, clip_norm=slow.clip_norm)
        losses.append(float(loss.detach()))
    return losses


def _loss(
    model: LatentModel, guide: LocalGuide, batch: Batch, noise: Drawing, kl_weight: float
) -> Tensor:
    """-ELBO summed over the batch, in nats: Pyro runs the guide, then the model at its draw."""
    elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    with _Thoughts(noise, kl_weight):
        loss: Tensor = elbo.differentiable_loss(model, guide, batch)
    return loss


class _Thoughts(Messenger):
    """Draws the guide's z from each sequence's own noise, and weighs both densities of z."""

    def __init__(self, noise: Drawing, kl_weight: float) -> None:
        super().__init__()
        self.noise, self.kl_weight = noise, kl_weight

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == SITE_Z:
            msg["scale"] = msg["scale"] * self.kl_weight
            if msg["value"] is None:
                msg["value"] = self.noise(msg["fn"])[0]


def _descend(
    loss: Tensor, parameters: list[nn.Parameter], optimizer: Any, rate: float, clip_norm: float = 0
) -> None:
    """One step of an optimiser down the loss."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    if clip_norm:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _decaying(
    beta: list[nn.Parameter], programs: Sequence[nn.Module], slow: Slow
) -> list[dict[str, Any]]:
    """Matrices of linear maps decay; gains, vectors and embeddings do not."""
    modules = [m for program in programs for m in program.modules()]
    embeddings = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in beta:
        groups[p.dim() >= 2 and id(p) not in embeddings].append(p)
    return [{"params": ps, "weight_decay": d * slow.weight_decay} for d, ps in groups.items()]
