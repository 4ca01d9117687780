"""One SQLite file of rows, each under a sequence id and a tag, and verified when it is read."""

from __future__ import annotations

import json
import sqlite3
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ltm_pyro.errors import InputError

_SCHEMA = """
PRAGMA page_size = 8192;
CREATE TABLE rows (
    id INTEGER NOT NULL, tag INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE INDEX by_id ON rows (id, tag, crc);
CREATE TABLE facts (value TEXT NOT NULL, crc INTEGER NOT NULL);
"""
FORMAT = f"2-{sys.byteorder}"
_FACTS: dict[str, Any] = {
    "format": FORMAT, "prepared": 0, "published": 0, "files": 1, "columns": None,
    "rows": 0, "digest": 0,
}  # fmt: skip
_AT_ONCE = 500  # ids in one query; SQLite takes at least 999 parameters
_PENDING_BYTES = 64 * 2**20  # a transaction waits in memory, so a long one is cut
_PATIENCE = 30.0  # seconds that one process waits for another's commit
_MIX = tuple(np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def empty_file() -> bytes:
    """A file without rows."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.executescript(_SCHEMA)
    database.execute("INSERT INTO facts VALUES (?, ?)", _saved(_FACTS))
    data = bytes(database.serialize())
    database.close()
    return data


class RowFile:
    """Rows of one process.

    Args:
        path: A file that began as `empty_file()`.
        damaged: Makes the error for a file that cannot be used.

    Attributes:
        facts: What the file says of itself; `prepared` and `published` are slow steps, `files` the
            number of files beside it, `columns` what a row holds.

    Raises:
        InputError: if it is missing, damaged or of another format.
    """

    def __init__(self, path: Path, damaged: Callable[[str], InputError]) -> None:
        self.path, self._damaged = path, damaged
        self._writes, self._pending = False, 0
        try:
            regular = stat.S_ISREG(path.lstat().st_mode)
        except OSError:
            raise damaged(f"{path.name} is missing") from None
        if not regular:
            raise damaged(f"{path.name} is not a regular file")
        with self._reading():
            self._database = self._connected("ro")
            try:
                self.facts = self._read_facts()
            except sqlite3.OperationalError:
                # A writer was killed: SQLite takes back what was half done, which needs writing.
                self._database.close()
                self._database = self._connected("rw")
                self.facts = self._read_facts()
        self._verify()

    def _connected(self, mode: str) -> sqlite3.Connection:
        # Threads take turns at the doors of the package (`ltm_pyro.doors`).
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_PATIENCE,
            isolation_level=None, check_same_thread=False,
        )  # fmt: skip

    def _read_facts(self) -> dict[str, Any]:
        [(value, crc)] = self._database.execute("SELECT value, crc FROM facts").fetchall()
        facts: dict[str, Any] = json.loads(value)
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r} and not {FORMAT!r}")
        if (value, crc) != _saved(facts):
            raise ValueError("what it says of itself does not match its checksum")
        return facts

    def _verify(self) -> None:
        """That no row has gone, come or changed its name since the last transaction."""
        rows, digest = 0, 0
        with self._reading():
            keys = self._database.execute("SELECT id, tag, crc FROM rows INDEXED BY by_id")
            while some := keys.fetchmany(10_000):
                rows += len(some)
                digest = _added(digest, some)
        if (rows, digest) != (self.facts["rows"], self.facts["digest"]):
            raise self._damaged(f"{self.path.name} does not match its own checksum")

    def ids(self, tag: int | None) -> set[int]:
        """Sequences with a row, of tags up to `tag`."""
        query, values = ("", ()) if tag is None else (" WHERE tag <= ?", (tag,))
        with self._reading():
            found = self._database.execute(f"SELECT DISTINCT id FROM rows{query}", values)
            return {i for (i,) in found}

    def newest(self, ids: Sequence[int], tag: int | None) -> dict[int, tuple[int, bytes]]:
        """Of the sequences `ids`, the row with the highest tag up to `tag`, with that tag."""
        out: dict[int, tuple[int, bytes]] = {}
        for start in range(0, len(ids), _AT_ONCE):
            some = list(ids[start : start + _AT_ONCE])
            marks = ",".join("?" * len(some))
            upto = "" if tag is None else f" AND tag <= {int(tag)}"
            # With a bare `max`, SQLite takes the other columns from the row that has it.
            query = (
                f"SELECT id, max(tag), crc, data FROM rows WHERE id IN ({marks}){upto} GROUP BY id"
            )
            with self._reading():
                found = self._database.execute(query, some).fetchall()
            for i, newest, crc, data in found:
                if crc != _checksum(i, newest, data):
                    raise self._damaged(f"the row of sequence id {i} does not match its checksum")
                out[i] = (newest, data)
        return out

    def write(self, tag: int, rows: Iterable[tuple[int, bytes]]) -> None:
        """Puts rows under `tag`, in the place of what they have there."""
        self._begin()
        with self._writing():
            for i, data in rows:
                gone = self._database.execute(
                    "DELETE FROM rows WHERE id = ? AND tag = ? RETURNING id, tag, crc", (i, tag)
                ).fetchall()
                key = (i, tag, _checksum(i, tag, data))
                self._database.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (*key, data))
                self._counted(gone, came=[key])
                self._pending += len(data)
        if self._pending > _PENDING_BYTES:
            self.commit()

    def remove_after(self, tag: int) -> None:
        """Removes rows with a higher tag: no checkpoint has seen them."""
        self._begin()
        with self._writing():
            self._counted(
                self._database.execute(
                    # The index has tags alone; the table has the data between them.
                    "DELETE FROM rows WHERE rowid IN "
                    "(SELECT rowid FROM rows INDEXED BY by_id WHERE tag > ?) "
                    "RETURNING id, tag, crc",
                    (tag,),
                ).fetchall()
            )

    def remove_replaced(self, ids: Iterable[int], tag: int) -> None:
        """Removes rows of `ids` that have a newer one with a tag up to `tag`."""
        self._begin()
        with self._writing():
            for i in ids:
                self._counted(
                    self._database.execute(
                        "DELETE FROM rows WHERE id = ?1 AND tag < "
                        "(SELECT max(tag) FROM rows WHERE id = ?1 AND tag <= ?2) "
                        "RETURNING id, tag, crc",
                        (i, tag),
                    ).fetchall()
                )

    def commit(self, **facts: Any) -> None:
        """Puts on disk, for good and as a whole, what was written, and new facts.

        Where the disk is full, what was committed before is still there.
        """
        self.facts.update(facts)
        self._begin()
        with self._writing():
            self._database.execute("UPDATE facts SET value = ?, crc = ?", _saved(self.facts))
            self._database.execute("COMMIT")
        self._pending = 0

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()

    def _begin(self) -> None:
        with self._writing():
            if not self._writes:
                self._database.close()
                self._database = self._connected("rw")
                # Until a commit nothing goes to the file, so that others can read meanwhile.
                self._database.execute("PRAGMA cache_spill = OFF")
                self._database.execute("PRAGMA synchronous = FULL")
                self._writes = True
            if not self._database.in_transaction:
                self._database.execute("BEGIN IMMEDIATE")

    def _counted(
        self, gone: Sequence[tuple[int, int, int]], came: Sequence[tuple[int, int, int]] = ()
    ) -> None:
        self.facts["rows"] += len(came) - len(gone)
        self.facts["digest"] = _added(_added(self.facts["digest"], came), gone, sign=-1)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
            raise self._damaged(f"{self.path.name}: {error}") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            locked = "locked" in str(error)
            remedy = "let the other process end" if locked else "free some space"
            raise InputError(
                f"cannot write the local parameters in {str(self.path)!r}: {error}; {remedy} and "
                "go on from the last checkpoint"
            ) from None


def _saved(facts: dict[str, Any]) -> tuple[str, int]:
    value = json.dumps(facts, sort_keys=True)
    return value, zlib.crc32(value.encode())


def _checksum(i: int, tag: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{i} {tag}".encode()))


def _added(digest: int, keys: Sequence[tuple[int, int, int]], sign: int = 1) -> int:
    """A sum over rows modulo 2^64, whatever their order: any one changed bit changes it."""
    if not keys:
        return digest
    columns = np.array(keys, dtype=np.int64).view(np.uint64)
    mixed = (columns * np.array(_MIX, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(29)
    return (digest + sign * int((mixed * _MIX[0]).sum(dtype=np.uint64))) % 2**64
