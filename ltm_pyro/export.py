"""A fitted posterior as an `xarray.DataTree` in ArviZ's schema, and as a NetCDF file.

Two dimensions carry ArviZ's names and mean this here: `chain` is an independent restart of the fit,
`draw` a draw from the guide that this restart ended with. Draws from a guide are independent, so
within one restart effective sample size and r-hat say nothing about the fit: ArviZ gives NaN for an
r-hat of one chain, and for the effective size of a few dozen draws a noisy number. With several
restarts r-hat shows whether they found the same posterior; `khat` and the scores show whether it is
the right one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyro
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

import ltm_pyro
from ltm_pyro import compat_arviz
from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.pairing import refuse_other_sequences
from ltm_pyro.diagnostics.labels import sequence_coords
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.posterior import FastTrace, Posterior
from ltm_pyro.models.base import SITE_Z, LatentModel
from ltm_pyro.models.doors import door
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.priors import ThoughtPrior
from ltm_pyro.random import Stream, derive_seed, seeded
from ltm_pyro.run.files import write_atomic

Variable = tuple[tuple[str, ...], NDArray[Any], dict[str, Any]]
"""Dimensions, values, attributes: what `xarray.Dataset` takes."""

_ENGINE: Literal["h5netcdf"] = "h5netcdf"
_ROWS_AT_ONCE = 1024  # sequences written together by the posterior predictive

CHAIN_MEANING = "independent restart of the fit"
DRAW_MEANING = "independent draw from the guide; effective sample size says nothing about the fit"


@door
def to_datatree(
    post: Posterior | Sequence[Posterior],
    batch: Batch | None = None,
    scores: xr.Dataset | None = None,
    draws: int = 200,
    *,
    model: LatentModel | None = None,
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
        model: Adds log densities and, from its likelihood, new sequences.
        fit_trace: The fit's metrics, one row per slow step.
        predictive_draws: Of the S draws, how many also write a new sequence (with a model).
        seed: Of all draws; the tree is a function of its arguments.

    Returns:
        A tree with these groups, each present where what it needs was given:

        - `posterior`: `z` (chain, draw, sequence, thought, dim).
        - `prior`: `z` (chain, draw, thought, dim); one prior serves all sequences.
        - `posterior_predictive`: `tokens` (chain, draw, sequence, position), at the masks and
          covariates of the sequences.
        - `log_likelihood`: `x` (chain, draw, sequence), log p(x_i | z) of whole sequences in nats.
        - `observed_data`: `tokens` (sequence, position).
        - `constant_data`: `mask` (sequence, position), true where a position is data and not
          padding; `n_tokens` (sequence); with a model whose prior is learned, what has been
          learned under the names of `ThoughtPrior.named_values`: a mixture's `prior_weight`
          (component), `prior_mean` and `prior_scale` (component, thought, dim), an autoregressive
          prior's `prior_coefficient` (dim). A flow's networks are in the run's checkpoint only.
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
    given = [post] if isinstance(post, Posterior) else post
    if not isinstance(given, list | tuple) or not all(isinstance(p, Posterior) for p in given):
        raise InputError(f"post is {shown(post)}: must be svi.infer(batch), or a list of such")
    chains = list(given)
    _check(chains, batch, scores, draws, predictive_draws)
    z = [_draw(chain, draws, seed, number) for number, chain in enumerate(chains)]
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {"z": (("chain", "draw", "sequence", "thought", "dim"), _stack(z), {})},
        "prior": _prior(chains[0], draws, derive_seed(seed, Stream.SAMPLE, 2 * len(chains))),
        "variational_params": _parameters(chains),
        "sample_stats": {},
        "constant_data": {},
        "fit_trace": {**_metrics(fit_trace), **_fast_course(chains)},
    }
    if batch is not None:
        groups["observed_data"] = _observed(model, batch)
        groups["constant_data"]["n_tokens"] = (
            ("sequence",), batch.n_tokens.cpu().numpy(), {"units": "tokens"},
        )  # fmt: skip
        groups["constant_data"].update(_constant(batch))
        if model is not None:
            groups["log_likelihood"], groups["sample_stats"] = _densities(model, chains, z, batch)
    prior = getattr(model, "thought_prior", None)
    groups["constant_data"].update(_learned_prior(prior))
    if model is not None and predictive_draws:
        groups["posterior_predictive"] = _predictive(model, chains[0], z, predictive_draws, seed)
    if scores is not None:
        khat = scores["khat"]
        judged = {name: scores.attrs[name] for name in ("khat_limit", "draws")}
        groups["sample_stats"]["khat"] = (("sequence",), khat.values, {"units": "1", **judged})
    coords = _coordinates(chains[0], len(chains), model)
    known = {} if batch is None else sequence_coords(batch)
    attrs = _attributes(chains[0], draws, seed)
    if isinstance(prior, ThoughtPrior):
        attrs["prior"] = prior.family
    datasets = {
        f"/{name}": _dataset(variables, coords, known, attrs)
        for name, variables in groups.items()
        if variables
    }
    if scores is not None:
        datasets["/scores"] = scores.assign_attrs(_plain(scores.attrs))
    tree: xr.DataTree = xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **datasets})
    compat_arviz.teach_trees()
    return tree


def save_datatree(tree: xr.DataTree, path: str | Path) -> Path:
    """Writes the tree as NetCDF; at any moment the old file is there, or the whole new one.

    Args:
        tree: Of `to_datatree`.
        path: Where to, usually `posterior.nc`.

    Raises:
        InputError: if it cannot be written.
    """
    target = Path(path)
    # Made in memory: the HDF5 library ends in a segmentation fault where a disk is full.
    write_atomic(target, tree.to_netcdf(engine=_ENGINE))
    return target


def load_datatree(path: str | Path) -> xr.DataTree:
    """Reads what `save_datatree` wrote, whole into memory.

    Raises:
        InputError: if there is no such file, or it is not NetCDF.
    """
    if not Path(path).is_file():
        raise InputError(f"{str(path)!r} does not exist: write it with save_datatree")
    try:
        with xr.open_datatree(path, engine=_ENGINE) as tree:
            loaded: xr.DataTree = tree.load()
            compat_arviz.teach_trees()
            return loaded
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{str(path)!r} cannot be read as NetCDF: {reason}") from None


def _check(
    chains: list[Posterior],
    batch: Batch | None,
    scores: xr.Dataset | None,
    draws: int,
    predictive_draws: int,
) -> None:
    if not chains:
        raise InputError("to_datatree needs at least one posterior")
    first = chains[0]
    each = 8 * len(chains) * len(first) * math.prod(first.prior.event_shape)
    whole_number("draws", draws, 1, bytes_each=each)
    whole_number("predictive_draws", predictive_draws, at_least=0)
    for other in chains[1:]:
        if other.family != first.family:
            raise InputError(
                f"restarts of {first.family!r} and {other.family!r}: export each alone"
            )
    for restart in chains[1:]:
        refuse_other_sequences(first, restart, ("the posterior", "a restart"))
    if batch is not None:
        first.refuse_other_batch(batch)
    if scores is not None:
        refuse_other_sequences(first, scores, ("the posterior", "scores"))


def _draw(post: Posterior, draws: int, seed: int, chain: int) -> Tensor:
    """(S, B, K, D)."""
    with seeded(derive_seed(seed, Stream.SAMPLE, chain), post.ids.device):
        return post.sample(draws)


def _stack(chains: Sequence[Tensor]) -> NDArray[Any]:
    """One array with the chain in front."""
    array: NDArray[Any] = torch.stack([values.detach().cpu() for values in chains]).numpy()
    return array


def _prior(post: Posterior, draws: int, seed: int) -> dict[str, Variable]:
    with torch.no_grad(), seeded(seed, post.ids.device):
        z = post.prior.sample(torch.Size([draws]))
    return {"z": (("chain", "draw", "thought", "dim"), _stack([z]), {})}


def _learned_prior(prior: object) -> dict[str, Variable]:
    """What a learned prior says of itself."""
    if not isinstance(prior, ThoughtPrior):
        return {}
    return {
        name: (dims, value.detach().cpu().numpy(), {"of": f"prior {prior.family}"})
        for name, (dims, value) in prior.named_values().items()
    }


def _parameters(chains: list[Posterior]) -> dict[str, Variable]:
    """Local parameters; those of z's own shape get its dimensions."""
    out: dict[str, Variable] = {}
    shape = tuple(chains[0].distribution.event_shape)
    for name, value in chains[0].parameters.items():
        inner = tuple(value.shape[1:])
        own = tuple(f"{name}_dim_{i}" for i in range(len(inner)))
        dims = ("thought", "dim") if inner == shape else own
        values = _stack([chain.parameters[name] for chain in chains])
        out[name] = (("chain", "sequence", *dims), values, {})
    return out


