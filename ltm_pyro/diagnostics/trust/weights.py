"""What the importance weights w = p(x, z) / q(z) of q's own draws say."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.estimates import khat_threshold, log_mean
from ltm_pyro.diagnostics.psis import pareto_khat
from ltm_pyro.diagnostics.trust.diagnosis import Court, Flag, column
from ltm_pyro.diagnostics.trust.draws import Draws
from ltm_pyro.diagnostics.trust.score import Columns, Moments, moment_flags

LEAST_EFFECTIVE = 100
"""Effective draws below which weighted moments are not used."""

GAP = 0.1
"""Tolerance for the ELBO's distance from the importance-weighted bound, nats per sequence."""


def weight_flags(draws: Draws, court: Court, shape: tuple[int, int]) -> tuple[list[Flag], Columns]:
    """Tail of the weights, gap between the bounds, and q's moments against the weighted ones."""
    log_w = draws.log_joint - draws.log_q
    S = len(log_w)
    khat = pareto_khat(log_w.cpu().numpy())
    limit = khat_threshold(S)
    weight = torch.softmax(log_w, 0)
    bound = log_mean(log_w)
    iw, iw_error = bound.value.cpu().numpy(), bound.error.cpu().numpy()
    relative = S * weight - 1.0
    gap = iw - log_w.mean(0).cpu().numpy()
    gap_error = standard_error(relative - log_w).cpu().numpy()
    flags = []
    heavy = khat > limit  # what is not judged is not flagged
    if heavy.any():
        order = sorted(np.flatnonzero(heavy), key=lambda i: -np.nan_to_num(khat[i], nan=np.inf))
        flags.append(
            Flag(
                "weights", "tails", tuple(court.ids[order].tolist()),
                f"k-hat of sequence {court.ids[order[0]]} is {khat[order[0]]:.2f}, above "
                f"{limit:.2f} (the limit at S = {S}): the posterior has mass where q has next to "
                "none (too narrow, off centre, thin tails; in many dimensions also far too "
                "wide); do not reweight its draws, nor trust its IW bound to be tight",
            )
        )  # fmt: skip
    if found := court.judge_above(gap[:, None], gap_error[:, None], GAP, S - 1):
        flags.append(
            Flag(
                "weights", "gap", found.sequences,
                f"KL(q || posterior) is at least {found.low:.2f} nats "
                f"({found.whose}): the ELBO falls that much short; use the importance-weighted "
                "bound, more fast steps or a richer family",
            )
        )  # fmt: skip
    effective = bound.ess.cpu().numpy()
    usable = ~heavy & (effective >= LEAST_EFFECTIVE)
    flags += moment_flags("weights", _weighted_moments(draws, weight, usable), court, shape)
    return flags, {
        "khat": column(khat, "1"),
        "effective_share": column(effective / S, "1"),
        "elbo": column(draws.elbo.cpu().numpy(), "nats"),
        "iw_bound": column(iw, "nats"),
        "iw_bound_se": column(iw_error, "nats"),
        "gap": column(gap, "nats"),
        "gap_se": column(gap_error, "nats"),
    }


def _weighted_moments(draws: Draws, weight: Tensor, usable: np.ndarray) -> Moments:
    """Mean and variance under the weights against q's own, from the same draws.

    Standard errors are those of the difference: for equal weights it is 0, and so is its error.
    """
    u, S = draws.u, len(draws.u)
    w = weight[..., None]
    mean = (w * u).sum(0)
    variance = (w * (u - mean).square()).sum(0)
    own = u.square().mean(0)
    ratio = own / variance.clamp_min(1e-12)
    shift_parts = S * w * (u - mean) - u
    ratio_parts = ratio * (
        (u.square() - own) / own.clamp_min(1e-12)
        - S * w * ((u - mean).square() - variance) / variance.clamp_min(1e-12)
    )
    root = math.sqrt(S)
    unknown = torch.as_tensor(~usable, device=u.device)[:, None] | draws.frozen

    def plain(value: Tensor) -> np.ndarray:
        out: np.ndarray = value.masked_fill(unknown, torch.nan).cpu().numpy()
        return out

    return Moments(
        (plain(mean), plain(shift_parts.std(0) / root)),
        (plain(ratio - 1.0), plain(ratio_parts.std(0) / root)),
        None,
        df=LEAST_EFFECTIVE - 1,
    )
