"""Classifiers that several studies use: softmax regressions, and two samples told apart by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_regression(
    x: Tensor, y: Tensor, classes: int, *, ridge: float = 1.0, steps: int = 60
) -> Tensor:
    """Weights (F + 1, C) of the penalised fit to features x (n, F) and labels y (n,), by L-BFGS."""
    x = F.pad(x, (0, 1), value=1.0)
    weights = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(x @ weights, y) + ridge / len(x) * weights[:-1].square().sum()
        fit.backward()
        return fit.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def predicted(weights: Tensor, x: Tensor) -> Tensor:
    """Class probabilities (n, C)."""
    return (F.pad(x, (0, 1), value=1.0) @ weights).softmax(-1)


def two_sample_accuracy(real: Tensor, made: Tensor, seed: int) -> tuple[float, float]:
    """How often a classifier tells made rows from real ones, on rows that it has not seen.

    A classifier two-sample test (Lopez-Paz & Oquab 2017): 0.5 where it cannot. Half of either
    sample trains it.

    Args:
        real: (n, F) features.
        made: (n, F).
        seed: Of the split.

    Returns:
        Accuracy and its binomial standard error.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([real, made]).float()
    y = torch.cat([torch.zeros(len(real)), torch.ones(len(made))]).long()
    order = torch.randperm(len(x), generator=generator)
    train, test = order.chunk(2)
    mean, scale = x[train].mean(0), x[train].std(0) + 1e-3
    x = (x - mean) / scale
    weights = softmax_regression(x[train], y[train], 2, ridge=10.0)
    right = (predicted(weights, x[test]).argmax(-1) == y[test]).double()
    return float(right.mean()), float(right.std() / len(test) ** 0.5)


def explained(x: Tensor, y: Tensor) -> float:
    """R2 of y (n, M) by a linear regression on x (n, F), fitted on one half, on the other."""
    x = F.pad(x, (0, 1), value=1.0)
    half = len(x) // 2
    fit = torch.linalg.lstsq(x[:half], y[:half]).solution
    left = (y[half:] - x[half:] @ fit).square().sum()
    return float(1 - left / (y[half:] - y[:half].mean(0)).square().sum())
