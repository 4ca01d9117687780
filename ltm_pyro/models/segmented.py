"""Documents in segments, each with thoughts of its own, which a prior links.

    SegmentedThoughtModel        z_1 -> z_2 -> ... -> z_S          a chain: memory at test time
    SessionThoughtModel          z_0 -> z_1, ..., z_0 -> z_S       a session and its turns

and in both x_s | z_s ~ emission, which sees its own segment alone. All thoughts of a document are
the one latent of its row, so that guides, clocks, scores and exports are those of any model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import exclusive
from ltm_pyro.errors import InputError, shown
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel, sequences
from ltm_pyro.models.drawn import Shape
from ltm_pyro.models.priors import HierarchicalPrior, NormalTree, StateSpacePrior


class Joined(TorchDistribution):
    """Segments as rows of `flat` (..., B * S), seen as documents: batch (..., B), event (S * T,).

    Args:
        flat: Event shape (T,).
        segments: S.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own interface

    def __init__(
        self, flat: TorchDistribution, segments: int, validate_args: bool | None = None
    ) -> None:
        self.flat, self.segments = flat, segments
        *lead, rows = flat.batch_shape
        event = torch.Size([segments * flat.event_shape[0]])
        super().__init__(torch.Size([*lead, rows // segments]), event, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """As of each segment."""
        support: Any = self.flat.support
        return support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Joined:
        """The same distribution with more leading dimensions."""
        *lead, rows = batch_shape
        return Joined(self.flat.expand(torch.Size([*lead, rows * self.segments])), self.segments)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., B, S * T) to (..., B)."""
        rows = value.unflatten(-1, (self.segments, -1)).flatten(-3, -2)
        each: Tensor = self.flat.log_prob(rows)
        return each.unflatten(-1, (-1, self.segments)).sum(-1)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Documents, (*sample_shape, ..., B, S * T)."""
        rows: Tensor = self.flat.sample(torch.Size(sample_shape))
        return rows.unflatten(-2, (-1, self.segments)).flatten(-2)


class _Documents(LatentModel):
    """What chains and sessions share.

    Args:
        emission: Scores one segment given its thoughts (K, D); x of one axis. Its prior is not
            used.
        segments: S; every document is x (B, S * T), padded and masked where it is shorter. A
            covariate (B, S * C, ...) is read as C entries for each segment.
        prior: Over the thoughts of all blocks.
    """

    thought_prior: StateSpacePrior | HierarchicalPrior

    def __init__(self, emission: LatentModel, segments: int) -> None:
        super().__init__()
        if not isinstance(emission, LatentModel):
            raise InputError(f"emission is {shown(emission)}: must be a LatentModel of one segment")
        own: Any = getattr(emission, "thought_prior", None)
        if own is not None and any(True for _ in own.parameters()):
            raise InputError(
                "the emission's own prior learns, and is not used here: build it with prior "
                "'standard_normal'"
            )
        self.emission = emission
        self.segments = whole_number("segments", segments, at_least=1)

    def prior(self) -> TorchDistribution:
        """p(z) of one document: event shape (M * K, D)."""
        return self.thought_prior()

    @property
    def device(self) -> torch.device:
        """Where the prior's weights live."""
        return self.thought_prior.log_scale.device

    def segment_thoughts(self, z: Tensor) -> Tensor:
        """Thoughts of the segments alone, (..., M * K, D) to (..., S, K, D)."""
        k, _ = self.emission.thought_shape
        return z.unflatten(-2, (-1, k))[..., -self.segments :, :, :]

    def folded(self, batch: Batch) -> Batch:
        """Segments as rows, B * S of them; a row's id is its document's."""

        def split(value: Tensor) -> Tensor:
            if value.dim() < 2 or value.shape[1] % self.segments:
                raise InputError(
                    f"{tuple(value.shape)} cannot be cut into {self.segments} segments: x, mask "
                    "and covariates must be (B, S * T)"
                )
            return value.unflatten(1, (self.segments, -1)).flatten(0, 1)

        return Batch(
            None if batch.x is None else split(batch.x),
            split(batch.mask),
            batch.ids.repeat_interleave(self.segments),
            covariates={name: split(value) for name, value in batch.covariates.items()},
        )

    def joined(self, rows: Batch) -> Batch:
        """`folded`, the way back."""

        def join(value: Tensor) -> Tensor:
            return value.unflatten(0, (-1, self.segments)).flatten(1, 2)

        return Batch(
            None if rows.x is None else join(rows.x),
            join(rows.mask),
            covariates={name: join(value) for name, value in rows.covariates.items()},
        )

    def blank(self, size: int) -> Batch:
        """`size` documents still to be made."""
        size = whole_number("size", size, at_least=1)
        return self.joined(self.emission.blank(size * self.segments))

    def likelihood(self, z: Tensor, batch: Batch) -> Joined:
        """p(x | z) for thoughts (..., B, M * K, D): batch shape (..., B), event shape (S * T,)."""
        rows = self.segment_thoughts(z).flatten(-4, -3)
        return Joined(self.emission.likelihood(rows, self.folded(batch)), self.segments)

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x | z) in nats, z (..., B, M * K, D) to (..., B)."""
        rows = self.segment_thoughts(z).flatten(-4, -3)
        each = self.emission.log_likelihood(rows, self.folded(batch))
        return each.unflatten(-1, (-1, self.segments)).sum(-1)

    def token_log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p of each element of x, z (..., B, M * K, D) to (..., B, S * T)."""
        rows = self.segment_thoughts(z).flatten(-4, -3)
        each = self.emission.token_log_likelihood(rows, self.folded(batch))
        return each.unflatten(-2, (-1, self.segments)).flatten(-2)

    def check(self, batch: Batch) -> None:
        """Refuses what cannot be cut into segments, or is no segment to the emission."""
        self.emission.check(self.folded(batch))

    def _blocks(self) -> Iterator[int]:
        """The segments, in the order in which `stepwise` runs them."""
        return iter(pyro.markov(range(self.segments)))

    @abstractmethod
    def _first(self, prior: NormalTree) -> tuple[TorchDistribution, Tensor | None]:
        """What z of the first segment is drawn from, and the parent of all that follow."""

    @exclusive
    def stepwise(self, batch: Batch | None = None, *, size: int = 1) -> Tensor:
        """The same story block by block, a Pyro program with sites of each segment.

        For handlers that want them by name: `pyro.condition(model.stepwise, {"z_0": ...})`, or a
        dialogue's first turns as `x_0`, `x_1`.

        Args:
            batch: Documents to condition on; without `x`, or `None`, they are made.
            size: B when there is no batch.

        Returns:
            x (B, S * T).
        """
        batch = self.blank(size) if batch is None else batch
        rows, shape = self.folded(batch), self.emission.thought_shape
        prior, made = self.thought_prior(), []
        with sequences(batch):
            p, parent = self._first(prior)
            for s in self._blocks():
                flat = pyro.sample(f"{SITE_Z}_{s}", p)
                one = rows.select(torch.arange(s, len(rows), self.segments, device=batch.device))
                z = flat.unflatten(-1, shape)
                x = pyro.sample(f"{SITE_X}_{s}", self.emission.likelihood(z, one), obs=one.x)
                made.append(x)
                p = prior.step(flat if parent is None else parent)
        return torch.stack(made, 1).flatten(1, 2)


def _standard(prior: NormalTree) -> TorchDistribution:
    """What the first block is drawn from: event shape (N,)."""
    zero = torch.zeros_like(prior.log_scale)
    return dist.Normal(zero, torch.ones_like(zero)).to_event(1)


class SegmentedThoughtModel(_Documents):
    """A document as a chain of segments: what came before reaches a segment through thoughts alone.

        z_1 ~ N(0, I)      z_s | z_{s-1} ~ N(A z_{s-1}, diag(scale^2))      (K, D) each
        x_s | z_s ~ emission                                               (T,)  each

    A state-space model whose transition is learned on the slow clock. Over whole documents any
    guide fits the chain at once; `filter_thoughts` goes segment by segment, at flat memory.

    Args:
        emission: Scores one segment given its thoughts (K, D); x of one axis. Its own prior is not
            used.
        segments: S; every document is x (B, S * T), padded and masked where it is shorter. A
            covariate (B, S * C, ...) is read as C entries for each segment.

    Raises:
        InputError: if the emission is no model or its own prior learns, or `segments` is below 2.

    Example:
        >>> emission = LatentThoughtModel.from_preset("nano", seq_len=32)
        >>> model = SegmentedThoughtModel(emission, segments=4)
        >>> model(size=2).shape
        torch.Size([2, 128])
    """

    def __init__(self, emission: LatentModel, segments: int) -> None:
        super().__init__(emission, segments)
        k, d = emission.thought_shape
        prior = StateSpacePrior(self.segments * k, d, blocks=self.segments)
        self.thought_prior = prior.to(emission.prior().sample())

    def _first(self, prior: NormalTree) -> tuple[TorchDistribution, Tensor | None]:
        return _standard(prior), None


class SessionThoughtModel(_Documents):
    """A session and its turns: what turns share reaches them through the session's thoughts alone.

        z_session      ~ N(0, I)                                            (K, D)
        z_s | z_session ~ N(A z_session, diag(scale^2))     s = 1..S         (K, D) each
        x_s | z_s      ~ emission                                           (T,)  each

    The session's thoughts are the first K of a row's, its turns' those that follow (after Friedman
    et al. 2023, arXiv 2305.07961, whose simulator is conditioned on both levels).

    Args:
        emission: Scores one turn given its thoughts (K, D); x of one axis. Its own prior is not
            used.
        turns: S; every session is x (B, S * T), padded and masked where it is shorter. A covariate
            (B, S * C, ...) is read as C entries for each turn.

    Raises:
        InputError: if the emission is no model or its own prior learns, or `turns` is below 1.
    """

    def __init__(self, emission: LatentModel, turns: int) -> None:
        super().__init__(emission, turns)
        k, d = emission.thought_shape
        blocks = self.segments + 1
        prior = HierarchicalPrior(blocks * k, d, blocks=blocks)
        self.thought_prior = prior.to(emission.prior().sample())

    def session_thoughts(self, z: Tensor) -> Tensor:
        """Those of the session, (..., (1 + S) K, D) to (..., K, D)."""
        return z[..., : self.emission.thought_shape[0], :]

    def _blocks(self) -> Iterator[int]:
        turns: Any = pyro.plate("turns", self.segments)
        return iter(turns)

    def _first(self, prior: NormalTree) -> tuple[TorchDistribution, Tensor | None]:
        session = pyro.sample(f"{SITE_Z}_session", _standard(prior))
        return prior.step(session), session
