"""The table of held-out scores: mode by mode, in every unit, beside the control."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.diagnostics.estimates import (
    COMPARED,
    PERPLEXITIES,
    clustered_mean,
    documents_of,
    losses,
    per_token_perplexity,
)
from ltm_pyro.run.scoring import HeldOut

UNITS = ("token", "byte", "word")
QUANTITIES = ("nats_per_sequence", "ppl_per_token", "ppl_per_byte", "bits_per_byte", "ppl_per_word")
"""Columns of numbers, each with its two errors."""
_SCORES = {
    "ppl_elbo": ("ELBO", "bound"),
    "ppl_iw": ("importance-weighted bound", "bound"),
    "ppl_predictive": ("prediction of the rest", "no bound"),
}


def held_out_rows(modes: dict[str, HeldOut], unit: str) -> list[dict[str, Any]]:
    """One row per mode and score, and one for the control on the same tokens.

    Args:
        modes: Scores by mode.
        unit: What a token stands for, `byte` or `token`.

    Returns:
        Of each: `mode`, `score`, `kind` (`bound`, `no bound`, `exact`); `nats_per_sequence`,
        `ppl_per_token`, `ppl_per_byte`, `ppl_per_word` (exp of the nats per unit) and
        `bits_per_byte`, each with `_mc_se` and `_sampling_error`, two of which on either side hold
        95 %; `None` where the unit is not known.
    """
    rows: list[dict[str, Any]] = []
    for mode, held_out in modes.items():
        for name in COMPARED:
            if name in held_out.scores.attrs and math.isfinite(held_out.scores.attrs[name]):
                score, kind = _SCORES[name]
                found = _row(held_out.scores, name, unit)
                rows.append({"mode": mode, "score": score, "kind": kind, **found})
        if held_out.control is not None and mode != "prior":
            named = {"mode": mode, "score": "control without thoughts", "kind": "exact"}
            rows.append({**named, **_row(held_out.control, "ppl_z0", unit)})
    return rows


def _row(scores: xr.Dataset, name: str, unit: str) -> dict[str, Any]:
    column, sign = PERPLEXITIES[name]
    documents = documents_of(scores)
    nats, mean = losses(scores, name), clustered_mean(scores[column], documents)
    se = scores[f"{column}_se"].values if f"{column}_se" in scores else np.zeros(len(nats))
    mc = float(np.sqrt(np.square(se).sum())) / len(nats)
    out = _numbers("nats_per_sequence", -sign * mean.value, mc, mean.error)
    for each in UNITS:
        counted = scores.get("n_tokens" if each == unit else f"n_{each}s")
        if counted is None or not counted.values.sum():
            out |= _numbers(f"ppl_per_{each}", None, None, None)
            continue
        found = per_token_perplexity("p", nats, counted.values, se, documents)
        values = [found[key] for key in ("p", "p_se", "p_sampling_se")]
        out |= _numbers(f"ppl_per_{each}", *values)
        if each == "byte":
            ppl, *errors = values
            scale = ppl * math.log(2)  # the delta method, backwards
            out |= _numbers("bits_per_byte", math.log2(ppl), *(e / scale for e in errors))
    if "bits_per_byte" not in out:
        out |= _numbers("bits_per_byte", None, None, None)
    return out


def _numbers(
    name: str, value: float | None, mc_se: float | None, sampling: float | None
) -> dict[str, float | None]:
    return {name: value, f"{name}_mc_se": mc_se, f"{name}_sampling_error": sampling}
