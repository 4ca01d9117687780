"""Writes the README's table of the demo from its two finished runs, with what made it beside it.

    make demo
    .venv/bin/python benchmarks/readme_demo.py

Replaces what stands between the markers in README.md and copies the run's score figure to docs/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
PICTURE = Path("docs/demo_scores.png")


def main() -> None:
    """Rewrites the block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("mixture", type=Path, nargs="?", default=Path("runs/demo-mixture"))
    options = parser.parse_args()
    run = options.run
    known = json.loads((options.mixture / "scores.json").read_text())
    scores = json.loads((run / "scores.json").read_text())
    config = json.loads((run / "config.json").read_text())
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    block = "\n".join(
        [BEGIN, *table(scores, known), "", footnote(scores, config, run), "", *picture(), END]
    )
    readme.write_text(before + block + after)
    (ROOT / PICTURE).parent.mkdir(exist_ok=True)
    shutil.copyfile(run / "scores.png", ROOT / PICTURE)


def table(scores: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The scores of both texts as Markdown rows."""
    columns = [_column(scores), _column(known)]
    head = [
        f"| held-out text | pydoc, per {scores['unit']} | `mixture`, per {known['unit']} |",
        "|---|---|---|",
    ]
    return head + [f"| {name} | {columns[0][name]} | {columns[1][name]} |" for name in columns[0]]


def _column(scores: dict[str, Any]) -> dict[str, str]:
    control, panel = scores["control"], scores["collapse"]

    def with_errors(values: dict[str, Any], name: str) -> str:
        return (
            f"{values[name]:.3f} ± {values[f'{name}_sampling_se']:.3f} ± {values[f'{name}_se']:.3f}"
        )

    def against_control(name: str) -> str:
        pair = scores["against_control"][name]
        return f"{pair['ratio']:.4f} ± {pair['ratio_error']:.4f}: {pair['verdict']}"

    return {
        "`ppl_elbo`, with thoughts": with_errors(scores, "ppl_elbo"),
        "`ppl_iw`, with thoughts": f"{with_errors(scores, 'ppl_iw')}, S = {scores['draws']}",
        "control: same decoder, no z": with_errors(control, "ppl_elbo"),
        "`ppl_elbo`, paired ratio to the control": against_control("ppl_elbo"),
        "`ppl_iw`, paired ratio to the control": against_control("ppl_iw"),
        "KL, nats per sequence": f"{panel['kl']:.2f} ± {panel['kl_se']:.2f}",
        "loss with another document's z, nats per sequence": (
            f"{panel['penalty_shuffled']:.2f} ± {panel['penalty_shuffled_se']:.2f}"
        ),
        "k-hat": scores["khat"]["in_words"],
    }


def footnote(scores: dict[str, Any], config: dict[str, Any], run: Path) -> str:
    """What the numbers are, and what made them."""
    settings = config["config"]
    with (run / "metrics.csv").open() as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    versions = ", ".join(
        f"{name} {scores[f'{name}_version']}" for name in ("ltm_pyro", "torch", "pyro")
    )
    return (
        f"Mode {scores['mode']}: {scores['mode_meaning']}. First error: of having sampled these "
        f"documents ({scores['n_documents']} of pydoc, {scores['n_sequences']} sequences, "
        f"{scores['n_tokens']} {scores['unit']}s); second: Monte Carlo. One fit of each. Made by "
        f"`make demo` and `benchmarks/readme_demo.py`: on pydoc {settings['steps']} slow steps for "
        f"each model, seed {settings['seed']}, corpus SHA-256 {config['corpus']['sha256'][:12]}, "
        f"{versions}, Python {platform.python_version()}; {seconds:.0f} s for that fit on "
        f"{os.cpu_count()} cores ({platform.machine()})."
    )


def picture() -> list[str]:
    """The figure with its reading."""
    return [
        f"![Held-out gain over the control, sequence by sequence]({PICTURE})",
        "",
        "On pydoc: each sequence's gain over the control, a decoder without thoughts that is",
        "trained apart, in nats. Above the dashed line this fit gives the sequence more",
        "probability than that fit does; that thoughts are why shows on average only, over seeds.",
        "Another document's thoughts (orange) must score lower, or z is not used.",
    ]


if __name__ == "__main__":
    main()
