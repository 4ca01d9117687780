"""A fitted posterior as an `xarray.DataTree` in ArviZ's schema."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

import ltm_pyro
from ltm_pyro import compat_arviz
from ltm_pyro.checks import refuse_other_sequences, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.estimates import sequence_coords
from ltm_pyro.doors import door, require_model
from ltm_pyro.errors import InputError, shown
from ltm_pyro.export import groups
from ltm_pyro.export.groups import Variables
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.priors import ThoughtPrior
from ltm_pyro.random import Stream, derive_seed, seeded

CHAIN_MEANING = "independent restart of the fit"
DRAW_MEANING = "independent draw from the guide; effective sample size says nothing about the fit"


@door
def to_datatree(
    post: Posterior | Sequence[Posterior],
    batch: Batch | None = None,
    scores: xr.Dataset | None = None,
    draws: int = 200,
    *,
    model: LatentModel | Sequence[LatentModel] | None = None,
    fit_trace: Sequence[Mapping[str, float]] | None = None,
    predictive_draws: int = 10,
    seed: int = 0,
) -> xr.DataTree:
    """Draws, densities, data and scores of a batch, in ArviZ's groups.

    Args:
        post: q for B sequences; several for the same sequences are restarts and become chains.
        batch: The sequences, in the same order.
        scores: Of `evaluate`.
        draws: S, draws per chain and sequence.
        model: Adds log densities and, from its likelihood, new sequences. One for all chains, or a
            list with one for each, where decoders were fitted anew too.
        fit_trace: The fit's metrics, one row per slow step.
        predictive_draws: Of the S draws, how many also write a new sequence (with a model); as many
            are written at thoughts from the prior.
        seed: Of all draws; the tree is a function of its arguments.

    Returns:
        A tree with these groups, each present where what it needs was given:

        - `posterior`: `z` (chain, draw, sequence, thought, dim).
        - `prior`: `z` (chain, draw, thought, dim); one prior serves all sequences; of several
          models the first one's.
        - `posterior_predictive`, `prior_predictive`: `tokens` (chain, draw, sequence, position), at
          the masks and covariates of the sequences; thoughts are q's, or the prior's.
        - `log_likelihood`, in nats: `x` (chain, draw, sequence), log p(x_i | z) of whole sequences;
          of a language model also `x_token` (chain, draw, sequence, position), 0 at padding.
        - `observed_data`: `tokens` (sequence, position).
        - `constant_data`: `mask` (sequence, position), true where a position is data and not
          padding; `n_tokens` (sequence); `text` (sequence) where the batch knows it; with a model
          whose prior is learned, what has been learned under the names of
          `ThoughtPrior.named_values`: a mixture's `prior_weight` (component), `prior_mean` and
          `prior_scale` (component, thought, dim), an autoregressive prior's `prior_coefficient`
          (dim). A flow's networks are in the run's checkpoint only.
        - `sample_stats`: `log_p` = log p(x_i, z) and `log_q` = log q(z) in nats (chain, draw,
          sequence); `khat` (sequence).
        - `variational_params`: the guide's local parameters (chain, sequence, ...).
        - `fit_trace`: the fit's metrics over `slow_step`, and as `fast_elbo` (of a point mass
          `fast_log_joint`), `fast_nll`, ... the fast loop's course (chain, fast_step, sequence).
        - `scores`: all of `scores`.

        Data that are no tokens (real numbers, or those of a `model` that is no language model)
        are named `x` instead of `tokens`; where one x has more than one dimension they are called
        `x_dim_0`, `x_dim_1`, ... instead of `position`. Covariates are in `constant_data` as
        `covariate_` and their name.
        ArviZ's functions take the tree as it is: with ArviZ 1.x always, with 0.23 from the first
        call of this function on (see `compat_arviz.teach_trees`).

    Raises:
        InputError: if posteriors, batch and scores are not about the same sequences.
    """
    chains = _checked(post, batch, scores, draws, predictive_draws)
    first, n = chains[0], len(chains)
    models = _models(model, n)
    model = models[0] if models else None
    prior = getattr(model, "thought_prior", None)
    z = _draws(chains, draws, seed)
    tree: dict[str, Variables] = {
        "posterior": {"z": (("chain", "draw", "sequence", "thought", "dim"), groups.stack(z), {})},
        "prior": groups.prior_thoughts(first, draws, derive_seed(seed, Stream.SAMPLE, 2 * n)),
        "variational_params": groups.parameters(chains),
        "sample_stats": {},
        "constant_data": groups.learned_prior(prior),
        "fit_trace": {**groups.metrics(fit_trace), **groups.fast_course(chains)},
    }
    if batch is not None:
        tree["observed_data"] = groups.observed(model, batch)
        tree["constant_data"] |= groups.constant(batch)
        if model is not None:
            tree["log_likelihood"], tree["sample_stats"] = groups.densities(
                models, chains, z, batch
            )
    if model is not None and predictive_draws:
        tree |= _predictive(models, first, z, min(predictive_draws, draws), seed)
    if scores is not None:
        judged = {"units": "1", **{name: scores.attrs[name] for name in ("khat_limit", "draws")}}
        tree["sample_stats"]["khat"] = (("sequence",), scores["khat"].values, judged)
    attrs = _attributes(first, prior, draws, seed)
    coords, known = _coordinates(first, n, model), {} if batch is None else sequence_coords(batch)
    datasets = {
        name: _dataset(variables, coords, known, attrs)
        for name, variables in tree.items()
        if variables
    }
    if scores is not None:
        datasets["scores"] = scores.assign_attrs(_plain(scores.attrs))
    compat_arviz.teach_trees()
    found: xr.DataTree = xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **datasets})
    return found


def _draws(chains: list[Posterior], draws: int, seed: int) -> list[Tensor]:
    """Draws (S, B, K, D) of each chain."""
    z = []
    for number, post in enumerate(chains):
        with seeded(derive_seed(seed, Stream.SAMPLE, number), post.ids.device):
            z.append(post.sample(draws))
    return z


def _predictive(
    models: list[LatentModel], post: Posterior, z: list[Tensor], draws: int, seed: int
) -> dict[str, Variables]:
    """New sequences at q's thoughts, one model a chain, and at the first model's prior's."""
    # Of these sequences: blocks of a larger export are not to repeat each other's noise.
    own = derive_seed(seed, Stream.TOKENS, int(post.ids[0]) if len(post) else 0)
    *seeds, last = (derive_seed(own, Stream.SAMPLE, number) for number in range(len(z) + 1))
    return {
        "posterior_predictive": groups.predictive(models, post, z, draws, seeds),
        "prior_predictive": groups.predictive(models[:1], post, None, draws, [last]),
    }


