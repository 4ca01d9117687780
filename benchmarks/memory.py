"""Measures the peak memory of training steps against what `ltm-pyro cost` predicts.

    .venv/bin/python benchmarks/memory.py
    .venv/bin/python benchmarks/memory.py --quick --json memory.json

Each case is a process of its own that takes training steps with `DualRateSVI` (2 fast steps each)
on random tokens; measured is the most that was resident (`getrusage`). The case `bare` is a
process that does one step of a model of a few weights: Python, torch and Pyro themselves. Linux.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ltm_pyro as ltm
from ltm_pyro.config import FitConfig, ModelConfig, preset
from ltm_pyro.diagnostics.memory import memory_report

STEPS = 2  # AdamW's moments exist from the second on
FAST_STEPS = 2
QUICK: dict[str, tuple[str, dict[str, Any]]] = {
    "nano": ("nano", {}),
    "nano, compiled": ("nano", {"compile": True}),
    "tiny": ("tiny", {}),
    "tiny, compiled": ("tiny", {"compile": True}),
}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "ltm-small": ("ltm-small", {}),
    "ltm-small, compiled": ("ltm-small", {"compile": True}),
    "ltm-small, compiled, bf16": ("ltm-small", {"compile": True, "precision": "bf16"}),
    "ltm-small, bf16": ("ltm-small", {"precision": "bf16"}),
    "ltm-small, checkpointing": ("ltm-small", {"checkpointing": True}),
    "ltm-small, micro_batch 2": ("ltm-small", {"micro_batch": 2}),
}
BARE = FitConfig(
    compile=False,
    batch_size=1,
    model=ModelConfig(
        vocab_size=8, seq_len=8, n_layers=1, width=8, n_heads=2, mlp_hidden=8, thought_dim=2
    ),
)


def main() -> None:
    """Measures each case in a process of its own, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures here; - prints them alone")
    parser.add_argument("--quick", action="store_true", help="nano and tiny only")
    parser.add_argument("--cases", nargs="+", help="these cases alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = QUICK if arguments.quick else QUICK | LARGE
    if arguments.child is not None:
        print(train(config_of(arguments.child)))
        return
    names = arguments.cases or list(cases)
    bare = {n: in_child(n) for n in ("bare", "bare, compiled")}
    rows = [row(name) for name in names]
    text = json.dumps({"versions": versions(), "bare_bytes": bare, "cases": rows}, indent=2)
    if arguments.json == "-":
        print(text)
        return
    print("\n".join(table(rows, bare)))
    if arguments.json is not None:
        Path(arguments.json).write_text(text)


def config_of(name: str) -> FitConfig:
    """The fit of a case."""
    if name.startswith("bare"):
        return replace(BARE, compile=name.endswith("compiled"))
    start, changes = (QUICK | LARGE)[name]
    return replace(preset(start), **{"compile": False, **changes})


def in_child(name: str) -> int:
    """Bytes resident at most in a fresh process, with a compile cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        command = ["/usr/bin/env", f"TORCHINDUCTOR_CACHE_DIR={cache}"]
        command += [sys.executable, __file__, "--child", name]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(told.split()[-1])


def train(config: FitConfig) -> int:
    """Bytes that this process held at most after a few training steps."""
    model = ltm.LatentThoughtModel(config.model)
    svi = ltm.DualRateSVI(
        model,
        ltm.build_guide(config.guide, model),
        fast=replace(config.fast, steps=FAST_STEPS),
        slow=config.slow,
        execution=ltm.Execution(
            compile=config.compile,
            precision=config.precision,
            micro_batch=config.micro_batch or None,
            checkpointing=config.checkpointing,
        ),
    )
    shape = (config.batch_size, config.model.seq_len)
    for _ in range(STEPS):
        svi.step(ltm.Batch(torch.randint(config.model.vocab_size, shape)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(name: str) -> dict[str, Any]:
    """Measured and predicted, in bytes."""
    measured, report = in_child(name), memory_report(config_of(name))
    return {
        "case": name,
        "measured_bytes": measured,
        "predicted_bytes": report.peak_process_bytes,
        "tensor_bytes": report.peak_tensor_bytes,
        "ratio": measured / report.peak_process_bytes,
    }


def table(rows: list[dict[str, Any]], bare: dict[str, int]) -> list[str]:
    """Markdown."""
    lines = [f"{name}: {n / 1e6:.0f} MB" for name, n in bare.items()]
    lines += ["", "| case | measured | predicted | of that tensors | measured / predicted |"]
    lines += ["|---|---|---|---|---|"]
    for r in rows:
        sizes = [r["measured_bytes"], r["predicted_bytes"], r["tensor_bytes"]]
        told = " | ".join(f"{n / 1e6:,.0f} MB" for n in sizes)
        lines.append(f"| {r['case']} | {told} | {r['ratio']:.2f} |")
    return lines


def versions() -> dict[str, str]:
    """Of what was measured."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "ltm": ltm.__version__}


if __name__ == "__main__":
    main()
