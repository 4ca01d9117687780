"""What inference, scores and guides ask of a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.config import Precision
from ltm_pyro.data.batches import Batch

P = TypeVar("P", bound=Callable[..., Any])

SITE_Z = "z"
SITE_X = "x"
PLATE = "sequences"
"""The plate over sequences, dim -1, in every model and every guide."""


def sequences(batch: Batch) -> pyro.plate:
    """The plate over a batch's sequences; its indices live where the batch does.

    They are given because Pyro would count them again at every call.
    """
    device = str(batch.device)
    plate: pyro.plate = pyro.plate(
        PLATE, len(batch), subsample=batch.indices, dim=-1, device=device
    )
    return plate


def standard_program(forward: P) -> P:
    """Marks a `forward` that does nothing but sample the sites of its class.

    In the plate of sequences, a model's has z ~ `prior()` and x ~ `likelihood(z, batch)`, a guide's
    z ~ `posterior()`. Both clocks may then sample them themselves. A program that does more is not
    marked, and always runs as it is: a subclass with a `forward` of its own, for one. It may do
    more where a prior's weights learn: it always runs there.
    """
    forward.standard_program = True  # type: ignore[attr-defined]
    return forward


def is_standard_program(module: object) -> bool:
    """Whether calling `module` runs a `standard_program`, with no hook around it."""
    if not isinstance(module, nn.Module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return getattr(module.forward, "standard_program", False)


@runtime_checkable
class Computes(Protocol):
    """A model whose likelihood can be computed in several ways; the language model's can."""

    def computing(
        self,
        precision: Precision = "fp32",
        checkpointing: bool = False,
        in_halves: bool = False,
    ) -> AbstractContextManager[None]:
        """Inside the block the likelihood is computed in this way."""
        ...

    def compile_fast_loop(self) -> None:
        """Compiles the likelihood that the fast loop calls."""
        ...


@runtime_checkable
class LatentModel(Protocol):
    """A Pyro program over one plate of sequences with sites `z` and `x`.

    Every model is also an `nn.Module` (possibly without weights): the slow clock steps its
    parameters, decoder and learned prior alike.
    """

    @property
    def thought_shape(self) -> tuple[int, int]:
        """(K, D)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        ...

    def __call__(self, batch: Batch | None = None) -> Any:
        """The generative story; runs forward where `batch` is `None` or has no `x`."""
        ...

    def prior(self) -> TorchDistribution:
        """p(z): event shape (K, D)."""
        ...

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x | z) in nats: z (..., B, K, D) to (..., B)."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """The same batch with whatever does not depend on z computed once."""
        ...

    def check(self, batch: Batch) -> None:
        """Raises `InputError` where the model cannot score the batch."""
        ...

    def parameters(self, recurse: bool = True) -> Any:
        """All weights."""
        ...
