"""From what a person gives to where the documents come from."""

from __future__ import annotations

import json
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltm_pyro.data.blocks import block_size, blocks
from ltm_pyro.data.hub import PREFIX, HubSource, SavedSource, is_saved
from ltm_pyro.data.memory import MemorySource
from ltm_pyro.data.readers import SUFFIXES
from ltm_pyro.data.records import Reading, Source
from ltm_pyro.data.reference import PydocSource
from ltm_pyro.data.sources import PATTERN, FileSource, as_path, expand_paths, kind_of
from ltm_pyro.data.split import SPLITS
from ltm_pyro.errors import InputError, shown, unknown_name

BUILT_IN = ("pydoc", "mixture")
HUB_OPTIONS = ("config", "hub_split")
IN_MEMORY = "in-memory"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_PATH = 1024


def find_source(
    data: object, reading: Reading, hub: Mapping[str, Any], name: str | None
) -> tuple[Source, str | None]:
    """The source of `data`, as `load_corpus` takes it, and the name by which it is found again.

    The latter is `None` for data that a program holds, which are called `name`. `hub` are options
    for a Hugging Face dataset.
    """
    if isinstance(data, str) and data.startswith("["):
        data = _path_list(data)
    if isinstance(data, str | os.PathLike):
        source = _named(data, reading, hub)
        on_disk = isinstance(source, FileSource | SavedSource)
        return source, _absolute(data) if on_disk else str(data)
    if isinstance(data, list | tuple) and _are_paths(data):
        paths = [path for item in data for path in expand_paths(os.fspath(item))]
        again = json.dumps([_absolute(item) for item in data])
        return FileSource(*paths, reading=reading), again
    if isinstance(data, list | tuple):
        _refuse_list(data)
        if len(data) < len(SPLITS) and all(isinstance(item, str) for item in data):
            data = _blocks_of(data)
    return MemorySource(data, reading, name or IN_MEMORY), None


def _named(data: str | os.PathLike[str], reading: Reading, hub: Mapping[str, Any]) -> Source:
    name = os.fspath(data)
    if isinstance(name, str) and isinstance(data, str):
        if name == "pydoc":
            return PydocSource()
        if name.startswith(PREFIX):
            return HubSource(name.removeprefix(PREFIX), **hub, reading=reading)
        if _is_text(name):
            raise InputError(
                f"{shown(name)} reads as a text, not as the path of one: give texts in a list, "
                "load_corpus([...])"
            )
        if _ADDRESS.match(name):
            raise InputError(f"{shown(name)} is an address: fetch the file, and give its path")
        path = as_path(name)
        there = os.path.lexists(path) or bool(PATTERN.search(name))
        if _is_hub_name(name) and not there:
            return HubSource(name, **hub, reading=reading)
        if not name or not (there or "." in name or len(path.parts) > 1):
            raise InputError(
                f"{unknown_name('corpus', name, BUILT_IN)}, or give the path of a file or folder, "
                f"or a Hugging Face dataset as {PREFIX}NAME"
            )
    paths = expand_paths(name)
    if len(paths) == 1 and is_saved(paths[0]):
        return SavedSource(paths[0], **hub, reading=reading)
    return FileSource(*paths, reading=reading)


def _is_hub_name(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME rather than as a path with a slip in it."""
    owner = name.partition("/")[0]
    is_file = kind_of(Path(name)) in SUFFIXES
    return bool(_HUB_NAME.fullmatch(name)) and not is_file and not os.path.isdir(owner)


def _is_text(name: str) -> bool:
    """Whether `name` can hardly be a path: it has lines, or the length of a text."""
    return "\n" in name or len(name) > _LONGEST_PATH or (name.count(" ") > 4 and not _lies(name))


def _lies(name: str) -> bool:
    """Whether something lies at `name`; a name that no file can have is no path."""
    try:
        return os.path.lexists(os.path.expanduser(name))
    except (OSError, ValueError):
        return False


def _are_paths(items: Sequence[object]) -> bool:
    """Whether all of `items` are paths: of what lies there, or by their suffixes."""
    return bool(items) and all(
        isinstance(item, os.PathLike)
        or (
            isinstance(item, str)
            and bool(item)
            and not _is_text(item)
            and (_lies(item) or kind_of(Path(item)) in SUFFIXES)
        )
        for item in items
    )


def _path_list(text: str) -> list[str]:
    """Several paths in one string, as a run's settings keep them."""
    try:
        paths = json.loads(text)
    except (ValueError, RecursionError):
        paths = None
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise InputError(f'{shown(text)} is no list of paths: write several as ["a.txt", "b.txt"]')
    return [os.fspath(as_path(path)) for path in paths]


def _refuse_list(items: Sequence[object]) -> None:
    if not items:
        raise InputError("the corpus is empty: give texts, or records with a text")
    first = items[0]
    if isinstance(first, numbers.Number):
        raise InputError(
            f"a list of numbers such as {shown(first)} is no corpus: give token ids as a NumPy "
            "array, or texts as strings"
        )


def absolute_path(name: str) -> str:
    """The absolute path, paths or pattern that `name` stands for; other names as they are."""
    if name in BUILT_IN or not name:
        return name
    if name.startswith("["):
        return json.dumps([_absolute(path) for path in _path_list(name)])
    return _absolute(name) if PATTERN.search(name) or _lies(name) else name


def _blocks_of(texts: Sequence[str]) -> list[str]:
    """One or two texts cut into documents as a text file is, so that there are some to part."""
    size = block_size(sum(len(text.encode("utf-8", "replace")) for text in texts))
    return [block for text in texts for block in blocks(iter([text]), size)]


def _absolute(path: str | os.PathLike[str]) -> str:
    found = as_path(path)
    return str(found.absolute() if PATTERN.search(str(found)) else found.resolve())
