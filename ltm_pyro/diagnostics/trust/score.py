"""What the gradient of log p(x, z) says at q's own draws.

If q is the posterior, then for its mean m (Stein's identities; Gorham & Mackey 2015, section 2)

    E_q[grad log p(x, z)] = 0        and        E_q[(z - m) grad log p(x, z)^T] = -I.

The regression of the gradient on z over q's draws says by how much q would have to change:
grad = g - P (z - m) names a posterior of precision P and mean m + P^-1 g. Where p(z | x) is normal
that is the posterior itself, whatever q is. Where it is not, the identities still hold for the
right q; but they also hold for the best normal q, however heavy the posterior's tails are, so tails
have to be asked about in other ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.diagnostics.estimates import Columns, Values, as_array, columns, jackknife
from ltm_pyro.diagnostics.trust.diagnosis import Bonferroni, Finding, Flag
from ltm_pyro.diagnostics.trust.draws import Draws

GROUPS = 40
"""Groups of draws for the jackknife, which gives the errors."""

MOST_DIMENSIONS = 64
"""Above it, and below `DRAWS_PER_DIMENSION` draws for each, dimensions are looked at one by one."""

DRAWS_PER_DIMENSION = 10

SHIFT, VARIANCE, CORRELATION = 0.15, 0.2, 0.2
"""Tolerances: shift in q's scales, share of the variance (a scale off by a tenth), correlation."""

FROZEN = 0.05
"""A scale below this share of the posterior's is called frozen."""


@dataclass(frozen=True)
class Moments:
    """What q's draws imply about the posterior, relative to q. Each with its standard error.

    Attributes:
        shift: (B, M) posterior mean minus q's, in q's scales.
        variance: (B, M) q's variance over the posterior's, minus 1.
        correlation: (B, pairs) posterior's minus q's; `None` where dimensions were looked at alone.
    """

    shift: tuple[Values, Values]
    variance: tuple[Values, Values]
    correlation: tuple[Values, Values] | None
    df: float


def moments_against(
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    unknown: Tensor,
    correlation: tuple[Values, Values] | None,
    df: float,
) -> Moments:
    """Mean and variance of weighted draws against those of q's own, pair by pair.

    Standard errors are those of the difference: where the two agree draw by draw it is 0, and so is
    its error. `before` and `after` are (S, B, M) in q's own units, mean 0 before; `weight`
    (S, B, 1) sums to 1 over draws; what is `unknown` (B, M) is not judged.
    """
    S = len(before)
    mean = (weight * after).sum(0)
    centred = after - mean
    own, variance = before.square().mean(0), (weight * centred.square()).sum(0)
    ratio = own / variance.clamp_min(1e-12)
    shifts = S * weight * centred - before
    ratios = ratio * (
        (before.square() - own) / own.clamp_min(1e-12)
        - S * weight * (centred.square() - variance) / variance.clamp_min(1e-12)
    )
    known = [
        as_array(value.masked_fill(unknown, torch.nan))
        for value in (mean, shifts.std(0) / math.sqrt(S), ratio - 1.0, ratios.std(0) / math.sqrt(S))
    ]
    return Moments((known[0], known[1]), (known[2], known[3]), correlation, df)


