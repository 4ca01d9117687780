"""Posterior draws from a Markov chain as the measure of guides' means and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.diagnostics.estimates import Values
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.inference.mcmc import MCMCDraws
from ltm_pyro.inference.mcmc.sampler import check_options
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.random import Stream, derive_seed, seeded

MOMENT_DRAWS = 1000
"""Draws of q for its moments: their error, 3 % of a scale, is below what is worth telling."""

OPTIONS = ("chains", "warmup", "draws", "mass", "step_size", "max_leapfrog")
"""Of `sample_posterior`, that a comparison does not set itself."""


def check_reference(kernel: str, options: Mapping[str, Any], reals: int) -> None:
    """Refuses what chains of so many `reals` would refuse only after all guides were fitted."""
    for name in options:
        if name not in OPTIONS:
            raise unknown_name("option in reference_options", str(name), OPTIONS)
    try:
        known = check_options(kernel, options)
    except InputError as error:
        raise InputError(f"reference_options: {error}") from None
    # As they come, and stacked.
    each = 16 * known["chains"] * reals
    whole_number("reference_options['draws']", known["draws"], bytes_each=each)


def against_reference(
    reference: MCMCDraws, posts: Sequence[Posterior], seed: int
) -> dict[str, Any]:
    """How far each guide's means and scales are from those of a reference for some sequences.

    Gives `reference_mean_error` (guide, sequence): root mean square over dimensions of the
    difference of means, in units of the reference's scale, less in squares what the errors of both
    means alone give, not below 0; `reference_mean_floor` (sequence) is these, which the exact
    posterior would score too. `reference_scale_ratio` (guide, sequence): geometric mean over
    dimensions of q's scale over the reference's; below 1, q is too narrow. `reference_rhat`,
    `reference_ess` (sequence). `nan` for what was not sampled, or whose chains disagree.
    """
    ids = posts[0].ids
    place = {i: row for row, i in enumerate(ids.tolist())}
    rows = torch.tensor([place[i] for i in reference.ids.tolist()], device=ids.device)
    bad = torch.isin(reference.ids.cpu(), torch.tensor(reference.unreliable, dtype=torch.long))
    relative = reference.mean_se / reference.scale
    floor = (relative.square() + 1.0 / MOMENT_DRAWS).flatten(1).mean(1).sqrt()
    floor[bad] = torch.nan

    def column(values: Tensor) -> Values:
        """(B,), of values for the sequences that were sampled."""
        out = np.full(len(ids), np.nan)
        out[rows.cpu()] = values.cpu()
        return out

    errors, ratios = [], []
    for post in posts:
        with seeded(derive_seed(seed, Stream.SCORE, 1), ids.device):
            z = post.sample(MOMENT_DRAWS)[:, rows]
        shift = (z.mean(0) - reference.mean) / reference.scale
        squared = shift.square().flatten(1).mean(1) - floor.square()
        ratio = (z.std(0) / reference.scale).log().flatten(1).mean(1).exp()
        ratio[bad] = torch.nan
        errors.append(column(squared.clamp_min(0.0).sqrt()))
        ratios.append(column(ratio))
    return {
        "reference_mean_error": (("guide", "sequence"), np.stack(errors)),
        "reference_scale_ratio": (("guide", "sequence"), np.stack(ratios)),
        "reference_rhat": ("sequence", column(reference.rhat)),
        "reference_ess": ("sequence", column(reference.ess)),
        "reference_mean_floor": ("sequence", column(floor)),
    }
