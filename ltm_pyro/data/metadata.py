"""What is known of documents besides their text: on disk, read for the rows that are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ltm_pyro.data.grouping import FILE, file_groups
from ltm_pyro.errors import InputError, did_you_mean, shown

OWN = ("document", "file", "offset", "position", "group")
"""Columns that every sequence has; a record's field of the same name gets `record.` before it."""
_ROWS = 2**14  # parsed at a time


@dataclass(frozen=True, eq=False)
class DocumentTable:
    """One row per document, memory-mapped.

    Attributes:
        files: Names of the files.
        fields: Names of the records' fields.
        file: (n,) which file a document is from.
        offset: (n,) where it begins there; see `Document.offset`.
        rows: Bytes: the fields of each document as JSON, by their numbers in `fields`.
        row_lengths: (n,) bytes of each row; 0 where a document has no fields.
        group_by: What documents are grouped by: then there is a column `group`.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    rows: NDArray[np.uint8]
    row_lengths: NDArray[np.int64]
    group_by: str | None = None

    def frame(self, documents: NDArray[np.int64]) -> pd.DataFrame:
        """The rows of `documents`, in that order: `document`, `file`, `offset` and all fields."""
        file = pd.Categorical.from_codes(self.file[documents], pd.Index(self._unique_files()))
        known = {"document": documents, "file": file, "offset": self.offset[documents]}
        frame = pd.DataFrame(known)
        if self.fields and len(documents):
            self._add_fields(frame, documents)
        if self.group_by is not None and len(documents):
            frame["group"] = self._groups(frame, documents)
        return frame

    def _groups(self, frame: pd.DataFrame, documents: NDArray[np.int64]) -> Any:
        by = str(self.group_by)
        of_files = None if by in self.fields else file_groups(self.files, by)
        if of_files is None:
            return frame[f"record.{by}" if by in OWN else by]
        names, codes = np.unique(np.array(of_files, dtype=str), return_inverse=True)
        return pd.Categorical.from_codes(codes[self.file[documents]], pd.Index(names))

    def _add_fields(self, frame: pd.DataFrame, documents: NDArray[np.int64]) -> None:
        starts = range(0, len(documents), _ROWS)
        parts = [self._columns(documents[start : start + _ROWS]) for start in starts]
        for name in self.fields:
            shown_name = f"record.{name}" if name in OWN else name
            frame[shown_name] = _joined([part.pop(name) for part in parts])

    def column(self, name: str) -> Iterator[Any]:
        """A field of every document, one value after another; `None` where it is missing."""
        if name == FILE and FILE not in self.fields:
            yield from (self.files[number] for number in self.file)
            return
        if name not in self.fields:
            known = [FILE, *self.fields]
            raise InputError(
                f"the corpus has no field {shown(name)}: {did_you_mean(name, known)}it has "
                f"{shown(', '.join(known), 200)[1:-1]}"
            )
        key = str(self.fields.index(name))
        for row in self._parsed(range(len(self.row_lengths))):
            yield row.get(key)

    def _columns(self, documents: NDArray[np.int64]) -> dict[str, pd.Series]:
        """The fields of some documents, in pandas's own types."""
        columns: dict[str, list[Any]] = {name: [] for name in self.fields}
        keys = [(str(number), columns[name]) for number, name in enumerate(self.fields)]
        for row in self._parsed(documents):
            for key, values in keys:
                values.append(row.get(key))
        return {k: pd.Series(v, dtype=object).infer_objects() for k, v in columns.items()}

    def _parsed(self, documents: NDArray[np.int64] | range) -> Iterator[dict[str, Any]]:
        for d in documents:
            end = int(self._ends[d])
            data = self.rows[end - int(self.row_lengths[d]) : end].tobytes()
            yield json.loads(data) if data else {}

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.row_lengths)

    def _unique_files(self) -> list[str]:
        """Names that differ, as two folders may hold files of one name."""
        seen: dict[str, int] = {}
        names = []
        for name in self.files:
            seen[name] = seen.get(name, 0) + 1
            names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
        return names


def _joined(parts: list[pd.Series]) -> pd.Series:
    """Parts of one column, one below the other, of one type where they agree."""
    if len({part.dtype for part in parts}) > 1:
        return pd.concat([p.astype(object) for p in parts], ignore_index=True).infer_objects()
    return pd.concat(parts, ignore_index=True)
