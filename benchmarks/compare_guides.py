"""Writes the comparison of guide families in docs/guides.md, with what made it beside it.

    make demo
    .venv/bin/python benchmarks/compare_guides.py runs/demo

Runs `ltm-pyro compare` on the run, replaces what stands between the markers in docs/guides.md and
copies the figure to docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from ltm_pyro.cli import main as ltm_pyro_command
from ltm_pyro.diagnostics.compare import Comparison

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"
PICTURE = "guide_comparison.png"
PAGE = ROOT / "docs" / "guides.md"
OPTIONS = (
    "--guides mean_field,low_rank,full_rank,amortized,semi_amortized --reference hmc --sequences 32"
)


def main() -> None:
    """Compares, then rewrites the block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    run = parser.parse_args().run
    if ltm_pyro_command(["compare", str(run), *shlex.split(OPTIONS)]):
        raise SystemExit("the comparison failed")
    frame = pd.read_csv(run / "comparison.csv", index_col=0)
    data = xr.open_datatree(run / "comparison.nc", engine="h5netcdf").to_dataset()
    config = json.loads((run / "config.json").read_text())
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    block = [BEGIN, *table(frame), "", *notes(data), "", footnote(data, config), ""]
    block += [f"![Guide families on the same sequences]({PICTURE})", END]
    PAGE.write_text(before + "\n".join(block) + after)
    shutil.copyfile(run / "comparison.png", PAGE.parent / PICTURE)


def table(frame: pd.DataFrame) -> list[str]:
    """One row per guide, as Markdown."""
    head = (
        "| guide | ELBO | difference | per token | truncation gap | k-hat | mean error | "
        "scale ratio | evaluations | verdict |"
    )
    rows = [head, "|" + "---|" * 10]
    for guide, row in frame.iterrows():
        cells = [
            f"`{guide}`",
            f"{row['elbo_per_sequence']:.2f}",
            _error(row, "elbo_difference_per_sequence", 2),
            _error(row, "elbo_difference_per_token", 4),
            _error(row, "truncation_gap_per_sequence", 2),
            _khat(row),
            f"{row['reference_mean_error_median']:.2f}",
            f"{row['reference_scale_ratio_median']:.2f}",
            f"{row['decoder_evaluations']:.0f} ({row['training_evaluations']:.0f})",
            str(row["verdict"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _khat(row: Any) -> str:
    median = float(row["khat_median"])
    share = float(row["khat_share_unreliable"])
    return "not judged" if math.isnan(median) else f"{median:.2f} ({share:.0%})"


def _error(row: Any, name: str, digits: int) -> str:
    mean, error = float(row[name]), float(row[f"{name}_error"])
    if not math.isfinite(mean) or (mean == 0 and error == 0):
        return "-"
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def notes(data: xr.Dataset) -> list[str]:
    """What must be known beside the table."""
    return [f"- {note}" for note in Comparison(data).notes]


def footnote(data: xr.Dataset, config: dict[str, Any]) -> str:
    """What made the table."""
    versions = ", ".join(
        f"{name} {data.attrs[f'{name}_version']}" for name in ("ltm_pyro", "torch", "pyro")
    )
    return (
        f"Made by `make demo`, then `benchmarks/compare_guides.py` (`ltm-pyro compare runs/demo "
        f"{OPTIONS}`, seed {data.attrs['seed']}): corpus SHA-256 "
        f"{config['corpus']['sha256'][:12]}, {versions}, Python {platform.python_version()}; "
        f"on {os.cpu_count()} cores ({platform.machine()})."
    )


if __name__ == "__main__":
    main()
