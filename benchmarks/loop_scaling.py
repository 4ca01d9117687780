"""What the fast loop costs as one thing grows and the rest stays: T_fast, T, V, batch, preset.

Two statements are checked on each axis, from medians over rounds that visit all points in turn:

- `spread`: largest over smallest cost per unit (a fast step; a token and fast step), minus 1. It is
  0 for a cost that is exactly proportional.
- `residual`: largest relative distance from the straight line a + b x that fits best. It allows a
  fixed cost a, and is 0 for a cost that is linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from loop_cases import Case, Workload

AXES = ("fast_steps", "length", "vocab_size", "batch_size", "preset")
SHORT_STEPS = 4
"""T_fast on the axes of V, B and preset; against T it is twice that."""


@dataclass(frozen=True)
class Point:
    """One point on an axis: its value, and the case there."""

    value: int | str
    case: Case


def axis_points(axis: str, base: Case, *, quick: bool = False) -> list[Point]:
    """The points of an axis.

    Args:
        axis: One of `AXES`.
        base: What stays; the window stays the preset's.
        quick: The first three points only.
    """
    short = replace(base, fast_steps=SHORT_STEPS)
    if axis == "fast_steps":
        one = replace(base, batch_size=min(base.batch_size, 2))
        points = [Point(n, replace(one, fast_steps=n)) for n in (4, 8, 16, 32, 64)]
    elif axis == "length":
        # Several rows: what a small batch costs more is for the axis of B to show.
        few = replace(base, batch_size=min(base.batch_size, 4), fast_steps=2 * SHORT_STEPS)
        points = [
            Point(n, replace(few, length=n, model={**base.model, "seq_len": n}))
            for n in (256, 512, 1024, 2048, 4096)
        ]
    elif axis == "vocab_size":
        few = replace(short, batch_size=2)
        points = [
            Point(n, replace(few, model={**base.model, "vocab_size": n}))
            for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
        ]
    elif axis == "batch_size":
        points = [Point(n, replace(short, batch_size=n)) for n in (1, 2, 4, 8, 16, 32)]
    else:
        one = replace(short, batch_size=1)
        points = [Point(n, replace(one, preset=n)) for n in ("nano", "tiny", "ltm-small")]
    return points[:3] if quick else points


def measure_axis(axis: str, base: Case, rounds: int, *, quick: bool = False) -> dict[str, Any]:
    """Times and peak memory of (c) and of the published algorithm along one axis.

    Args:
        axis: One of `AXES`.
        base: What stays.
        rounds: Visits of (c) to each point, of which medians are taken; the published algorithm
            visits once.
        quick: Few points.

    Returns:
        Plain types for JSON: `points`, and `linearity` of (c) where the axis is a number.
    """
    torch.compiler.reset()  # Each shape is a graph, and their number in one process is limited.
    points = axis_points(axis, base, quick=quick)
    works = [Workload(p.case, only=("a", "c")) for p in points]
    for work in works:
        work.warm_up(("c",), ("infer",))
    # The published algorithm is there to be seen beside it; one visit takes as long as all of c's.
    works[0].warm_up(("a",), ("infer",))
    seconds = [{"a": [work.seconds("a", "infer")], "c": list[float]()} for work in works]
    for _ in range(rounds):
        for work, times in zip(works, seconds, strict=True):
            times["c"].append(work.seconds("c", "infer"))
    rows = [
        _row(point, work, times) for point, work, times in zip(points, works, seconds, strict=True)
    ]
    out: dict[str, Any] = {"axis": axis, "rounds": rounds, "base": asdict(base), "points": rows}
    if axis != "preset":
        out["linearity"] = linearity(
            [float(p.value) for p in points], [r["seconds"]["c"] for r in rows]
        )
    if axis == "vocab_size":
        out["memory"] = {name: _memory_slope(rows, name) for name in ("a", "c")}
    return out


def _row(point: Point, work: Workload, times: Mapping[str, list[float]]) -> dict[str, Any]:
    case = point.case
    seconds = {name: median(values) for name, values in times.items()}
    return {
        "value": point.value,
        "tokens": case.tokens,
        "fast_steps": case.fast_steps,
        "compiled": work.compiled,
        "seconds": seconds,
        "seconds_per_fast_step": {n: s / case.fast_steps for n, s in seconds.items()},
        "peak_bytes": {name: work.peak(name, "infer") for name in seconds},
        "weight_bytes": sum(p.numel() * p.element_size() for p in work.model.parameters()),
    }


def linearity(x: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How far a cost is from proportional, and from a straight line.

    Args:
        x: Values on the axis, above 0.
        seconds: Cost at each.

    Returns:
        `intercept` (s) and `slope` (s per unit) of the line with the smallest relative residuals,
        `residual` (the largest of them) and `spread` (of the cost per unit).
    """
    at, cost = np.asarray(x), np.asarray(seconds)
    design = np.stack([np.ones_like(at), at], axis=1) / cost[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(design, np.ones_like(cost), rcond=None)
    fitted = intercept + slope * at
    unit = cost / at
    return {
        "intercept": float(intercept),
        "slope": float(slope),
        "residual": float(np.abs(cost / fitted - 1).max()),
        "spread": float(unit.max() / unit.min() - 1),
    }


def _memory_slope(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Growth of peak memory with V beyond the weights, and what one (B, T, V) tensor would take."""
    vocab = np.array([float(r["value"]) for r in rows])
    peak = np.array([float(r["peak_bytes"][name]) for r in rows])
    return {
        "smallest": float(peak.min()),
        "largest": float(peak.max()),
        "bytes_per_vocabulary_entry": float(np.polyfit(vocab, peak, 1)[0]),
        "bytes_per_vocabulary_entry_of_logits": 4.0 * rows[0]["tokens"],
    }
