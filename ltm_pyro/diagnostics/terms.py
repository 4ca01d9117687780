"""Fresh draws of q and the three log densities of each: what every score is made of.

`evaluate`, `importance_bound` and `diagnose` take their draws from here, so that for the same q,
number of draws and seed they answer from the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Drawing, Noise, Stream, derive_seed

DRAWS_AT_ONCE = 64
"""Draws of z held in memory together, (64, B, K, D)."""
TOKENS_AT_ONCE = 8192
"""Tokens that the decoder scores at a time: enough to keep a processor busy."""


def fresh_draws(
    q: TorchDistribution, ids: Tensor, draws: int, seed: int, *, other: bool = False
) -> Iterator[Tensor]:
    """S draws, (up to `DRAWS_AT_ONCE`, B, K, D) at a time.

    Noise belongs to a sequence: its draws are the same in any batch, the first ones whatever S is.

    Args:
        q: Batch shape (B,).
        ids: (B,) of the sequences.
        draws: S.
        seed: Of the scores.
        other: Draws independent of the usual ones, to judge those by.
    """
    stream = Stream.CALIBRATE if other else Stream.SCORE
    draw = Drawing(Noise(derive_seed(seed, stream), ids))
    for start in range(0, draws, DRAWS_AT_ONCE):
        with torch.no_grad():
            z = draw(q, min(DRAWS_AT_ONCE, draws - start))
        yield z


class Likelihoods:
    """Log p(x | z_s), z (S, B, K, D) to (S, B) float64, some draws or some rows at a time.

    So memory grows neither with S nor with B. Processes share the sequences; draws are cheap, and
    are all made by each.

    Args:
        model: Whose likelihood.
        batch: B sequences.
        parallel: The processes.
        at_once: Draws times sequences scored together; as many as `TOKENS_AT_ONCE` by default.
    """

    def __init__(
        self,
        model: LatentModel,
        batch: Batch,
        parallel: Parallel | None = None,
        at_once: int | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        shared = parallel is not None and len(batch) >= parallel.size
        self.parallel = parallel if parallel is not None and shared else Parallel()
        mine = self.parallel.share(len(batch))
        size = max(1, TOKENS_AT_ONCE // batch.mask[0].numel()) if at_once is None else at_once
        starts = range(mine.start, mine.stop, size)
        self.parts = [slice(start, min(start + size, mine.stop)) for start in starts]
        self.draws = max(1, size // max(1, mine.stop - mine.start))

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """For all sequences, in every process."""
        mine = torch.cat([self._of_rows(rows, z) for rows in self.parts], dim=1)
        return self.parallel.gather_rows(mine, dim=1)

    def _of_rows(self, rows: slice, z: Tensor) -> Tensor:
        prepared = self.model.prepare(self.batch.select(rows))
        some = z[:, rows].split(self.draws)
        return torch.cat([self.model.log_likelihood(d, prepared).double() for d in some])


@dataclass(frozen=True)
class Terms:
    """Log densities of S draws of q for each of B sequences, (S, B) float64, nats.

    Attributes:
        log_likelihood: log p(x | z).
        log_prior: log p(z).
        log_q: log q(z).
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) - log q(z)."""
        return self.log_likelihood + self.log_prior - self.log_q


def standard_error(draws: Tensor) -> Tensor:
    """Of the mean over S independent draws, (S, ...) to (...); NaN for one draw alone."""
    return draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else draws[0] * torch.nan


@torch.no_grad()
def score_terms(
    likelihoods: Likelihoods,
    q: TorchDistribution,
    prior: TorchDistribution,
    draws: int,
    seed: int,
    *,
    ids: Tensor | None = None,
    rows: Tensor | slice = slice(None),
    other: bool = False,
) -> Terms:
    """The terms of S fresh draws of q.

    Args:
        likelihoods: Of the sequences at `rows`.
        q: Batch shape (B,).
        prior: p(z).
        draws: S.
        seed: Of the draws.
        ids: (B,) of q's sequences; those of `likelihoods` by default.
        rows: Of q, the sequences that are scored; all by default.
        other: As in `fresh_draws`.
    """
    parts = []
    ids = likelihoods.batch.ids if ids is None else ids
    for z in fresh_draws(q, ids, draws, seed, other=other):
        log_q, z = q.log_prob(z).double()[:, rows], z[:, rows]
        parts.append((likelihoods(z).double(), prior.log_prob(z).double(), log_q))
    return Terms(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
