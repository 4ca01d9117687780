"""`metrics.csv`: one row per slow step, added as the fit goes on."""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ltm_pyro.inference.course import Metrics
from ltm_pyro.reading import open_regular, read_bytes
from ltm_pyro.run.files import write_atomic, writing

_LONGEST_ROW = 4096
"""Bytes, of some twenty numbers."""


class MetricsFile:
    """Appends rows, so that they can be watched, and restores them.

    Args:
        path: The file.
        owner: The run that it belongs to, for messages.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.owner = owner

    def append(self, row: Metrics) -> None:
        """Adds one row; the first brings the header.

        Raises:
            InputError: if it cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        with writing(self.path), open(self.path, "ab") as stream:
            if stream.tell() == 0:
                writer.writerow(row)
            stream.write(f"{text.getvalue()}{_line(row)}\n".encode())

    def sync(self) -> None:
        """Brings the rows to the disk, before a checkpoint that counts on them."""
        if self.path.exists():
            with writing(self.path), open(self.path, "rb") as stream:
                os.fsync(stream.fileno())

    def read(self, steps: int) -> list[Metrics]:
        """The rows of the first `steps` steps; what a killed process wrote after them is ignored.

        They are history, without which the weights are as good: where some are lost a warning says
        so, and the others are given.

        Raises:
            InputError: if the file is a link, a pipe or the like.
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

    def complete(self, rows: Sequence[Metrics]) -> None:
        """Writes all rows anew, unless `append` was given the last one already.

        Raises:
            InputError: if they cannot be written.
        """
        if rows and self._last_line() != _line(rows[-1]):
            self.truncate(rows)

    def _last_line(self) -> str:
        try:
            with open_regular(self.path) as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - _LONGEST_ROW))
                return stream.read().decode(errors="replace").rpartition("\n")[0].split("\n")[-1]
        except OSError:
            return ""

    def truncate(self, rows: Sequence[Metrics]) -> None:
        """Leaves only `rows`: a resumed fit writes the following ones again.

        Raises:
            InputError: if it cannot be written.
        """
        text = io.StringIO()
        if rows:
            csv.writer(text, lineterminator="\n").writerow(rows[0])
            text.writelines(f"{_line(row)}\n" for row in rows)
        write_atomic(self.path, text.getvalue().encode())


def _line(row: Metrics) -> str:
    """One row as it is written; `repr` keeps every bit of a number."""
    return ",".join(repr(value) for value in row.values())


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
            row = dict(zip(header, map(float, cells), strict=True))
        except ValueError:
            continue
        step = row.get("step", math.nan)
        if step.is_integer() and step > (rows[-1]["step"] if rows else 0):
            rows.append(row)
    return rows
