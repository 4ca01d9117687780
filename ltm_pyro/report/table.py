"""The table of held-out scores: mode by mode, in every unit, beside the control."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.diagnostics.estimates import COMPARED, exponential, loss_rate
from ltm_pyro.run.scoring import HeldOut

QUANTITIES = ("nats_per_sequence", "ppl_per_token", "ppl_per_byte", "bits_per_byte", "ppl_per_word")
"""Columns of numbers, each with its two errors."""
_SCORES = {
    "ppl_elbo": ("ELBO", "bound"),
    "ppl_iw": ("importance-weighted bound", "bound"),
    "ppl_predictive": ("prediction of the rest", "no bound"),
}


def held_out_rows(modes: dict[str, HeldOut], unit: str) -> list[dict[str, Any]]:
    """One row per mode and score, and one for the control on the same tokens, `byte` or `token`.

    Of each: `mode`, `score`, `kind` (`bound`, `no bound`, `exact`), and `QUANTITIES`, `ppl` being
    exp of the nats per unit, each with `_mc_se` and `_sampling_error`, two of which on either side
    hold 95 %; `None` where the unit is not known.
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


def _row(scores: xr.Dataset, name: str, unit: str) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for quantity in QUANTITIES:
        per = quantity.rpartition("_")[2]
        counted = "token" if per == unit else per
        names = (quantity, f"{quantity}_mc_se", f"{quantity}_sampling_error")
        if counted != "sequence" and not scores.get(f"n_{counted}s", np.zeros(1)).sum():
            out |= dict.fromkeys(names)
            continue
        rate, mc = loss_rate(scores, name, counted)
        value, nat = -rate.value, 1.0  # and what a nat is worth, for the errors
        if quantity.startswith("ppl"):
            value = nat = exponential(rate.value)
        elif quantity.startswith("bits"):
            value, nat = rate.value / math.log(2), 1.0 / math.log(2)
        out |= dict(zip(names, (value, nat * mc, nat * rate.error), strict=True))
    return out
