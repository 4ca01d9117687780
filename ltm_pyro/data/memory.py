"""Documents from what a program holds: strings, dicts, frames, datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ltm_pyro.data.records import Document, Reading
from ltm_pyro.data.split import SPLIT_NAMES
from ltm_pyro.errors import InputError, shown

_ROWS = 1024


class MemorySource:
    """Strings, or mappings with a text among their fields.

    Args:
        data: An iterable of them, which is read once; a pandas frame or series; or a mapping of
            such by split.
        reading: Which part of a mapping, or which column, is the text.
        name: For people.
    """

    files = ("",)

    def __init__(self, data: object, reading: Reading, name: str = "in-memory") -> None:
        self.reading, self.name = reading, name
        self._parts: list[tuple[str, str, Iterator[Any]]] = []
        if isinstance(data, Mapping):
            _check_splits(data)
            for key, part in data.items():
                self._parts.append((SPLIT_NAMES[key.lower()], f" of {key!r}", self._rows(part)))
        else:
            self._parts.append(("", "", self._rows(data)))

    def identity(self) -> None:
        """Only reading tells what is in it."""

    def documents(self) -> Iterator[Document]:
        """The documents, in the order given."""
        place = -1
        for split, label, rows in self._parts:
            for number, record in enumerate(rows):
                place += 1
                text, fields = self.reading.take(record, f"item {number}{label}")
                yield Document(text, 0, place, split, fields)

    def _rows(self, data: object) -> Iterator[Any]:
        if isinstance(data, pd.DataFrame):
            return _frame_rows(data, self.reading.text_field)
        if isinstance(data, set | frozenset):
            raise InputError(
                "a set has no order, so that ids would be others in each process: give a list"
            )
        if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
            raise InputError(
                f"a corpus cannot be made of {type(data).__name__} {shown(data)}: give a path, "
                "strings, dicts or a frame"
            )
        return iter(data)


def _frame_rows(frame: pd.DataFrame, field: str) -> Iterator[Mapping[str, Any]]:
    """Rows as mappings, some at a time."""
    columns = [str(name) for name in frame.columns]
    if field not in columns and field.partition(".")[0] not in columns:
        names = shown(", ".join(columns), 200)[1:-1] or "none"
        raise InputError(
            f'the frame has no column "{shown(field)[1:-1]}": its columns are {names}; name one '
            "with text_field"
        )
    for start in range(0, len(frame), _ROWS):
        part = frame.iloc[start : start + _ROWS]
        part = part.astype(object).where(part.notna(), None)
        for row in part.to_dict("records"):
            yield {str(name): value for name, value in row.items()}


def _check_splits(data: Mapping[Any, Any]) -> None:
    names = [str(key).lower() for key in data]
    unknown = [key for key, name in zip(data, names, strict=True) if name not in SPLIT_NAMES]
    if unknown or not names:
        raise InputError(
            f"a dict must hold the splits train, val and test, not {shown(list(data))}: give the "
            "records themselves as a list of dicts"
        )
    told = [SPLIT_NAMES[name] for name in names]
    if len(set(told)) < len(told):
        raise InputError(f"a dict names one split twice: {shown(list(data))}; join them")


def is_ids(data: object) -> bool:
    """Whether `data` is an array of numbers, in which case they must be token ids."""
    return (isinstance(data, np.ndarray) and data.dtype.kind in "iufb") or (
        type(data).__module__ == "torch" and hasattr(data, "detach")
    )
