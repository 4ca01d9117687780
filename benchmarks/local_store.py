"""Measures the store of local parameters on disk, at three sizes, against a nano step.

    .venv/bin/python benchmarks/local_store.py
    .venv/bin/python benchmarks/local_store.py --quick --json store.json

For each number of rows, in a process of its own: one row per sequence of nano's mean field with
Adam's moments; gather, load into guide and optimiser, and scatter of a batch of 8 random rows
(medians), with a warm page cache and after the file was put out of it; a checkpoint after 50
batches; peak memory. The nano step is `DualRateSVI.step` (B = 8, the preset's T_fast), alternating
with the measured calls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.config import preset
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.database import RowDatabase, new_store_files
from ltm_pyro.inference.clocks.fast import local_optimizer
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel

CONFIG = preset("nano")
B = CONFIG.batch_size
SIZES, QUICK = (10_000, 100_000, 1_000_000), (10_000, 100_000)
FILL = 8192  # rows stored at a time while a store is made
CHECKPOINT_BATCHES = CONFIG.checkpoint_every


def main() -> None:
    """Measures each size in a process of its own, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="up to 10^5 rows, fewer repetitions")
    parser.add_argument("--folder", type=Path, help="where to put the stores (2.4 GB)")
    parser.add_argument("--eager", action="store_true", help="a step without the compiler")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of rows")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    repeats = 11 if arguments.quick else 25
    if arguments.rows is not None:
        print(json.dumps(measure(arguments.rows, repeats, arguments.folder, arguments.eager)))
        return
    sizes = arguments.sizes or (QUICK if arguments.quick else SIZES)
    rows = [in_child(n, arguments) for n in sizes]
    print("\n".join(table(rows)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"versions": versions(), "sizes": rows}, indent=2))


def in_child(n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures for `n` rows, from a fresh process so that its peak memory is its own."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        command = [sys.executable, __file__, "--rows", str(n), "--folder", folder]
        command += ["--quick"] if arguments.quick else []
        command += ["--eager"] if arguments.eager else []
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])


def measure(n: int, repeats: int, folder: Path, eager: bool) -> dict[str, Any]:
    """Makes a store of `n` rows in `folder` and times it."""
    svi, guide, batch = nano(eager)
    before = peak_bytes()
    last = make_store(folder, n, svi, guide)
    began = time.perf_counter()
    store = RowDatabase(folder, last)
    opening = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)

    def visit() -> None:
        ids = torch.randperm(n, generator=generator)[:B] if n < 10**5 else draw(n, generator)
        guide.reset(batch)
        optimizer = local_optimizer(guide, svi.fast)
        found = store.gather(ids, {**guide.rows(), **optimizer.state()})
        guide.load_rows({name: found[name] for name in guide.rows()})
        optimizer = local_optimizer(guide, svi.fast)
        optimizer.load(found)
        store.scatter(ids, {**guide.rows(), **optimizer.state()})

    def checkpoint(step: int) -> None:
        store.prepare(step)
        store.publish(step)

    visit()
    svi.step(batch)
    svi.step(batch)
    warm, steps, cold = [], [], []
    for _ in range(repeats):  # alternating, so that both see the same machine
        warm += [timed(visit) for _ in range(5)]
        steps.append(timed(lambda: svi.step(batch)))
    checkpoints = []
    for step in range(last + 1, last + 4):
        for _ in range(CHECKPOINT_BATCHES):
            visit()
        checkpoints.append(timed(partial(checkpoint, step)))
    for _ in range(repeats):
        evict(folder)
        cold.append(timed(visit))
    size = sum(p.stat().st_size for p in folder.iterdir())
    per_step = statistics.median(steps)
    return {
        "rows": n,
        "file_bytes": size,
        "bytes_per_row": size / n,
        "visit_ms": 1e3 * statistics.median(warm),
        "visit_cold_ms": 1e3 * statistics.median(cold),
        "step_ms": 1e3 * per_step,
        "share_of_step": statistics.median(warm) / per_step,
        "share_of_step_cold": statistics.median(cold) / per_step,
        "open_s": opening,
        "checkpoint_ms": 1e3 * statistics.median(checkpoints),
        "checkpoint_batches": CHECKPOINT_BATCHES,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "compiled": not eager,
    }


def nano(eager: bool) -> tuple[DualRateSVI, LocalGuide, Batch]:
    """Nano's clocks, a guide beside them for the store, and a batch of random tokens."""
    torch.manual_seed(0)
    model = LatentThoughtModel(CONFIG.model)
    if not eager:
        model.compile_fast_loop()
    svi = DualRateSVI(model, build_guide("mean_field", model), fast=CONFIG.fast)
    size = (B, CONFIG.model.seq_len)
    batch = Batch(torch.randint(CONFIG.model.vocab_size, size))
    return svi, build_guide("mean_field", model), batch


def make_store(folder: Path, n: int, svi: DualRateSVI, guide: LocalGuide) -> int:
    """A store with `n` rows, in some other order than that of the ids; its slow step."""
    for name, data in new_store_files().items():
        (folder / name).write_bytes(data)
    store = RowDatabase(folder, 0)
    size = (FILL, CONFIG.model.seq_len)
    guide.reset(Batch(torch.zeros(size, dtype=torch.long)))
    rows = {**guide.rows(), **local_optimizer(guide, svi.fast).state()}
    odd = 7_919 if n % 7_919 else 7_907
    for start in range(0, n, FILL):
        ids = torch.arange(start, min(start + FILL, n)) * odd % n
        store.scatter(ids, {name: value[: len(ids)] for name, value in rows.items()})
        if start // FILL % 4 == 3 or start + FILL >= n:
            store.prepare(store.step + 1)
            store.publish(store.step + 1)
    store.close()
    return store.step


def draw(n: int, generator: torch.Generator) -> Tensor:
    """B random ids, distinct for all practical purposes."""
    return torch.randint(n, (B,), generator=generator)


def evict(folder: Path) -> None:
    """Puts the files out of the page cache, where the system offers that."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One row per size, as Markdown."""
    head = (
        "| rows | on disk, MB | a visit, ms | share of a step | cold, ms | share | open, s | "
        "checkpoint, ms | peak memory, MB |"
    )
    lines = [head, "|" + "---:|" * 9]
    for r in rows:
        cells = [
            f"{r['rows']:,}",
            f"{r['file_bytes'] / 1e6:.0f}",
            f"{r['visit_ms']:.2f}",
            f"{r['share_of_step']:.1%}",
            f"{r['visit_cold_ms']:.2f}",
            f"{r['share_of_step_cold']:.1%}",
            f"{r['open_s']:.3f}",
            f"{r['checkpoint_ms']:.0f}",
            f"{r['peak_bytes'] / 1e6:.0f} ({r['peak_bytes_before'] / 1e6:.0f} before)",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    how = "compiled" if rows[0]["compiled"] else "uncompiled"
    steps = ", ".join(f"{r['step_ms']:.0f}" for r in rows)
    lines += [
        "",
        f"A visit gathers {B} random rows, loads them into guide and optimiser, and scatters them. "
        f"The step is nano's ({how}; B = {B}, T_fast = {CONFIG.fast.steps}), timed in the same "
        f"run: {steps} ms. A checkpoint follows {CHECKPOINT_BATCHES} batches. {versions()}.",
    ]
    return lines


def versions() -> str:
    """What the figures were made with."""
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
