"""What the files of a run folder hold: one checked model per file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le
from pydantic import ConfigDict, JsonValue, Strict, StringConstraints
from pydantic.dataclasses import dataclass

from ltm_pyro.config import Fast, FitConfig, Slow
from ltm_pyro.errors import InputError
from ltm_pyro.reading import damaged
from ltm_pyro.schema import Whole, validated

Digest = Annotated[str, Strict(), StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""
Version = Annotated[
    str, Strict(), StringConstraints(pattern=r"^[0-9]{1,6}(\.[0-9A-Za-z]{1,9}){0,5}$")
]
TensorFile = Annotated[
    str, Strict(), StringConstraints(pattern=r"^tensors-[0-9a-f]{12}\.safetensors$")
]
"""A name inside the checkpoint's folder, and so no path out of it."""
Step = Annotated[Whole, Ge(0), Le(10**12)]
Few = Annotated[str, Strict(), StringConstraints(max_length=4096)]

_record = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore"))


@_record
class Heading:
    """Of `config.json`: which layout, by which version."""

    format: Annotated[Whole, Ge(0), Le(10**6)]
    version: Version


@_record
class CorpusFacts:
    """What the corpus was."""

    sha256: Digest
    name: Few
    n_tokens: Step
    n_bytes: Step


@_record
class Earlier:
    """Settings that a run had, and up to which slow step."""

    until_step: Step
    steps: Step
    fast: Fast
    slow: Slow


@_record
class Facts:
    """`config.json`: settings, and what was recorded when the run was made."""

    config: FitConfig
    corpus: CorpusFacts
    tokenizer_sha256: Digest
    versions: Mapping[str, Few]
    earlier: tuple[Earlier, ...] = ()


@_record
class State:
    """How far a checkpoint is, and with which settings."""

    slow_step: Step
    config: FitConfig


@_record
class CheckpointFile:
    """`state.json`: a checkpoint, which names its tensor file by content."""

    checksum: Digest
    tensors: TensorFile
    sha256: Digest
    state: Mapping[str, JsonValue]


T = TypeVar("T")


def checked(schema: type[T], values: Mapping[str, Any], path: Path, owner: str) -> T:
    """What `path` holds, known to be of `schema`; else its `owner` is damaged."""
    try:
        return validated(schema, values)
    except InputError as error:
        raise damaged(owner, f"{path.name}: {error}") from None
