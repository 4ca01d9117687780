"""Where the nats are: thought by thought, layer by layer, token by token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ltm_pyro.checks import one_of, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import Likelihoods, fresh_draws
from ltm_pyro.diagnostics.estimates import columns, sequence_coords
from ltm_pyro.diagnostics.information import kl_by_block
from ltm_pyro.diagnostics.marginals import blocks
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.latent_thought import LatentThoughtModel


@door
def reconstruction_by_block(
    model: LatentModel,
    post: Posterior,
    batch: Batch,
    *,
    by: Literal["layer", "thought"] = "layer",
    draws: int = 16,
    seed: int = 0,
) -> xr.Dataset:
    """How much is reconstructed as the thoughts of blocks 1..m are kept and the others set to 0.

    The order is the decoder's, from below; what a block brings depends on those before it.

    Args:
        model: The model.
        post: q for the sequences of `batch`.
        batch: The sequences.
        by: What is kept at a time: the thoughts of a `layer`, or one `thought`.
        draws: S, fresh draws per sequence.
        seed: Of the draws.

    Returns:
        Dataset in nats: `nll` (kept, sequence), E_q[-log p(x | z)] with the first `kept` blocks;
        `kl` (block, sequence), of each block by itself (`nan` where its density is not known); for
        a language model `accuracy` (kept), the share of tokens that are the likeliest at q's mean.
        Attributes `by`, `draws`, `seed`, `kl_kind`.

    Raises:
        InputError: if the batch does not fit, or the model has no layers.
    """
    one_of("by", by, ("layer", "thought"))
    whole_number("draws", draws, at_least=1)
    post.refuse_other_batch(batch)
    n_thoughts = model.thought_shape[0]
    n_blocks = n_thoughts if by == "thought" else model.n_layers
    if n_blocks is None:
        raise InputError("this model has no layers: take by='thought'")
    parts = blocks(n_thoughts, n_blocks)
    likelihoods = Likelihoods(model, batch.to(model.device))
    sums = torch.zeros(n_blocks + 1, len(batch), dtype=torch.float64)
    for z in fresh_draws(post.distribution, batch.ids, draws, seed):
        for kept in range(n_blocks + 1):
            sums[kept] -= likelihoods(_first(z, parts[:kept])).sum(0).cpu()
    kl, kind = kl_by_block(post, parts)
    variables = columns(("kept", "sequence"), "nats", nll=sums / draws)
    variables |= columns(("block", "sequence"), "nats", kl=kl.T)
    if isinstance(model, LatentThoughtModel):
        means = [_first(post.mean, parts[:kept]) for kept in range(n_blocks + 1)]
        variables |= columns("kept", "1", accuracy=[_accuracy(model, z, batch) for z in means])
    own = {"kept": np.arange(n_blocks + 1), "block": np.arange(n_blocks)}
    return xr.Dataset(
        variables,
        {**sequence_coords(batch, [*variables, *own]), **own},
        {"by": by, "draws": draws, "seed": seed, "kl_kind": kind},
    )


def _first(z: Tensor, kept: list[slice]) -> Tensor:
    """The thoughts (..., K, D) with all but the first ones set to 0."""
    stop = kept[-1].stop if kept else 0
    return torch.cat([z[..., :stop, :], torch.zeros_like(z[..., stop:, :])], dim=-2)


@torch.no_grad()
def _accuracy(model: LatentThoughtModel, z: Tensor, batch: Batch) -> float:
    right = torch.zeros((), dtype=torch.long)
    for row in range(len(batch)):  # all logits of one sequence at a time
        x, mask = batch.observed[row : row + 1], batch.mask[row]
        found = model.decoder.logits(x.to(model.device), z[row : row + 1])[0].argmax(-1).cpu()
        right += (found == x[0].cpu())[mask.cpu()].sum()
    return float(right) / float(batch.n_tokens.sum())


@door
def token_surprise(
    model: LatentModel,
    post: Posterior,
    batch: Batch,
    *,
    control: LatentModel | None = None,
    draws: int = 16,
    seed: int = 0,
) -> xr.Dataset:
    """Surprise of each token with the sequence's own thoughts, and without any.

    q has seen the sequence: this shows where thoughts say something, and is no score.

    Args:
        model: The model.
        post: q for the sequences of `batch`.
        batch: The sequences.
        control: The decoder trained without thoughts, which then stands for none; by default the
            same model at z = 0 does.
        draws: S, fresh draws per sequence.
        seed: Of the draws.

    Returns:
        Dataset over `sequence` and `token`, nats, `nan` beyond a sequence's end: `nll`, which is
        E_q[-log p(token | tokens before, z)], and `nll_without`. Attribute `without`.

    Raises:
        InputError: if the batch does not fit the posterior.
    """
    whole_number("draws", draws, at_least=1)
    post.refuse_other_batch(batch)
    batch = batch.to(model.device)
    nats = torch.zeros(batch.mask.shape, dtype=torch.float64)
    with torch.no_grad():
        for part in fresh_draws(post.distribution, batch.ids, draws, seed):
            for z in part:
                nats -= model.token_log_likelihood(z, batch).cpu()
        zero = torch.zeros_like(z)
        without = -(control or model).token_log_likelihood(zero, batch).double().cpu()
    nll, without = (v.where(batch.mask.cpu(), torch.nan) for v in (nats / draws, without))
    variables = columns(("sequence", "token"), "nats", nll=nll, nll_without=without)
    return xr.Dataset(
        variables,
        sequence_coords(batch, variables),
        {"without": "z = 0" if control is None else "the control", "draws": draws},
    )
