"""What a prior over thoughts is. One family per file, registered by name.

To add a family: subclass `ThoughtPrior`, make the distribution in `forward`, decorate with
`@register_prior("name")`. Its weights are then learned on the slow clock, saved in checkpoints and
sampled by generation, and the contract test in `tests/test_priors.py` runs over it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.checks import MOST, whole_number
from ltm_pyro.registry import Registry


class ThoughtPrior(nn.Module, ABC):
    """p(z): K thought vectors of D dimensions, the same for all sequences.

    Args:
        n_thoughts: K.
        thought_dim: D.

    Attributes:
        shape: (K, D).
    """

    family: ClassVar[str] = ""
    cannot_concentrate: ClassVar[bool] = False
    """Whether its density stays bounded whatever its weights learn, so that point masses may teach
    it."""

    def __init__(self, n_thoughts: int, thought_dim: int) -> None:
        super().__init__()
        self.shape = (
            whole_number("n_thoughts", n_thoughts, at_least=1),
            whole_number("thought_dim", thought_dim, at_least=1),
        )

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.parameters())
        return f"{type(self).__name__}({weights:,} weights)"

    @abstractmethod
    def forward(self) -> TorchDistribution:
        """The prior of one sequence's thoughts: batch shape (), event shape (K, D).

        Made without gradients, it carries none and keeps its values when the weights move on.
        """

    def named_values(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """What has been learned, for export: name to dimensions and values.

        The dimensions `thought` and `dim` are those of z.
        """
        return {}

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Weights that weight decay must leave alone: those for which 0 is no special place."""
        return []

    def observe(self, z: Tensor) -> None:
        """Shown the draws z ~ q(z_i), (..., K, D), of each slow step that learns the prior.

        Gradients need nothing of this; a family that takes its start from the data keeps them.
        """


PRIORS: Registry[type[ThoughtPrior]] = Registry(
    "prior", "register_prior", needs=ThoughtPrior, label="family"
)
register_prior = PRIORS.register
"""Class decorator: makes a prior known to `build_prior` by name; see `Registry.register`."""
prior_names = PRIORS.names
"""Names of all registered priors."""


def build_prior(name: str, n_thoughts: int, thought_dim: int, /, **options: Any) -> ThoughtPrior:
    """A prior of the family `name`, with fresh weights from torch's global generator.

    Args:
        name: A registered family, e.g. `"mixture"`.
        n_thoughts: K.
        thought_dim: D.
        **options: Options of the family.

    Raises:
        InputError: for an unknown family or option (the nearest name is offered), or a value out
            of range.
    """
    for size, value in (("n_thoughts", n_thoughts), ("thought_dim", thought_dim)):
        whole_number(size, value, at_least=1, at_most=MOST)
    return PRIORS.build(name, n_thoughts, thought_dim, options=options)
