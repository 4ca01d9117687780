"""`metrics.csv`: one row per slow step, added as the fit goes on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from ltm_pyro.course import Metrics
from ltm_pyro.reading import open_regular, read_bytes
from ltm_pyro.run.files import write_atomic, writing

_LONGEST_ROW = 4096
"""Bytes, of some twenty numbers."""
_LARGEST = 2**31
"""Bytes, of some ten million rows."""


class MetricsFile:
    """Appends rows, so that they can be watched, and restores them.

    Args:
        path: The file.
        owner: The run that it belongs to, for messages.
        later: Names that rows of some steps have beyond those of the first; other cells are empty.
    """

    def __init__(self, path: Path, owner: str, later: Sequence[str] = ()) -> None:
        self.path, self.owner, self.later = path, owner, later

    def append(self, row: Metrics) -> None:
        """Adds one row; the first brings the header."""
        known = self._columns()
        columns = known or list(dict.fromkeys([*row, *self.later]))
        with writing(self.path), open(self.path, "ab") as stream:
            if not known:
                stream.write(f"{','.join(columns)}\n".encode())
            stream.write(f"{_line(row, columns)}\n".encode())

    def sync(self) -> None:
        """Brings the rows to the disk, before a checkpoint that counts on them."""
        if self.path.exists():
            with writing(self.path), open(self.path, "rb") as stream:
                os.fsync(stream.fileno())

    def read(self, steps: int) -> list[Metrics]:
        """The rows of the first `steps` steps; what a killed process wrote after them is ignored.

        They are history, without which the weights are as good: where some are lost a warning says
        so, and the others are given.
        """
        if steps == 0:
            return []
        rows: list[Metrics] = []
        if os.path.lexists(self.path):
            most = (steps + 1) * _LONGEST_ROW
            data = read_bytes(self.path, self.owner, most=most, cut=True)
            rows = [row for row in _parsed(data) if row["step"] <= steps]
        if [row["step"] for row in rows] != list(range(1, steps + 1)):
            warnings.warn(
                f"{self.path.name} of {self.owner} holds {len(rows)} of the {steps} steps done: "
                "the history is incomplete, the weights are whole",
                stacklevel=2,
            )
        return rows

    def rows(self) -> list[Metrics]:
        """All whole rows that there are, of a fit that may be writing more."""
        if not os.path.lexists(self.path):
            return []
        return _parsed(read_bytes(self.path, self.owner, most=_LARGEST, cut=True))

    def complete(self, rows: Sequence[Metrics]) -> None:
        """Writes all rows anew, unless `append` was given the last one already."""
        columns = self._columns()
        if rows and self._last_line() != _line(rows[-1], columns):
            self.truncate(rows)

    def _columns(self) -> list[str]:
        """The names in the first line; none where there is no file."""
        try:
            with open_regular(self.path) as stream:
                line = stream.readline(_LONGEST_ROW).decode(errors="replace").rstrip("\n")
        except OSError:
            return []
        return line.split(",") if line else []

    def _last_line(self) -> str:
        try:
            with open_regular(self.path) as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LONGEST_ROW))
                return stream.read().decode(errors="replace").rpartition("\n")[0].split("\n")[-1]
        except OSError:
            return ""

    def truncate(self, rows: Sequence[Metrics]) -> None:
        """Leaves only `rows`: a resumed fit writes the following ones again."""
        write_atomic(self.path, self.content(rows))

    def content(self, rows: Sequence[Metrics]) -> bytes:
        """What the file holds when it holds `rows`."""
        names = (name for row in rows for name in row)
        columns = dict.fromkeys([*(rows[0] if rows else ()), *self.later, *names])
        lines = [",".join(columns), *(_line(row, columns) for row in rows), ""] if rows else []
        return "\n".join(lines).encode()


def _line(row: Metrics, columns: Iterable[str]) -> str:
    """One row as it is written; `repr` keeps every bit of a number."""
    return ",".join(repr(row[name]) if name in row else "" for name in columns)


def _parsed(data: bytes) -> list[Metrics]:
    """The whole rows in `data`, in the order of their steps."""
    *lines, _ = data.decode(errors="replace").split("\n")  # the last one may have been cut
    if not lines or len(lines[0]) > _LONGEST_ROW:
        return []
    header = lines[0].split(",")
    rows: list[Metrics] = []
    for line in lines[1:]:
        cells = line.split(",")
        try:
            pairs = zip(header, cells, strict=True)
            row = {name: float(cell) for name, cell in pairs if cell}
        except ValueError:
            continue
        step = row.get("step", math.nan)
        if step.is_integer() and step > (rows[-1]["step"] if rows else 0):
            rows.append(row)
    return rows
