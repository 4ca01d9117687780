"""What a slow step costs on 1 to 1024 GPUs: a small simulator, checked against this machine.

    .venv/bin/python benchmarks/scaling.py                 # prints, and rewrites docs/scaling.md
    .venv/bin/python benchmarks/scaling.py --dry           # prints only

A slow step with its fast loop takes, on each of W GPUs with b sequences,

    compute     FLOPs of `ltm-pyro cost` for b sequences / matrix-product rate
    noise       (T_fast + 1) W b K D normals / rate: each process draws for the whole batch
    exchange    bytes sent / bandwidth + steps of a ring * latency
    AdamW       28 bytes per weight read and written / memory bandwidth, of its part where sharded

one after another: nothing overlaps, so the prediction errs on the slow side. Rates are flags. The
check runs one process and two of them on this machine, by turns, counts messages and the bytes that
the kernel sent, and compares times with the simulator's at this machine's own measured rates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as dist

import ltm_pyro as ltm
from ltm_pyro.config import Fast, FitConfig, ModelConfig, preset
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.cost import cost_report
from ltm_pyro.inference.parallel import Parallel, join, leave
from ltm_pyro.models.latent_thought import LatentThoughtModel

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
GPUS = (1, 8, 64, 1024)
PER_WEIGHT_ADAMW = 28  # bytes: weight, gradient and two moments read, all but the gradient written
BESIDE = 36  # bytes of the numbers beside the gradient
SEED = 0

BILLION = replace(
    preset("ltm-large"),
    preset="1B",
    model=ModelConfig(
        vocab_size=50257, seq_len=1024, n_layers=15, width=2048, n_heads=16, mlp_hidden=5504,
        window=256, thoughts_per_layer=8, thought_dim=512,
    ),
    fast=Fast(steps=16, lr=0.3),
)  # fmt: skip
MODELS = (preset("ltm-small"), preset("ltm-medium"), preset("ltm-large"), BILLION)


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, each of one GPU (or process), in SI units."""

    flops: float
    normals: float
    memory: float
    gpus_per_node: int
    inside: float
    between: float
    inside_latency: float
    between_latency: float

    def link(self, gpus: int) -> tuple[float, float]:
        """(bytes per second, seconds per message) of the slowest link of a ring.

        All GPUs of a node share its way out, each with an adapter of its own, in as many rings.
        """
        if gpus <= self.gpus_per_node:
            return self.inside, self.inside_latency
        return min(self.inside, self.gpus_per_node * self.between), self.between_latency


@dataclass(frozen=True)
class Step:
    """One slow step with its fast loop, per GPU.

    Attributes:
        flops: Matrix products.
        sent: Bytes.
        messages: Collective operations.
        state: Bytes of weights, gradients, message and moments.
        seconds: By part.
    """

    flops: float
    sent: float
    messages: int
    state: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def simulate(config: FitConfig, gpus: int, machine: Machine, *, shard: bool = False) -> Step:
    """What a slow step costs on `gpus` GPUs with `config.batch_size` sequences each."""
    report = cost_report(config)
    weights = report.n_weights + report.n_prior_weights
    shard = shard and gpus > 1
    flops = report.flops_training_step * config.batch_size * config.model.seq_len
    rows = gpus * config.batch_size
    normals = (config.fast.steps + 1) * rows * report.n_local
    message = 4 * weights + BESIDE * (gpus if shard else 1)
    # A ring all-reduce is a reduce-scatter and an all-gather of the same size.
    sent = 2 * (gpus - 1) / gpus * message + (2 * (gpus - 1) / gpus * 4 if shard else 0)
    bandwidth, latency = machine.link(gpus)
    ring_steps = (4 if shard else 2) * (gpus - 1)
    stepped = weights / gpus if shard else weights
    moments = 8 * stepped + (4 * stepped if shard else 0)
    return Step(
        flops=flops,
        sent=sent,
        messages=0 if gpus == 1 else 3 if shard else 1,
        state=8 * weights + moments + (message if gpus > 1 else 0),
        seconds={
            "compute": flops / machine.flops,
            "noise": normals / machine.normals,
            "exchange": sent / bandwidth + ring_steps * latency,
            "AdamW": PER_WEIGHT_ADAMW * stepped / machine.memory,
        },
    )


