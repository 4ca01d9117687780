"""Posterior draws from a Markov chain as the measure of guides' means and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.errors import unknown_name
from ltm_pyro.inference.mcmc import MCMCDraws
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.random import Stream, derive_seed, seeded

MOMENT_DRAWS = 1000
"""Draws of q for its moments: their error, 3 % of a scale, is below what is worth telling."""


OPTIONS = ("chains", "warmup", "draws", "mass", "step_size", "max_leapfrog")
"""Of `sample_posterior`, that a comparison does not set itself."""


def check_reference(options: Mapping[str, Any], reals: int) -> None:
    """Refuses options that the chains would refuse after all guides were fitted.

    Args:
        options: For `sample_posterior`.
        reals: Numbers in one draw of all sequences.

    Raises:
        InputError: for an unknown option, a count that is none, or draws beyond the memory.
    """
    for name in options:
        if name not in OPTIONS:
            raise unknown_name("option in reference_options", str(name), OPTIONS)
    for name, least in (("chains", 2), ("warmup", 0), ("draws", 4), ("max_leapfrog", 1)):
        if name in options:
            whole_number(f"reference_options[{name!r}]", options[name], least, MOST_COUNT)
    chains, draws = options.get("chains", 4), options.get("draws", 1000)
    # As they come, and stacked.
    whole_number("reference_options['draws']", draws, bytes_each=16 * chains * reals)


def against_reference(
    reference: MCMCDraws, posts: Sequence[Posterior], seed: int
) -> dict[str, Any]:
    """How far each guide's means and scales are from the reference's, per sequence.

    Args:
        reference: Draws for these sequences, or for some of them.
        posts: One posterior per guide.
        seed: Of the draws from q.

    Returns:
        `reference_mean_error` (guide, sequence): root mean square over dimensions of the difference
        of means, in units of the reference's scale, less in squares what the errors of both means
        alone give, not below 0. `reference_mean_floor` (sequence): that floor, which the exact
        posterior would score too. `reference_scale_ratio` (guide, sequence):
        geometric mean over dimensions of q's scale over the reference's; below 1, q is too narrow.
        `reference_rhat`, `reference_ess` (sequence). What was not sampled, and what belongs
        to chains that disagree, is `nan`.
    """
    ids = posts[0].ids
    place = {i: row for row, i in enumerate(ids.tolist())}
    rows = torch.tensor([place[i] for i in reference.ids.tolist()], device=ids.device)
    bad = torch.isin(reference.ids.cpu(), torch.tensor(reference.unreliable, dtype=torch.long))
    shape = (len(posts), len(ids))
    errors, ratios = np.full(shape, np.nan), np.full(shape, np.nan)
    relative = reference.mean_se / reference.scale
    floor = (relative.square() + 1.0 / MOMENT_DRAWS).flatten(1).mean(1).sqrt()
    floor[bad] = torch.nan
    for guide, post in enumerate(posts):
        mean, scale = _moments(post, seed)
        shift = (mean[rows] - reference.mean) / reference.scale
        ratio = (scale[rows] / reference.scale).log().flatten(1).mean(1).exp()
        squared = shift.square().flatten(1).mean(1) - floor.square()
        shift, ratio = squared.clamp_min(0.0).sqrt().cpu(), ratio.cpu()
        shift[bad], ratio[bad] = torch.nan, torch.nan
        errors[guide, rows.cpu()], ratios[guide, rows.cpu()] = shift, ratio
    dims = ("guide", "sequence")
    out: dict[str, Any] = {
        "reference_mean_error": (dims, errors),
        "reference_scale_ratio": (dims, ratios),
    }
    for name, value in (("rhat", reference.rhat), ("ess", reference.ess), ("mean_floor", floor)):
        column = np.full(len(ids), np.nan)
        column[rows.cpu()] = value.cpu()
        out[f"reference_{name}"] = ("sequence", column)
    return out


def _moments(post: Posterior, seed: int) -> tuple[Tensor, Tensor]:
    """Means and scales of q, (B, K, D) each."""
    with seeded(derive_seed(seed, Stream.SCORE, 1), post.ids.device):
        z = post.sample(MOMENT_DRAWS)
    return z.mean(0), z.std(0)
