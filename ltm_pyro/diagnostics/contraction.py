"""Contraction: how much of its prior a posterior has left behind, and where the truth lies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.calibration import ROWS_AT_ONCE
from ltm_pyro.diagnostics.estimates import columns
from ltm_pyro.diagnostics.marginals import moments
from ltm_pyro.doors import door
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.simulation import simulate
from ltm_pyro.random import Stream, derive_seed, seeded

_PRIOR_DRAWS = 4_000


@door
def contraction(
    model: LatentModel, infer: Callable[[Batch], Posterior], replications: int = 500, seed: int = 0
) -> xr.Dataset:
    """Posterior contraction and z-scores of the truth on data from the model (Betancourt 2020).

    Args:
        model: Writes the data, and gives the prior that thoughts come from.
        infer: From a batch to its posterior.
        replications: N, sequences written and inferred.
        seed: Of the data.

    Returns:
        Dataset over `replication` and `quantity` (dimensions of z): `contraction`, 1 less the
        posterior's over the prior's variance, 0 where nothing was learned; `z_score`, the truth
        less q's mean in q's scales: mean 0 and variance 1 where q is right.

    Raises:
        InputError: if there are fewer than 2 replications.
    """
    whole_number("replications", replications, at_least=2)
    simulated = simulate(model, replications, derive_seed(seed, Stream.CALIBRATE))
    with torch.no_grad(), seeded(derive_seed(seed, Stream.SAMPLE), model.device):
        prior = model.prior().expand(torch.Size([_PRIOR_DRAWS])).sample().var(0)
    rows = []
    for first in range(0, replications, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        mean, variance = moments(infer(simulated.batch.select(part)))
        z_score = (simulated.z[part] - mean) / variance.sqrt()
        rows.append(torch.stack([1 - variance / prior, z_score]).flatten(2).detach().cpu())
    shrunk, z_score = torch.cat(rows, dim=1)
    K, D = model.thought_shape
    names = np.array([f"z[{k},{d}]" for k in range(K) for d in range(D)])
    return xr.Dataset(
        columns(("replication", "quantity"), "1", contraction=shrunk, z_score=z_score),
        {"quantity": names},
        {"replications": replications, "seed": seed},
    )
