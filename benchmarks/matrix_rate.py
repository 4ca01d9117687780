"""How fast this machine multiplies the matrices of one fast step, each product timed alone.

Counted are the products that a fast step cannot do without: forward, and backward by activations
(the weights are frozen). Two sums are kept apart: products with weights, and self-attention's own.
Left out are cross-attention (its projections can be taken to the K_l thoughts, and what remains is
thin) and whatever an engine computes twice, so the share of the rate that comes out is at least
this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ltm_pyro.config import ModelConfig

LARGEST = 2**25
"""Elements of a result at most: longer products are timed on fewer rows and scaled up."""


SMALLEST_BLOCK = 16
"""Queries that attention takes together at least, where the window is shorter."""


@dataclass(frozen=True)
class Product:
    """`count` times `batch` products of (rows, inner) with (inner, columns) matrices."""

    name: str
    rows: int
    inner: int
    columns: int
    count: int
    batch: int = 1
    transposed: bool = False
    """Whether the second matrix is stored transposed, as a weight is in the forward pass."""
    attention: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations, two per multiply-add."""
        return 2.0 * self.count * self.batch * self.rows * self.inner * self.columns


def fast_step_products(model: ModelConfig, batch_size: int, length: int) -> list[Product]:
    """The matrix products of one fast step on B sequences of T tokens.

    Layer 0 starts at its cross-attention: what lies below does not depend on z.
    """
    n, width, hidden, layers = batch_size * length, model.width, model.mlp_hidden, model.n_layers
    upper = layers - 1
    maps = [  # name, inputs, outputs, times
        ("queries, keys, values", width, 3 * width, upper),
        ("attention out", width, width, upper),
        ("MLP in", width, 2 * hidden, layers),
        ("MLP out", hidden, width, layers),
        ("logits", width, model.vocab_size, 1),
    ]
    out = []
    for name, inputs, outputs, count in maps:
        out.append(Product(f"{name}, forward", n, inputs, outputs, count, transposed=True))
        out.append(Product(f"{name}, backward", n, outputs, inputs, count))
    if model.window > 1 and upper:
        out += _attention_products(model, batch_size, length, upper)
    return [p for p in out if p.count]


def _attention_products(
    model: ModelConfig, batch_size: int, length: int, layers: int
) -> list[Product]:
    """Scores and mixing in blocks of queries: 2 products forward, 4 backward."""
    block = min(max(model.window, SMALLEST_BLOCK), length)
    reach = length if model.window >= length else block + model.window - 1
    batch = batch_size * model.n_heads * -(-length // block)
    head = model.width // model.n_heads
    return [
        Product(
            "scores, and by the mixed values", block, head, reach, 2 * layers, batch, True, True
        ),
        Product("mixing, and by queries", block, reach, head, 2 * layers, batch, attention=True),
        Product("by keys and values", reach, block, head, 2 * layers, batch, attention=True),
    ]


class MatrixRate:
    """Times all products again and again, so that it can alternate with the loops.

    Args:
        products: What to multiply.
        device: Where.
        dtype: As what.
    """

    def __init__(self, products: list[Product], device: torch.device, dtype: torch.dtype) -> None:
        self.products = products
        self.device = device
        self.dtype = dtype
        self.seconds: list[list[float]] = [[] for _ in products]

    def measure(self) -> None:
        """Times each product once more; operands are made anew, so that few are held at once."""
        for product, seconds in zip(self.products, self.seconds, strict=True):
            run, share = self._operands(product)
            run()
            seconds.append(product.count * share * _typical(run, self.device))

    def _operands(self, p: Product) -> tuple[Callable[[], Tensor], float]:
        """A call that multiplies once into memory that is there, and the share to scale by."""
        rows = min(p.rows, max(1, LARGEST // p.columns))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device).to(self.dtype)

        if p.batch == 1:
            left = random(rows, p.inner)
            right = random(p.columns, p.inner).T if p.transposed else random(p.inner, p.columns)
        else:
            left = random(p.batch, rows, p.inner)
            right = (
                random(p.batch, p.columns, p.inner).mT
                if p.transposed
                else random(p.batch, p.inner, p.columns)
            )
        out = left @ right
        return lambda: torch.matmul(left, right, out=out), p.rows / rows

    def totals(self, *, attention: bool) -> tuple[float, float]:
        """FLOPs of one fast step and the seconds that its products took alone, medians added.

        Args:
            attention: Count self-attention's own products too.
        """
        chosen = [
            (p.flops, median(s))
            for p, s in zip(self.products, self.seconds, strict=True)
            if attention or not p.attention
        ]
        return sum(f for f, _ in chosen), sum(s for _, s in chosen)

    def rows(self) -> list[dict[str, float | str | bool]]:
        """Each product with its rate, for the record."""
        return [
            {
                "product": p.name, "batch": p.batch, "rows": p.rows, "inner": p.inner,
                "columns": p.columns, "count": p.count, "attention": p.attention,
                "gflops_per_second": p.flops / median(s) / 1e9,
            }
            for p, s in zip(self.products, self.seconds, strict=True)
        ]  # fmt: skip


def _typical(run: Callable[[], Tensor], device: torch.device, budget: float = 0.05) -> float:
    """Median seconds of some calls, as many as the budget (s) allows, at least three."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 50):
        began = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)