def score_moments(draws: Draws) -> Moments:
    """The moments of the posterior that the gradients imply."""
    S, _, M = draws.u.shape
    joint = 1 < M <= MOST_DIMENSIONS and DRAWS_PER_DIMENSION * M <= S
    groups = max(2, min(GROUPS, S // 5))
    edges = [len(part) for part in torch.arange(S).chunk(groups)]
    parts = [
        _sums(u, h, joint) for u, h in zip(draws.u.split(edges), draws.h.split(edges), strict=True)
    ]
    stacked = [torch.stack(some) for some in zip(*parts, strict=True)]
    totals = [some.sum(0) for some in stacked]
    left_out = [
        _implied(*(t - some[g] for t, some in zip(totals, stacked, strict=True)), joint=joint)
        for g in range(len(edges))
    ]
    answers = []
    for value, *without in zip(_implied(*totals, joint=joint), *left_out, strict=True):
        answers.append((as_array(value), as_array(jackknife(torch.stack(without)))))
    return Moments(
        answers[0], answers[1], answers[2] if len(answers) > 2 else None, df=len(edges) - 1
    )


def _sums(u: Tensor, h: Tensor, joint: bool) -> tuple[Tensor, ...]:
    """Count and sums of u, h, u u^T, u h^T over draws: all that the estimates need."""
    count = u.new_tensor(len(u))
    if joint:
        uu, uh = torch.einsum("sbi,sbj->bij", u, u), torch.einsum("sbi,sbj->bij", u, h)
    else:
        uu, uh = (u * u).sum(0), (u * h).sum(0)
    return count, u.sum(0), h.sum(0), uu, uh


def _implied(
    count: Tensor, su: Tensor, sh: Tensor, suu: Tensor, suh: Tensor, *, joint: bool
) -> list[Tensor]:
    """Shift, q's variance over the posterior's minus 1, and differences of correlations."""
    mean_u, mean_h = su / count, sh / count
    if not joint:
        variance = suu / count - mean_u**2
        identity = -(suh / count - mean_u * mean_h)  # E[(z - m) grad] = -1 in each dimension
        # Where log p is not concave along a dimension the identity is all that can be said.
        precision = identity / variance.clamp_min(1e-12)
        shift = mean_h / torch.where(precision > 0.05, precision, torch.ones_like(precision))
        return [shift, identity - 1.0]
    covariance = suu / count - mean_u[..., :, None] * mean_u[..., None, :]
    cross = -(suh / count - mean_u[..., :, None] * mean_h[..., None, :])
    eye = torch.eye(su.shape[-1], dtype=su.dtype, device=su.device)
    # A dimension in which q does not vary says nothing; this keeps it from spoiling the others.
    stuck = covariance.diagonal(dim1=-2, dim2=-1) <= 0
    covariance = covariance + torch.diag_embed(stuck.to(eye))
    cross = cross + torch.diag_embed(stuck.to(eye))
    precision = torch.linalg.solve(covariance, cross)
    precision = 0.5 * (precision + precision.mT)
    values, vectors = torch.linalg.eigh(precision)
    concave = values[..., :1] > 0
    inverse = (vectors / torch.where(concave, values, torch.ones_like(values))[..., None, :]) @ (
        vectors.mT
    )
    posterior = torch.where(concave[..., None], inverse, eye)
    shift = (posterior @ mean_h[..., None]).squeeze(-1)
    own = covariance.diagonal(dim1=-2, dim2=-1)
    identity = cross.diagonal(dim1=-2, dim2=-1)
    implied = posterior.diagonal(dim1=-2, dim2=-1)
    variance = torch.where(concave, own / implied, identity) - 1.0
    upper = torch.triu_indices(len(eye), len(eye), 1, device=eye.device)
    difference = torch.where(
        concave[..., None],
        _correlation(posterior) - _correlation(covariance),
        torch.zeros_like(eye),
    )
    return [shift, variance, difference[..., upper[0], upper[1]]]


def _correlation(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    return covariance / (scale[..., :, None] * scale[..., None, :])


def score_flags(draws: Draws, rule: Bonferroni) -> tuple[list[Flag], Columns]:
    """What the implied moments say against q."""
    moments = score_moments(draws)
    flags = moment_flags("score", moments, rule)
    stuck = draws.frozen.cpu().numpy()
    if stuck.any():
        ids = rule.ids[stuck.any(1)].tolist()
        name = rule.dimension(np.argmax(stuck[stuck.any(1)][0]))
        sentence = (
            f"q does not vary at all in {name} of sequence {ids[0]}: a dimension was never fitted, "
            "or its scale underflowed; fit it again from the prior's scale"
        )
        flags.append(Flag("score", "frozen", tuple(ids), sentence))
    shift, variance = moments.shift[0], moments.variance[0]
    worst = np.take_along_axis(shift, np.abs(shift).argmax(1)[:, None], 1)[:, 0]
    ratio = np.sqrt(np.maximum(variance + 1.0, 0.0))
    scales = {"score_scale_least": ratio.min(1), "score_scale_most": ratio.max(1)}
    return flags, {
        **columns("sequence", "scales of q", score_shift=worst),
        **columns("sequence", "posterior scales", **scales),
    }


PART_OF_THE_WAY = (
    " (against q's draws after a few steps towards the posterior, itself further from q as a rule)"
)


def moment_flags(source: str, moments: Moments, rule: Bonferroni) -> list[Flag]:
    """Flags for shifts, scales and correlations that are off."""
    flags = []
    if found := rule.test(*moments.shift, SHIFT, moments.df):
        side = "below" if found.effect > 0 else "above"
        low, high = found.size
        by = f"at least {low:.2f}" if source == "weights" else f"{low:.2f} to {high:.2f}"
        sentence = (
            f"q's mean of {rule.dimension(found.column)} lies {by} of its scales "
            f"{side} {_what(source)} ({found.whose}): the fit has not converged, or q belongs "
            "to something else; run more fast steps and check the order of the sequences"
        )
        flags.append(Flag(source, "shift", found.sequences, sentence))
    ratio, error = moments.variance
    if found := rule.test_above(-ratio, error, VARIANCE, moments.df):
        flags.append(_scale_flag(source, replace(found, effect=-found.effect), rule))
    if found := rule.test_above(ratio, error, VARIANCE, moments.df):
        flags.append(_scale_flag(source, found, rule))
    if moments.correlation is not None and (
        found := rule.test(*moments.correlation, CORRELATION, moments.df)
    ):
        upper = np.triu_indices(math.prod(rule.shape), 1)
        pair = " and ".join(rule.dimension(index[found.column]) for index in upper)
        low, high = found.interval
        sentence = (
            f"{_what(source)} correlation of {pair} less q's is {low:+.2f} to {high:+.2f} "
            f"({found.whose}): q ignores or misstates a "
            "correlation; use a family that has one (low_rank, full_rank, flow)"
        )
        flags.append(Flag(source, "correlation", found.sequences, sentence))
    if source == "drift":
        flags = [replace(flag, sentence=flag.sentence + PART_OF_THE_WAY) for flag in flags]
    return flags


def _scale_flag(source: str, found: Finding, rule: Bonferroni) -> Flag:
    """What is wrong with a scale, from q's variance over the posterior's, less 1.

    Weights give a limit. They are those of q's own draws: of what lies beyond them they know
    nothing, so that they make q look nearer to the posterior than it is.
    """
    low, high = (math.sqrt(max(edge + 1.0, 0.0)) for edge in found.interval)
    wide = found.effect > 0
    if wide:
        problem, remedy = "wide", "fit longer, from a smaller starting variance"
    elif high < FROZEN:
        problem, remedy = "frozen", "q gives this dimension no freedom: fit it again from the prior"
    else:
        problem, remedy = (
            "narrow",
            "intervals from q are too short; fit longer or in a richer family",
        )
    ratio = f"{low:.2f} to {high:.2f}"
    if source == "weights":
        ratio = f"at least {low:.2f}" if wide else f"at most {high:.2f}"
    sentence = (
        f"q's scale of {rule.dimension(found.column)} is {ratio} times {_what(source)} "
        f"({found.whose}): {'too large' if wide else 'too small'}; {remedy}"
    )
    return Flag(source, problem, found.sequences, sentence)


def _what(source: str) -> str:
    """Whose moments q's are held against."""
    return "the moved draws'" if source == "drift" else "the posterior's"
