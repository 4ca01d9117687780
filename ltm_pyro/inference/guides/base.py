"""What a local guide is. One family per file, registered by name.

To add a family: subclass `LocalGuide`, say which tensors a row has (`initial_rows`) and how they
make a distribution (`posterior`), decorate with `@register_guide("name")` (`guides.registry`);
`check_guide("name", ...)` holds it to the contract.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import Unit
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.guides.program import GuideProgram
from ltm_pyro.models.base import SITE_Z, LatentModel, sequences
from ltm_pyro.random import seeded

Loss = Callable[[Batch], Tensor]
"""-ELBO of a batch, summed over its sequences, in nats."""


class LocalGuide(GuideProgram):
    """q(z_i; phi_i) for each sequence i of a batch, called as a Pyro guide with site `z`.

    Rows are independent: nothing of one sequence's parameters enters another's posterior.

    Args:
        model: Gives (K, D), device and dtype; it is not kept.

    Attributes:
        local: The local parameters phi_i, each (B, ...), moved by the fast clock.
        inputs: What an encoder reads of each sequence, each (B, ...); empty for most families.
    """

    family: ClassVar[str] = ""
    has_density: ClassVar[bool] = True
    """False for a point mass, which has no ELBO."""
    start_log_variance: float | None = None
    """Where log variances start, `None` for families without; used for the KL floor."""
    built_with: dict[str, Any] | None = None
    """The options that `build_guide` was given."""

    def __init__(self, model: LatentModel) -> None:
        super().__init__()
        self.thought_shape = model.thought_shape
        # Tells device and dtype, and follows `.to()`.
        with seeded(0, model.device):  # the caller's generator is left alone
            anchor = model.prior().sample().new_zeros(())
        self.register_buffer("anchor", anchor, persistent=False)

    def _facts(self) -> dict[str, object]:
        """The family, latents of one row, rows that it holds, and weights that rows share."""
        shared = sum(p.numel() for p in self.shared_parameters())
        told = {"family": self.family, "z": self.thought_shape, "rows": self.n_rows}
        return told | ({"shared weights": f"{shared:,}"} if shared else {})

    @abstractmethod
    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Fresh local parameters by name, each (B, ...); none for a family without."""

    def initial_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the family reads of each sequence, by name, each (B, ...)."""
        return {}

    @abstractmethod
    def posterior(self) -> TorchDistribution:
        """q(z) at the present parameters: batch shape (B,), event shape (K, D).

        The only place where parameters become a distribution.
        """

    def kl(self, prior: TorchDistribution) -> Tensor | None:
        """KL(q || prior) per sequence in nats, (B,); `None` where torch knows no closed form."""
        return closed_kl(self.posterior(), prior) if self.has_density else None

    def units(self) -> dict[str, Unit]:
        """How local parameters relate to a mean and a scale, for the natural gradient.

        By name, at their present values: one scale of q for a mean (in the parameter's own units),
        `LOG_VARIANCE_UNIT` for a log variance. Adam moves what is left out; by default that is all.
        """
        return {}

    def reset(self, batch: Batch) -> None:
        """Allocates fresh local parameters for the B rows of `batch`, and takes up its inputs."""
        if not isinstance(batch, Batch):
            raise InputError(f"batch is {shown(batch)}: must be a Batch")
        if inputs := self.initial_inputs(batch):
            self.inputs.load(inputs)
        self.load_rows(self.initial_rows(batch))

    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Puts given values (B, ...) in place as the local parameters."""
        self.local = nn.ParameterDict(
            {name: nn.Parameter(value.detach().clone()) for name, value in rows.items()}
        )

    def rows(self) -> dict[str, Tensor]:
        """The local parameters' values, as copies."""
        return {name: p.detach().clone() for name, p in self.local.items()}

    def forward(self, batch: Batch) -> Tensor:
        """The Pyro guide: one site `z` in the plate of sequences.

        Raises:
            InputError: if the guide was not reset for this batch.
        """
        self.check(batch)
        with sequences(batch):
            z: Tensor = pyro.sample(SITE_Z, self.posterior())
        return z

    def local_parameters(self) -> dict[str, nn.Parameter]:
        """What moves on the fast clock, by name."""
        return {name: p for name, p in self.local.items() if isinstance(p, nn.Parameter)}

    def shared_parameters(self) -> list[nn.Parameter]:
        """What moves on the slow clock: everything that is not local."""
        local = {id(p) for p in self.local.values()}
        return [p for p in self.parameters() if id(p) not in local]

    def shared_loss(self, loss: Loss, batch: Batch) -> Tensor | None:
        """What the slow clock also descends, for the shared parameters alone.

        Args:
            loss: Summed -ELBO at whatever the guide holds when it is called; decoder frozen.
            batch: The batch that the guide holds.
        """
        return None


def closed_kl(q: TorchDistribution, prior: TorchDistribution) -> Tensor | None:
    """KL(q || prior) in nats, (B,), where torch knows a closed form; see `models.full_normal`."""
    try:
        kl: Tensor = kl_divergence(q, prior)
    except NotImplementedError:
        return None
    return kl
