"""Every question that can be put to a posterior without knowing the truth, asked together."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from ltm_pyro.checks import MOST_COUNT, QUIET_SECONDS, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.estimates import Columns, provenance, sequence_coords
from ltm_pyro.diagnostics.trust.diagnosis import Bonferroni, Diagnosis, Flag
from ltm_pyro.diagnostics.trust.draws import Draws, Joint, draw
from ltm_pyro.diagnostics.trust.drift import drift_flags
from ltm_pyro.diagnostics.trust.other_side import RELIABLE, annealing_flags, row_flags
from ltm_pyro.diagnostics.trust.score import score_flags
from ltm_pyro.diagnostics.trust.weights import weight_flags
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Stream, derive_seed, seeded

FALSE_ALARM_RATE = 0.01
"""Chance that the exact posterior is flagged by anything, over all sequences and questions."""

QUESTIONS = 16
"""Questions that share it: gap, tails, rows, mass, log joint, and four moments thrice, or fewer."""

LEAST_DRAWS = 100

COPIES = 8
"""Of the draws, gradients and moments of them included, that are in memory together."""


@door
def diagnose(
    model: LatentModel,
    post: Posterior,
    batch: Batch,
    *,
    draws: int = 1000,
    steps: int = 10,
    chains: int = 32,
    rungs: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Looks for evidence that q(z_i) is not p(z_i | x_i).

    Five sources, none of which needs the truth:

    - `weights`: k-hat of p(x, z) / q(z), the gap between ELBO and importance-weighted bound, and
      q's moments against the weighted ones where k-hat allows. Blind to modes that q misses; a q
      that is too wide has a small k-hat.
    - `score`: what grad log p(x, z) at q's draws implies about mean, scale and correlations; sees
      them at their full size. Blind to missed modes, and to tails.
    - `drift`: whether the draws move when Metropolis-adjusted steps are taken from them. Sees cut
      tails; sees shifts and scales only as far as the steps go. Blind to missed modes.
    - `annealing`: whether annealing from the prior finds more mass. Sees missed modes, if it gets
      there at all: with too few rungs it stays silent, and `left_out` says so.
    - `rows`: whether another sequence's posterior does better than a sequence's own.

    An estimate is flagged where it is off by more than a tolerance and its error together. The
    tolerances, of each sequence and of the mean over sequences:

    - of a dimension: 0.15 scales for its mean, 0.2 for its variance's ratio less 1, a pair's
      correlation 0.2;
    - of all dimensions together: 0.1 nats for the gap, 0.25 nats for the change of log p(x, z) in
      the drift, twice the draws in the tail, 0.15 nats of missed mass, 1 nat for another sequence;
    - none for k-hat: it is flagged above `khat_threshold(draws)`.

    A fit within all of them is let pass but for one call in a hundred. Small errors of many
    dimensions add up in the second kind: scales of 0.9 are within the first, and in 8 dimensions
    q's draws are then 0.76 nats too typical, which drift flags.

    Errors allow for all sequences and dimensions, so that the exact posterior is flagged in about
    one of a hundred calls, and the intervals that flags tell hold for all of them at once. Passing
    proves nothing: a mode that annealing does not reach either, or an error below the tolerances,
    stays unseen. What the weights say of moments is a limit: they see q's own draws alone, and make
    q look better than it is.

    Args:
        model: Prior, of any kind, and likelihood. It is asked for `draws` * (1 + `steps`)
            gradients per sequence, and for about 4 * `chains` * `rungs` more by the annealing.
        post: q; it needs draws and a density, and no closed form.
        batch: The sequences, in the posterior's order.
        draws: S per sequence.
        steps: Of the drift; 0 leaves it out.
        chains: Of the annealing, per sequence; 0 leaves it out.
        rungs: Temperatures of the annealing.
        seed: Of all random numbers; the draws are those of `evaluate` for the same S and seed.
        progress: Show a progress bar on stderr, if it takes longer than a few seconds.

    Returns:
        Data over `sequence`, flags with reasons, `passed`, and a text. A point mass gets one flag.

    Raises:
        InputError: naming the argument that cannot be used: a posterior of other sequences, too few
            draws, or more than fit into the memory.
    """
    counts = {"draws": draws, "steps": steps, "chains": chains, "rungs": rungs}
    _check(batch, counts, len(batch) * math.prod(model.thought_shape))
    batch = batch.to(model.device)
    model.check(batch)
    post.refuse_other_batch(batch)
    ids = batch.ids.cpu().numpy()
    attrs = {
        **provenance(batch), "guide": post.family, "draws": draws, "steps": steps, "seed": seed,
    }  # fmt: skip
    nothing = xr.Dataset(coords=sequence_coords(batch), attrs=attrs)
    if not post.has_density:
        return Diagnosis(nothing, [_point_mass(ids)])
    rule = Bonferroni(ids, FALSE_ALARM_RATE / QUESTIONS, model.thought_shape)
    target = Joint(model, batch)
    flags: list[Flag] = []
    columns: Columns = {}
    bar = tqdm(total=5, disable=not progress, unit="part", desc="diagnose", delay=QUIET_SECONDS)
    with bar, seeded(derive_seed(seed, Stream.CALIBRATE), batch.device):
        drawn = draw(target, post, draws, seed)
        if (unfit := _not_finite(drawn, ids)) is not None:
            return Diagnosis(nothing, [unfit])
        for found, numbers in _answers(model, batch, post, target, drawn, rule, counts, seed):
            flags += found
            columns |= numbers
            bar.update()
    left_out = _left_out(len(batch), steps, chains, columns)
    data = xr.Dataset(columns, sequence_coords(batch, columns), attrs)
    return Diagnosis(data, flags, left_out)


