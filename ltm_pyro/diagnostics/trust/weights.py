"""What the importance weights w = p(x, z) / q(z) of q's own draws say."""

from __future__ import annotations

import numpy as np
import torch

from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.estimates import Columns, columns, khat_threshold, log_mean
from ltm_pyro.diagnostics.psis import pareto_khat
from ltm_pyro.diagnostics.trust.diagnosis import Bonferroni, Flag
from ltm_pyro.diagnostics.trust.draws import Draws
from ltm_pyro.diagnostics.trust.score import moment_flags, moments_against

LEAST_EFFECTIVE = 100
"""Effective draws below which weighted moments are not used."""

GAP = 0.1
"""Tolerance for the ELBO's distance from the importance-weighted bound, nats per sequence."""


def weight_flags(draws: Draws, rule: Bonferroni) -> tuple[list[Flag], Columns]:
    """Tail of the weights, gap between the bounds, and q's moments against the weighted ones."""
    log_w = draws.log_joint - draws.log_q
    S = len(log_w)
    khat = pareto_khat(log_w.cpu().numpy())
    weight, bound = torch.softmax(log_w, 0), log_mean(log_w)
    gap = bound.value - log_w.mean(0)
    gap_error = standard_error(S * weight - 1.0 - log_w)
    heavy = khat > khat_threshold(S)  # what is not judged is not flagged
    flags = [_tail_flag(khat, heavy, rule, S)] if heavy.any() else []
    if found := rule.test_above(gap, gap_error, GAP, S - 1):
        sentence = (
            f"KL(q || posterior) is at least {found.interval[0]:.2f} nats ({found.whose}): the "
            "ELBO falls that much short; use the importance-weighted bound, more fast steps or a "
            "richer family"
        )
        flags.append(Flag("weights", "gap", found.sequences, sentence))
    usable = torch.as_tensor(~heavy, device=log_w.device) & (bound.ess >= LEAST_EFFECTIVE)
    unknown = ~usable[:, None] | draws.frozen
    moments = moments_against(
        draws.u, draws.u, weight[..., None], unknown, None, df=LEAST_EFFECTIVE - 1
    )
    flags += moment_flags("weights", moments, rule)
    nats = {"elbo": draws.elbo, "iw_bound": bound.value, "iw_bound_se": bound.error}
    return flags, {
        **columns("sequence", "1", khat=khat, effective_share=bound.ess / S),
        **columns("sequence", "nats", **nats, gap=gap, gap_se=gap_error),
    }


def _tail_flag(khat: np.ndarray, heavy: np.ndarray, rule: Bonferroni, draws: int) -> Flag:
    order = sorted(np.flatnonzero(heavy), key=lambda i: -khat[i])
    sentence = (
        f"k-hat of sequence {rule.ids[order[0]]} is {khat[order[0]]:.2f}, above "
        f"{khat_threshold(draws):.2f} (the limit at S = {draws}): the posterior has mass where q "
        "has next to none (too narrow, off centre, thin tails; in many dimensions also far too "
        "wide); do not reweight its draws, nor trust its IW bound to be tight"
    )
    return Flag("weights", "tails", tuple(rule.ids[order].tolist()), sentence)
