"""The variables of each group of an exported tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import SITE_Z, LatentModel
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.priors import ThoughtPrior
from ltm_pyro.random import seeded

Variables = dict[str, tuple[tuple[str, ...], NDArray[Any], dict[str, Any]]]
"""By name: dimensions, values, attributes, as `xarray.Dataset` takes them."""

_ROWS_AT_ONCE = 1024  # sequences written together by the predictive distributions
_NATS = {"units": "nats"}
_CONDITIONAL = {
    **_NATS,
    "note": "given thoughts that were fitted to x: not for PSIS-LOO, whose latent has seen x; use "
    "held-out marginal scores instead",
}
_PER_DRAW = ("chain", "draw", "sequence")


def prior_thoughts(post: Posterior, draws: int, seed: int) -> Variables:
    """The group `prior`: one prior serves all sequences."""
    with torch.no_grad(), seeded(seed, post.ids.device):
        z = post.prior.sample(torch.Size([draws]))
    return {"z": (("chain", "draw", "thought", "dim"), stack([z]), {})}


def learned_prior(prior: object) -> Variables:
    """What a learned prior says of itself."""
    if not isinstance(prior, ThoughtPrior):
        return {}
    return {
        name: (dims, value.detach().cpu().numpy(), {"of": f"prior {prior.family}"})
        for name, (dims, value) in prior.named_values().items()
    }


def parameters(chains: list[Posterior]) -> Variables:
    """Local parameters; those of z's own shape get its dimensions."""
    out: Variables = {}
    shape = tuple(chains[0].distribution.event_shape)
    for name, value in chains[0].parameters.items():
        inner = tuple(value.shape[1:])
        own = tuple(f"{name}_dim_{i}" for i in range(len(inner)))
        dims = ("thought", "dim") if inner == shape else own
        values = stack([chain.parameters[name] for chain in chains])
        out[name] = (("chain", "sequence", *dims), values, {})
    return out


def observed(model: LatentModel | None, batch: Batch) -> Variables:
    """The data, without their mask."""
    x = batch.observed
    return {_data_name(model, x): (_data_dims(x), x.cpu().numpy(), {})}


def constant(batch: Batch) -> Variables:
    """Mask, lengths, covariates, and the text where the batch knows it."""
    out: Variables = {
        "mask": (_data_dims(batch.mask), batch.mask.cpu().numpy(), {}),
        "n_tokens": (("sequence",), batch.n_tokens.cpu().numpy(), {"units": "tokens"}),
    }
    for name, value in batch.covariates.items():
        own = tuple(f"covariate_{name}_dim_{i}" for i in range(value.dim() - 1))
        out[f"covariate_{name}"] = (("sequence", *own), value.cpu().numpy(), {})
    if batch.origin is not None and batch.origin.tokenizer is not None:
        # HDF5 keeps no NUL in a text.
        texts = [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in batch.texts()]
        out["text"] = (("sequence",), np.array(texts, dtype=object), {})
    return out


def densities(
    models: list[LatentModel], chains: list[Posterior], z: list[Tensor], batch: Batch
) -> tuple[Variables, Variables]:
    """The groups `log_likelihood` and `sample_stats`, z (S, B, K, D) of each chain."""
    for model in models:
        model.check(batch.to(model.device))
    with torch.no_grad():
        pairs = list(zip(models, z, strict=True))
        scored = [_log_likelihoods(m, draws, batch.to(m.device)) for m, draws in pairs]
        whole, by_token = zip(*scored, strict=True)
        priors = [m.prior().log_prob(draws).double() for m, draws in pairs]
        log_p = [x + p for x, p in zip(whole, priors, strict=True)]
        log_q = [chain.log_prob(d).double() for chain, d in zip(chains, z, strict=True)]
    log_likelihood: Variables = {"x": (_PER_DRAW, stack(whole), _CONDITIONAL)}
    if by_token[0] is not None:
        dims = (*_PER_DRAW, "position")
        log_likelihood["x_token"] = (dims, stack(by_token), {**_CONDITIONAL, "padding": "0"})
    stats: Variables = {"log_p": (_PER_DRAW, stack(log_p), _NATS)}
    if chains[0].has_density:
        stats["log_q"] = (_PER_DRAW, stack(log_q), _NATS)
    return log_likelihood, stats


