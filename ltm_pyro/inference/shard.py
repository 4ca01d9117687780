"""The files of one shard of a row store: records on disk that change only whole.

    shard-0.rows       one record per slot; mapped for reading, written at `merge` alone
    shard-0.ids        the sequence id of each slot, int64
    shard-0.json       the slow step of the two, and how many slots they have
    shard-0.new        records changed since: an id that changes again overwrites its record
    shard-0.delta-N    the same, complete for slow step N, until it is merged

Writes go through files and never through the mapping: a full disk is then an error and no crash.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.errors import InputError
from ltm_pyro.inference.row_layout import Records, RowLayout

_ID_BYTES = 8
_PARTIAL = ".partial"
_BLOCK_BYTES = 2**22  # merged at a time
# A fault maps the pages around it too (64 KiB on Linux); beyond so many the mapping is emptied, so
# that a process does not seem to hold the whole file. The page cache keeps what it had.
_FAULT_BYTES, _MAPPED_BYTES = 2**16, 2**23


class _File(FileIO):
    """A file that closes with its last reference, as a mapping does."""

    def __del__(self) -> None:
        self.close()


class Shard:
    """One shard, opened as its files were at a slow step. Opening writes nothing.

    Args:
        folder: The store's.
        name: Start of the names of its files, e.g. `shard-0`.
        step: Slow step of the checkpoint that the rows must belong to.
        damaged: Makes the error for files that cannot be used, from what is wrong with them.

    Attributes:
        step: Slow step of the base file.
        n_rows: Slots in the base file.
        n_changed: Records changed since.

    Raises:
        InputError: if a file is missing, cut or of another step.
    """

    def __init__(
        self, folder: Path, name: str, step: int, damaged: Callable[[str], InputError]
    ) -> None:
        self.folder = folder
        self.name = name
        self._damaged = damaged
        self.step, self.n_rows = self._read_meta()
        self.n_changed = 0
        self._delta: FileIO | None = None
        self._named: int | None = None  # the step that the delta's name holds
        self._base: mmap.mmap | None = None
        self._touched = 0
        self.layout: RowLayout | None = None
        if self.step != step:
            self._named = step
            self._delta = self._open_prepared(step)

    def use(self, layout: RowLayout) -> None:
        """Says what a record is; needed before any record is read or written.

        Raises:
            InputError: if the files are too short for what they should hold.
        """
        self.layout = layout
        self._map()
        if self._delta is not None:
            size = os.fstat(self._delta.fileno()).st_size
            if size % layout.record_bytes:
                raise self._damaged(f"{self.name}.delta-{self._named} has been cut")
            self.n_changed = size // layout.record_bytes

    @property
    def holds_rows(self) -> bool:
        """Whether there are records, of which the layout must then be known."""
        delta = 0 if self._delta is None else os.fstat(self._delta.fileno()).st_size
        return self.n_rows > 0 or delta > 0

    @property
    def pending(self) -> bool:
        """Whether a delta of the checkpoint's own step is still to be merged."""
        return self._named is not None

    def ids(self) -> NDArray[np.int64]:
        """The id in each slot, (n_rows,)."""
        if not self.n_rows:
            return np.zeros(0, dtype=np.int64)
        try:
            found = np.fromfile(self._path("ids"), dtype=np.int64, count=self.n_rows)
        except OSError:
            raise self._damaged(f"{self.name}.ids is missing") from None
        if len(found) < self.n_rows:
            raise self._damaged(f"{self.name}.ids has been cut")
        return found

    def changed_ids(self) -> NDArray[np.int64]:
        """The id in each changed record, (n_changed,)."""
        blocks = [self._known.headers(block)["id"] for block in self._changed()]
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)

    def read(self, slot: int, out: NDArray[np.uint8]) -> None:
        """Copies the record in `slot` of the base file into `out` (R,)."""
        assert self._base is not None
        size = self._known.record_bytes
        out[:] = np.frombuffer(self._base, np.uint8, size, slot * size)
        self._touched += _FAULT_BYTES
        if self._touched > _MAPPED_BYTES and hasattr(self._base, "madvise"):
            self._base.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def read_changed(self, place: int, out: NDArray[np.uint8]) -> None:
        """Copies the changed record number `place` into `out` (R,)."""
        assert self._delta is not None
        self._delta.seek(place * self._known.record_bytes)
        if self._delta.readinto(out.data) != len(out):
            raise self._damaged(f"the changed records of {self.name} have been cut")

    def write_changed(self, place: int, record: NDArray[np.uint8]) -> None:
        """Puts `record` (R,) at `place`, from 0 to `n_changed`."""
        delta = self._writable()
        delta.seek(place * self._known.record_bytes)
        _write(delta, record)
        self.n_changed = max(self.n_changed, place + 1)

    def prepare(self, step: int) -> None:
        """Makes the changed records durable under a name that holds `step`.

        Raises:
            InputError: if the base is of that step already and other rows have changed since.
        """
        if step == self.step and not self.n_changed:
            return
        if step <= self.step:
            raise InputError(
                f"rows changed after step {self.step} were stored, and are to be stored as of step "
                f"{step}: give a later step"
            )
        if self._named == step:
            return
        delta = self._writable()
        os.fsync(delta.fileno())
        delta.close()  # some systems rename closed files only
        target = self._path(f"delta-{step}")
        self._path("new").replace(target)
        self._delta, self._named = _File(target), step

    def merge(self, step: int, slots: NDArray[np.int64], new_ids: NDArray[np.int64]) -> None:
        """Moves the changed records into the base file, which is then of `step`.

        May be cut short anywhere and done again: it writes the same bytes to the same places.

        Args:
            step: As given to `prepare`.
            slots: (n_changed,) where each changed record belongs.
            new_ids: Ids of the slots from `n_rows` on.
        """
        if step == self.step:
            return
        if self.n_changed:
            with _appendable(self._path("rows")) as rows:
                for slot, block in self._runs(slots):
                    rows.seek(slot * self._known.record_bytes)
                    _write(rows, block)
            with _appendable(self._path("ids")) as ids:
                ids.truncate(self.n_rows * _ID_BYTES)
                ids.seek(self.n_rows * _ID_BYTES)
                _write(ids, new_ids)
        self.n_rows += len(new_ids)
        self.step = step
        write_checked(self._path("json"), {"step": step, "rows": self.n_rows})

    def forget(self) -> None:
        """Drops the delta, which has been merged, and maps the base anew."""
        self.discard()
        self.n_changed, self._named = 0, None
        if self.layout is not None:
            self._map()

    def discard(self) -> None:
        """Removes all deltas from disk, those of checkpoints that were never written too."""
        if self._delta is not None:
            self._delta.close()
            self._delta = None
        deltas = self.folder.glob(f"{self.name}.delta-*")
        partials = self.folder.glob(f".{self.name}.*{_PARTIAL}")
        for left in [self._path("new"), *deltas, *partials]:
            with suppress(OSError):
                left.unlink()

    def close(self) -> None:
        """Lets go of the files."""
        if self._delta is not None:
            self._delta.close()
        self._base = None

    @property
    def _known(self) -> RowLayout:
        assert self.layout is not None
        return self.layout

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.name}.{ending}"

    def _read_meta(self) -> tuple[int, int]:
        """Slow step and number of slots; (0, 0) where nothing was merged yet."""
        saved = read_checked(self._path("json"), self._damaged)
        return (0, 0) if saved is None else (int(saved["step"]), int(saved["rows"]))

    def _open_prepared(self, step: int) -> FileIO:
        """The delta that brings the base to `step`.

        Raises:
            InputError: if there is none.
        """
        try:
            if self.step < step:
                return _File(self._path(f"delta-{step}"))
        except OSError:
            pass
        raise self._damaged(
            f"{self.name} holds rows of slow step {self.step} and the checkpoint is of {step}"
        )

    def _writable(self) -> FileIO:
        """The delta, in a file that no checkpoint names."""
        if self._delta is not None and self._named is None:
            return self._delta
        fresh = _File(self._path("new"), "w+")
        # Whether the checkpoint of a named delta was written is unknown: it stays as it is.
        for block in self._changed():
            _write(fresh, block)
        if self._delta is not None:
            self._delta.close()
        self._delta, self._named = fresh, None
        return fresh

    def _map(self) -> None:
        """Maps the base file as it is now."""
        self._base = None
        if not self.n_rows:
            return
        try:
            with open(self._path("rows"), "rb") as stream:
                if os.fstat(stream.fileno()).st_size < self.n_rows * self._known.record_bytes:
                    raise self._damaged(f"{self.name}.rows has been cut")
                self._base = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            raise self._damaged(f"{self.name}.rows is missing") from None
        if hasattr(self._base, "madvise"):
            self._base.madvise(mmap.MADV_RANDOM)  # neighbours on disk are no neighbours in time

    def _changed(self) -> Iterator[Records]:
        """The changed records in blocks (m, R), each checked."""
        if self._delta is None or not self.n_changed:
            return
        size = self._known.record_bytes
        per_block = max(1, _BLOCK_BYTES // size)
        for start in range(0, self.n_changed, per_block):
            block = np.empty((min(per_block, self.n_changed - start), size), dtype=np.uint8)
            self._delta.seek(start * size)
            read = self._delta.readinto(block.reshape(-1).data)
            if read != block.nbytes or self._known.broken(block) is not None:
                raise self._damaged(f"the changed records of {self.name} are not what was written")
            yield block

    def _runs(self, slots: NDArray[np.int64]) -> Iterator[tuple[int, Records]]:
        """Changed records that go to neighbouring slots, with the first slot."""
        done = 0
        for block in self._changed():
            here = slots[done : done + len(block)]
            cuts = np.flatnonzero(np.diff(here) != 1) + 1
            for start, stop in zip([0, *cuts], [*cuts, len(here)], strict=True):
                yield int(here[start]), block[start:stop]
            done += len(block)


def read_checked(path: Path, damaged: Callable[[str], InputError]) -> dict[str, Any] | None:
    """What `write_checked` wrote; `None` where there is no file.

    Raises:
        InputError: if it was changed.
    """
    try:
        saved = json.loads(path.read_bytes())
        if saved["sha256"] != _digest(saved["body"]):
            raise ValueError
        return dict(saved["body"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(f"{path.name} does not match its own checksum") from None


def checked_json(body: Mapping[str, Any]) -> bytes:
    """`body` with its checksum."""
    return (json.dumps({"sha256": _digest(body), "body": body}, indent=2) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in `folder` survive a loss of power, where that can be had."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_checked(path: Path, body: Mapping[str, Any]) -> None:
    """Replaces `path` by one rename; a reader finds the old or the new."""
    # Several processes may write the layout, the same bytes, at the same time.
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}{_PARTIAL}")
    try:
        with open(partial, "wb") as stream:
            stream.write(checked_json(body))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _appendable(path: Path) -> Iterator[FileIO]:
    """`path`, made where it is missing; on disk for good when the block ends."""
    with FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)), "r+") as file:
        yield file
        os.fsync(file.fileno())


def _write(file: FileIO, data: NDArray[Any]) -> None:
    """All of `data`, even where the system takes it in parts."""
    left = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
