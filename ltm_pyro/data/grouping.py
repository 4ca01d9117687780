"""Documents that belong together: those of one author, one book, one dialogue."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.checks import one_of
from ltm_pyro.errors import InputError, shown

if TYPE_CHECKING:
    from ltm_pyro.data.metadata import DocumentTable

SplitKind = Literal["document", "given", "group"]
FILE = "file"
_PATTERN = "file:"


def check_split(split: str | None, split_by: str | None, is_dict: bool) -> SplitKind:
    """How documents are dealt out; what was left open is filled in."""
    if split is None:
        split = "group" if split_by is not None else "given" if is_dict else "document"
    one_of("split", split, get_args(SplitKind))
    if split == "group" and (not isinstance(split_by, str) or not split_by):
        raise InputError(
            f'split="group" needs split_by, and it is {shown(split_by)}: name a field, or the '
            "file's name as 'file' or 'file:PATTERN'"
        )
    if split != "group" and split_by is not None:
        raise InputError(f'split_by is for split="group", not {split!r}: leave one of them out')
    if split_by is not None:
        _pattern(split_by)
    return cast("SplitKind", split)


def file_groups(files: tuple[str, ...], split_by: str) -> list[str] | None:
    """The group of each file, where the files' names tell it."""
    if split_by == FILE:
        return list(files)
    pattern = _pattern(split_by)
    if pattern is None:
        return None
    groups = []
    for name in files:
        found = pattern.search(name)
        if found is None:
            raise InputError(
                f"split_by {shown(split_by)}: the pattern is not found in the file name "
                f"{shown(name)}; change it, or leave the file out"
            )
        groups.append(found[1] if pattern.groups and found[1] is not None else found[0])
    return groups


def group_labels(table: DocumentTable, split_by: str) -> NDArray[np.int64]:
    """(n,) the same number for documents of one group; one without the field is on its own."""
    of_files = None if split_by in table.fields else file_groups(table.files, split_by)
    if of_files is not None:
        _, codes = np.unique(np.array(of_files, dtype=object).astype(str), return_inverse=True)
        return codes[table.file]
    labels = np.empty(len(table.file), dtype=np.int64)
    for number, value in enumerate(table.column(split_by)):
        text = f"document {number}" if value is None else json.dumps(value, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        labels[number] = int.from_bytes(digest, "little", signed=True)
    return labels


def _pattern(split_by: str) -> re.Pattern[str] | None:
    if not split_by.startswith(_PATTERN):
        return None
    try:
        return re.compile(split_by.removeprefix(_PATTERN))
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"split_by {shown(split_by)} is no regular expression: {error}") from None
