"""How a fit is getting on, from what its folder holds, whichever process writes it."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from ltm_pyro.checks import real_number, switch
from ltm_pyro.course import Metrics, bound_name
from ltm_pyro.diagnostics.held_out import PREFIX, EarlyStopping, best_step
from ltm_pyro.errors import InputError, printable
from ltm_pyro.reading import as_path
from ltm_pyro.run.fitting import RESTARTS
from ltm_pyro.run.folder import CONTROL, METRICS
from ltm_pyro.run.lock import writer_of
from ltm_pyro.run.metrics import MetricsFile
from ltm_pyro.run.opening import recorded_config

BARS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_WIDTH = 32  # characters of a sparkline
_RECENT = 20  # slow steps whose speed counts


def sparkline(values: Sequence[float], width: int = _WIDTH, bars: str = BARS) -> str:
    """The course of a series in one line, from its lowest to its highest value.

    Where there are more values than `width`, each character is the mean of a stretch; NaN leaves a
    gap.
    """
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)] if n else []
    means = [_mean(values[a:b]) for a, b in pairwise(edges)]
    known = [value for value in means if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    line = (bars[round((v - low) * scale)] if math.isfinite(v) else " " for v in means)
    return "".join(line)


def glance(folder: str | Path, bars: str = BARS) -> str:
    """A few lines on a run: how far it is, its bounds, KL, its speed and what is left.

    The folder may be written to meanwhile; sparklines are drawn with `bars`.
    """
    folder = as_path("run folder", folder)
    config = recorded_config(folder)
    label = f"run folder {str(folder)!r}"
    rows = MetricsFile(folder / METRICS, label).rows()
    control = MetricsFile(folder / CONTROL / METRICS, label).rows() if config.control else []
    step = int(rows[-1]["step"]) if rows else 0
    last = last_step(folder)
    writer = writer_of(folder)
    done = step >= last and (not config.control or len(control) >= last)
    if writer is not None:
        state = f"written by {writer}"
    elif done:
        state = "stopped early, done" if last < config.steps else "done"
    else:
        state = "nobody writes to it; go on with ltm-pyro fit --resume"
    lines = [
        f"{folder}: {config.preset} on {config.corpus.name}, slow step {step} of {last}, {state}"
    ]
    if rows:
        lines += _curves(rows, bars)
        lines.append(_pace("fit", rows, last, bars))
    if control:
        lines += _curves(control, bars, "control ")[:1]
        lines.append(f"  {'control':<19}slow step {int(control[-1]['step'])} of {last}")
    lines += _restarts(folder, config.restarts, last)
    return "\n".join(printable(line) for line in lines)


def last_step(folder: Path) -> int:
    """The slow step that the fit in `folder` ends with, as far as it is: see `Run.last_step`."""
    config = recorded_config(folder)
    patience = config.held_out.patience
    rows = MetricsFile(folder / METRICS, f"run folder {str(folder)!r}").rows() if patience else []
    return int(rows[-1]["step"]) if rows and EarlyStopping(patience).over(rows) else config.steps


def watch(
    folder: str | Path, *, every: float = 2.0, once: bool = False, stream: TextIO | None = None
) -> None:
    """Prints `glance` anew whenever something has changed, until nobody writes to the run.

    Args:
        folder: The run folder.
        every: Seconds between looks.
        once: Look once.
        stream: Where to print; standard output by default. A terminal is redrawn in place.

    Raises:
        InputError: if there is no run there, or `every` is not above 0.
    """
    every, once = real_number("every", every), switch("once", once)
    if not 0.0 < every <= 3600.0:
        raise InputError(f"every is {every:g}: must be seconds above 0, an hour at most")
    stream = sys.stdout if stream is None else stream
    folder = as_path("run folder", folder)
    bars = BARS if _encodes(stream, BARS) else PLAIN
    shown = ""
    while True:
        ended = writer_of(folder) is None  # asked first: what follows is then the last word
        text = _cut(glance(folder, bars), stream)
        if text != shown:
            above = f"\x1b[{shown.count(chr(10)) + 1}F\x1b[J" if shown and stream.isatty() else ""
            print(f"{above}{text}", file=stream, flush=True)
            shown = text
        if once or ended:
            return
        time.sleep(every)


def _curves(rows: Sequence[Metrics], bars: str, whose: str = "") -> list[str]:
    """The bound, the held-out bound where there is one, and KL."""
    name = bound_name(rows[-1])
    values = [row.get(f"{name}_per_token", math.nan) for row in rows]
    lines = [_curve(f"{whose}{name}/token", values, bars)]
    scored = [row for row in rows if f"{PREFIX}{name}" in row]
    best = best_step(scored)
    if best is not None:
        column = f"{PREFIX}{name}_per_token"
        told = f", best at step {best}"
        lines.append(_curve("held-out/token", [row[column] for row in scored], bars) + told)
    if "kl" in rows[-1]:
        lines.append(_curve("kl, nats/sequence", [row["kl"] for row in rows], bars))
    return lines


def _restarts(folder: Path, count: int, last: int) -> list[str]:
    """How far each restart is."""
    lines = []
    for number in range(1, count):
        place = folder / RESTARTS / str(number) / METRICS
        rows = MetricsFile(place, f"restart {number}").rows()
        step = int(rows[-1]["step"]) if rows else 0
        lines.append(f"  {f'restart {number}':<19}slow step {step} of {last}")
    return lines


def _curve(name: str, values: Sequence[float], bars: str) -> str:
    return f"  {name:<19}{sparkline(values, bars=bars):<{_WIDTH}} {values[-1]:.4g}"


def _pace(name: str, rows: Sequence[Metrics], last: int, bars: str) -> str:
    """Steps per second, and the time that the rest of the fit takes at that pace."""
    seconds = [row["seconds"] for row in rows]
    each = statistics.median(seconds[-_RECENT:])
    left = timedelta(seconds=round((last - int(rows[-1]["step"])) * each))
    line = _curve("steps/second", [1.0 / max(s, 1e-9) for s in seconds], bars)
    return f"{line.rpartition(' ')[0]} {1.0 / max(each, 1e-9):.3g}, {left} left of the {name}"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _encodes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _cut(text: str, stream: TextIO) -> str:
    """Lines that fit into a terminal, so that they can be drawn over."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(line[: width - 1] for line in text.split("\n"))
