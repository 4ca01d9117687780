"""Scores: what each estimates, with its Monte Carlo error, never on a draw that inference saw.

Per sequence, with z_s ~ q(z), s = 1..S, and log w_s = log p(x | z_s) + log p(z_s) - log q(z_s):

    nll_given_z = -mean_s log p(x | z_s)                     reconstruction; not a bound
    elbo        = -nll_given_z - KL(q || p)                  <= log p(x)
    iw_bound    = log mean_s w_s                             <= log p(x) in expectation, >= ELBO
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

import ltm_pyro
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.labels import corpus_attrs, sequence_coords
from ltm_pyro.diagnostics.partners import partners_of
from ltm_pyro.diagnostics.psis import pareto_khat
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.exclusive import exclusive
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.parallel import Parallel
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.random import Stream, derive_seed, seeded
from ltm_pyro.models.base import LatentModel

Mode = Literal["oracle", "prefix", "prior"]
MODES = {
    "oracle": "q saw the sequence that is scored; legitimate only as a bound, with the KL charged",
    "prefix": "q saw the first part of the sequence; the rest is scored, with q as predictive",
    "prior": "no posterior: thoughts are drawn from the prior",
}
SHUFFLED_DRAWS = 16
"""Draws per sequence for the shuffled-z control at most; it is a contrast, not a bound."""
TOKENS_AT_ONCE = 8192
"""Tokens that the decoder scores at a time: enough to keep a processor busy."""


@exclusive
def evaluate(
    model: LatentModel,
    post: Posterior | None,
    batch: Batch,
    draws: int = 64,
    *,
    mode: Mode = "oracle",
    controls: bool = True,
    seed: int = 0,
    parallel: Parallel | None = None,
) -> xr.Dataset:
    """Scores a batch on fresh draws.

    Args:
        model: Prior and likelihood.
        post: q for the sequences of `batch`, in the same order. In mode `prefix` it was fitted to
            `batch.prefix(n)`, and what it did not see is scored. Not needed in mode `prior`.
        batch: The sequences.
        draws: S, fresh draws per sequence, at least 2.
        mode: `oracle`, `prefix` or `prior`; see `MODES`.
        controls: Also score z = 0 and another sequence's z.
        seed: Of the draws.
        parallel: Processes that share the decoder's work; each then returns all scores.

    Returns:
        Dataset over `sequence` (coordinate: stable ids), in nats per sequence: `elbo`, `elbo_se`,
        `nll_given_z`, `nll_given_z_se`, `kl`, `iw_bound`, `iw_bound_se`, `log_joint`; `khat`;
        `n_tokens`; and the controls `nll_z0` (z = 0) and `nll_shuffled` (z of a sequence of
        another document, where documents are known; `nan` where there is no other), with
        `nll_shuffled_se`. In modes `prefix` and `prior` no KL is charged (`kl` is 0), because
        thoughts come from a distribution that did not see what is scored.

        Attributes: `mode` and its meaning, `draws`, `seed`, `guide`, `kl_estimator` of these
        scores, `objective` that q was fitted by and `objective_kl`, how it got its KL, versions,
        and for all sequences together `ppl_elbo`, `ppl_iw`, `ppl_reconstruction` (not a bound),
        `ppl_z0`, `ppl_shuffled`: exp(total nats / total tokens). `_se` is the Monte Carlo standard
        error given these sequences, `_sampling_se` that of sampling the sequences.

    Raises:
        InputError: if the batch does not fit the model or the posterior.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    if draws < 2:
        raise InputError(f"draws is {draws}: a standard error needs at least 2")
    batch = batch.to(model.device)
    model.check(batch)
    scored = _scored_part(batch, post, mode)
    q, prior = _proposal(model, post, mode, len(batch))
    with torch.no_grad(), seeded(derive_seed(seed, Stream.SCORE), batch.device):
        z = q.sample(torch.Size([draws]))
        likelihoods = _Likelihoods(model, scored, parallel or Parallel())
        log_lik = likelihoods(z)
        log_prior = prior.log_prob(z).double()
        log_q = q.log_prob(z).double() if mode == "oracle" else log_prior
        if mode == "oracle" and post is not None and not post.has_density:
            log_q = torch.full_like(log_prior, torch.inf)
        columns = _columns(log_lik, log_prior, log_q, post if mode == "oracle" else None)
        if controls:
            columns.update(_controls(likelihoods, z))
    columns["n_tokens"] = scored.n_tokens
    data = xr.Dataset(
        {name: ("sequence", value.cpu().numpy()) for name, value in columns.items()},
        coords=sequence_coords(batch),
    )
    data["khat"] = ("sequence", pareto_khat((log_lik + log_prior - log_q).cpu().numpy()))
    for name in data.data_vars:
        data[name].attrs["units"] = {"khat": "1", "n_tokens": "tokens"}.get(str(name), "nats")
    data.attrs = {**_attributes(data, post, mode, draws, seed), **corpus_attrs(batch)}
    return data


