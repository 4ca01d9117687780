"""`metrics.csv`: one row per slow step, added as the fit goes on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from ltm_pyro.inference.dual_rate import Metrics
from ltm_pyro.run.files import damaged, read_bytes, write_atomic, writing


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
            # `repr` keeps every bit of a number.
            writer.writerow([repr(value) for value in row.values()])
            stream.write(text.getvalue().encode())

    def sync(self) -> None:
        """Brings the rows to the disk, before a checkpoint that counts on them."""
        if self.path.exists():
            with writing(self.path), open(self.path, "rb") as stream:
                os.fsync(stream.fileno())

    def read(self, steps: int) -> list[Metrics]:
        """The rows of the first `steps` steps; what a killed process wrote after them is ignored.

        Raises:
            InputError: if the file does not hold that many whole rows.
        """
        if steps == 0:
            return []
        data = read_bytes(self.path, self.owner)
        try:
            lines = data.decode().split("\n")
            rows = list(csv.reader(lines[: steps + 1]))
            header, found = rows[0], rows[1:]
            # The last piece has no line end after it, so it may be cut short.
            whole = len(lines) > steps + 1 and all(len(r) == len(header) for r in found)
            metrics = [dict(zip(header, map(float, row), strict=True)) for row in found]
            whole = whole and [int(m["step"]) for m in metrics] == list(range(1, steps + 1))
        except (ValueError, IndexError, KeyError):
            whole = False
        if not whole:
            raise damaged(self.owner, f"{self.path.name} lacks rows of the {steps} steps done")
        return metrics

    def truncate(self, rows: Sequence[Metrics]) -> None:
        """Leaves only `rows`: a resumed fit writes the following ones again.

        Raises:
            InputError: if it cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if rows:
            writer.writerow(rows[0])
            writer.writerows([[repr(value) for value in row.values()] for row in rows])
        write_atomic(self.path, text.getvalue().encode())
