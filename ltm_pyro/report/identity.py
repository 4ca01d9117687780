"""Which run this is, on what it was made, and the commands that make it again."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import ltm_pyro
from ltm_pyro.config import FitConfig, preset, to_dict
from ltm_pyro.run.files import PARTIAL
from ltm_pyro.run.folder import Run

_OPEN = ("options", "guide_options", "objective_options", "prior_options")


def identity(run: Run) -> dict[str, Any]:
    """Name, versions, processor, settings and commands."""
    config = run.config
    return {
        "name": run.folder.resolve().name,
        "preset": config.preset,
        "guide": config.guide,
        "objective": config.objective,
        "seed": config.seed,
        "steps": run.svi.slow_step,
        "steps_asked": config.steps,
        "weights": sum(p.numel() for p in run.model.parameters()),
        "thoughts": run.model.thought_shape[0],
        "thought_dim": run.model.thought_shape[1],
        "versions": {
            "ltm_pyro": run.facts["version"],
            **run.facts["versions"],
            "report by ltm_pyro": ltm_pyro.__version__,
        },
        "processor": processor(str(run.model.device)),
        "threads": torch.get_num_threads(),
        "device": str(run.model.device),
        "commands": [
            fit_command(config, str(run.folder)),
            shlex.join(["ltm-pyro", "report", str(run.folder)]),
        ],
        "settings": dict(_differences(to_dict(config), {}, "")),
    }


def processor(device: str) -> str:
    """What computed, as far as the system tells."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fit_command(config: FitConfig, folder: str) -> str:
    """The command that fits with these settings: the preset, and what differs from it."""
    base = to_dict(preset(config.preset))
    mine = to_dict(config)
    del mine["preset"]
    words = ["ltm-pyro", "fit", "--preset", config.preset, "--out", folder]
    for name, value in _differences(mine, base, ""):
        if name != "model.vocab_size":  # the corpus has it
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _differences(
    mine: Mapping[str, Any], base: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
    for key, value in mine.items():
        other = base.get(key)
        if isinstance(value, Mapping) and key not in _OPEN:
            yield from _differences(value, other or {}, f"{prefix}{key}.")
        elif value is not None and json.dumps(value) != json.dumps(other):
            yield f"{prefix}{key}", value


def files(folder: Path, leave_out: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every file of the run with its size and SHA-256, in the order of their names."""
    out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in leave_out or name.endswith(PARTIAL) or not path.is_file() or path.is_symlink():
            continue
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        out.append({"name": name, "bytes": path.stat().st_size, "sha256": digest})
    return out