def _scored_part(batch: Batch, post: Posterior | None, mode: Mode) -> Batch:
    """The batch with the mask of what this mode scores."""
    if mode == "prior":
        return batch
    if post is None:
        raise InputError(f"mode {mode!r} needs a posterior: give svi.infer(batch)")
    post.refuse_other_batch(batch)
    if mode == "oracle":
        return batch
    rest = batch.mask & ~post.mask.to(batch.device)
    if not bool(rest.any(1).all()):
        raise InputError(
            "mode 'prefix' scores what the posterior did not see, and for at least one sequence "
            "nothing is left: infer on batch.prefix(n) with n below every sequence's length"
        )
    return replace(batch, mask=rest)


def _proposal(
    model: LatentModel, post: Posterior | None, mode: Mode, rows: int
) -> tuple[TorchDistribution, TorchDistribution]:
    """Where thoughts are drawn, batch shape (B,), and the prior."""
    prior = model.prior()
    if mode == "prior" or post is None:
        return prior.expand(torch.Size([rows])), prior
    return post.distribution, prior


class _Likelihoods:
    """Log p(x | z_s), (S, B) float64, for one draw and some rows at a time.

    So memory grows neither with S nor with B. Processes share the sequences; draws are cheap, and
    are all made by each.
    """

    def __init__(self, model: LatentModel, batch: Batch, parallel: Parallel) -> None:
        self.model = model
        self.parallel = Parallel() if len(batch) < parallel.size else parallel
        mine = self.parallel.share(len(batch))
        size = max(1, TOKENS_AT_ONCE // batch.mask.shape[1])
        starts = range(mine.start, mine.stop, size)
        self.parts = [slice(start, min(start + size, mine.stop)) for start in starts]
        self.batch = batch

    def __call__(self, z: Tensor) -> Tensor:
        mine = torch.cat([self._of_rows(rows, z) for rows in self.parts], dim=1)
        return self.parallel.gather_rows(mine, dim=1)

    def _of_rows(self, rows: slice, z: Tensor) -> Tensor:
        prepared = self.model.prepare(self.batch.select(rows))
        return torch.stack([self.model.log_likelihood(d[rows], prepared).double() for d in z])


def _controls(likelihoods: _Likelihoods, z: Tensor) -> dict[str, Tensor]:
    """The likelihood at z = 0 and at the thoughts of another document, z (S, B, K, D)."""
    nll_z0 = -likelihoods(torch.zeros_like(z[:1]))[0].to(z.dtype)
    partners = partners_of(z.shape[1], likelihoods.batch.documents)
    if partners is None:
        unknown = nll_z0 * torch.nan
        return {"nll_z0": nll_z0, "nll_shuffled": unknown, "nll_shuffled_se": unknown}
    shuffled = -likelihoods(z[:SHUFFLED_DRAWS, partners.to(z.device)])
    return {
        "nll_z0": nll_z0,
        "nll_shuffled": shuffled.mean(0),
        "nll_shuffled_se": _standard_error(shuffled),
    }


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean over the first dimension."""
    return values.std(0) / math.sqrt(len(values)) if len(values) > 1 else values[0] * torch.nan


def _columns(
    log_lik: Tensor, log_prior: Tensor, log_q: Tensor, post: Posterior | None
) -> dict[str, Tensor]:
    """The scores of S draws, (S, B) each; without `post` no KL is charged."""
    nll, nll_se = -log_lik.mean(0), _standard_error(log_lik)
    log_w = log_lik + log_prior - log_q
    if post is None:
        kl, elbo_se = torch.zeros_like(nll), nll_se
    elif post.kl_estimator == "analytic":
        kl, elbo_se = post.kl().double(), nll_se
    else:
        kl, elbo_se = (log_q - log_prior).mean(0), _standard_error(log_w)
    # Relative to the largest weight, so that nothing overflows.
    top = log_w.amax(0)
    weight = torch.exp(log_w - torch.where(top.isfinite(), top, 0.0))
    return {
        "elbo": -nll - kl,
        "elbo_se": elbo_se,
        "nll_given_z": nll,
        "nll_given_z_se": nll_se,
        "kl": kl,
        "iw_bound": log_w.logsumexp(0) - math.log(len(log_w)),
        "iw_bound_se": _standard_error(weight) / weight.mean(0),
        "log_joint": (log_lik + log_prior).mean(0),
    }


def _attributes(
    data: xr.Dataset, post: Posterior | None, mode: Mode, draws: int, seed: int
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "mode": mode,
        "mode_meaning": MODES[mode],
        "draws": draws,
        "seed": seed,
        "guide": "prior" if post is None or mode == "prior" else post.family,
        "kl_estimator": post.kl_estimator if post is not None and mode == "oracle" else "none",
        "objective": "none" if post is None or mode == "prior" else post.objective,
        "objective_kl": "none" if post is None or mode == "prior" else post.objective_kl,
        "n_sequences": data.sizes["sequence"],
        "n_tokens": int(data["n_tokens"].sum()),
        "ltm_pyro_version": ltm_pyro.__version__,
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
    }
    for name, column, sign, error in (
        ("ppl_elbo", "elbo", -1.0, "elbo_se"),
        ("ppl_iw", "iw_bound", -1.0, "iw_bound_se"),
        ("ppl_reconstruction", "nll_given_z", 1.0, "nll_given_z_se"),
        ("ppl_z0", "nll_z0", 1.0, None),
        ("ppl_shuffled", "nll_shuffled", 1.0, "nll_shuffled_se"),
    ):
        if column not in data:
            continue
        mc = None if error is None else data[error].values
        out.update(
            per_token_perplexity(name, sign * data[column].values, data["n_tokens"].values, mc)
        )
    out["ppl_reconstruction_is_a_bound"] = "no: the KL is not charged"
    if post is not None and mode == "oracle" and not post.has_density:
        out["note"] = "a point mass has no density: its ELBO is -inf; see log_joint"
    return out


def per_token_perplexity(
    name: str, nats: np.ndarray, n_tokens: np.ndarray, mc_se: np.ndarray | None = None
) -> dict[str, float]:
    """exp(total nats / total tokens) with its two standard errors, by the delta method.

    Args:
        name: Under which name.
        nats: (n,) negative log-likelihoods or bounds per sequence.
        n_tokens: (n,) their lengths.
        mc_se: (n,) Monte Carlo standard errors of `nats`.

    Returns:
        `name`; `name_se`, the Monte Carlo error given these sequences (0 where `nats` are exact);
        `name_sampling_se`, the error of having sampled n sequences (ratio estimator).
    """
    total = float(n_tokens.sum())
    rate = float(nats.sum()) / total
    ppl = math.exp(rate) if rate < 700 else math.inf
    n, sampling = len(nats), math.nan
    if n > 1 and math.isfinite(rate):
        spread = nats - rate * n_tokens
        sampling = math.sqrt(n / (n - 1) * float(np.square(spread).sum()))
    mc = 0.0 if mc_se is None else math.sqrt(float(np.square(mc_se).sum()))
    return {
        name: ppl,
        f"{name}_se": ppl * mc / total,
        f"{name}_sampling_se": ppl * sampling / total,
    }


@exclusive
def score_on_own_draws(svi: DualRateSVI, batch: Batch, draws: int = 64) -> xr.Dataset:
    """The trap of fixed noise, made visible: the objective on its own draws beside the honest ELBO.

    With `noise="fixed"` q adapts to the very draws it is fitted on, and the objective on them can
    exceed log p(x) (DADVI with few draws; Giordano, Ingram & Broderick 2024). This diagnostic is
    the only place where that number is shown, and it is not called a bound.

    Args:
        svi: With `Fast(noise="fixed")`.
        batch: The sequences; they are inferred anew.
        draws: S, fresh draws for the honest value.

    Returns:
        Dataset over `sequence`, nats: `own_draw_objective` (NOT a bound), `elbo`, `elbo_se` (fresh
        draws), `excess` (the first minus the second).

    Raises:
        InputError: if the fast clock draws fresh noise, so that there are no own draws.
    """
    if svi.fast.noise != "fixed":
        raise InputError(
            'score_on_own_draws needs Fast(noise="fixed"): fresh noise has no own draws'
        )
    post = svi.infer(batch)
    assert post.own_draw_elbo is not None
    data = evaluate(svi.model, post, batch, draws)[["elbo", "elbo_se"]]
    own = post.own_draw_elbo.double().cpu().numpy()
    data["own_draw_objective"] = ("sequence", own)
    data["excess"] = data["own_draw_objective"] - data["elbo"]
    data.attrs = {"note": "own_draw_objective is not a bound", "fixed_draws": svi.fast.fixed_draws}
    return data
