"""Scores: what each estimates, with its errors, never on a draw that inference saw.

Per sequence, with z_s ~ q(z), s = 1..S, and log w_s = log p(x | z_s) + log p(z_s) - log q(z_s):

    nll_given_z = -mean_s log p(x | z_s)                     reconstruction; not a bound
    elbo        = -nll_given_z - KL(q || p)                  <= log p(x)
    iw_bound    = log mean_s w_s                             <= log p(x) in expectation, >= ELBO

and in mode `prefix`, where q saw the first part of x and the rest is scored:

    log_predictive = log mean_s p(rest | z_s)                q's prediction of the rest; no bound on
                                                             log p(rest | first part)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import one_of, refuse_other_batch, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.estimates import (
    clustered_ratio,
    documents_of,
    few_documents_note,
    khat_threshold,
    log_mean,
    partners_of,
    provenance,
    sequence_coords,
    totals,
)
from ltm_pyro.diagnostics.psis import MIN_DRAWS, pareto_khat
from ltm_pyro.doors import door
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Drawing, Noise, Stream, derive_seed

Mode = Literal["oracle", "prefix", "prior"]
MODES = {
    "oracle": "q saw the sequence that is scored; legitimate only as a bound, with the KL charged",
    "prefix": "q saw the first part of the sequence, and its prediction of the rest is scored",
    "prior": "no posterior: thoughts are drawn from the prior",
}
_UNITS = {"khat": "1", "mask": "1", "n_tokens": "tokens", "n_bytes": "bytes", "n_words": "words"}
SHUFFLED_DRAWS = 16
"""Draws per sequence for the shuffled-z control at most; it is a contrast, not a bound."""

DRAWS_AT_ONCE = 64
"""Draws of z held in memory together, (64, B, K, D)."""
TOKENS_AT_ONCE = 8192
"""Tokens that the decoder scores at a time: enough to keep a processor busy."""


def fresh_draws(
    q: TorchDistribution, ids: Tensor, draws: int, seed: int, *, other: bool = False
) -> Iterator[Tensor]:
    """S draws of q, batch shape (B,), as (up to `DRAWS_AT_ONCE`, B, K, D) at a time.

    Noise belongs to a sequence, by its id: its draws are the same in any batch, the first ones
    whatever S is. `other` draws are independent of the usual ones, to judge those by.
    """
    stream = Stream.CALIBRATE if other else Stream.SCORE
    draw = Drawing(Noise(derive_seed(seed, stream), ids))
    for start in range(0, draws, DRAWS_AT_ONCE):
        with torch.no_grad():
            z = draw(q, min(DRAWS_AT_ONCE, draws - start))
        yield z


class Likelihoods:
    """Log p(x | z_s), z (S, B, K, D) to (S, B) float64; memory grows neither with S nor with B.

    Args:
        model: Whose likelihood.
        batch: B sequences.
        parallel: Processes, which share the sequences; draws are cheap, and all made by each.
        at_once: Draws times sequences scored together; as many as `TOKENS_AT_ONCE` by default.
    """

    def __init__(
        self,
        model: LatentModel,
        batch: Batch,
        parallel: Parallel | None = None,
        at_once: int | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        shared = parallel is not None and len(batch) >= parallel.size
        self.parallel = parallel if shared else None
        mine = self.parallel.share(len(batch)) if self.parallel else slice(0, len(batch))
        size = max(1, TOKENS_AT_ONCE // batch.mask[0].numel()) if at_once is None else at_once
        starts = range(mine.start, mine.stop, size)
        self.parts = [slice(start, min(start + size, mine.stop)) for start in starts]
        self.draws = max(1, size // max(1, mine.stop - mine.start))

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """For all sequences, in every process."""
        return self.gathered(torch.cat([self._of_rows(rows, z) for rows in self.parts], dim=1), 1)

    def gathered(self, mine: Tensor, dim: int = 0) -> Tensor:
        """What all processes have of their rows, along `dim`, in every process."""
        return mine if self.parallel is None else self.parallel.gather_rows(mine, dim)

    def _of_rows(self, rows: slice, z: Tensor) -> Tensor:
        prepared = self.model.prepare(self.batch.select(rows))
        some = z[:, rows].split(self.draws)
        return torch.cat([self.model.log_likelihood(d, prepared).double() for d in some])


@dataclass(frozen=True)
class Terms:
    """Log densities of S draws of q for each of B sequences, (S, B) float64, nats."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) - log q(z)."""
        return self.log_likelihood + self.log_prior - self.log_q


