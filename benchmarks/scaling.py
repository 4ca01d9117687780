"""What a slow step costs on 1 to 1024 GPUs: a small simulator, checked against this machine.

    .venv/bin/python benchmarks/scaling.py                 # prints, and rewrites docs/scaling.md
    .venv/bin/python benchmarks/scaling.py --dry           # prints only

A slow step with its fast loop takes, on each of W GPUs with b sequences,

    compute     FLOPs of `ltm-pyro cost` for b sequences / matrix-product rate, + an overhead
    noise       (T_fast + 1) W b K D normals / rate: each process draws for the whole batch
    exchange    bytes sent / bandwidth + steps of a ring * latency
    AdamW       28 bytes per weight read and written / memory bandwidth

one after another: nothing overlaps, so the prediction errs on the slow side. Rates are flags.

The check runs two processes on this machine, by turns apart and together, counts messages and the
bytes that the kernel sent, and compares times with the simulator's at this machine's own rates.
Overhead and matrix-product rate come from two batch sizes fitted apart, both processes at work;
the others from loops of sums, normals and AdamW alone. None of them has seen a shared step.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import pyro
import torch
from scaling_check import SEED, TURNS, check
from scaling_simulator import BILLION, MODELS, Machine, Step, simulate

import ltm_pyro as ltm
from ltm_pyro.diagnostics.cost import cost_report

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
GPUS = (1, 8, 64, 1024)


def table(machine: Machine) -> list[str]:
    """The prediction as Markdown."""
    head = (
        "| model | GPUs | TFLOP | sent, MB | messages | state, GB | ms: compute, noise, exchange, "
        "AdamW | efficiency |"
    )
    lines = [head, "|" + "---|" * 8]
    for config in MODELS:
        alone = simulate(config, 1, machine).total
        for gpus in GPUS:
            step = simulate(config, gpus, machine)
            lines.append(
                f"| {config.preset} | {gpus} | {step.flops / 1e12:.1f} | {step.sent / 1e6:.0f} | "
                f"{step.messages} | {step.state / 1e9:.2f} | {_times(step)} | "
                f"{alone / step.total:.1%} |"
            )
    return lines


def _times(step: Step) -> str:
    return ", ".join(f"{1e3 * v:.3g}" for v in step.seconds.values())


def assumptions(machine: Machine) -> str:
    shape = BILLION.model
    return (
        f"Per GPU: {machine.flops / 1e12:.0f} TFLOP/s reached in matrix products, "
        f"{machine.normals / 1e9:.0f} G normals/s, {machine.memory / 1e12:.1f} TB/s of memory, "
        f"{machine.inside / 1e9:.0f} GB/s and {1e6 * machine.inside_latency:.0f} us inside a node "
        f"of {machine.gpus_per_node}, {machine.between / 1e9:.0f} GB/s and "
        f"{1e6 * machine.between_latency:.0f} us between nodes; ring all-reduce, nothing "
        f"overlapped. {MODELS[0].batch_size} sequences of {shape.seq_len} tokens per GPU, so the "
        "global batch grows with the GPUs. "
        f"Efficiency: against 1 GPU. 1B: {shape.n_layers} layers of width {shape.width}, "
        f"{shape.n_heads} heads, SwiGLU {shape.mlp_hidden}, window {shape.window}, "
        f"{shape.thoughts_per_layer} thoughts of {shape.thought_dim} per layer, "
        f"V = {shape.vocab_size}, T_fast = {BILLION.fast.steps}; "
        f"{cost_report(BILLION).n_weights / 1e9:.2f} G weights."
    )


def main() -> None:
    """Simulates, checks and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="print, and leave the page alone")
    for name, (default, _, what) in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    options = parser.parse_args()
    given = {name: getattr(options, name.replace("-", "_")) for name in FLAGS}
    values = {name: given[name] * scale for name, (_, scale, _) in FLAGS.items()}
    machine = Machine(*values.values())
    changed = " ".join(f"--{n} {v}" for n, v in given.items() if v != FLAGS[n][0])
    command = f"benchmarks/scaling.py {changed}".strip()
    block = [BEGIN, *table(machine), "", assumptions(machine), "", *check(), "", footnote(command)]
    print("\n".join(block[1:]))
    if not options.dry:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + "\n".join([*block, END]) + rest.split(END)[1])


FLAGS: dict[str, tuple[Any, float, str]] = {
    "tflops": (250.0, 1e12, "TFLOP/s that a GPU reaches in matrix products"),
    "gnormals": (50.0, 1e9, "10^9 normal random numbers per second and GPU"),
    "tbs": (2.0, 1e12, "TB/s of a GPU's memory that AdamW reaches"),
    "gpus-per-node": (8, 1, "GPUs in a node"),
    "inside-gbs": (200.0, 1e9, "GB/s per GPU inside a node"),
    "between-gbs": (20.0, 1e9, "GB/s per GPU between nodes"),
    "inside-us": (5.0, 1e-6, "microseconds of a message inside a node"),
    "between-us": (15.0, 1e-6, "microseconds of a message between nodes"),
}
"""Default, unit, meaning; in the order of the fields of `Machine`."""


def footnote(command: str) -> str:
    """What made the tables."""
    versions = f"ltm_pyro {ltm.__version__}, torch {torch.__version__}, pyro {pyro.__version__}"
    return (
        f"Made by `{command}`, seed {SEED}. The check: two gloo processes of one thread each, "
        f"medians of {TURNS} steps; `one` is a process with the whole batch while the other core "
        "is as busy; gloo makes a reduce-scatter from a whole all-reduce, which the simulator "
        f"takes into account here and not above; on {os.cpu_count()} cores "
        f"({platform.machine()}); {versions}, Python {platform.python_version()}."
    )


if __name__ == "__main__":
    main()
