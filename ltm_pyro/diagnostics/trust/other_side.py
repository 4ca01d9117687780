"""Evidence that q's own draws cannot give: from the prior, and from the other sequences."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.evidence import annealed_bound
from ltm_pyro.diagnostics.trust.diagnosis import Court, Flag, column
from ltm_pyro.diagnostics.trust.draws import Joint
from ltm_pyro.diagnostics.trust.score import Columns
from ltm_pyro.models.base import LatentModel

MISSED = 0.15
"""Tolerance for mass found elsewhere, nats: q must have missed a seventh of the posterior."""

RELIABLE = 0.3
"""Largest relative standard error of an annealed estimate that is taken at its word."""

LEAPFROG = 3
"""Gradients per annealing transition at most: enough to move, at the price of the other parts."""

BETTER = 1.0
"""Nats by which another sequence's posterior must do better than a sequence's own."""

ROW_DRAWS, MOST_ROWS = 16, 32
"""Draws and other sequences that each sequence is compared on."""


def annealing_flags(
    model: LatentModel,
    batch: Batch,
    iw: tuple[np.ndarray, np.ndarray],
    court: Court,
    chains: int,
    rungs: int,
    seed: int,
) -> tuple[list[Flag], Columns]:
    """Whether annealing from the prior finds more of p(x) than q's importance weights do.

    Both are lower bounds of log p(x) up to their errors. Draws of q say nothing of a mode that q
    does not cover, however good their weights look; annealing starts everywhere that the prior is.

    Args:
        model: Prior and likelihood.
        batch: The sequences.
        iw: Importance-weighted bound from q and its standard error, (B,) each.
        court: The judge.
        chains: Per sequence.
        rungs: Temperatures between prior and posterior.
        seed: Of the annealing.
    """
    found = annealed_bound(
        model, batch, chains=chains, rungs=rungs, max_leapfrog=LEAPFROG, seed=seed
    )
    lower, error = found["lower"].values, found["lower_se"].values
    sure = error <= RELIABLE
    missed = lower - iw[0]
    verdict = court.judge_above(
        np.where(sure, missed, np.nan)[:, None],
        np.hypot(error, iw[1])[:, None],
        MISSED,
        chains - 1,
    )
    if verdict is None:
        # Where one chain carries the estimate its error means nothing, but E[exp lower] = p(x)
        # still holds, and by Markov's inequality such an excess has a chance of exp(-excess).
        chance = math.log(len(batch) / court.level)
        wild = np.where(sure, np.nan, missed)
        verdict = court.judge_above(wild[:, None], np.zeros_like(wild)[:, None], chance, chains - 1)
    flags = []
    if verdict is not None:
        share = -math.expm1(-verdict.effect)
        flags.append(
            Flag(
                "annealing", "missed mass", verdict.sequences,
                f"annealing from the prior finds log p(x) {verdict.low:.2f} to "
                f"{verdict.high:.2f} nats above q's importance-weighted bound ({verdict.whose}): "
                f"q's draws miss about {share:.0%} of the posterior: another mode where k-hat is "
                "small, else what the other flags name; fit from several starts, or use a mixture",
            )
        )  # fmt: skip
    return flags, {
        "annealed_bound": column(lower, "nats"),
        "annealed_bound_se": column(error, "nats"),
    }


def row_flags(
    target: Joint, start: Tensor, log_q: Tensor, court: Court
) -> tuple[list[Flag], Columns]:
    """Whether another sequence's posterior has a higher ELBO here than the sequence's own.

    It cannot if q is right: ELBO_i(q_i) - ELBO_i(q_j) = KL(q_j || p(z | x_i)) then. `start`
    (S, B, K, D) are draws of q and `log_q` (S, B) their densities.
    """
    start, log_q = start[:ROW_DRAWS], log_q[:ROW_DRAWS]
    own = target.value(start) - log_q
    B = start.shape[1]
    offsets = [k for k in range(1, B) if min(k, B - k) <= MOST_ROWS // 2]
    advantage = torch.full((B, len(offsets)), -math.inf, dtype=own.dtype, device=own.device)
    error = torch.zeros_like(advantage)
    for place, k in enumerate(offsets):
        gain = target.value(start.roll(k, 1)) - log_q.roll(k, 1) - own
        advantage[:, place] = gain.mean(0)
        error[:, place] = standard_error(gain)
    flags = []
    found = court.judge_above(advantage.cpu().numpy(), error.cpu().numpy(), BETTER, len(start) - 1)
    if found is not None:
        where = court.ids.tolist().index(found.worst) if found.worst >= 0 else 0
        other = int(court.ids[(where - offsets[found.column]) % B])
        flags.append(
            Flag(
                "rows", "other sequence", found.sequences,
                f"the posterior of sequence {other} explains sequence {court.ids[where]} better "
                f"than its own does, by {found.low:.1f} to {found.high:.1f} nats: posteriors "
                "and sequences are out of order; check how ids were matched",
            )
        )  # fmt: skip
    best = advantage.amax(1) if offsets else torch.full((B,), math.nan)
    return flags, {"best_other_advantage": column(best.cpu().numpy(), "nats")}
