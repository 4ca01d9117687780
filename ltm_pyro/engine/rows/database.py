"""Rows on disk, in one SQLite file for each process that writes.

A row carries a tag, and is never changed under a tag that a checkpoint may need: rows written after
the checkpoint of step p was prepared are tagged p + 1. A checkpoint takes three acts:

    store.prepare(N)        what has changed is on disk for good
    the run's checkpoint    one rename makes N the step that everything goes on from
    store.publish(N)        rows that step N has replaced may go

A store that is opened at step N sees, of each sequence, the row with the highest tag up to N. So a
process killed anywhere leaves the step before or step N, and nothing between; that a transaction is
on disk whole or not at all is SQLite's part. Processes may change in number: each writes its own
file and reads all, and the highest tag is the newest row wherever it lies.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor

from ltm_pyro.engine.rows.file import RowFile, empty_file
from ltm_pyro.engine.rows.layout import RowLayout
from ltm_pyro.engine.rows.store import Rows
from ltm_pyro.errors import InputError

_NAME = re.compile(r"rows-(\d+)\.db")


def file_name(number: int) -> str:
    """The file of process `number`."""
    return f"rows-{number}.db"


def new_store_files() -> dict[str, bytes]:
    """The files of an empty store, by name."""
    return {file_name(0): empty_file()}


class RowDatabase:
    """Rows of variational parameters and of their optimiser's moments, by sequence id, on disk.

    Opening writes nothing, so that a run can be read while its fit goes on. A sequence must stay
    with one process as long as the processes live.

    Args:
        folder: Made with `new_store_files`.
        step: Slow step of the checkpoint that the rows must belong to.
        owner: What the store belongs to, for messages.
        rank: Number of this process.
        world: Number of processes.

    Attributes:
        step: Slow step that was published last.

    Raises:
        InputError: if the store is damaged, or of another step.
    """

    def __init__(
        self, folder: Path, step: int, *, owner: str = "row store", rank: int = 0, world: int = 1
    ) -> None:
        self.folder, self.owner, self.step = folder, owner, step
        self._opened, self._rank, self._world = step, rank, world
        self._tag = step + 1
        self._changed: set[int] = set()
        self._writer: RowFile | None = None
        self._files = self._open_files()
        first = self._files[0].facts
        for held, wrong in (
            (first["prepared"], first["prepared"] < step),
            (first["published"], first["published"] > step),
        ):
            if wrong:
                raise InputError(
                    f"{owner} holds rows of slow step {held} and the checkpoint is of {step}: "
                    "restore both from one copy, or fit anew with --overwrite"
                )
        known = [file.facts["columns"] for file in self._files.values()]
        columns = next((c for c in known if c is not None), None)
        try:
            self._layout = None if columns is None else RowLayout.from_json(columns)
        except ValueError as error:
            raise self._damaged(f"{file_name(0)}: {error}") from None

    def _open_files(self) -> dict[int, RowFile]:
        """By the number of the process; the first file says how many there must be."""
        files = {0: RowFile(self.folder / file_name(0), self._damaged)}
        there = {
            int(found[1])
            for path in self.folder.iterdir()
            if (found := _NAME.fullmatch(path.name)) is not None
        }
        for number in sorted(there | set(range(files[0].facts["files"]))):
            if number:
                files[number] = RowFile(self.folder / file_name(number), self._damaged)
        return files

    def __len__(self) -> int:
        """Sequences that have a row, in any file."""
        return len(set().union(*(file.ids(self._visible(file)) for file in self._files.values())))

    def __repr__(self) -> str:
        return f"RowDatabase({str(self.folder)!r}: {len(self)} rows, step {self.step})"

    def gather(self, ids: Tensor, fresh: Rows) -> Rows:
        """See `RowStore`; `InputError` if the rows stored are another guide's, or damaged."""
        if self._layout is None:
            return {name: value.clone() for name, value in fresh.items()}
        numbers = ids.tolist()
        newest: dict[int, tuple[int, bytes]] = {}
        for file in self._files.values():
            for i, found in file.newest(numbers, self._visible(file)).items():
                newest[i] = max(newest.get(i, found), found)
        records = {row: newest[i][1] for row, i in enumerate(numbers) if i in newest}
        return self._layout.filled(fresh, records)

    def scatter(self, ids: Tensor, rows: Rows) -> None:
        """See `RowStore`; `InputError` if the rows stored are another guide's, or the disk full."""
        self._layout = self._layout or RowLayout.of(rows)
        numbers = ids.tolist()
        self._own().write(self._tag, zip(numbers, self._layout.packed(rows), strict=True))
        self._changed.update(numbers)

    def prepare(self, step: int) -> None:
        """Puts what has changed on disk for good, to be taken up with a checkpoint of `step`."""
        if self._changed and step < self._tag:
            raise InputError(
                f"rows have changed after slow step {step} was prepared: give a later step"
            )
        columns = None if self._layout is None else self._layout.to_json()
        self._own().commit(prepared=step, columns=columns)
        self._tag = step + 1

    def publish(self, step: int) -> None:
        """Removes the rows that the checkpoint of `step` has replaced. May be repeated."""
        own = self._own()
        own.remove_replaced(self._changed, step)
        own.commit(published=step, files=max(own.facts["files"], self._world))
        self._changed.clear()
        self.step = step

    def close(self) -> None:
        """Lets go of the files."""
        for file in self._files.values():
            file.close()

    def _visible(self, file: RowFile) -> int | None:
        """The highest tag that counts in `file`; `None` for all that it holds."""
        return None if file is self._writer else self._opened

    def _own(self) -> RowFile:
        """This process's file to write to, rid of what no checkpoint has seen.

        The first process does the same to files whose process is not among these.
        """
        if self._writer is None:
            if self._rank not in self._files:
                path = self.folder / file_name(self._rank)
                partial = path.with_name(f".{path.name}.partial")
                partial.write_bytes(empty_file())
                partial.replace(path)
                self._files[self._rank] = RowFile(path, self._damaged)
            own = self._files[self._rank]
            own.remove_after(self._opened)
            if self._rank == 0:
                for number in range(self._world, max(self._files) + 1):
                    if number in self._files:
                        self._files[number].remove_after(self._opened)
                        self._files[number].commit()
            self._writer = own
        return self._writer

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.owner} is damaged: {self.folder.name}{os.sep}{what}; restore it from a copy, "
            "or fit anew with --overwrite"
        )
