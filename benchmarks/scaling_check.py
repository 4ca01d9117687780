"""The check of `scaling.py`: two processes on this machine, by turns apart and together."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling_simulator import PER_WEIGHT_ADAMW, Machine, simulate

import ltm_pyro as ltm
from ltm_pyro.config import Fast, FitConfig, preset
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.cost import cost_report
from ltm_pyro.engine.processes import Parallel, join, leave
from ltm_pyro.models.latent_thought import LatentThoughtModel

SEED = 0
CASES = {
    "nano": preset("nano"),
    "6.3 M weights, short": replace(
        preset("tiny"),
        batch_size=4,
        model=replace(preset("tiny").model, seq_len=64),
        fast=Fast(steps=2),
    ),
}
TOGETHER = "together"
TURNS = 7


class Fitting:
    """A fit whose steps can be made again and again."""

    def __init__(self, config: FitConfig, parallel: Parallel) -> None:
        torch.manual_seed(SEED)
        self.config, self.parallel = config, parallel
        model = LatentThoughtModel(config.model)
        guide = ltm.build_guide("mean_field", model)
        slow = replace(config.slow, thoughts_start=0.0)
        self.svi = ltm.DualRateSVI(
            model, guide, config.fast, slow, execution=ltm.Execution(parallel=parallel)
        )
        shape = (config.batch_size, config.model.seq_len)
        whole = Batch(torch.randint(config.model.vocab_size, shape))
        self.batch = whole.select(parallel.rows(len(whole)))

    def step(self) -> float:
        """One slow step; its seconds."""
        began = time.perf_counter()
        self.svi.step(self.batch)
        return time.perf_counter() - began


def measure(name: str, parallel: Parallel) -> dict[str, Any]:
    """Apart with the whole batch, apart with half of it, and together, by turns."""
    config = CASES[name]
    half = replace(config, batch_size=config.batch_size // parallel.size)
    fits = {"whole": Fitting(config, Parallel()), "half": Fitting(half, Parallel())}
    fits[TOGETHER] = Fitting(config, parallel)
    seconds: dict[str, list[float]] = {kind: [] for kind in fits}
    traffic: dict[str, Any] = {}
    for _ in range(TURNS + 1):  # the first turn warms up
        for kind, fit in fits.items():
            parallel.barrier()
            before = bytes_sent()
            with counted() as count:
                taken = fit.step()
            traffic[kind] = {"sent": bytes_sent() - before, "messages": count()}
            everybody = parallel.gather(taken)
            # Apart each has its own time; together the slower one decides.
            seconds[kind].append(max(everybody) if kind == TOGETHER else statistics.mean(everybody))
    times = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
    return {"seconds": times, "traffic": traffic, "rates": rates(config, parallel)}


def rates(config: FitConfig, parallel: Parallel) -> dict[str, float]:
    """This machine's own, measured with all processes at work, but on nothing that is checked."""
    report = cost_report(config)
    sizes = {"small": 16, "large": 4 * report.n_weights}

    def exchanged(n: int) -> object:
        return parallel.sum(torch.zeros(max(1, n // 4)))

    exchange = {name: _median(partial(exchanged, n), parallel, 15) for name, n in sizes.items()}
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
        parallel.barrier()
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
            # `tcpi_bytes_sent` of struct tcp_info (linux/tcp.h, since 4.19).
            total += struct.unpack_from("<Q", info, 200)[0]
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
    if parallel.is_rank_0:
        Path(file).write_text(json.dumps(found))
    leave()


def check() -> list[str]:
    """Runs the check; its table as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", __file__, str(file)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads(file.read_text())
    lines = [
        "| fit | messages: simulated, counted | MB sent: simulated, counted | "
        "time of two processes / one: simulated, measured |",
        "|---|---|---|---|",
    ]
    for name, case in found.items():
        config = CASES[name]
        half = replace(config, batch_size=config.batch_size // 2)
        machine = _this_machine(config, half, case)
        one = simulate(config, 1, machine)
        two = simulate(half, 2, machine)
        seen, times = case["traffic"][TOGETHER], case["seconds"]
        lines.append(
            f"| {name} | {two.messages}, {seen['messages']} | "
            f"{two.sent / 1e6:.3f}, {seen['sent'] / 1e6:.3f} | {two.total / one.total:.3f}, "
            f"{times[TOGETHER] / times['whole']:.3f} |"
        )
    return lines


def _this_machine(config: FitConfig, half: FitConfig, case: dict[str, Any]) -> Machine:
    """Its rates; overhead and matrix products from steps of one process with two batch sizes."""
    r, seconds = case["rates"], case["seconds"]
    machine = Machine(
        flops=math.inf, normals=r["normals"], memory=r["memory"], gpus_per_node=8,
        inside=r["bandwidth"], between=r["bandwidth"],
        inside_latency=r["latency"], between_latency=r["latency"],
    )  # fmt: skip
    large, small = simulate(config, 1, machine), simulate(half, 1, machine)
    per_flop = (seconds["whole"] - large.total - seconds["half"] + small.total) / (
        large.flops - small.flops
    )
    overhead = seconds["whole"] - large.total - large.flops * per_flop
    return replace(machine, flops=1 / per_flop, overhead=overhead)


if __name__ == "__main__":
    worker(sys.argv[1])
