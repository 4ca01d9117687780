"""Normal posterior with a covariance of its own per sequence, whole or in blocks."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import log_variance, one_of
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, Unit
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import register_guide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.full_normal import BlockNormal, FullNormal

BLOCKS = ("layer", "thought", "whole")
COPIES = 6
"""Matrices of L's size that a fast step holds: L, its parameters, both gradients, its moments."""
MEMORY = 8 * 2**30
"""Bytes that these may take for one batch. More would not finish in useful time either: a step
costs (K * D)^2 per draw."""


@register_guide("full_rank")
class FullRank(LocalGuide):
    """Normal with every correlation within a block, per sequence.

    q(z_i) = N(loc_i, L_i L_i') with L = diag(exp(log_variance / 2)) (I + U), U strictly lower
    triangular: the rows of L are in units of the diagonal. An optimiser with one learning rate for
    all then moves them well whether a posterior is as wide as the prior or a hundred times
    narrower; with the entries of L themselves as parameters, the first steps towards a narrow
    posterior overshoot and do not come back.

    Args:
        block: Which dimensions lean on each other: `"whole"` (all K * D), `"layer"` (those that
            feed one decoder layer) or `"thought"` (the D of one thought).
        init_log_variance: Log of the variances at the start. 0 is the standard normal prior's.

    Local parameters: `loc` and `log_variance` (B, K, D), the latter of each dimension given those
    before it in its block; `lower` (B, M, N (N - 1) / 2), the entries of U by row, for M blocks of
    N dimensions (absent where N is 1).

    Raises:
        InputError: if `block` is unknown, the model has no layers, or one sequence's covariance
            does not fit in memory.
    """

    def __init__(
        self, model: LatentModel, block: str = "whole", init_log_variance: float = 0.0
    ) -> None:
        one_of("block", block, BLOCKS)
        super().__init__(model)
        self.block = block
        self.init_log_variance = self.start_log_variance = log_variance(init_log_variance)
        n_thoughts, dim = model.thought_shape
        self.n_blocks = {"whole": 1, "thought": n_thoughts}.get(block) or _layers(model)
        self.block_size = n_thoughts * dim // self.n_blocks
        self._refuse_too_large(1)
        row, column = torch.tril_indices(self.block_size, self.block_size, -1).unbind()
        place = row * self.block_size + column
        self.register_buffer("place", place.to(self.anchor.device), persistent=False)

    place: Tensor

    def _refuse_too_large(self, n_rows: int) -> None:
        size = COPIES * n_rows * self.n_blocks * self.block_size**2 * self.anchor.element_size()
        if size > MEMORY:
            smaller = "" if self.block == "thought" else "block='thought' (or 'layer'), "
            raise InputError(
                f"guide full_rank with block={self.block!r} takes {size / 2**30:.1f} GiB for the "
                f"covariances of {n_rows} sequence{'s' if n_rows > 1 else ''} of "
                f"{self.n_blocks} x {self.block_size} dimensions, above its limit of "
                f"{MEMORY / 2**30:.0f} GiB: choose {smaller}guide low_rank, or a smaller batch"
            )

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Means at 0, variances as asked, no correlation."""
        self._refuse_too_large(len(batch))
        shape = (len(batch), *self.thought_shape)
        rows = {
            "loc": self.anchor.new_zeros(shape),
            "log_variance": self.anchor.new_full(shape, self.init_log_variance),
        }
        if len(self.place):
            rows["lower"] = self.anchor.new_zeros(len(batch), self.n_blocks, len(self.place))
        return rows

    def _scale_tril(self) -> Tensor:
        """L, (B, M, N, N)."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        shape = (len(scale), self.n_blocks, self.block_size)
        unit = torch.eye(self.block_size, dtype=scale.dtype, device=scale.device)
        unit = unit.expand(*shape, self.block_size)
        if "lower" in self.local:
            places = self.place.expand(*shape[:2], -1)
            unit = unit.flatten(2).scatter(2, places, self.local["lower"]).view(unit.shape)
        return scale.view(*shape, 1) * unit

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D)."""
        factors = self._scale_tril()
        if self.n_blocks == 1:
            return FullNormal(self.local["loc"], factors.squeeze(1))
        return BlockNormal(self.local["loc"], factors)

    def units(self) -> dict[str, Unit]:
        """For `loc` the scale of a dimension given those before it; `lower` has none."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return {"loc": scale, "log_variance": LOG_VARIANCE_UNIT}


def _layers(model: LatentModel) -> int:
    """L of a model with a decoder; `InputError` for one without layers."""
    layers = getattr(model, "n_layers", None)
    if layers is None:
        raise InputError(
            f"block='layer' needs a model with decoder layers, and {type(model).__name__} has "
            "none: use block='thought' or block='whole'"
        )
    return int(layers)