def _observed(model: LatentModel | None, batch: Batch) -> dict[str, Variable]:
    x = batch.observed
    return {_data_name(model, x): (_data_dims(x), x.cpu().numpy(), {})}


def _constant(batch: Batch) -> dict[str, Variable]:
    """The mask and the covariates."""
    out: dict[str, Variable] = {"mask": (_data_dims(batch.mask), batch.mask.cpu().numpy(), {})}
    for name, value in batch.covariates.items():
        own = tuple(f"covariate_{name}_dim_{i}" for i in range(value.dim() - 1))
        out[f"covariate_{name}"] = (("sequence", *own), value.cpu().numpy(), {})
    return out


def _data_name(model: LatentModel | None, x: Tensor) -> str:
    tokens = not x.is_floating_point() and (model is None or isinstance(model, LatentThoughtModel))
    return "tokens" if tokens else "x"


def _data_dims(x: Tensor) -> tuple[str, ...]:
    """Of x or its mask, (B, ...)."""
    inner = x.dim() - 1
    names = ("position",) if inner == 1 else tuple(f"x_dim_{i}" for i in range(inner))
    return ("sequence", *names)


def _densities(
    model: LatentModel, chains: list[Posterior], z: list[Tensor], batch: Batch
) -> tuple[dict[str, Variable], dict[str, Variable]]:
    """The groups `log_likelihood` and `sample_stats`."""
    batch = batch.to(model.device)
    model.check(batch)
    with torch.no_grad():
        prepared = model.prepare(batch)
        # One draw at a time, so that memory does not grow with S.
        likelihood = [
            torch.stack([model.log_likelihood(draw, prepared).double() for draw in draws])
            for draws in z
        ]
        prior = model.prior()
        log_p = [
            value + prior.log_prob(draws).double()
            for value, draws in zip(likelihood, z, strict=True)
        ]
        log_q = [chain.log_prob(draws).double() for chain, draws in zip(chains, z, strict=True)]
    dims = ("chain", "draw", "sequence")
    nats = {"units": "nats"}
    conditional = {
        **nats,
        "level": "whole sequences, given thoughts that were fitted to them",
        "note": "not for PSIS-LOO, whose latent has seen x: use held-out marginal scores instead",
    }
    stats: dict[str, Variable] = {"log_p": (dims, _stack(log_p), nats)}
    if chains[0].has_density:
        stats["log_q"] = (dims, _stack(log_q), nats)
    return {"x": (dims, _stack(likelihood), conditional)}, stats


