"""The perplexity that the published procedure prints, corrected step by step to a bound.

The code released with Kong et al. (2025) fits q by mean field from a log variance of -5, on ONE
draw of the noise that stays for the whole fast loop, and scores on that same draw; its windows run
across documents, their first token is not scored, and the perplexity is a mean of exponentials.
Each of these is put right in turn here, on the same tokens and the same weights. docs/
published_perplexity.md says what follows from the table, and what does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from ltm_pyro.checks import MOST, whole_number
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides.mean_field import MeanField
from ltm_pyro.inference.posterior import Posterior

START_LOG_VARIANCE = -5.0
"""Where the released code starts the log variances of q."""

Row = tuple[str, Batch, Posterior, bool, bool]
"""What changed, tokens, q, whether it is scored on its own draw, whether exponentials are meant."""


@door
def as_published(
    svi: DualRateSVI,
    batch: Batch,
    *,
    fast_steps: int | None = None,
    steps: int | None = None,
    draws: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """The published score of these tokens, then one correction after another.

    Args:
        svi: A fit; its decoder is left as it is.
        batch: B held-out sequences (B, T), in the order of their documents.
        fast_steps: T_fast of the published loop; the fast clock's own by default.
        steps: T_fast of the last row; the fast clock's own by default.
        draws: S, fresh draws per sequence wherever fresh draws score.
        seed: Of those draws.

    Returns:
        One row per correction, each on top of those above it: `change`; `ppl_per_token`, what is
        printed; `is_bound`, whether that is an upper bound on the model's perplexity, up to the
        Monte Carlo error; `ppl_fresh_per_token`, a bound always: the same q on fresh draws, exp of
        total nats over total tokens, with `ppl_fresh_per_token_se` (Monte Carlo);
        `kl_per_sequence`, nats; `n_sequences`, `n_tokens`.

    Raises:
        InputError: if the batch is not of sequences of tokens, or too short to leave a token out.
    """
    whole_number("draws", draws, 2, MOST)
    if batch.mask.dim() != 2 or int(batch.n_tokens.sum()) <= len(batch) or batch.mask.shape[1] < 2:
        raise InputError("as_published scores sequences of 2 tokens or more: give such a batch")
    batch = batch.to(svi.model.device)
    table = []
    for change, tokens, post, own, meant in _rows(svi, batch, fast_steps, steps):
        fresh = evaluate(svi.model, post, tokens, draws, controls=False, seed=seed)
        loss = -fresh["elbo"].values
        if own:
            assert post.own_draw_elbo is not None
            loss = -post.own_draw_elbo.double().cpu().numpy()
        table.append(
            {
                "change": change,
                "ppl_per_token": _perplexity(loss, fresh["n_tokens"].values, meant=meant),
                "is_bound": not own,
                "ppl_fresh_per_token": fresh.attrs["ppl_elbo"],
                "ppl_fresh_per_token_se": fresh.attrs["ppl_elbo_se"],
                "kl_per_sequence": float(fresh["kl"].mean()),
                "n_sequences": len(tokens),
                "n_tokens": int(fresh["n_tokens"].sum()),
            }
        )
    return pd.DataFrame(table)


def _rows(
    svi: DualRateSVI, batch: Batch, fast_steps: int | None, steps: int | None
) -> Iterator[Row]:
    published = Fast(
        steps=svi.fast.steps if fast_steps is None else fast_steps, optimizer="adam",
        lr=0.34, schedule="cosine", final_fraction=0.1, noise="fixed", fixed_draws=1,
    )  # fmt: skip
    fresh = replace(published, noise="fresh", fixed_draws=Fast().fixed_draws)
    windows = across_documents(batch)
    unscored = windows.suffix(1)
    unscored = unscored.select(torch.nonzero(unscored.n_tokens)[:, 0])
    first = _fitted(svi, unscored, published)
    yield "as published", unscored, first, True, True
    yield "total nats over total tokens, not a mean of exponentials", unscored, first, True, False
    whole = _fitted(svi, windows, published)
    yield "the first token of a window is scored too", windows, whole, True, False
    within = _fitted(svi, batch, published)
    yield "windows end where documents end", batch, within, True, False
    yield "scored on fresh draws", batch, within, False, False
    yield "fitted on fresh draws too", batch, _fitted(svi, batch, fresh), False, False
    start = _fitted(svi, batch, fresh, 0.0)
    yield "q starts at the prior, not at log variance -5", batch, start, False, False
    yield "this fit's own guide and fast clock", batch, svi.infer(batch, steps), False, False


def _fitted(
    svi: DualRateSVI, batch: Batch, fast: Fast, log_variance: float = START_LOG_VARIANCE
) -> Posterior:
    """Mean field by a fast loop of its own, on the weights of `svi`."""
    guide = MeanField(svi.model, init_log_variance=log_variance).to(svi.model.device)
    return DualRateSVI(
        svi.model, guide, fast, svi.slow, seed=svi.seed, execution=svi.execution
    ).infer(batch)


def across_documents(batch: Batch) -> Batch:
    """The same tokens in windows of T whatever their documents, ids 0, 1, ...; the last shorter."""
    tokens, length = batch.observed[batch.mask], batch.mask.shape[1]
    rows = -(-len(tokens) // length)
    x = tokens.new_zeros(rows * length)
    x[: len(tokens)] = tokens
    mask = torch.arange(rows * length, device=x.device) < len(tokens)
    return Batch(x.view(rows, length), mask.view(rows, length))


def _perplexity(nats: NDArray[np.float64], n_tokens: NDArray[np.int64], *, meant: bool) -> float:
    """exp(total nats / total tokens), or the mean of exp(nats / tokens) over sequences."""
    with np.errstate(over="ignore"):
        if meant:
            return float(np.exp(nats / n_tokens).mean())
        return float(np.exp(nats.sum() / n_tokens.sum()))


@door
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
        InputError: if the fast clock draws fresh noise, so that there are no own draws, or q is a
            point mass, which has no ELBO to compare with.
    """
    if svi.fast.noise != "fixed":
        raise InputError(
            'score_on_own_draws needs Fast(noise="fixed"): fresh noise has no own draws'
        )
    if not svi.guide.has_density:
        raise InputError(
            f"score_on_own_draws compares ELBOs, and guide {svi.guide.family!r} is a point mass "
            "without one: use a guide with a density such as 'mean_field'"
        )
    post = svi.infer(batch)
    assert post.own_draw_elbo is not None
    data = evaluate(svi.model, post, batch, draws)[["elbo", "elbo_se"]]
    own = post.own_draw_elbo.double().cpu().numpy()
    data["own_draw_objective"] = ("sequence", own)
    data["excess"] = data["own_draw_objective"] - data["elbo"]
    data.attrs = {"note": "own_draw_objective is not a bound", "fixed_draws": svi.fast.fixed_draws}
    return data