def _answers(
    model: LatentModel,
    batch: Batch,
    post: Posterior,
    target: Joint,
    drawn: Draws,
    rule: Bonferroni,
    counts: dict[str, int],
    seed: int,
) -> Iterator[tuple[list[Flag], Columns]]:
    """What each source says, one after another."""
    weights = weight_flags(drawn, rule)
    yield weights
    yield score_flags(drawn, rule)
    if counts["steps"]:
        yield drift_flags(target, post, drawn, counts["steps"], rule)
    if len(batch) > 1:
        yield row_flags(target, drawn, rule)
    if counts["chains"]:
        iw = weights[1]["iw_bound"][1], weights[1]["iw_bound_se"][1]
        yield annealing_flags(model, batch, iw, rule, counts["chains"], counts["rungs"], seed)


def _check(batch: Batch, counts: dict[str, int], reals: int) -> None:
    """Refuses what is too few, or more than the memory holds with so many `reals` in a draw."""
    if not len(batch):
        raise InputError("batch is empty: give at least one sequence")
    for name, least in (("draws", LEAST_DRAWS), ("steps", 0), ("chains", 0), ("rungs", 1)):
        whole_number(name, counts[name], least, MOST_COUNT)
    if counts["chains"] == 1:
        raise InputError("chains is 1: an error needs 2 or more; 0 leaves the annealing out")
    for name in ("draws", "chains"):
        whole_number(name, counts[name], bytes_each=COPIES * 8 * reals)


def _left_out(rows: int, steps: int, chains: int, columns: Columns) -> dict[str, str]:
    """Questions that were not asked, or not answered, with the reason."""
    out = {}
    if not steps:
        out["drift"] = "steps is 0"
    if not chains:
        out["annealing"] = "chains is 0, so a missed mode stays unseen"
    elif unsure := int((columns["annealed_bound_se"][1] > RELIABLE).sum()):
        out["annealing"] = (
            f"of {unsure} of {rows} sequences: one chain carries their estimate; give more "
            "rungs or chains"
        )
    if rows < 2:
        out["rows"] = "there is one sequence only"
    return out


def _point_mass(ids: np.ndarray) -> Flag:
    sentence = (
        "this posterior is a point mass: it has no density and no spread, so there is nothing to "
        "diagnose, and its draws are no draws from the posterior; use it as a mode, or fit "
        "another family"
    )
    return Flag("density", "point mass", tuple(ids.tolist()), sentence)


def _not_finite(drawn: Draws, ids: np.ndarray) -> Flag | None:
    """A flag for sequences where a draw of q has no finite density."""
    bad = ~(drawn.log_joint.isfinite() & drawn.log_q.isfinite()).all(0).cpu().numpy()
    if not bad.any():
        return None
    sentence = (
        f"log p(x, z) or log q(z) of draws of sequence {ids[bad][0]} is not finite: q reaches "
        "where the model has no density, or has diverged; look at its parameters"
    )
    return Flag("density", "not finite", tuple(ids[bad].tolist()), sentence)
