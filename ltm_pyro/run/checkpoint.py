"""Checkpoints: tensors in safetensors, the rest in JSON, and at every moment a whole one on disk.

`state.json` is the checkpoint: it names its tensor file by content, with the checksum. A new tensor
file is written first, then `state.json` is replaced by one rename, then the old tensor file is
removed. A process killed anywhere in between leaves the old checkpoint or the new one. Loading
parses JSON and copies numbers; nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.reading import LARGEST_JSON, damaged, open_regular, read_bytes, read_json
from ltm_pyro.run.files import PARTIAL, json_bytes, sha256, write_atomic, writing
from ltm_pyro.run.schemas import CheckpointFile, State, checked

STATE = "state.json"
_PATTERN = "tensors-*.safetensors"
ATTEMPTS = 3  # a reader may lose the race against a fit that replaces its checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """What a fit needs to go on: tensors on the CPU by name, and a state of JSON types."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def to_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's files by name, the tensor file first."""
    data = safetensors.torch.save(_apart(checkpoint.tensors))
    digest = sha256(data)
    name = f"tensors-{digest[:12]}.safetensors"
    body = {"tensors": name, "sha256": digest, "state": checkpoint.state}
    return {name: data, STATE: json_bytes({"checksum": _checksum(body), **body})}


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the checkpoint in `folder`; where it cannot be written, the one before is whole."""
    files = to_files(checkpoint)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    for old in [*folder.glob(_PATTERN), *folder.glob(f".*{PARTIAL}")]:
        if old.name not in files:
            with suppress(OSError):
                old.unlink()


def load(folder: Path, owner: str) -> Checkpoint:
    """The checkpoint in `folder`; `InputError` about its `owner` if it is absent or damaged."""
    while True:
        before = mark(folder)
        try:
            return _load(folder, owner)
        except InputError:
            if mark(folder) == before:
                raise  # no fit has replaced it meanwhile


def _load(folder: Path, owner: str) -> Checkpoint:
    saved = _read_state(folder, owner)
    path = folder / saved.tensors
    data = read_bytes(path, owner)
    if sha256(data) != saved.sha256:
        raise damaged(owner, f"{folder.name}/{path.name} does not match its checksum")
    try:
        return Checkpoint(safetensors.torch.load(data), dict(saved.state))
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(owner, f"{folder.name}/{path.name}: {error}") from None


def _read_state(folder: Path, owner: str) -> CheckpointFile:
    saved = read_json(folder / STATE, owner)
    found = checked(CheckpointFile, saved, folder / STATE, owner)
    if found.checksum != _checksum({k: v for k, v in saved.items() if k != "checksum"}):
        raise damaged(owner, f"{folder.name}/{STATE} does not match its own checksum")
    return found


def saved_step(folder: Path, owner: str) -> int:
    """Slow steps of the checkpoint in `folder`; `InputError` if it is absent or damaged."""
    saved = _read_state(folder, owner)
    return checked(State, saved.state, folder / STATE, owner).slow_step


def mark(folder: Path) -> str:
    """Tells the checkpoint in `folder` from any other; empty where there is none."""
    try:
        with open_regular(folder / STATE) as stream:
            return sha256(stream.read(LARGEST_JSON))
    except OSError:
        return ""


def exists(folder: Path) -> bool:
    """Whether `folder` has a checkpoint."""
    return (folder / STATE).exists()


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def put(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that start with `prefix`."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def weights_of(svi: DualRateSVI) -> dict[str, Tensor]:
    """Every weight that the slow clock fits, model's and guide's, as a checkpoint calls it."""
    local = ("local.", "inputs.")
    shared = {k: v for k, v in svi.guide.state_dict().items() if not k.startswith(local)}
    return {**put("model.", _module(svi).state_dict()), **put("guide.", shared)}


def tensors_of(svi: DualRateSVI) -> dict[str, Tensor]:
    """The weights, and AdamW's moments and step counts by the number of their parameter."""
    state = svi.clock.optimizer.state
    moments = {
        f"{number}.{name}": value
        for number, p in enumerate(svi.clock.parameters)
        for name, value in state.get(p, {}).items()
    }
    return {**weights_of(svi), **put("adamw.", moments)}


def restore(svi: DualRateSVI, tensors: dict[str, Tensor], step: int, owner: str) -> None:
    """Puts what `tensors_of` gave at slow step `step` into a fit of the same model."""
    model, weights = _module(svi), take(tensors, "model.")
    _check_names(model.state_dict(), weights, owner)
    model.load_state_dict(weights)
    try:
        svi.guide.load_state_dict(take(tensors, "guide."))
        for key, value in take(tensors, "adamw.").items():
            number, _, name = key.partition(".")
            p = svi.clock.parameters[int(number)]
            like = value.to(p.device) if name == "step" else value.to(p)
            svi.clock.optimizer.state[p][name] = like.clone()
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise damaged(owner, f"its checkpoint is another model's ({error})") from None
    svi.slow_step, svi.whole = step, True


def _check_names(expected: dict[str, Tensor], found: dict[str, Tensor], owner: str) -> None:
    """Refuses tensors of another model, naming the first that is missing, unknown or reshaped."""
    for name in sorted(expected.keys() | found.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (expected, found)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{owner} holds another model: {name} should be {shapes[0]} and is {shapes[1]}"
            )


def share_checkpoint(
    parallel: Parallel, read: Callable[[], Checkpoint | None]
) -> Checkpoint | None:
    """What the first process reads, in all processes."""
    if parallel.size == 1:
        return read()
    mine = parallel.on_rank_0(read)
    state = parallel.broadcast(None if mine is None else mine.state)
    if state is None:
        return None
    return Checkpoint(parallel.broadcast_tensors({} if mine is None else mine.tensors), state)


def _module(svi: DualRateSVI) -> nn.Module:
    return cast("nn.Module", svi.model)  # a run records no other


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, those that share memory copied: the format refuses tied weights."""
    out: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        place = held.untyped_storage().data_ptr()
        out[name] = held.clone() if place in known else held
        known.add(place)
    return out


def _checksum(body: dict[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode())