def _log_likelihoods(model: LatentModel, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Log p(x | z) of sequences (S, B), float64, and of a language model's tokens (S, B, T)."""
    # One draw at a time, so that what is computed on the way does not grow with S.
    if isinstance(model, LatentThoughtModel):
        tokens = torch.stack([model.token_log_likelihood(draw, batch) for draw in z])
        return tokens.double().sum(-1), tokens
    prepared = model.prepare(batch)
    return torch.stack([model.log_likelihood(draw, prepared).double() for draw in z]), None


def predictive(
    models: list[LatentModel], post: Posterior, z: list[Tensor] | None, draws: int, seeds: list[int]
) -> Variables:
    """New sequences by each chain's model, at the masks and covariates of `post`'s.

    At the first `draws` thoughts of z (S, B, K, D) of each chain; without them at as many that the
    program draws.
    """
    unobserved = Batch(None, post.mask, post.ids, covariates=post.covariates)
    unobserved = unobserved.to(models[0].device)
    at_once = max(1, _ROWS_AT_ONCE // len(post))
    written = []
    for chain, (model, seed) in enumerate(zip(models, seeds, strict=True)):
        with torch.no_grad(), seeded(seed, model.device):
            if z is None:
                x = torch.stack([model(unobserved) for _ in range(draws)])
            else:
                parts = z[chain][:draws].split(at_once)
                x = torch.cat(
                    [poutine.condition(model, data={SITE_Z: p})(unobserved) for p in parts]
                )
        written.append(x if x.is_floating_point() else x.int())
    dims = ("chain", "draw", *_data_dims(post.mask))
    return {_data_name(models[0], written[0]): (dims, stack(written), {})}


def metrics(rows: object) -> Variables:
    """Columns of rows that may differ in their names: NaN where a row lacks one."""
    if rows is None:
        return {}
    known = isinstance(rows, Sequence) and all(
        isinstance(row, Mapping) and all(isinstance(v, Real) for v in row.values()) for row in rows
    )
    if not known:
        raise InputError(f"fit_trace is {shown(rows)}: must be svi.metrics, or rows like its own")
    given = cast("Sequence[Mapping[str, float]]", rows)
    out: Variables = {}
    for name in dict.fromkeys(name for row in given for name in row if name != "step"):
        units = {"units": "nats per token"} if name.endswith("_per_token") else {}
        if name in ("elbo", "nll", "kl", "log_joint", "log_prior", "objective", "fast_gain"):
            units = {"units": "nats per sequence"}
        values = np.array([row.get(name, math.nan) for row in given])
        out[name] = (("slow_step",), values, units)
    return out


def fast_course(chains: list[Posterior]) -> Variables:
    """The fast loop's course, where every chain has one of the same length."""
    traces = [chain.trace for chain in chains if chain.trace is not None]
    if len(traces) < len(chains) or len({len(trace.lr) for trace in traces}) != 1:
        return {}
    dims = ("chain", "fast_step", "sequence")
    nats = {"units": "nats per sequence"}
    terms = {name: [getattr(trace, name) for trace in traces] for name in ("elbo", "nll", "kl")}
    if not chains[0].has_density:
        terms["log_joint"] = terms.pop("elbo")
        terms["log_prior"] = [-part for part in terms.pop("kl")]
    out: Variables = {f"fast_{name}": (dims, stack(v), nats) for name, v in terms.items()}
    out["fast_grad_norm"] = (dims, stack([trace.grad_norm for trace in traces]), {})
    out["fast_lr"] = (("chain", "fast_step"), stack([trace.lr for trace in traces]), {})
    return out


def stack(chains: Sequence[Tensor]) -> NDArray[Any]:
    """One array with the chain in front."""
    array: NDArray[Any] = torch.stack([values.detach().cpu() for values in chains]).numpy()
    return array


def _data_name(model: LatentModel | None, x: Tensor) -> str:
    tokens = not x.is_floating_point() and (model is None or isinstance(model, LatentThoughtModel))
    return "tokens" if tokens else "x"


def _data_dims(x: Tensor) -> tuple[str, ...]:
    """Of x or its mask, (B, ...)."""
    inner = x.dim() - 1
    names = ("position",) if inner == 1 else tuple(f"x_dim_{i}" for i in range(inner))
    return ("sequence", *names)
