"""A run on a text that a browser could obey, for the tests of the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ltm_pyro.cli import main

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</style><img src=x onerror=document.title='owned'>",
    "\"double\" & 'single' quotes",
    "{{ 7*7 }}{% raw %}",
    "😀👩‍👩‍👧",
    "שלום עולם",
    "\N{RIGHT-TO-LEFT OVERRIDE}turned\N{POP DIRECTIONAL FORMATTING}",
    "nul\0byte",
    "\x1b[31mred",
    "]]> <!-- &lt;b&gt; -->",
]
SMALL = [
    *("--model.seq_len", "48", "--model.n_layers", "2", "--model.width", "16"),
    *("--model.n_heads", "2", "--model.mlp_hidden", "16", "--model.thought_dim", "2"),
    *("--model.window", "4", "--fast.steps", "2", "--batch_size", "4", "--no-compile"),
    *("--eval_sequences", "24", "--eval_draws", "4", "--eval_fast_steps", "4"),
    *("--corpus.options", '{"fractions": [0.6, 0.3, 0.1]}'),
]


def hostile_run(folder: Path, *options: str) -> Path:
    """Fits a few steps to a text of fragments that must never be obeyed; returns the run folder."""
    rng = random.Random(0)
    records = [{"text": " ".join(rng.choices(HOSTILE, k=6)), "<b>/c": rng.choice(HOSTILE)}
               for _ in range(40)]  # fmt: skip
    corpus = folder / "<i>'text'.jsonl"
    corpus.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    run = folder / "run <b>&'"
    arguments = ["--corpus", str(corpus), "--out", str(run), "--steps", "3", *SMALL, *options]
    assert main(["fit", *arguments]) == 0
    return run


def numbers_of(run: Path) -> dict[str, Any]:
    """`report.json` of a run."""
    return json.loads((run / "report.json").read_text(encoding="utf-8"))
