"""A fit of a second, for the tests of the command line."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from ltm_pyro.config import CorpusConfig, Fast, FitConfig, ModelConfig

MICRO = [
    *("--model.seq_len", "16", "--model.n_layers", "1", "--model.width", "16"),
    *("--model.n_heads", "2", "--model.mlp_hidden", "16", "--model.thought_dim", "4"),
    *("--model.window", "4", "--fast.steps", "2", "--batch_size", "4", "--no-compile"),
    *("--eval_sequences", "5", "--eval_draws", "4", "--checkpoint_every", "2"),
]
"""Options that make a fit small."""


def write_text(path: Path, blocks: int = 12) -> Path:
    """Enough different documents for three splits."""
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran", "over", "hills"]
    rng = random.Random(0)
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=30)) for _ in range(blocks)))
    return path


def micro_fit(text: Path, seq_len: int = 16, **changes) -> FitConfig:
    """A fit of a second on `text`."""
    small = {"n_layers": 1, "width": 16, "n_heads": 2, "mlp_hidden": 16, "thought_dim": 4}
    usual = {
        "corpus": CorpusConfig(name=str(text)),
        "model": ModelConfig(seq_len=seq_len, window=4, **small),
        "fast": Fast(steps=2),
        **{"steps": 4, "batch_size": 4, "compile": False, "checkpoint_every": 2},
        **{"eval_sequences": 5, "eval_draws": 4},
    }
    return FitConfig(**{**usual, **changes})


def program(*arguments: str) -> list[str]:
    """The command line that runs `ltm-pyro` in a process of its own."""
    code = "import sys; from ltm_pyro.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


def environment() -> dict[str, str]:
    """That of a process which imports the code under test and computes as this one does."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def run_program(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """Runs `ltm-pyro` to its end."""
    return subprocess.run(
        program(*arguments),
        cwd=cwd,
        env=environment(),
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
        **options,
    )
