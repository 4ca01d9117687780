"""Speed and memory of the fast loop: the published algorithm, a loop by hand, `DualRateSVI`.

    python benchmarks/fast_loop.py --json docs/fast_loop.json            # the table, minutes
    python benchmarks/fast_loop.py --quick                               # about a minute
    python benchmarks/fast_loop.py --scaling --json docs/fast_loop_scaling.json   # and the figure
    python benchmarks/speed_tables.py                                    # both into docs/speed.md

In one run, on the same weights and the same (random) tokens, the loops take turns: a b c, a b c.
Ratios are of neighbours in time, so a machine that is slower for a while is slower for all. Each
preset and precision has a process of its own, whose memory no other case has left in pieces.

    a     Kong et al. (2025), algorithm 1, in plain eager fp32: published_loop.py
    a16   the same under bf16 autocast, in the bf16 rows
    b     the engine written by hand, without Pyro: lean_loop.py
    c     ltm.DualRateSVI, .infer (fast loop alone) and .step (fast loop and slow step)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from loop_cases import Case, Precision, measure
from loop_scaling import AXES, measure_axis
from speed_tables import FIGURE, ROOT, markdown_table, scaling_table

from ltm_pyro.config import preset
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.run.files import json_bytes, write_atomic

T = TypeVar("T")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
SHAPES = {"nano": (8, 1024), "tiny": (8, 256), "ltm-small": (1, 256), "ltm-large": (1, 256)}
"""Batch size and length; the paper's on a short batch, or they would take hours on a CPU."""
USUAL = ("nano", "tiny", "ltm-small")
SHORT_LOOP = 4
"""T_fast of the paper's presets, and of all in a quick run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes JSON if asked."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"header": header(args)}
    print(describe(result["header"]), end="\n\n")
    if args.scaling:
        base = case(args, args.presets[0], args.precision[0])
        result["axes"] = {}
        for axis in args.axes:
            note(f"axis {axis}")
            result["axes"][axis] = measure_axis(axis, base, args.rounds, quick=args.quick)
        print("\n".join(scaling_table(result)))
        draw(result, args.figure)
    else:
        result["rows"] = []
        for name in args.presets:
            for precision in args.precision:
                note(f"{name} {precision}")
                result["rows"].append(alone(measure, case(args, name, precision), args.rounds))
        print("\n".join(markdown_table(result["rows"])))
    if args.json:
        write_atomic(args.json, json_bytes(result))


def alone(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns in a new process."""
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads) as pool:
        return pool.submit(function, *arguments).result()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, those that were left out filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", help=f"of {', '.join(SHAPES)}; --scaling takes one")
    parser.add_argument("--precision", nargs="+", help="fp32, bf16; default both")
    parser.add_argument("--rounds", type=int, help="turns of each loop; default 5, quick 3")
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and noise")
    parser.add_argument("--batch-size", type=int, help="B; default 8, of the paper's presets 1")
    parser.add_argument("--length", type=int, help="T; default 256")
    parser.add_argument("--fast-steps", type=int, help="T_fast; default the preset's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="small and few, about a minute")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--scaling", action="store_true", help="cost as one thing grows instead")
    parser.add_argument("--axes", nargs="+", default=list(AXES), help="of --scaling")
    parser.add_argument("--figure", type=Path, default=ROOT / FIGURE, help="of --scaling")
    args = parser.parse_args(arguments)
    args.command = command(sys.argv[1:] if arguments is None else arguments)
    presets = ["tiny"] if args.scaling else ["nano", "tiny"] if args.quick else list(USUAL)
    args.presets = args.presets or presets
    one = args.quick or args.scaling
    args.precision = args.precision or (["fp32"] if one else list(PRECISIONS))
    args.rounds = args.rounds or (3 if args.quick else 5)
    for what, given, known in (
        ("preset", args.presets, SHAPES),
        ("precision", args.precision, PRECISIONS),
        ("axis", args.axes, AXES),
    ):
        for name in given:
            if name not in known:
                raise unknown_name(what, name, known)
    return args


def case(args: argparse.Namespace, name: str, precision: Precision) -> Case:
    """What the options ask for, for one preset and precision."""
    batch_size, length = (2, 128) if args.quick else SHAPES[name]
    short = args.quick or name.startswith("ltm-")
    return Case(
        preset=name,
        precision=precision,
        batch_size=args.batch_size or batch_size,
        length=args.length or length,
        fast_steps=args.fast_steps or (SHORT_LOOP if short else preset(name).fast.steps),
        compile=args.compile,
        device=args.device,
        seed=args.seed,
    )


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What made the numbers."""
    return {
        "command": args.command,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "quick": args.quick,
        "machine": machine(args.device),
        "cores": os.cpu_count(),
        "versions": {
            "ltm_pyro": version("ltm-pyro"),
            "torch": torch.__version__,
            "pyro": version("pyro-ppl"),
            "python": platform.python_version(),
        },
    }


def describe(head: dict[str, Any]) -> str:
    """The header as text."""
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    return (
        f"`{head['command']}`, seed {head['seed']}, {versions}; {head['machine']}, "
        f"{head['threads']} threads."
    )


def machine(device: str) -> str:
    """The processor's public name and what it can do with bf16, or the accelerator's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        name, flags = found.get("model name", name), found.get("flags", "")
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(bf16) or 'no bf16 instructions'})"


def command(arguments: Sequence[str]) -> str:
    """What was typed, folders of this machine left out."""
    return " ".join(
        ["python benchmarks/fast_loop.py"]
        + [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """The figure of a scaling run."""
    from loop_figure import cost_curves

    from ltm_pyro.plots.style import save_figure

    save_figure(cost_curves(result), path)


def note(what: str) -> None:
    """Tells on stderr what is being measured."""
    print(f"measuring {what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
