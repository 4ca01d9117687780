"""Products with frozen matrices, prepacked once: the same numbers, and plain where they must be."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ltm_pyro.engine.kernels import likelihood as module
from ltm_pyro.engine.kernels.likelihood import linear, prepack, prepacked

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Sums of 48 products round in another order; bf16 has 8 bits."""


def matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 5, 48, generator=generator).to(dtype),
        torch.randn(64, 48, generator=generator).to(dtype) / 7,
    )


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="layouts are oneDNN's"
)


@needs_onednn
@pytest.mark.parametrize("prepacks", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_plain_product(
    dtype: torch.dtype, prepacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = matrices(dtype)
    if not prepacks:
        monkeypatch.setattr(module, "can_prepack", lambda weight: False)
    weight = prepack(weight)
    assert (prepacked(weight) is not None) == prepacks
    results = []
    for product in (linear, F.linear):
        at = x.clone().requires_grad_()
        out = product(at, weight)
        (gradient,) = torch.autograd.grad((out.float() * torch.arange(64)).sum(), at)
        results.append((out, gradient))
    torch.testing.assert_close(*results, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_weight_that_learns_has_its_gradient() -> None:
    x, weight = matrices(torch.float32)
    prepack(weight)
    weight.requires_grad_()
    assert torch.autograd.grad(linear(x, weight).sum(), weight)[0].abs().sum() > 0


def test_a_weight_that_changed_is_not_taken_for_the_one_that_was_prepacked() -> None:
    x, weight = matrices(torch.float32)
    prepack(weight)
    weight.zero_()
    assert not linear(x, weight).any()


def test_autocast_rounds_a_weight_in_full_precision() -> None:
    x, weight = matrices(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert linear(x, prepack(weight.bfloat16())).dtype == torch.bfloat16


@needs_onednn
def test_the_layout_goes_with_the_weight() -> None:
    weight = prepack(torch.randn(64, 48))
    assert prepacked(weight) is not None
    assert prepacked(weight.detach()) is None
    before = len(module._PREPACKED)
    del weight
    gc.collect()
    assert len(module._PREPACKED) == before - 1


def test_elsewhere_products_are_plain() -> None:
    weight = prepack(torch.randn(64, 48, device="meta"))
    assert prepacked(weight) is None
    assert linear(torch.randn(2, 48, device="meta"), weight).shape == (2, 64)


def test_double_precision_is_left_as_it_is() -> None:
    x, weight = matrices(torch.float64)
    weight = prepack(weight)
    assert prepacked(weight) is None
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
