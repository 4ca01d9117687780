"""Evidence that q's own draws cannot give: from the prior, and from the other sequences."""

from __future__ import annotations

import math

import numpy as np
import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.estimates import Columns, Values, columns
from ltm_pyro.diagnostics.evidence import annealed_bound
from ltm_pyro.diagnostics.trust.diagnosis import Bonferroni, Flag
from ltm_pyro.diagnostics.trust.draws import Draws, Joint
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
    iw: tuple[Values, Values],
    rule: Bonferroni,
    chains: int,
    rungs: int,
    seed: int,
) -> tuple[list[Flag], Columns]:
    """Whether annealing from the prior finds more of p(x) than q's importance weights do.

    Both are lower bounds of log p(x) up to their errors. Draws of q say nothing of a mode that q
    does not cover, however good their weights look; annealing starts everywhere that the prior is.
    `iw` is q's importance-weighted bound and its standard error, (B,) each.
    """
    bound = annealed_bound(
        model, batch, chains=chains, rungs=rungs, max_leapfrog=LEAPFROG, seed=seed
    )
    lower, error = bound["lower"].values, bound["lower_se"].values
    sure, missed = error <= RELIABLE, lower - iw[0]
    found = rule.test_above(
        np.where(sure, missed, np.nan), np.hypot(error, iw[1]), MISSED, chains - 1
    )
    if found is None:
        # Where one chain carries the estimate its error means nothing, but E[exp lower] = p(x)
        # still holds, and by Markov's inequality such an excess has a chance of exp(-excess).
        chance = math.log(len(batch) / rule.level)
        wild = np.where(sure, np.nan, missed)
        found = rule.test_above(wild, np.zeros_like(wild), chance, chains - 1)
    flags = []
    if found is not None:
        low, high = found.interval
        sentence = (
            f"annealing from the prior finds log p(x) {low:.2f} to {high:.2f} nats above q's "
            f"importance-weighted bound ({found.whose}): q's draws miss about "
            f"{-math.expm1(-found.effect):.0%} of the posterior: another mode where k-hat is "
            "small, else what the other flags name; fit from several starts, or use a mixture"
        )
        flags.append(Flag("annealing", "missed mass", found.sequences, sentence))
    return flags, columns("sequence", "nats", annealed_bound=lower, annealed_bound_se=error)


def row_flags(target: Joint, draws: Draws, rule: Bonferroni) -> tuple[list[Flag], Columns]:
    """Whether another sequence's posterior has a higher ELBO here than the sequence's own.

    It cannot if q is right: ELBO_i(q_i) - ELBO_i(q_j) = KL(q_j || p(z | x_i)) then.
    """
    start = draws.state.z[:ROW_DRAWS].unflatten(-1, rule.shape)
    log_q = draws.log_q[:ROW_DRAWS]
    own = target.value(start) - log_q
    B = start.shape[1]
    offsets = [k for k in range(1, B) if min(k, B - k) <= MOST_ROWS // 2]
    gains = [target.value(start.roll(k, 1)) - log_q.roll(k, 1) - own for k in offsets]
    advantage = torch.stack([gain.mean(0) for gain in gains], 1)
    error = torch.stack([standard_error(gain) for gain in gains], 1)
    flags = []
    if found := rule.test_above(advantage, error, BETTER, len(start) - 1):
        where = rule.ids.tolist().index(found.worst) if found.worst >= 0 else 0
        other = int(rule.ids[(where - offsets[found.column]) % B])
        low, high = found.interval
        sentence = (
            f"the posterior of sequence {other} explains sequence {rule.ids[where]} better than "
            f"its own does, by {low:.1f} to {high:.1f} nats: posteriors and sequences are out of "
            "order; check how ids were matched"
        )
        flags.append(Flag("rows", "other sequence", found.sequences, sentence))
    return flags, columns("sequence", "nats", best_other_advantage=advantage.amax(1))
