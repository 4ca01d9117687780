"""What a written token costs: at which position, and against recomputing the prefix.

    .venv/bin/python benchmarks/generation.py
    .venv/bin/python benchmarks/generation.py --quick --json generation.json

Two tables, everything timed in one run in turns, medians, on freshly initialised weights (values do
not matter to the time):

- milliseconds per token after 300, 1000, 2000 and 4000 tokens;
- how many times faster the cached text is than recomputing the prefix for each token, by the
  package's own decoder in two ways: `decoder.logits(tokens, z)[:, -1]`, and the same without the
  logits of the positions that are not asked for. "token" compares the token at position `--length`,
  "text" a whole text of that length (recomputation timed at evenly spaced positions and summed).

Every token includes the draw from its logits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import ltm_pyro
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.sampling import SamplingRule, write_tokens

POSITIONS = (300, 1000, 2000, 4000)
BLOCK = 4
"""Tokens timed at once: few, so that the positions meet the same state of the machine."""
ROUNDS = 16
"""Blocks per position and repeat."""
RULE = SamplingRule()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["nano", "tiny"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="B, rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of the whole text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="B = 1, 3 repeats: half a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.repeats = [1], 3
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(header(args.threads, args.seed), end="\n\n", flush=True)
    results = []
    for name in args.presets:
        room = max(POSITIONS) + BLOCK * (ROUNDS * args.repeats + 1)
        model = ltm_pyro.LatentThoughtModel.from_preset(name, seq_len=max(room, args.length))
        for rows in args.batches:
            case: dict[str, Any] = {"preset": name, "rows": rows}
            case |= by_position(model.decoder, rows, POSITIONS, args.repeats)
            case |= against_recomputing(model.decoder, rows, args.length, args.repeats)
            results.append(case)
            print(f"measured {name}, B = {rows}", file=sys.stderr, flush=True)
    print("\n".join([*position_table(results), "", *speedup_table(results, args.length)]))
    if args.json:
        about = {**versions(), "threads": args.threads, "seed": args.seed, "command": command()}
        args.json.write_text(json.dumps({"about": about, "cases": results}, indent=1))


def command() -> str:
    """What was typed, without the interpreter's folder."""
    return shlex.join(["python", "benchmarks/generation.py", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "ltm_pyro": ltm_pyro.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores ({platform.machine()})",
    }


def header(threads: int, seed: int) -> str:
    """One line: command, versions, machine."""
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"`{command()}`: {about}, threads {threads}, seed {seed}, float32."


def thoughts(decoder: Decoder, rows: int) -> Tensor:
    """Thoughts (B, K, D) to write from."""
    return torch.randn(rows, decoder.config.n_thoughts, decoder.config.thought_dim)


def in_turns(
    tasks: dict[str, Callable[[], Any]], repeats: int
) -> Iterator[tuple[str, list[float]]]:
    """Runs the tasks in turns, once unrecorded, and yields each with its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    yield from seconds.items()


@torch.inference_mode()
def by_position(
    decoder: Decoder, rows: int, positions: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Milliseconds per token after each number of tokens."""

    def writer(position: int) -> Callable[[], None]:
        tokens = torch.randint(decoder.config.vocab_size, (rows, position))
        state = decoder.start(thoughts(decoder, rows))
        decoder.read(tokens, state)
        previous = tokens[:, -1]

        def write() -> None:
            nonlocal previous
            for _ in range(BLOCK):
                previous = RULE.choose(decoder.step(previous, state), torch.rand(rows))

        return write

    timed = in_turns({str(p): writer(p) for p in positions}, ROUNDS * repeats)
    return {"ms_per_token_at": {p: statistics.median(s) / BLOCK * 1e3 for p, s in timed}}


def against_recomputing(decoder: Decoder, rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Cached writing against two ways of recomputing: one token at `length`, and a whole text."""
    z = thoughts(decoder, rows)
    tokens = torch.randint(decoder.config.vocab_size, (rows, length))
    stride = max(1, length // 16)
    grid = range(max(1, stride // 2), length, stride)

    def all_logits(t: int) -> None:
        RULE.choose(decoder.logits(tokens[:, :t], z)[:, -1], torch.rand(len(tokens)))

    def last_logits(t: int) -> None:
        last = decoder.above(decoder.trunk(tokens[:, :t]), z)[:, -1]
        RULE.choose(last @ decoder.embedding.weight.T, torch.rand(len(last)))

    state = decoder.start(z)
    decoder.read(tokens, state)

    def cached_token() -> None:
        for _ in range(BLOCK):
            state.t = length - 1
            RULE.choose(decoder.step(tokens[:, -1], state), torch.rand(len(tokens)))

    tasks: dict[str, Callable[[], Any]] = {
        "text": lambda: write_tokens(decoder, z, length),
        "token": cached_token,
    }
    for t in (*grid, length):
        tasks[f"all {t}"] = partial(all_logits, t)
        tasks[f"last {t}"] = partial(last_logits, t)
    with torch.inference_mode():
        median = {name: statistics.median(s) for name, s in in_turns(tasks, repeats)}
    token = median["token"] / BLOCK
    figures: dict[str, Any] = {
        "cached_ms_per_token": median["text"] / length * 1e3,
        "cached_ms_of_token": token * 1e3,
    }
    for way in ("all", "last"):
        # Each timed position stands for the `stride` around it.
        text = sum(median[f"{way} {t}"] for t in grid) * length / len(grid)
        figures[f"recomputed_{way}_ms_of_token"] = median[f"{way} {length}"] * 1e3
        figures[f"token_speedup_{way}"] = median[f"{way} {length}"] / token
        figures[f"text_speedup_{way}"] = text / median["text"]
    return figures


def position_table(results: list[dict[str, Any]]) -> list[str]:
    """Milliseconds per token by position, as Markdown."""
    positions = list(results[0]["ms_per_token_at"])
    lines = [
        f"| preset | B | {' | '.join(f'ms/token at {p}' for p in positions)} "
        f"| {positions[-1]} / {positions[0]} |",
        "|---" * (len(positions) + 3) + "|",
    ]
    for case in results:
        times = list(case["ms_per_token_at"].values())
        cells = [f"`{case['preset']}`", str(case["rows"]), *(f"{ms:.3f}" for ms in times)]
        lines.append(f"| {' | '.join(cells)} | {times[-1] / times[0]:.2f} |")
    return lines


def speedup_table(results: list[dict[str, Any]], length: int) -> list[str]:
    """Speed-ups over recomputing, as Markdown."""
    lines = [
        f"| preset | B | ms/token, text of {length} | token {length}: all logits "
        f"| token {length}: last logits | text: all logits | text: last logits |",
        "|---" * 7 + "|",
    ]
    for case in results:
        factors = [
            case[f"{what}_speedup_{way}"] for what in ("token", "text") for way in ("all", "last")
        ]
        cells = [f"`{case['preset']}`", str(case["rows"]), f"{case['cached_ms_per_token']:.3f}"]
        lines.append(f"| {' | '.join(cells + [f'{x:.0f} x' for x in factors])} |")
    return lines


if __name__ == "__main__":
    main()
