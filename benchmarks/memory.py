"""Holds what `ltm-pyro cost` says of memory against processes that really fit.

    .venv/bin/python benchmarks/memory.py
    .venv/bin/python benchmarks/memory.py --quick --json memory.json

Each case is fitted twice, in processes of their own of which the most that was resident is taken:
`DualRateSVI.fit` on random tokens, and with `--whole` the command `ltm-pyro fit`, corpus, control,
scores, figures and samples included. Beside them the formula, and what `cost --measure` finds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ltm_pyro as ltm
from ltm_pyro.config import FitConfig, preset
from ltm_pyro.diagnostics.memory import measured_bytes, memory_report

STEPS = 4
QUICK: dict[str, tuple[str, dict[str, Any]]] = {
    "nano": ("nano", {}),
    "nano, compiled": ("nano", {"compile": True}),
    "tiny": ("tiny", {}),
    "tiny, compiled": ("tiny", {"compile": True}),
}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture": ("mixture", {}),
    "tiny, bf16": ("tiny", {"precision": "bf16"}),
    "tiny, checkpointing": ("tiny", {"checkpointing": True}),
    "tiny, semi_amortized": ("tiny", {"guide": "semi_amortized"}),
    "ltm-small": ("ltm-small", {}),
    "ltm-small, compiled": ("ltm-small", {"compile": True}),
    "ltm-small, micro_batch 2": ("ltm-small", {"micro_batch": 2}),
}
CASES = QUICK | LARGE


def main() -> None:
    """Measures each case, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures here; - prints them alone")
    parser.add_argument("--quick", action="store_true", help="nano and tiny only")
    parser.add_argument("--whole", action="store_true", help="run the command fit too")
    parser.add_argument("--cases", nargs="+", help="these cases alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return train(config_of(arguments.child))
    names = arguments.cases or list(QUICK if arguments.quick else CASES)
    rows = [row(name, arguments.whole) for name in names]
    text = json.dumps({"versions": versions(), "cases": rows}, indent=2)
    if arguments.json == "-":
        print(text)
        return None
    print("\n".join(table(rows)))
    if arguments.json is not None:
        Path(arguments.json).write_text(text)
    return None


def config_of(name: str) -> FitConfig:
    """The fit of a case."""
    start, changes = CASES[name]
    return replace(preset(start), **{"compile": False, **changes})


def train(config: FitConfig) -> None:
    """A few steps on random tokens, by the clock's own loop."""
    model = ltm.LatentThoughtModel(config.model)
    svi = ltm.DualRateSVI(
        model,
        ltm.build_guide(config.guide, model),
        fast=replace(config.fast, steps=min(config.fast.steps, STEPS)),
        slow=replace(config.slow, thoughts_start=0.0),
        execution=ltm.Execution(
            compile=config.compile,
            precision=config.precision,
            micro_batch=config.micro_batch or None,
            checkpointing=config.checkpointing,
        ),
    )
    shape = (config.batch_size, config.model.seq_len)
    for _ in range(STEPS):
        svi.fit(ltm.Batch(torch.randint(config.model.vocab_size, shape)), steps=1)


def peak_of(command: list[str]) -> int:
    """Bytes resident at most in a process of its own, with a compile cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        child = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        )
        _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} has failed")
    return used.ru_maxrss * 1024


def row(name: str, whole: bool) -> dict[str, Any]:
    """Measured and predicted, in bytes."""
    config = config_of(name)
    report = memory_report(config)
    out = {
        "case": name,
        "trained_bytes": peak_of([__file__, "--child", name]),
        "measured_bytes": measured_bytes(config),
        "formula_bytes": report.peak_bytes,
        "tensor_bytes": report.tensor_bytes,
    }
    if whole:
        start, changes = CASES[name]
        options = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
        fit = ["-m", "ltm_pyro", "fit", "--preset", start, "--no-compile", *options]
        with tempfile.TemporaryDirectory() as folder:
            out["fit_bytes"] = peak_of([*fit, "--steps", "2", "--out", f"{folder}/run"])
    return out


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    names = [key for key in rows[0] if key != "case"]
    lines = [f"| case | {' | '.join(n.removesuffix('_bytes') for n in names)} | share of formula |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for r in rows:
        told = " | ".join(f"{r[name] / 1e6:,.0f} MB" for name in names)
        most = max(r[n] for n in names if n not in ("formula_bytes", "tensor_bytes"))
        lines.append(f"| {r['case']} | {told} | {most / r['formula_bytes']:.2f} |")
    return lines


def versions() -> dict[str, str]:
    """Of what was measured."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "ltm": ltm.__version__}


if __name__ == "__main__":
    main()
