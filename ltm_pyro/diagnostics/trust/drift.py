"""Do draws of q stay where they are when steps towards the posterior are taken from them?

Metropolis-adjusted steps leave p(z | x) as it is. So if q is the posterior, draws after the steps
are as draws before; wherever they went instead, q was not. Draw by draw the two belong together,
which takes out most of the noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.trust.diagnosis import Court, Flag, Floats, column
from ltm_pyro.diagnostics.trust.draws import Draws, Joint, walk
from ltm_pyro.diagnostics.trust.score import MOST_DIMENSIONS, Columns, Moments, moment_flags
from ltm_pyro.inference.posterior import Posterior

JOINT = 0.25
"""Tolerance for the change of log p(x, z), nats."""

RARE, LEAST_RARE = 0.005, 5
"""The tail is where log q is below that of all but this share of q's draws, and of all but so many.
If q is right, as many draws are there after the steps; twice as many are tolerated."""


def drift_flags(
    target: Joint,
    post: Posterior,
    draws: Draws,
    steps: int,
    court: Court,
    shape: tuple[int, int],
) -> tuple[list[Flag], Columns]:
    """Takes the steps and says what changed."""
    state, rates = walk(target, draws, steps)
    flags = moment_flags("drift", _moments(draws, state.z.double()), court, shape)
    S = len(state.z)
    change = state.terms[0] - draws.log_joint
    rise = change.mean(0).cpu().numpy()
    rise_error = standard_error(change).cpu().numpy()
    if found := court.judge(rise[:, None], rise_error[:, None], JOINT, S - 1):
        problem, why = (
            ("implausible draws", "q is too wide, off centre, or ignores correlations")
            if found.effect > 0
            else ("too typical draws", "q is too narrow or keeps to the mode")
        )
        flags.append(
            Flag(
                "drift", problem, found.sequences,
                f"log p(x, z) of q's draws {'rises' if found.effect > 0 else 'falls'} by "
                f"{found.size[0]:.2f} to {found.size[1]:.2f} nats in {steps} steps towards the "
                f"posterior ({found.whose}): {why}; the shift, scale and correlation flags say "
                "which",
            )
        )  # fmt: skip
    share, share_error, expected = _share_in_tail(post, draws, state.z.unflatten(-1, shape))
    excess = (share - expected)[:, None]
    if found := court.judge_above(excess, share_error[:, None], expected, S - 1):
        flags.append(
            Flag(
                "drift", "tails", found.sequences,
                f"{found.low + expected:.1%} to {found.high + expected:.1%} of the draws went "
                f"where q has {expected:.1%} of its mass ({found.whose}): the posterior reaches "
                "where q hardly does; if no shift or scale explains it, q's tails are cut: use a "
                "family with heavier ones (mixture, flow)",
            )
        )  # fmt: skip
    return flags, {
        "drift_log_joint": column(rise, "nats"),
        "drift_log_joint_se": column(rise_error, "nats"),
        "drift_in_tail": column(share, "1"),
        "drift_acceptance": column(rates.cpu().numpy(), "1"),
    }


def _moments(draws: Draws, after: Tensor) -> Moments:
    """How far mean, variance and correlations have moved, in q's own units."""
    before = draws.u
    u = (after - draws.centre) / draws.scale
    S, _, M = u.shape
    root = math.sqrt(S)
    shift = u - before
    mean = u.mean(0)
    squares, own_squares = (u - mean).square(), before.square()
    variance, own = squares.mean(0), own_squares.mean(0)
    ratio = own / variance.clamp_min(1e-12)
    parts = ratio * (own_squares / own.clamp_min(1e-12) - squares / variance.clamp_min(1e-12))
    correlation = _correlations(before, u - mean) if 1 < M <= MOST_DIMENSIONS else None
    # Where q does not vary it has no units to measure by; that is a flag of its own.
    unknown = draws.frozen

    def plain(value: Tensor) -> Floats:
        out: Floats = value.masked_fill(unknown, torch.nan).cpu().numpy()
        return out

    return Moments(
        (plain(shift.mean(0)), plain(shift.std(0) / root)),
        (plain(ratio - 1.0), plain(parts.std(0) / root)),
        correlation,
        df=S - 1,
    )


def _correlations(before: Tensor, after: Tensor) -> tuple[Floats, Floats]:
    """Change of each pair's correlation, with its error, (B, pairs) each."""
    upper = torch.triu_indices(before.shape[-1], before.shape[-1], 1)
    changes, errors = [], []
    for b in range(before.shape[1]):  # one at a time: a draw has as many products as pairs
        products, sizes = [], []
        for u in (before[:, b], after[:, b]):
            unit = u / u.square().mean(0).sqrt().clamp_min(1e-12)
            products.append(unit[:, upper[0]] * unit[:, upper[1]])
            # A correlation also depends on the two scales, which are estimated too.
            sizes.append(0.5 * (unit[:, upper[0]].square() + unit[:, upper[1]].square()))
        rho = [product.mean(0) for product in products]
        parts = (products[1] - rho[1] * sizes[1]) - (products[0] - rho[0] * sizes[0])
        changes.append(rho[1] - rho[0])
        errors.append(standard_error(parts))
    return torch.stack(changes).cpu().numpy(), torch.stack(errors).cpu().numpy()


def _share_in_tail(post: Posterior, draws: Draws, after: Tensor) -> tuple[Floats, Floats, float]:
    """Share of the draws that ended in q's tail (B,), its error, and what is expected of it."""
    with torch.no_grad():
        log_q = post.log_prob(after).double()
    S = len(after)
    rare = max(LEAST_RARE, round(RARE * S))
    edge = draws.log_q.kthvalue(rare, dim=0).values
    expected = rare / (S + 1)
    # Not a number is a place where q is not defined: beyond its tail.
    share = (~(log_q >= edge)).double().mean(0).cpu().numpy()
    # The edge comes from as many draws as are counted, so it brings about the same error again.
    error = np.sqrt((expected + np.maximum(expected, share * (1 - share))) / S)
    return share, error, expected