def _checked(
    post: object, batch: Batch | None, scores: xr.Dataset | None, draws: int, predictive_draws: int
) -> list[Posterior]:
    """The posterior of each chain, all about the same sequences."""
    given = [post] if isinstance(post, Posterior) else post
    if not isinstance(given, list | tuple) or not all(isinstance(p, Posterior) for p in given):
        raise InputError(f"post is {shown(post)}: must be svi.infer(batch), or a list of such")
    if not given:
        raise InputError("to_datatree needs at least one posterior")
    first: Posterior = given[0]
    each = 8 * len(given) * len(first) * math.prod(first.prior.event_shape)
    whole_number("draws", draws, 1, bytes_each=each)
    whole_number("predictive_draws", predictive_draws, at_least=0)
    for other in given[1:]:
        if other.family != first.family:
            raise InputError(
                f"restarts of {first.family!r} and {other.family!r}: export each alone"
            )
        refuse_other_sequences(first, other, ("the posterior", "a restart"))
    if batch is not None:
        first.refuse_other_batch(batch)
    if scores is not None:
        refuse_other_sequences(first, scores, ("the posterior", "scores"))
    return list(given)


def _models(given: object, chains: int) -> list[LatentModel]:
    """The model of each chain; none where none was given."""
    if given is None:
        return []
    models = list(given) if isinstance(given, list | tuple) else [given] * chains
    if len(models) != chains:
        raise InputError(f"model has {len(models)} models for {chains} posteriors: one for each")
    for each in models:
        require_model(each)
    return cast("list[LatentModel]", models)


def _coordinates(post: Posterior, chains: int, model: LatentModel | None) -> dict[str, Any]:
    thoughts, _ = tuple(post.distribution.event_shape)
    layers = getattr(model, "n_layers", None)
    names = [f"thought {k}" for k in range(thoughts)]
    if layers is not None:
        per_layer = thoughts // layers
        names = [f"layer {k // per_layer} thought {k % per_layer}" for k in range(thoughts)]
    return {"chain": np.arange(chains), "sequence": post.ids.cpu().numpy(), "thought": names}


def _dataset(
    variables: Variables, coords: dict[str, Any], sequences: dict[str, Any], attrs: dict[str, Any]
) -> xr.Dataset:
    """One group, with coordinates for each of its dimensions, and what is known of `sequences`."""
    data = xr.Dataset(variables, attrs=attrs)
    for name, size in data.sizes.items():
        known = coords.get(str(name))
        fits = known is not None and len(known) == size
        start = 1 if name == "slow_step" else 0
        data.coords[name] = known if fits else np.arange(start, start + size)
    if "sequence" in data.sizes:
        taken = {*data.sizes, *data.variables}
        data = data.assign_coords({n: v for n, v in sequences.items() if n not in taken})
    for name, meaning in (("chain", CHAIN_MEANING), ("draw", DRAW_MEANING)):
        if name in data.coords:
            data.coords[name].attrs["meaning"] = meaning
    return data


def _attributes(post: Posterior, prior: object, draws: int, seed: int) -> dict[str, Any]:
    """No time of writing: the same arguments give the same tree."""
    return {
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "creation_library": "ltm_pyro",
        "creation_library_version": ltm_pyro.__version__,
        "torch_version": str(torch.__version__),
        "guide": post.family,
        "kl_estimator": post.kl_estimator,
        "objective": post.objective,
        "objective_kl": post.objective_kl,
        "fast_optimizer": post.optimizer,
        "draws": draws,
        "seed": seed,
        **({"prior": prior.family} if isinstance(prior, ThoughtPrior) else {}),
    }


def _plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes that NetCDF can hold."""
    return {
        str(name): int(value) if isinstance(value, bool) else value
        for name, value in attrs.items()
        if value is not None
    }