def standard_error(draws: Tensor) -> Tensor:
    """Of the mean over S independent draws, (S, ...) to (...); NaN for one draw alone."""
    return draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else draws[0] * torch.nan


@torch.no_grad()
def score_terms(
    likelihoods: Likelihoods,
    q: TorchDistribution,
    prior: TorchDistribution,
    draws: int,
    seed: int,
    *,
    ids: Tensor | None = None,
    rows: Tensor | slice = slice(None),
    other: bool = False,
) -> Terms:
    """The terms of S fresh draws of q, batch shape (B,); `other` as in `fresh_draws`.

    `likelihoods` are of the sequences at `rows` of q, whose `ids` (B,) are theirs by default.
    """
    ids = likelihoods.batch.ids if ids is None else ids
    parts = []
    for z in fresh_draws(q, ids, draws, seed, other=other):
        log_q, z = q.log_prob(z).double()[:, rows], z[:, rows]
        parts.append((likelihoods(z), prior.log_prob(z).double(), log_q))
    return Terms(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@door
def evaluate(
    model: LatentModel,
    post: Posterior | None,
    batch: Batch,
    draws: int = 64,
    *,
    mode: Mode = "oracle",
    controls: bool = True,
    seed: int = 0,
    per_token: bool = False,
    parallel: Parallel | None = None,
) -> xr.Dataset:
    """Scores a batch on fresh draws.

    Args:
        model: Prior and likelihood.
        post: q for the sequences of `batch`, in the same order. In mode `prefix` it was fitted to
            `batch.prefix(n)`, and what it did not see is scored; sequences of which it saw
            everything are left out. Not needed in mode `prior`.
        batch: The sequences.
        draws: S, fresh draws per sequence, at least 2; `psis.MIN_DRAWS` or more for a k-hat.
        mode: `oracle`, `prefix` or `prior`; see `MODES`.
        controls: Also score z = 0 and another sequence's z.
        seed: Of the draws.
        per_token: Also score each token, which takes the decoder's work once more.
        parallel: Processes that share the decoder's work; each then returns all scores.

    Returns:
        Dataset over `sequence`, in nats per sequence, by coordinates of what is known of the
        sequences (`document`, `group`, ...; see `score_table`):

        - `elbo`, `nll_given_z`, `iw_bound`, each with `_se`; `kl`, `log_joint`; `n_tokens` and,
          where the raw text is known, `n_bytes` and `n_words` (parted by white space).
        - `khat`, not judged (`nan`) from fewer than `psis.MIN_DRAWS` draws.
        - the controls `nll_z0` (z = 0) and `nll_shuffled`, with `_se` (z of a sequence of another
          document, where documents are known; `nan` where there is no other).
        - In mode `prior` no KL is charged (`kl` is 0), because thoughts come from a distribution
          that did not see what is scored. In mode `prefix` there are `log_predictive` and its `_se`
          in place of `elbo`, `kl`, `iw_bound` and `log_joint`: q's prediction of the rest is no
          bound on log p(rest | first part), and can exceed it.
        - With `per_token` also over `token`, `nan` where nothing is scored: `log_score`,
          E_q log p(x_t | x_<t, z), whose sum over tokens is -`nll_given_z`; `log_score_iw`, the
          importance-weighted prediction of x_t from x_<t, whose sum is `iw_bound` or
          `log_predictive` (see `diagnostics.token_scores`); the scored positions, `mask`; and
          `price` (sequence), log mean p(z)/q(z), which the first scored token's `log_score_iw`
          includes (0 in the other modes). `loss_by_position` sums up.

        Attributes: what was asked, of what and by which versions; `kl_estimator` of these scores,
        and `objective_kl`, how the objective that q was fitted by got its own; `khat_limit` at S
        draws; `n_sequences`, `n_tokens`, `n_documents` (0 where not known: each sequence then
        stands for itself in errors), `effective_documents`; `left_out`, how many sequences mode
        `prefix` had nothing to score of; `note`, if something must be said beside the numbers. For
        all sequences together `ppl_elbo`, `ppl_iw` (mode `prefix`: `ppl_predictive`),
        `ppl_reconstruction` (not a bound), `ppl_z0`, `ppl_shuffled`: exp(total nats / total
        tokens); where the text is known `bits_per_byte_elbo` and so on, total bits / total bytes.
        `_se` is the Monte Carlo standard error given these sequences, `_sampling_se` that of having
        sampled their documents, so that two of it on either side hold 95 %
        (`diagnostics.estimates`).

    Raises:
        InputError: if the batch does not fit the model or the posterior.
    """
    one_of("mode", mode, MODES)
    # A standard error needs two.
    whole_number("draws", draws, 2, bytes_each=4 * len(batch) * math.prod(model.thought_shape))
    batch = batch.to(model.device)
    model.check(batch)
    scored = _scored_part(batch, post, mode)
    rows = torch.nonzero(scored.n_tokens)[:, 0] if mode == "prefix" else batch.indices
    scored = scored.select(rows)
    prior = model.prior()
    post = None if mode == "prior" else post
    q = prior.expand(torch.Size([len(batch)])) if post is None else post.distribution
    likelihoods = Likelihoods(model, scored, parallel)
    with torch.no_grad():
        terms = score_terms(likelihoods, q, prior, draws, seed, ids=batch.ids, rows=rows)
        columns = _prediction(terms) if mode == "prefix" else _bounds(terms, post)
        if controls:
            z = next(fresh_draws(q, batch.ids, min(draws, DRAWS_AT_ONCE), seed))
            columns |= _controls(likelihoods, z[:SHUFFLED_DRAWS, rows])
        if per_token:
            # Here, because it is built on this module, and few ask for it.
            from ltm_pyro.diagnostics.token_scores import token_scores

            charged = prior if post is not None and mode == "oracle" else None
            columns |= token_scores(likelihoods, q, charged, draws, seed, ids=batch.ids, rows=rows)
    data = _dataset(scored, columns)
    data.attrs = {
        **_settings(post, mode, draws, seed),
        **provenance(batch),
        "left_out": len(batch) - len(scored),
        **totals(data),
    }
    if notes := _notes(data, post):
        data.attrs["note"] = "; ".join(notes)
    return data


def _dataset(scored: Batch, columns: dict[str, Tensor]) -> xr.Dataset:
    """The columns with their units, and the sizes of the sequences."""
    columns["n_tokens"] = scored.n_tokens
    if (sizes := scored.text_sizes) is not None:
        columns["n_bytes"], columns["n_words"] = sizes
    data = xr.Dataset(coords=sequence_coords(scored, columns))
    for name, value in columns.items():
        dims, units = ("sequence", "token")[: value.dim()], _UNITS.get(name, "nats")
        data[name] = (dims, value.cpu().numpy(), {"units": units})
    return data


def _scored_part(batch: Batch, post: Posterior | None, mode: Mode) -> Batch:
    """The batch with the mask of what this mode scores."""
    if mode == "prior":
        return batch
    if post is None:
        raise InputError(f"mode {mode!r} needs a posterior: give svi.infer(batch)")
    refuse_other_batch(post, batch)
    if mode == "oracle":
        return batch
    rest = batch.mask & ~post.mask.to(batch.device)
    if not bool(rest.any()):
        raise InputError(
            "mode 'prefix' scores what the posterior did not see, and nothing is left: infer on "
            f"batch.prefix(n) with n below {int(batch.n_tokens.max())}, the longest sequence"
        )
    return replace(batch, mask=rest)


def _controls(likelihoods: Likelihoods, z: Tensor) -> dict[str, Tensor]:
    """The likelihood at z = 0 and at the thoughts of another document, z (S, B, K, D)."""
    nll_z0 = -likelihoods(torch.zeros_like(z[:1]))[0].to(z.dtype)
    partners = partners_of(z.shape[1], likelihoods.batch.documents)
    if partners is None:
        unknown = nll_z0 * torch.nan
        return {"nll_z0": nll_z0, "nll_shuffled": unknown, "nll_shuffled_se": unknown}
    shuffled = -likelihoods(z[:, partners.to(z.device)])
    return {
        "nll_z0": nll_z0,
        "nll_shuffled": shuffled.mean(0),
        "nll_shuffled_se": standard_error(shuffled),
    }


def _bounds(terms: Terms, post: Posterior | None) -> dict[str, Tensor]:
    """Bounds on log p(x) by S draws; without `post` z is from the prior and no KL is charged."""
    log_lik, log_prior = terms.log_likelihood, terms.log_prior
    nll, nll_se = -log_lik.mean(0), standard_error(log_lik)
    log_w, elbo_se = terms.log_weights, nll_se
    if post is None:
        log_w, kl = log_lik, torch.zeros_like(nll)
    elif not post.has_density:
        log_w, kl = torch.full_like(log_lik, -torch.inf), torch.full_like(nll, torch.inf)
    elif post.closed_form_kl is not None:
        kl = post.closed_form_kl.double()
    else:
        kl, elbo_se = (terms.log_q - log_prior).mean(0), standard_error(log_w)
    iw = log_mean(log_w)
    return {
        "elbo": -nll - kl,
        "elbo_se": elbo_se,
        "nll_given_z": nll,
        "nll_given_z_se": nll_se,
        "kl": kl,
        "iw_bound": iw.value,
        "iw_bound_se": iw.error,
        "log_joint": (log_lik + log_prior).mean(0),
        "khat": _khat(log_w),
    }


def _prediction(terms: Terms) -> dict[str, Tensor]:
    """What q predicts of the rest, by S draws; k-hat is of the likelihoods that are averaged."""
    log_lik = terms.log_likelihood
    predictive = log_mean(log_lik)
    return {
        "nll_given_z": -log_lik.mean(0),
        "nll_given_z_se": standard_error(log_lik),
        "log_predictive": predictive.value,
        "log_predictive_se": predictive.error,
        "khat": _khat(log_lik),
    }


def _khat(log_weights: Tensor) -> Tensor:
    if len(log_weights) < MIN_DRAWS:
        return torch.full_like(log_weights[0], torch.nan)
    return torch.from_numpy(pareto_khat(log_weights.cpu().numpy()))


def _settings(post: Posterior | None, mode: Mode, draws: int, seed: int) -> dict[str, Any]:
    """What was asked, and of what."""
    return {
        "mode": mode,
        "mode_meaning": MODES[mode],
        "draws": draws,
        "seed": seed,
        "guide": "prior" if post is None else post.family,
        "kl_estimator": post.kl_estimator if post is not None and mode == "oracle" else "none",
        "objective": "none" if post is None else post.objective,
        "objective_kl": "none" if post is None else post.objective_kl,
        "fast_optimizer": "none" if post is None else post.optimizer,
        "khat_limit": khat_threshold(draws),
    }


def _notes(data: xr.Dataset, post: Posterior | None) -> list[str]:
    """What must be said beside the numbers."""
    notes, left_out = [], data.attrs["left_out"]
    if post is not None and data.attrs["mode"] == "oracle" and not post.has_density:
        notes.append("a point mass has no density: its ELBO is -inf; see log_joint")
    if left_out:
        notes.append(
            f"{left_out} of {left_out + data.sizes['sequence']} sequences are left out: no longer "
            "than the prefix, so that nothing of them is left to score"
        )
    tokens = data["n_tokens"].values
    few = few_documents_note(clustered_ratio(tokens, tokens, documents_of(data)))
    return notes if few is None else [*notes, few]
