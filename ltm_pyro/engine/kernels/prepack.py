"""Frozen matrices, prepacked once for many products.

A matrix product on the CPU rearranges its second factor before it begins. In the fast loop that
factor is a weight which stays as it is for T_fast steps, forward as W^T and backward as W. oneDNN
can be handed both rearranged; the product is the same, and sooner done. Where oneDNN has no such
layout (other devices, other precisions) products are plain.

Measured alone (`benchmarks/tricks.py`): without it an eager fast loop takes 1.29 times as long on
`nano` and 1.22 times on `tiny`, a whole slow step 1.22 and 1.13 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

_PRECISIONS = (torch.float32, torch.bfloat16)
_ROWS = 2048
"""Rows of the first factor that a layout is made for; others are as welcome."""


class Prepacked(NamedTuple):
    """A matrix W as products take it: x W^T, and x W."""

    transposed: Tensor
    plain: Tensor


_PREPACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weights to their layouts; a weight that is gone takes its own along."""


def prepack(weight: Tensor) -> Tensor:
    """The same matrix, detached, and prepacked while that tensor lives.

    Args:
        weight: (out, in); must not change as long as the result is used.
    """
    weight = weight.detach()
    if can_prepack(weight):
        _PREPACKED[weight] = Prepacked(_reordered(weight), _reordered(weight.T))
    return weight


def prepacked(weight: Tensor) -> Prepacked | None:
    """What `prepack` made for this very tensor."""
    found: Prepacked | None = _PREPACKED.get(weight)
    return found


def can_prepack(weight: Tensor) -> bool:
    """Whether oneDNN has a layout for a matrix of this device and precision."""
    known = all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
    usable = weight.is_cpu and weight.dtype in _PRECISIONS and torch.backends.mkldnn.is_available()
    return usable and known


def _reordered(second: Tensor) -> Tensor:
    """What a product with second^T takes."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(second.contiguous(), _ROWS)
    return out


@torch.library.custom_op("ltm_pyro::frozen_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """The product of x (..., in) with W^T, or of x (..., out) with W."""
    found = prepacked(weight)
    if found is None:
        return x @ (weight.T if transposed else weight)
    second = found.transposed if transposed else found.plain
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, second, None, "none", [], "")
    return out


@_product.register_fake
def _(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0 if transposed else 1]))


@register_flop_formula(torch.ops.ltm_pyro.frozen_product)
def _flops(x: Sequence[int], weight: Sequence[int], transposed: bool, **_: Any) -> int:
    """For `torch.utils.flop_counter`."""
    del transposed
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])
    ctx.transposed = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return _product(grad.contiguous(), weight, not ctx.transposed), None, None


_product.register_autograd(_backward, setup_context=_keep)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T, from the layout of a prepacked weight where there is one.

    Args:
        x: (..., in).
        weight: (out, in).

    Returns:
        (..., out).
    """
    casting = torch.is_autocast_enabled("cpu")
    low = weight.dtype == torch.get_autocast_dtype("cpu")
    if weight.requires_grad or not weight.is_cpu or (casting and not low):
        return F.linear(x, weight)
    # A compiler cannot ask; in its graphs the product itself does.
    if not torch.compiler.is_compiling() and prepacked(weight) is None:
        return F.linear(x, weight)
    product: Tensor = _product(x.to(weight.dtype), weight, True)
    return product
