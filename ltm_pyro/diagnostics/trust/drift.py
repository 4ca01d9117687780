"""Do draws of q stay where they are when steps towards the posterior are taken from them?

Metropolis-adjusted steps leave p(z | x) as it is. So if q is the posterior, draws after the steps
are as draws before; wherever they went instead, q was not. Draw by draw the two belong together,
which takes out most of the noise.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.estimates import Columns, Values, as_array, columns
from ltm_pyro.diagnostics.trust.diagnosis import Bonferroni, Flag
from ltm_pyro.diagnostics.trust.draws import Draws, Joint, walk
from ltm_pyro.diagnostics.trust.score import MOST_DIMENSIONS, moment_flags, moments_against
from ltm_pyro.inference.posterior import Posterior

JOINT = 0.25
"""Tolerance for the change of log p(x, z), nats."""

RARE, LEAST_RARE = 0.005, 5
"""The tail is where log q is below that of all but this share of q's draws, and of all but so many.
If q is right, as many draws are there after the steps; twice as many are tolerated."""


def drift_flags(
    target: Joint, post: Posterior, draws: Draws, steps: int, rule: Bonferroni
) -> tuple[list[Flag], Columns]:
    """Takes the steps and says what changed."""
    state, rates = walk(target, draws, steps)
    after = (state.z.double() - draws.centre) / draws.scale
    S, _, M = after.shape
    correlation = (
        _correlations(draws.u, after - after.mean(0)) if 1 < M <= MOST_DIMENSIONS else None
    )
    equal = after.new_full((S, 1, 1), 1 / S)
    # Where q does not vary it has no units to measure by; that is a flag of its own.
    moments = moments_against(draws.u, after, equal, draws.frozen, correlation, df=S - 1)
    flags = moment_flags("drift", moments, rule)
    change = state.terms[0] - draws.log_joint
    rise, rise_error = change.mean(0), standard_error(change)
    if found := rule.test(rise, rise_error, JOINT, S - 1):
        verb, problem, why = (
            ("rises", "implausible draws", "q is too wide, off centre, or ignores correlations")
            if found.effect > 0
            else ("falls", "too typical draws", "q is too narrow or keeps to the mode")
        )
        sentence = (
            f"log p(x, z) of q's draws {verb} by {found.size[0]:.2f} to {found.size[1]:.2f} nats "
            f"in {steps} steps towards the posterior ({found.whose}): {why}; the shift, scale and "
            "correlation flags say which"
        )
        flags.append(Flag("drift", problem, found.sequences, sentence))
    share, share_error, expected = _share_in_tail(post, draws, state.z.unflatten(-1, rule.shape))
    if found := rule.test_above(share - expected, share_error, expected, S - 1):
        low, high = found.interval
        sentence = (
            f"{low + expected:.1%} to {high + expected:.1%} of the draws went where q has "
            f"{expected:.1%} of its mass ({found.whose}): the posterior reaches where q hardly "
            "does; if no shift or scale explains it, q's tails are cut: use a family with heavier "
            "ones (mixture, flow)"
        )
        flags.append(Flag("drift", "tails", found.sequences, sentence))
    return flags, {
        **columns("sequence", "nats", drift_log_joint=rise, drift_log_joint_se=rise_error),
        **columns("sequence", "1", drift_in_tail=share, drift_acceptance=rates),
    }


def _correlations(before: Tensor, after: Tensor) -> tuple[Values, Values]:
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
    return as_array(torch.stack(changes)), as_array(torch.stack(errors))


def _share_in_tail(post: Posterior, draws: Draws, after: Tensor) -> tuple[Values, Values, float]:
    """Share of the draws that ended in q's tail (B,), its error, and what is expected of it."""
    with torch.no_grad():
        log_q = post.log_prob(after).double()
    S = len(after)
    rare = max(LEAST_RARE, round(RARE * S))
    edge = draws.log_q.kthvalue(rare, dim=0).values
    expected = rare / (S + 1)
    # Not a number is a place where q is not defined: beyond its tail.
    share = as_array((~(log_q >= edge)).double().mean(0))
    # The edge comes from as many draws as are counted, so it brings about the same error again.
    error = np.sqrt((expected + np.maximum(expected, share * (1 - share))) / S)
    return share, error, expected
