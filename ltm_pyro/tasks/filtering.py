"""Thoughts of a document as it is read: the filtering posterior, segment by segment.

    p(z_s | x_<s)  ~  N(m, P)        m = A m_{s-1},   P = A P_{s-1} A' + diag(scale^2)
    p(z_s | x_<=s) ~  q(z_s)         fitted by a guide to segment s, with N(m, P) as its prior

and q's mean and covariance are what the next segment starts from (assumed-density filtering,
Maybeck 1982, chapter 12). With `full_rank` on a linear-Gaussian emission this is the Kalman filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import ELBO
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.full_normal import is_factorised_normal
from ltm_pyro.models.priors import NormalTree, StandardNormal
from ltm_pyro.models.segmented import SegmentedThoughtModel
from ltm_pyro.random import Stream, derive_seed

LOC, SCALE = "filter.loc", "filter.scale_tril"
"""What is known of a segment's thoughts before it is read, as covariates: (B, N) and (B, N, N)."""
_MOMENT_DRAWS = 1024
CLOCK = Fast(steps=512, optimizer="adam", lr=0.1)
"""Of each segment: where a posterior leans hard, natural steps leave three times the distance."""


class Segment(LatentModel):
    """One segment in units of its prediction: z = loc + scale_tril u, u ~ N(0, I).

    Its latent is u (K, D). That has the same prior for all rows, as the contract asks, and is where
    guides start well.
    """

    def __init__(self, emission: LatentModel) -> None:
        super().__init__()
        self.emission = emission
        self.thought_prior = StandardNormal(*emission.thought_shape).to(emission.prior().sample())

    def prior(self) -> TorchDistribution:
        """p(u): event shape (K, D)."""
        prior: TorchDistribution = self.thought_prior()
        return prior

    def thoughts(self, u: Tensor, batch: Batch) -> Tensor:
        """Thoughts for u (..., B, K, D)."""
        loc, scale = batch.covariates[LOC], batch.covariates[SCALE]
        flat = loc + (scale @ u.flatten(-2)[..., None]).squeeze(-1)
        return flat.unflatten(-1, u.shape[-2:])

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        """p(x | u): as the emission's of z."""
        return self.emission.likelihood(self.thoughts(z, batch), self._own(batch))

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        """Log p(x | u) in nats, u (..., B, K, D) to (..., B)."""
        return self.emission.log_likelihood(self.thoughts(z, batch), self._own(batch))

    def check(self, batch: Batch) -> None:
        """As the emission does."""
        self.emission.check(self._own(batch))

    @staticmethod
    def _own(batch: Batch) -> Batch:
        kept = {n: v for n, v in batch.covariates.items() if n not in (LOC, SCALE)}
        return replace(batch, covariates=kept)


@dataclass(frozen=True, repr=False)
class Filtered:
    """What is known of B documents after one more segment.

    Attributes:
        posterior: q(u), in units of the prediction (`Segment`); any guide's.
        loc: (B, N) mean of z given all that was read, N = K * D of one segment.
        covariance: (B, N, N).
        elbo: (B,) in nats: bounds log p(x_s | x_<s) from below where the prediction is exact, as
            it is at the first segment, and for normal posteriors throughout.
        log_evidence: (B,) the same by importance weights from q: never below `elbo`, and above
            log p(x_s | x_<s) in expectation never.
        log_evidence_se: (B,) its Monte Carlo error.
    """

    posterior: Posterior
    loc: Tensor
    covariance: Tensor
    elbo: Tensor
    log_evidence: Tensor
    log_evidence_se: Tensor