# --- the table -------------------------------------------------------------------------------


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
            kinds = (False,) if gpus == 1 else (False, True)
            steps = [simulate(config, gpus, machine, shard=kind) for kind in kinds]
            shares = " / ".join(f"{alone / step.total:.1%}" for step in steps)
            lines.append(
                f"| {config.preset} | {gpus} | {steps[0].flops / 1e12:.1f} | "
                f"{_pair(steps, lambda s: f'{s.sent / 1e6:.0f}')} | "
                f"{_pair(steps, lambda s: str(s.messages))} | "
                f"{_pair(steps, lambda s: f'{s.state / 1e9:.2f}')} | "
                f"{_pair(steps, _times)} | "
                f"{shares} |"
            )
    return lines


def _times(step: Step) -> str:
    return ", ".join(f"{1e3 * v:.3g}" for v in step.seconds.values())


def _pair(steps: list[Step], show: Callable[[Step], str]) -> str:
    """Replicated, then sharded where it differs."""
    shown = [show(step) for step in steps]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def assumptions(machine: Machine) -> str:
    shape = BILLION.model
    return (
        f"Per GPU: {machine.flops / 1e12:.0f} TFLOP/s reached in matrix products, "
        f"{machine.normals / 1e9:.0f} G normals/s, {machine.memory / 1e12:.1f} TB/s of memory, "
        f"{machine.inside / 1e9:.0f} GB/s and {1e6 * machine.inside_latency:.0f} us inside a node "
        f"of {machine.gpus_per_node}, {machine.between / 1e9:.0f} GB/s and "
        f"{1e6 * machine.between_latency:.0f} us between nodes; ring all-reduce, nothing "
        f"overlapped. {MODELS[0].batch_size} sequences of {shape.seq_len} tokens per GPU, so the "
        "global batch grows with the GPUs. Two numbers: replicated / sharded (`--shard`). "
        f"Efficiency: against 1 GPU. 1B: {shape.n_layers} layers of width {shape.width}, "
        f"{shape.n_heads} heads, SwiGLU {shape.mlp_hidden}, window {shape.window}, "
        f"{shape.thoughts_per_layer} thoughts of {shape.thought_dim} per layer, "
        f"V = {shape.vocab_size}, T_fast = {BILLION.fast.steps}; "
        f"{cost_report(BILLION).n_weights / 1e9:.2f} G weights."
    )


# --- the check -------------------------------------------------------------------------------

CASES = {
    "nano": preset("nano"),
    "6.3 M weights, short": replace(
        preset("tiny"),
        batch_size=4,
        model=replace(preset("tiny").model, seq_len=64),
        fast=Fast(steps=2),
    ),
}
TURNS = 5


class Fitting:
    """A fit whose steps can be made again and again."""

    def __init__(self, config: FitConfig, parallel: Parallel) -> None:
        torch.manual_seed(SEED)
        self.config, self.parallel = config, parallel
        model = LatentThoughtModel(config.model)
        guide = ltm.build_guide("mean_field", model)
        slow = replace(config.slow, thoughts_start=0.0)
        self.svi = ltm.DualRateSVI(model, guide, config.fast, slow, parallel=parallel)
        shape = (config.batch_size, config.model.seq_len)
        whole = Batch(torch.randint(config.model.vocab_size, shape))
        self.batch = whole.select(parallel.rows(len(whole)))

    def step(self) -> float:
        """One slow step; its seconds."""
        began = time.perf_counter()
        self.svi.step(self.batch)
        return time.perf_counter() - began


def measure(name: str, parallel: Parallel) -> dict[str, Any]:
    """One process and all of them, by turns."""
    config = CASES[name]
    alone = Fitting(config, Parallel()) if parallel.first else None
    kinds = {"replicated": False, "sharded": True}
    together = {}
    for kind, shard in kinds.items():
        parallel.shard = shard
        together[kind] = Fitting(config, parallel)
    seconds: dict[str, list[float]] = {"alone": [], **{kind: [] for kind in kinds}}
    traffic: dict[str, Any] = {}
    for turn in range(-1, TURNS):  # the first one warms up
        parallel.wait()
        if alone is not None:
            seconds["alone"].append(alone.step())
        for kind in kinds:
            parallel.wait()
            before = bytes_sent()
            with counted() as count:
                taken = together[kind].step()
            traffic[kind] = {"sent": bytes_sent() - before, "messages": count()}
            seconds[kind].append(max(parallel.gather(taken)))
        del turn
    times = {kind: statistics.median(values[1:]) for kind, values in seconds.items() if values}
    return {"seconds": times, "traffic": traffic, "rates": rates(config, parallel)}