def _predictive(
    model: LatentModel, post: Posterior, z: list[Tensor], draws: int, seed: int
) -> dict[str, Variable]:
    """New sequences from the model's own program, run forward at thoughts drawn from q."""
    unobserved = Batch(None, post.mask, post.ids, covariates=post.covariates).to(model.device)
    at_once = max(1, _ROWS_AT_ONCE // len(post))
    written = []
    for chain, thoughts in enumerate(z):
        noise = derive_seed(seed, Stream.SAMPLE, len(z) + chain)
        with torch.no_grad(), seeded(noise, model.device):
            parts = [
                poutine.condition(model, data={SITE_Z: some})(unobserved)
                for some in thoughts[:draws].split(at_once)
            ]
        x = torch.cat(parts)
        written.append(x if x.is_floating_point() else x.int())
    dims = ("chain", "draw", *_data_dims(post.mask))
    return {_data_name(model, written[0]): (dims, _stack(written), {})}


def _metrics(rows: object) -> dict[str, Variable]:
    """Columns of rows that may differ in their names: NaN where a row lacks one."""
    if rows is None:
        return {}
    known = isinstance(rows, Sequence) and all(
        isinstance(row, Mapping) and all(isinstance(v, Real) for v in row.values()) for row in rows
    )
    if not known:
        raise InputError(f"fit_trace is {shown(rows)}: must be svi.metrics, or rows like its own")
    given = cast("Sequence[Mapping[str, float]]", rows)
    names = dict.fromkeys(name for row in given for name in row if name != "step")
    return {
        name: (
            ("slow_step",),
            np.array([row.get(name, math.nan) for row in given]),
            _metric_units(name),
        )
        for name in names
    }


def _metric_units(name: str) -> dict[str, Any]:
    if name.endswith("_per_token"):
        return {"units": "nats per token"}
    terms = ("elbo", "nll", "kl", "log_joint", "log_prior")
    nats = name in (*terms, "objective", "fast_gain")
    return {"units": "nats per sequence"} if nats else {}


def _fast_course(chains: list[Posterior]) -> dict[str, Variable]:
    traces: list[FastTrace] = [chain.trace for chain in chains if chain.trace is not None]
    if len(traces) < len(chains) or len({len(trace.lr) for trace in traces}) != 1:
        return {}
    dims = ("chain", "fast_step", "sequence")
    nats = {"units": "nats per sequence"}
    terms = {name: [getattr(trace, name) for trace in traces] for name in ("elbo", "nll", "kl")}
    if not chains[0].has_density:
        terms["log_joint"] = terms.pop("elbo")
        terms["log_prior"] = [-part for part in terms.pop("kl")]
    out: dict[str, Variable] = {
        f"fast_{name}": (dims, _stack(values), nats) for name, values in terms.items()
    }
    out["fast_grad_norm"] = (dims, _stack([trace.grad_norm for trace in traces]), {})
    out["fast_lr"] = (("chain", "fast_step"), _stack([trace.lr for trace in traces]), {})
    return out


def _coordinates(post: Posterior, chains: int, model: LatentModel | None) -> dict[str, Any]:
    thoughts, _ = tuple(post.distribution.event_shape)
    layers = getattr(model, "n_layers", None)
    if layers is None:
        names = [f"thought {k}" for k in range(thoughts)]
    else:
        per_layer = thoughts // layers
        names = [f"layer {k // per_layer} thought {k % per_layer}" for k in range(thoughts)]
    return {"chain": np.arange(chains), "sequence": post.ids.cpu().numpy(), "thought": names}


def _dataset(
    variables: dict[str, Variable],
    coords: dict[str, Any],
    sequences: dict[str, Any],
    attrs: dict[str, Any],
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


def _attributes(post: Posterior, draws: int, seed: int) -> dict[str, Any]:
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
        "draws": draws,
        "seed": seed,
    }


def _plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes that NetCDF can hold."""
    return {
        str(name): int(value) if isinstance(value, bool) else value
        for name, value in attrs.items()
        if value is not None
    }