def filter_thoughts(
    model: SegmentedThoughtModel,
    documents: Batch | Iterable[Batch],
    guide: str = "full_rank",
    fast: Fast | None = None,
    elbo: ELBO | str | None = None,
    *,
    draws: int = 64,
    seed: int = 0,
) -> Iterator[Filtered]:
    """Reads documents segment by segment; what was read is kept as one normal a document.

    Args:
        model: The chain; left as it is.
        documents: All segments (B, S * T) at once; or one batch (B, T) a segment, as many as come,
            e.g. from a generator: memory does not grow with their number.
        guide: The family that is fitted to each segment.
        fast: The fast clock of each segment; `CLOCK` by default.
        elbo: The objective, as of `DualRateSVI`; by default `stl` with 4 draws, whose gradient is
            free of noise at the exact posterior. What is handed on is all that is known of the
            segments before, so noise in it would pile up.
        draws: S, fresh ones, of each segment's score.
        seed: Of all noise.

    Yields:
        What is known after each segment.

    Raises:
        InputError: if the model is no chain, or cannot score a segment, or their rows differ.
    """
    if not isinstance(model, SegmentedThoughtModel):
        raise InputError(
            f"model is a {type(model).__name__}: filter_thoughts needs a SegmentedThoughtModel"
        )
    draws = whole_number("draws", draws, at_least=2)
    with torch.no_grad():
        prior = model.thought_prior()
    one = Segment(model.emission)
    clock = CLOCK if fast is None else fast
    objective = build_objective("stl", particles=4) if elbo is None else elbo
    known: Filtered | None = None
    for s, segment in enumerate(_segments(model, documents)):
        rows = _predicted(prior, segment.to(model.device), known)
        svi = DualRateSVI(one, guide, clock, elbo=objective, seed=derive_seed(seed, Stream.FAST, s))
        post = svi.infer(rows, progress=False)
        u = post.sample(draws, seed=derive_seed(seed, Stream.SCORE, s))
        known = _updated(one, post, rows, u)
        yield known


def _segments(model: SegmentedThoughtModel, documents: Batch | Iterable[Batch]) -> Iterable[Batch]:
    """One batch a segment; ids are the documents'."""
    if not isinstance(documents, Batch):
        return documents
    model.check(documents)
    rows, count = model.folded(documents), model.segments
    return (rows.select(torch.arange(s, len(rows), count)) for s in range(count))


def _predicted(prior: NormalTree, segment: Batch, known: Filtered | None) -> Batch:
    """The segment with what is known of its thoughts before it is read."""
    size = len(prior.log_scale)
    if known is None:
        loc = prior.log_scale.new_zeros(len(segment), size)
        scale = torch.eye(size).to(loc).expand(len(segment), -1, -1)
    elif len(known.loc) != len(segment):
        raise InputError(
            f"a segment of {len(segment)} rows after one of {len(known.loc)}: give a row for each "
            "document, its mask false where a document has ended"
        )
    else:
        loc, covariance = prior.predict(known.loc, known.covariance)
        scale = torch.linalg.cholesky(covariance)
    return replace(segment, covariates={**segment.covariates, LOC: loc, SCALE: scale})


@torch.no_grad()
def _updated(one: Segment, post: Posterior, rows: Batch, u: Tensor) -> Filtered:
    """Moments of z under the fitted q, and its score on fresh draws u (S, B, K, D)."""
    log_weight = one.log_likelihood(u, rows) + post.prior.log_prob(u) - post.log_prob(u)
    evidence = log_weight.logsumexp(0) - math.log(len(u))
    share = (log_weight - evidence).exp()
    loc, covariance = _moments(post)
    scale = rows.covariates[SCALE]
    return Filtered(
        posterior=post,
        loc=rows.covariates[LOC] + (scale @ loc[..., None]).squeeze(-1),
        covariance=scale @ covariance @ scale.mT,
        elbo=log_weight.mean(0),
        log_evidence=evidence,
        log_evidence_se=share.std(0) / math.sqrt(len(u)),
    )


def _moments(post: Posterior) -> tuple[Tensor, Tensor]:
    """Mean (B, N) and covariance (B, N, N) of u; of draws where q does not tell its own."""
    q = post.distribution
    if hasattr(q, "covariance"):
        return q.mean.flatten(1), q.covariance
    if is_factorised_normal(q):
        return q.mean.flatten(1), torch.diag_embed(q.variance.flatten(1))
    u = post.sample(_MOMENT_DRAWS).flatten(2)
    centred = u - u.mean(0)
    return u.mean(0), torch.einsum("sbi,sbj->bij", centred, centred) / (len(u) - 1)
