"""Tables of `fast_loop.py`, and what puts them into docs/speed.md.

    python benchmarks/speed_tables.py            # docs/fast_loop.json, docs/fast_loop_scaling.json

Replaces what stands between the markers in docs/speed.md; without the second file the part on
scaling is left out. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
TABLE, SCALING = Path("docs/fast_loop.json"), Path("docs/fast_loop_scaling.json")
FIGURE = Path("docs/fast_loop.png")
UNITS = {
    "fast_steps": "T_fast", "length": "T at a fixed window", "vocab_size": "V",
    "batch_size": "B", "preset": "preset",
}  # fmt: skip

LEGEND = """
a, b, c in tokens x fast steps per second, median of the rounds. a is algorithm 1 of Kong et al.
(2025) in eager fp32 PyTorch, in the bf16 rows too; a16 is a under bf16 autocast; b is this engine
by hand, without Pyro. All run in one process, where freed memory is kept for a too. `infer` is the
fast loop, `step` the fast loop and a slow step. The loops take turns on the same weights and
random tokens; ratios are of times, median of {rounds} rounds (smallest to largest). Peak memory:
tensors at the worst moment, beyond weights and optimiser states. Last column: FLOPs of the fast
step's products with weights per second of c, over the rate that the same products reach alone,
same shapes and dtype, in the same run (GFLOP/s: {rates}).
"""

Row = Mapping[str, Any]


def main() -> None:
    """Rewrites the block."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, nargs="?", default=ROOT / TABLE)
    parser.add_argument("scaling", type=Path, nargs="?", default=ROOT / SCALING)
    args = parser.parse_args()
    page = ROOT / "docs/speed.md"
    scaling = json.loads(args.scaling.read_text()) if args.scaling.exists() else None
    text = block(json.loads(args.table.read_text()), scaling)
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def block(result: Row, scaling: Row | None = None) -> str:
    """The whole section between the markers."""
    lines = [
        *markdown_table(result["rows"]), "", legend(result["rows"]), "", footnote(result["header"]),
    ]  # fmt: skip
    if scaling is not None:
        lines += [
            "", f"![Cost of the fast loop as one thing grows]({FIGURE.name})", "",
            *scaling_table(scaling), "", footnote(scaling["header"]),
        ]  # fmt: skip
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """One line for each preset, precision and part."""
    head = [
        "| preset, B x T, T_fast | decoder | part | a: published | b: by hand | c: `DualRateSVI` "
        "| a / c | a16 / c | c / b | peak memory a, c | of the matrix rate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return head + [_line(row, part) for row in rows for part in ("infer", "step")]


def _line(row: Row, part: str) -> str:
    data = row[part]
    speed = data["tokens_x_fast_steps_per_second"]
    cells = [
        f"`{row['preset']}`, {row['batch_size']} x {row['length']}, {row['fast_steps']}",
        row["precision"] + ("" if row["compiled"] else ", eager"),
        f"`{part}`",
        *(f"{speed[name]:,.0f}" for name in ("a", "b", "c")),
        _ratio(data, "a/c"),
        _ratio(data, "a16/c"),
        _ratio(data, "c/b", digits=3),
        f"{_megabytes(data['peak_bytes']['a'])}, {_megabytes(data['peak_bytes']['c'])}",
        f"{row['matrix']['weights']['share']:.0%}" if part == "infer" else "",
    ]
    return f"| {' | '.join(cells)} |"


def _ratio(data: Row, name: str, digits: int = 2) -> str:
    if name not in data:
        return ""
    r = data[name]
    return f"{r['median']:.{digits}f} ({r['min']:.{digits}f} to {r['max']:.{digits}f})"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def legend(rows: Sequence[Row]) -> str:
    """What the columns are."""
    rates = "; ".join(
        f"`{row['preset']}` {row['precision']} {m['weights']['reached_gflops_per_second']:.0f} of "
        f"{m['weights']['gflops_per_second']:.0f}"
        for row in rows
        for m in (row["matrix"],)
    )
    rounds = min(row["rounds"] for row in rows)
    return LEGEND.format(rounds=rounds, rates=rates).replace("\n", " ").strip()


def footnote(head: Row) -> str:
    """What made the numbers."""
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    return (
        f"Made by `{head['command']}` and `benchmarks/speed_tables.py`: seed {head['seed']}, "
        f"{versions}; {head['machine']}, {head['threads']} threads."
    )


def scaling_table(result: Row) -> list[str]:
    """How linear (c) is in each axis, then what memory does with V."""
    lines = [
        "| cost of c against | from, to | tokens B x T | T_fast | per fast step (ms) "
        "| off a straight line | off proportional |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, axis in result["axes"].items():
        points = axis["points"]
        first, last = points[0], points[-1]
        milliseconds = [_three_digits(1e3 * p["seconds_per_fast_step"]["c"]) for p in points]
        fit = axis.get("linearity")
        cells = [
            UNITS[name], f"{first['value']}, {last['value']}",
            _range(first["tokens"], last["tokens"]),
            _range(first["fast_steps"], last["fast_steps"]), "; ".join(milliseconds),
            f"{fit['residual']:.1%}" if fit else "", f"{fit['spread']:.1%}" if fit else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if "vocab_size" in result["axes"]:
        lines += ["", memory_sentence(result["axes"]["vocab_size"])]
    return lines


def _three_digits(value: float) -> str:
    """Rounded to three digits; from 1,000 on to a whole number, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def memory_sentence(axis: Row) -> str:
    """What peak memory does as V grows."""
    points, memory = axis["points"], axis["memory"]
    c, a = memory["c"], memory["a"]
    return (
        f"From V = {points[0]['value']} to {points[-1]['value']} the peak memory of c's fast loop "
        f"beyond the weights lies between {_megabytes(c['smallest'])} and "
        f"{_megabytes(c['largest'])}, {c['bytes_per_vocabulary_entry']:z,.0f} bytes for each entry "
        f"of the vocabulary; of a's between {_megabytes(a['smallest'])} and "
        f"{_megabytes(a['largest'])}, {a['bytes_per_vocabulary_entry']:,.0f} bytes. One (B, T, V) "
        f"tensor takes {c['bytes_per_vocabulary_entry_of_logits']:,.0f} bytes an entry."
    )


if __name__ == "__main__":
    main()
