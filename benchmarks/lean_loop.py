"""The engine without Pyro: what `DualRateSVI` would be if it were written by hand for one model.

Same likelihood (the model's own, compiled or not), same trunk computed once, weights frozen; but
the posterior is mean field and nothing else, the KL and its gradient are formulas, and there is
neither Pyro nor metrics nor a check. What `DualRateSVI` costs beyond this is the price of being
able to swap the guide, the prior and the objective.

    d loss / d mu           = g + mu                                    g = d(-log p(x | z)) / dz
    d loss / d log variance = (g * noise * sigma + sigma^2 - 1) / 2     z = mu + sigma * noise
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.engine.execution import frozen
from ltm_pyro.inference.clocks.schedules import learning_rate
from ltm_pyro.models.learning import embedding_weights
from ltm_pyro.random import Noise, Stream, derive_seed


def noise_of(batch: ltm.Batch, like: Tensor, seed: int, draws: int) -> Tensor:
    """The sequences' own noise, (S, B, K, D), for parameters (B, K, D)."""
    numbers = Noise(seed, batch.ids).normal(like[0].numel(), draws)
    return numbers.to(like.dtype).view(draws, *like.shape)


def gradient(
    model: ltm.LatentThoughtModel, batch: ltm.Batch, mu: Tensor, log_variance: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-ELBO of a batch and its gradient, the weights being frozen.

    Args:
        model: With a standard-normal prior.
        batch: From `model.prepare`.
        mu: (B, K, D).
        log_variance: (B, K, D).
        noise: (B, K, D), standard normal.

    Returns:
        The part -log p(x | z) of the loss, summed over the batch, in nats; gradients of the whole
        loss by `mu` and by `log_variance`, each (B, K, D).
    """
    scale = (0.5 * log_variance).exp()
    z = torch.addcmul(mu, scale, noise).requires_grad_()
    nll = -model.log_likelihood(z, batch).sum()
    (by_z,) = torch.autograd.grad(nll, z)
    by_log_variance = (by_z * noise * scale + scale.square() - 1).mul_(0.5)
    return nll.detach(), by_z + mu, by_log_variance


class _Adam:
    """Adam in place on one tensor, with the second moment of `RowAdam` (the same step counts)."""

    def __init__(self, value: Tensor, fast: ltm.Fast, eps: float = 1e-8) -> None:
        self.value, self.betas, self.eps = value, fast.betas, eps
        # The exponents of `local_optimizer`: 1 is Adam itself.
        self.memory = 1.0 if fast.noise == "fixed" else 0.6
        self.first, self.second = torch.zeros_like(value), torch.zeros_like(value)

    def step(self, gradient: Tensor, count: int, lr: float) -> None:
        beta1, beta2 = self.betas
        weight = max((1 - beta2) / (1 - beta2**count), count**-self.memory)
        self.first.lerp_(gradient, 1 - beta1)
        self.second.lerp_(gradient.square(), weight)
        root = self.second.sqrt().add_(self.eps)
        self.value.addcdiv_(self.first, root, value=-lr / (1 - beta1**count))


class LeanLoop:
    """Both clocks by hand, with the call names of `DualRateSVI`.

    Args:
        model: Shared with the `DualRateSVI` that it is measured against, so that both call the very
            same (compiled) likelihood.
        fast: The fast clock.
        slow: The slow clock.
        seed: Of the noise.
        precision: Of the decoder.
    """

    def __init__(
        self,
        model: ltm.LatentThoughtModel,
        fast: ltm.Fast,
        slow: ltm.Slow,
        seed: int = 0,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model, self.fast, self.seed, self.precision = model, fast, seed, precision
        self.clip_norm = slow.clip_norm
        self.weights = list(model.parameters())
        spared = {id(p) for p in embedding_weights(model)}
        decay = [p for p in self.weights if p.dim() >= 2 and id(p) not in spared]
        rest = [p for p in self.weights if p.dim() < 2 or id(p) in spared]
        groups = [
            {"params": decay, "weight_decay": slow.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=slow.lr, betas=slow.betas, fused=True)
        self.slow_step = 0

    def infer(self, batch: ltm.Batch) -> tuple[Tensor, Tensor]:
        """The fast loop: mean and log variance of q(z), each (B, K, D)."""
        with self.model.computing(self.precision):
            return self._fast_loop(batch, derive_seed(self.seed, Stream.FAST))

    def step(self, batch: ltm.Batch) -> float:
        """The fast loop, then one slow step; returns -ELBO per token in nats."""
        noise = derive_seed(self.seed, Stream.FAST, self.slow_step)
        with self.model.computing(self.precision):
            mu, log_variance = self._fast_loop(batch, noise)
            draws = derive_seed(self.seed, Stream.SLOW, self.slow_step)
            z = mu + (0.5 * log_variance).exp() * noise_of(batch, mu, draws, 1)[0]
            log_likelihood = self.model.log_likelihood(z, batch).sum()
        kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum()
        loss = (kl - log_likelihood) / batch.n_tokens.sum()
        for p, g in zip(self.weights, torch.autograd.grad(loss, self.weights), strict=True):
            p.grad = g.contiguous()  # As the weight lies: fused AdamW goes by place in memory.
        torch.nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.slow_step += 1
        return float(loss.detach())

    def _fast_loop(self, batch: ltm.Batch, seed: int) -> tuple[Tensor, Tensor]:
        fast = self.fast
        shape = (len(batch), *self.model.thought_shape)
        mu, log_variance = (self.model.decoder.bos.new_zeros(shape).detach() for _ in range(2))
        adam_mu, adam_variance = _Adam(mu, fast), _Adam(log_variance, fast)
        with frozen(self.weights):
            fresh = noise_of(batch, mu, seed, 1 if fast.noise == "fixed" else fast.steps)
            prepared = self.model.prepare(batch)
            for step in range(fast.steps):
                noise = fresh[step % len(fresh)]
                _, by_mu, by_variance = gradient(self.model, prepared, mu, log_variance, noise)
                lr = learning_rate(fast, step, fast.steps)
                adam_mu.step(by_mu, step + 1, lr)
                adam_variance.step(by_variance, step + 1, lr)
        return mu, log_variance