def rates(config: FitConfig, parallel: Parallel) -> dict[str, float]:
    """This machine's own, measured with all processes at work, but on nothing that is checked."""
    report = cost_report(config)
    sizes = {"small": 16, "large": 4 * report.n_weights}
    exchange = {
        name: _median(lambda n=n: parallel.sum(torch.zeros(max(1, n // 4))), parallel, 15)
        for name, n in sizes.items()
    }
    latency = exchange["small"] / 2  # two messages follow one another in a ring of two
    bandwidth = sizes["large"] / max(exchange["large"] - exchange["small"], 1e-9)
    normals = _median(lambda: torch.randn(10**6), parallel)
    weights = [torch.zeros(report.n_weights).requires_grad_()]
    weights[0].grad = torch.ones(report.n_weights)
    adamw = torch.optim.AdamW(weights)
    step = _median(adamw.step, parallel)
    return {
        "latency": latency,
        "bandwidth": bandwidth,
        "normals": 10**6 / normals,
        "memory": PER_WEIGHT_ADAMW * report.n_weights / step,
    }


def _median(work: Callable[[], object], parallel: Parallel, times: int = 5) -> float:
    work()
    taken = []
    for _ in range(times):
        parallel.wait()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def bytes_sent() -> int:
    """What this process has sent over its TCP connections, as the kernel counts it (Linux)."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            held = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            continue
        with held:
            try:
                info = held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError:
                continue
            # `tcpi_bytes_acked` of struct tcp_info (linux/tcp.h).
            total += struct.unpack_from("<Q", info, 120)[0]
    return total


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Counts the collective operations that are started inside the block."""
    names = [
        n for n in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor", "broadcast",
                    "all_gather_single", "all_gather_into_tensor", "all_gather_object")
        if hasattr(dist, n)
    ]  # fmt: skip
    kept = {name: getattr(dist, name) for name in names}
    calls = 0

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    for name, function in kept.items():
        setattr(dist, name, wrapped(function))
    try:
        yield lambda: calls
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def worker(file: str) -> None:
    """What `torchrun` starts."""
    parallel = join("cpu")
    found = {name: measure(name, parallel) for name in CASES}
    if parallel.first:
        Path(file).write_text(json.dumps(found))
    leave()


def check() -> list[str]:
    """Runs the check; its table as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", __file__, "--worker", str(file)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads(file.read_text())
    lines = [
        "| fit | kind | messages: simulated, counted | bytes sent: simulated, counted | "
        "time of two processes / one: simulated, measured |",
        "|---|---|---|---|---|",
    ]
    for name, case in found.items():
        config = CASES[name]
        half = replace(config, batch_size=config.batch_size // 2)
        machine = _this_machine(config, case)
        one = simulate(config, 1, machine)
        for kind in ("replicated", "sharded"):
            two = simulate(half, 2, machine, shard=kind == "sharded")
            seen, times = case["traffic"][kind], case["seconds"]
            lines.append(
                f"| {name} | {kind} | {two.messages}, {seen['messages']} | {two.sent:.0f}, "
                f"{seen['sent']} | {two.total / one.total:.3f}, "
                f"{times[kind] / times['alone']:.3f} |"
            )
    return lines


def _this_machine(config: FitConfig, case: dict[str, Any]) -> Machine:
    """Its rates; that of matrix products is what is left of one process's step."""
    r = case["rates"]
    machine = Machine(
        flops=math.inf, normals=r["normals"], memory=r["memory"], gpus_per_node=8,
        inside=r["bandwidth"], between=r["bandwidth"],
        inside_latency=r["latency"], between_latency=r["latency"],
    )  # fmt: skip
    rest = simulate(config, 1, machine)
    return replace(machine, flops=rest.flops / (case["seconds"]["alone"] - rest.total))


def main() -> None:
    """Simulates, checks and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="print, and leave the page alone")
    for name, (default, _, what) in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
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
        f"Made by `{command}`, seed {SEED}: the check is two gloo processes of one thread each, "
        f"medians of {TURNS} steps by turns with one process alone, on {os.cpu_count()} cores "
        f"({platform.machine()}); {versions}, Python {platform.python_version()}."
    )


if __name__ == "__main__":
    main()
