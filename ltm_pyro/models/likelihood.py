"""The sequence likelihood: one distribution that scores and writes whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.drawn import Shape
from ltm_pyro.models.sampling import write_tokens


class TokenSequence(TorchDistribution):
    """p(x | z) over token sequences: batch shape (..., B), event shape (T,).

    `log_prob` is the fused, masked decoder log-likelihood in nats; `sample` writes tokens one by
    one with a key/value cache. There is no `rsample`: tokens are discrete.

    Args:
        decoder: Writes samples.
        score: Scores B rows: (..., B, K, D) and (B, T) to (..., B).
        z: (..., B, K, D) thoughts.
        length: T.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own interface
    has_rsample = False

    def __init__(
        self,
        decoder: Decoder,
        score: Callable[[Tensor, Tensor], Tensor],
        z: Tensor,
        length: int,
        validate_args: bool | None = None,
    ) -> None:
        self.decoder = decoder
        self.score = score
        self.z = z
        self._scored: tuple[Tensor, Tensor] | None = None
        super().__init__(z.shape[:-2], torch.Size([length]), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Token ids 0..V-1 at every position."""
        last = self.decoder.config.vocab_size - 1
        return constraints.independent(constraints.integer_interval(0, last), 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """The same distribution with leading dimensions of z repeated."""
        shape = (*batch_shape, *self.z.shape[-2:])
        return TokenSequence(self.decoder, self.score, self.z.expand(shape), self.event_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(value | z), (..., B), for tokens (B, T).

        The last answer is kept with the value it is for: the ELBO and the metrics that split it
        into parts both ask, and one pass through the decoder serves them.
        """
        if self._scored is None or self._scored[0] is not value:
            self._scored = (value, self.score(value, self.z))
        return self._scored[1]

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Token sequences, (*sample_shape, ..., B, T)."""
        shape = (*sample_shape, *self.batch_shape)
        z = self.z.expand((*shape, *self.z.shape[-2:]))
        rows = z.reshape(-1, *z.shape[-2:])
        return write_tokens(self.decoder, rows, self.event_shape[0]).view(*shape, -1)
