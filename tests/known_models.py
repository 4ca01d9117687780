"""Small models for tests: oracles with exact answers, and a language model of a few weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.config import ModelConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.guides import LocalGuide
from ltm_pyro.inference.objectives import Objective
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.random import Drawing, Noise

TINY = ModelConfig(
    vocab_size=7, seq_len=12, n_layers=2, width=16, n_heads=2, mlp_hidden=24, window=4,
    thoughts_per_layer=2, thought_dim=3,
)  # fmt: skip


def make_oracle(
    shape: tuple[int, int] = (2, 2),
    n_observed: int = 5,
    noise_scale: float = 0.8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LinearGaussian:
    """An oracle with random loadings, so that its posterior is correlated."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n_observed, shape[0] * shape[1], generator=generator, dtype=dtype)
    bias = torch.randn(n_observed, generator=generator, dtype=dtype)
    return LinearGaussian(W, noise_scale, bias, shape)


class LearnedOracle(LinearGaussian):
    """The oracle with its bias as a weight, so that the slow clock has something to step."""

    def __init__(self, oracle: LinearGaussian) -> None:
        scale = float(oracle.noise_scale)
        super().__init__(oracle.W, scale, oracle.bias, oracle.thought_shape)
        del self.bias
        self.bias = nn.Parameter(oracle.bias.clone())


def make_language_model(
    config: ModelConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LatentThoughtModel:
    """A decoder that listens to its thoughts: cross-attention's zero start is taken away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentThoughtModel(config).to(dtype)
        for layer in model.decoder.layers:
            nn.init.normal_(layer.cross_attention.out.weight, std=0.5)
    return model


def make_tokens(rows: int, config: ModelConfig = TINY, seed: int = 0) -> Batch:
    """Random tokens; the last row is ragged, and ids are neither sorted nor from 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(config.vocab_size, (rows, config.seq_len), generator=generator)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[-1, config.seq_len // 2 :] = False
    ids = 100 + torch.randperm(rows, generator=generator)
    return Batch(x, mask, ids)


def loss_on_noise(
    objective: Objective, model: Any, guide: LocalGuide, batch: Batch, weight: float = 1.0
) -> Tensor:
    """An objective's loss on noise that is the same at every call."""
    draw = Drawing(Noise(0, batch.ids))
    return objective.descend(model, guide, batch, draw, weight)[0]


def exact_elbo(oracle: LinearGaussian, q: TorchDistribution, batch: Batch) -> Tensor:
    """ELBO in nats of a factorised normal q, by its moments and without draws, (B,) float64."""
    mean, variance = q.mean.flatten(1).double(), q.variance.flatten(1).double()
    W, noise = oracle.W.double(), oracle.noise_scale.double() ** 2
    error = batch.observed.double() - oracle.bias.double() - mean @ W.T
    expected_squares = error.square() + variance @ W.T.square()
    nll = 0.5 * (expected_squares / noise + (2 * math.pi * noise).log())
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(1)
    return -(torch.where(batch.mask, nll, 0.0).sum(1) + kl).detach()
