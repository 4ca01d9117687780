"""What inference, scores and guides ask of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import FIRST_USE, exclusively
from ltm_pyro.errors import InputError, shown
from ltm_pyro.html import show
from ltm_pyro.models.plain_svi import svi_asks, tell_parameters

SITE_Z = "z"
SITE_X = "x"
PLATE = "sequences"
"""The plate over sequences, dim -1, in every model and every guide."""


def sequences(batch: Batch) -> pyro.plate:
    """The plate over a batch's sequences; its indices live where the batch does.

    They are given because Pyro would count them again at every call.
    """
    device = str(batch.device)
    return pyro.plate(PLATE, len(batch), subsample=batch.indices, dim=-1, device=device)


class Program(nn.Module):
    """A module that is a Pyro program: threads take turns, and Pyro's own `SVI` trains its weights.

    Pyro's optimisers step what a program tells them of by `pyro.param`. Weights are told under
    `pyro.infer.SVI` alone, so that nothing is left in Pyro's global store by anything else.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        with exclusively():
            if args and not (args[0] is None or isinstance(args[0], Batch)):
                raise InputError(f"batch is {shown(args[0])}: must be a Batch, or None")
            if svi_asks():
                self.tell_svi(*args)
            return super().__call__(*args, **kwargs)

    def _facts(self) -> dict[str, object]:
        """What a line about it tells, by name."""
        weights = sum(p.numel() for p in self.parameters())
        return {"weights": f"{weights:,}"} if weights else {}

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"{type(self).__name__}({told})"

    def _repr_html_(self) -> str:
        return show(type(self).__name__, self._facts(), details=super().__repr__())

    def tell_svi(self, batch: Batch | None = None) -> None:
        """Tells Pyro's `SVI` of the weights before it runs the program on `batch`."""
        tell_parameters(self)


class LatentModel(Program, ABC):
    """One local latent z_i per row of data, as a Pyro program with sites `z` and `x`.

        z_i       ~ prior()                    (K, D)
        x_i | z_i ~ likelihood(z, batch)       any shape

    A subclass gives these two; the rest has a default that may be overridden. `check_model` holds
    it to the contract. What is known besides may be given too: `thought_prior`, a prior that learns
    (see `ThoughtPrior`), and `log_evidence(batch)`, log p(x) in nats, (B,), where it is exact:
    scores then use it.

    Attributes:
        x_shape: Shape of one x, so that the program runs forward without a batch: `model(size=3)`.

    Example:
        >>> class Counts(LatentModel):
        ...     x_shape = (5,)
        ...     def prior(self):
        ...         return dist.Normal(torch.zeros(1, 2), 1.0).to_event(2)
        ...     def likelihood(self, z, batch):
        ...         return dist.Poisson(z.sum((-2, -1)).exp()[..., None].expand(
        ...             *z.shape[:-2], 5)).mask(batch.mask).to_event(1)
    """

    x_shape: tuple[int, ...] | None = None

    @abstractmethod
    def prior(self) -> TorchDistribution:
        """p(z) of one row: batch shape (), event shape (K, D)."""

    @abstractmethod
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        """p(x | z) for thoughts (..., B, K, D): batch shape (..., B), event shape that of one x.

        What the mask leaves out must not count: `.mask(batch.mask)` before `.to_event`.
        """

    def forward(self, batch: Batch | None = None, *, size: int = 1) -> Tensor:
        """The generative story.

        Args:
            batch: Rows to condition on. Without `x` (`batch.unobserved()`), or `None`, the program
                runs forward and makes them.
            size: B when there is no batch.

        Returns:
            x (B, ...).
        """
        batch = self.blank(size) if batch is None else batch
        with sequences(batch):
            z = pyro.sample(SITE_Z, self.prior())
            x: Tensor = pyro.sample(SITE_X, self.likelihood(z, batch), obs=batch.x)
        return x

    def blank(self, size: int) -> Batch:
        """`size` rows still to be made.

        A model that reads covariates may make some up here.

        Raises:
            InputError: if the model does not tell the shape of x.
        """
        if self.x_shape is None:
            raise InputError(
                f"{type(self).__name__}() without a batch: set the attribute x_shape, the "
                "shape of one x, or give batch.unobserved()"
            )
        shape = (whole_number("size", size, at_least=1), *self.x_shape)
        return Batch(None, torch.ones(shape, dtype=torch.bool, device=self.device))

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x | z) in nats, z (..., B, K, D) to (..., B)."""
        return self.likelihood(z, batch).log_prob(batch.observed)

    def token_log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x_t | x_<t, z) in nats, z (..., B, K, D) to (..., B, T), 0 where masked.

        By default that of a likelihood whose elements are independent given z.

        Raises:
            InputError: if the likelihood is another, and this is not overridden.
        """
        likelihood = self.likelihood(z, batch)
        if not isinstance(likelihood, Independent) or batch.mask.dim() != 2:
            raise InputError(
                f"{type(self).__name__} does not tell how its likelihood is shared by the elements "
                "of x: define token_log_likelihood(z, batch), (..., B, T)"
            )
        return likelihood.base_dist.log_prob(batch.observed)

    def prepare(self, batch: Batch) -> Batch:
        """The same batch with whatever does not depend on z computed once."""
        return batch

    def check(self, batch: Batch) -> None:
        """Refuses a batch that the model cannot score.

        Raises:
            InputError: naming what does not fit; by default an `x` that is missing or not finite.
        """
        x = batch.observed
        if x.is_floating_point():
            fine = (x.isfinite() | ~batch.mask).reshape(len(batch), -1).all(-1)
            bad = batch.ids[~fine].tolist()
            if bad:
                raise InputError(f"x of sequence ids {bad[:8]} is not finite: mend or mask it")

    @property
    def thought_shape(self) -> tuple[int, int]:
        """(K, D)."""
        event = tuple(getattr(self.prior(), "event_shape", ()))
        if len(event) != 2:
            raise InputError(
                f"prior() of {type(self).__name__} draws {event}: must be a distribution of (K, D)"
            )
        return event

    def _facts(self) -> dict[str, object]:
        """Latents of one row of data, the prior, and weights."""
        prior: object = getattr(self, "thought_prior", None)
        told = {} if prior is None else {"prior": type(prior).__name__}
        return {"z": self.thought_shape, **told, **super()._facts()}

    @property
    def n_layers(self) -> int | None:
        """L where equal blocks of thoughts feed the layers of a decoder; `None` elsewhere."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model lives: with its first weight or buffer."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")


def _hold_to_contract(model: LatentModel, batch: Batch) -> None:
    from ltm_pyro.models.contract import first_use  # which is about models

    first_use(model, batch)


FIRST_USE.append(_hold_to_contract)


def exact_evidence(model: LatentModel, batch: Batch) -> Tensor | None:
    """Log p(x) in nats, (B,), from a model that knows it exactly; `None` from one that does not."""
    log_evidence: Any = getattr(model, "log_evidence", None)
    if log_evidence is None:
        return None
    found: Tensor = log_evidence(batch)
    if found.shape != (len(batch),):
        raise InputError(
            f"log_evidence of {type(model).__name__} is {tuple(found.shape)}: must be one number "
            f"per row, ({len(batch)},)"
        )
    return found
