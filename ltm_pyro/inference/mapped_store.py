"""Local parameters kept per sequence id on disk: memory-mapped, crash-safe, in parts.

Rows change in two files: the base, which holds a whole slow step, and what has changed since. A
checkpoint takes three acts:

    store.prepare(N)        what has changed is on disk for good, under a name that holds N
    the run's checkpoint    one rename makes N the step that everything goes on from
    store.publish(N)        what has changed moves into the base

A process killed anywhere leaves the step before or step N, and nothing between: the store is opened
at the checkpoint's step, takes the changes named after it and drops all others.

Rows are dealt out by lane, which is a sequence's row in every batch: lane l of L is kept in part
l * S // L of S. A process opens the parts of its own lanes and no others, so nothing moves when a
fit goes on with another number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltm_pyro.errors import InputError
from ltm_pyro.inference.row_index import RowIndex
from ltm_pyro.inference.row_layout import RowLayout
from ltm_pyro.inference.shard import (
    Shard,
    checked_json,
    read_checked,
    sync_folder,
    write_checked,
)

STORE, LAYOUT = "store.json", "layout.json"
_FORMAT = 1
_PARTS = 16  # enough to spread over processes, few enough to sync at every checkpoint


def new_store_files(lanes: int, processes: int = 1) -> dict[str, bytes]:
    """The files of an empty store, by name.

    Args:
        lanes: L, rows of a training batch over all processes.
        processes: How many will fill it first; S is a multiple of this number.

    Raises:
        InputError: if `processes` does not divide `lanes`.
    """
    if lanes < 1 or processes < 1 or lanes % processes:
        raise InputError(
            f"{lanes} rows of a batch cannot be dealt to {processes} processes: choose a batch "
            "size that is a multiple of the number of processes"
        )
    most = max(_PARTS, processes)
    parts = max(s for s in range(processes, most + 1, processes) if lanes % s == 0)
    return {STORE: checked_json({"format": _FORMAT, "lanes": lanes, "parts": parts})}


class MappedStore:
    """Rows of variational parameters and of their optimiser's moments, by sequence id, on disk.

    Memory: 16 bytes per row for the index, and what a batch holds. Opening writes nothing, so that
    a run can be read while its fit goes on.

    Args:
        folder: Made with `new_store_files`.
        step: Slow step of the checkpoint that the rows must belong to.
        owner: What the store belongs to, for messages.
        rank: Number of this process.
        world: Number of processes.

    Attributes:
        step: Slow step that was published last.

    Raises:
        InputError: if the store is damaged, of another step, or in too few parts for `world`.
    """

    def __init__(
        self, folder: Path, step: int, *, owner: str = "row store", rank: int = 0, world: int = 1
    ) -> None:
        self.folder = folder
        self.owner = owner
        self.step = step
        described = read_checked(folder / STORE, self._damaged)
        if described is None:
            raise self._damaged(f"{STORE} is missing")
        if described["format"] != _FORMAT:
            raise InputError(
                f"the local parameters of {owner} have format {described['format']} and this "
                f"version reads {_FORMAT}: use the version that wrote them, or fit anew"
            )
        self._lanes, parts = int(described["lanes"]), int(described["parts"])
        if parts % world:
            raise InputError(
                f"the local parameters of {owner} are in {parts} parts, which cannot be shared "
                f"by {world} processes: use a number of processes that divides {parts}"
            )
        own = parts // world
        self._parts, self._first = parts, rank * own
        digits = len(str(parts - 1))
        self._shards = [
            Shard(folder, f"shard-{number:0{digits}d}", step, self._damaged)
            for number in range(self._first, self._first + own)
        ]
        self._changed: dict[int, tuple[int, int]] = {}  # id: own shard, place among the changed
        self._layout: RowLayout | None = None
        self._layout_saved = False
        self._read_layout()
        self._index = RowIndex([shard.ids() for shard in self._shards])
        for k, shard in enumerate(self._shards):
            for place, i in enumerate(shard.changed_ids().tolist()):
                self._changed[i] = (k, place)
        self._to_merge = any(shard.pending for shard in self._shards)

    def __len__(self) -> int:
        changed = np.fromiter(self._changed, dtype=np.int64, count=len(self._changed))
        return len(self._index) + int((self._index.find(changed)[0] < 0).sum())

    def __repr__(self) -> str:
        return f"MappedStore({str(self.folder)!r}: {len(self)} rows, step {self.step})"

    def gather(self, ids: Tensor, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows for `ids` (B,): the stored ones, and those of `fresh` (B, ...) where an id is new.

        Raises:
            InputError: if the rows stored are another guide's, or damaged.
        """
        out = {name: value.clone() for name, value in fresh.items()}
        if self._layout is None:
            return out
        self._refuse_foreign(self._layout, fresh)
        numbers = ids.cpu().numpy()
        records = np.empty((len(numbers), self._layout.record_bytes), dtype=np.uint8)
        known: list[int] = []
        shards, slots = self._index.find(numbers)
        for row, i in enumerate(numbers.tolist()):
            changed = self._changed.get(i)
            if changed is not None:
                self._shards[changed[0]].read_changed(changed[1], records[len(known)])
            elif shards[row] >= 0:
                self._shards[shards[row]].read(int(slots[row]), records[len(known)])
            else:
                continue
            known.append(row)
        if known:
            self._check(records[: len(known)], numbers[known])
            rows = torch.tensor(known)
            for name, value in out.items():
                found = self._layout.unpack(records[: len(known)], name)
                value[rows.to(value.device)] = found.to(value.device)
        return out

    def scatter(self, ids: Tensor, rows: dict[str, Tensor], lanes: Tensor | None = None) -> None:
        """Stores `rows` (B, ...) under `ids` (B,).

        Args:
            ids: Of the sequences.
            rows: Every local tensor, the same ones at each call.
            lanes: (B,) the row of each in the whole batch; by default, `ids` are all the rows of
                this process. An id that is stored already stays in its part.

        Raises:
            InputError: if the rows stored are another guide's, or the disk is full.
        """
        if not len(ids):
            return
        self._merge_what_is_left()
        layout = self._layout_for(rows)
        numbers = ids.cpu().numpy()
        lanes = self._own_lanes(len(numbers)) if lanes is None else lanes
        records = layout.pack(ids, lanes, rows)
        parts = (lanes * self._parts // self._lanes - self._first).tolist()
        shards, _ = self._index.find(numbers)
        with self._writing():
            for row, i in enumerate(numbers.tolist()):
                place = self._changed.get(i)
                if place is None:
                    k = self._own(parts[row]) if shards[row] < 0 else int(shards[row])
                    place = (k, self._shards[k].n_changed)
                self._shards[place[0]].write_changed(place[1], records[row])
                self._changed[i] = place

    def prepare(self, step: int) -> None:
        """Puts what has changed on disk for good, to be taken up with a checkpoint of `step`.

        Raises:
            InputError: if the disk is full, or rows have changed after that very step.
        """
        self._merge_what_is_left()
        with self._writing():
            if self._layout is not None and not self._layout_saved:
                write_checked(self.folder / LAYOUT, self._layout.to_json())
                self._layout_saved = True
            for shard in self._shards:
                shard.prepare(step)
            sync_folder(self.folder)

    def publish(self, step: int) -> None:
        """Moves what `prepare` has put by into the base. May be repeated after a failure.

        Raises:
            InputError: if the disk is full.
        """
        ids: list[list[int]] = [[] for _ in self._shards]
        for i, (k, _) in self._changed.items():
            ids[k].append(i)
        with self._writing():
            for k, (shard, changed) in enumerate(zip(self._shards, ids, strict=True)):
                numbers = np.array(changed, dtype=np.int64)
                known, slots = self._index.find(numbers)
                new = known < 0
                slots[new] = shard.n_rows + np.arange(int(new.sum()))
                shard.merge(step, slots, numbers[new])
                self._index.add(k, numbers[new], slots[new])
            sync_folder(self.folder)
            # Only now: what a merge has written is safe, and no step needs the changes any more.
            for shard in self._shards:
                shard.forget()
        self._changed.clear()
        self.step, self._to_merge = step, False

    def close(self) -> None:
        """Lets go of the files."""
        for shard in self._shards:
            shard.close()

    def _merge_what_is_left(self) -> None:
        """Publishes the step that the store was opened at, if that was cut short."""
        if self._to_merge:
            self.publish(self.step)

    def _read_layout(self) -> None:
        saved = read_checked(self.folder / LAYOUT, self._damaged)
        if saved is not None:
            try:
                self._layout = RowLayout.from_json(saved)
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(f"{LAYOUT}: {error}") from None
            self._layout_saved = True
            for shard in self._shards:
                shard.use(self._layout)
        elif any(shard.holds_rows for shard in self._shards):
            raise self._damaged(f"{LAYOUT} is missing")

    def _layout_for(self, rows: dict[str, Tensor]) -> RowLayout:
        """The layout, taken from `rows` where there is none yet."""
        if self._layout is None:
            self._layout = RowLayout.of(rows)
            for shard in self._shards:
                shard.use(self._layout)
        self._refuse_foreign(self._layout, rows)
        missing = self._layout.columns.keys() - rows.keys()
        if missing:
            raise InputError(f"rows to store lack {min(missing)!r}: give every local tensor")
        return self._layout

    def _refuse_foreign(self, layout: RowLayout, rows: dict[str, Tensor]) -> None:
        difference = layout.difference(rows)
        if difference is not None:
            raise InputError(
                f"{self.owner} holds local parameters of another guide or dtype: {difference}; use "
                "the one that filled it, or fit anew"
            )

    def _check(self, records: NDArray[np.uint8], ids: NDArray[np.int64]) -> None:
        """Refuses records (B, R) that are not whole or not those of `ids` (B,)."""
        assert self._layout is not None
        row = self._layout.broken(records)
        if row is None:
            others = np.flatnonzero(self._layout.headers(records)["id"] != ids)
            row = int(others[0]) if len(others) else None
        if row is not None:
            raise self._damaged(f"the row of sequence id {ids[row]} does not match its checksum")

    def _own_lanes(self, n: int) -> Tensor:
        """Lanes (n,) of a batch that holds all rows of this process."""
        own = len(self._shards)
        first, lanes = self._first * self._lanes // self._parts, own * self._lanes // self._parts
        return first + torch.arange(n) * lanes // n

    def _own(self, part: int) -> int:
        """`part`, counted from the first of this process.

        Raises:
            InputError: if it is another process's.
        """
        if not 0 <= part < len(self._shards):
            raise InputError(
                "a sequence is of a lane that another process keeps: give each process its own "
                "rows of the batch"
            )
        return part

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write the local parameters in {str(self.folder)!r}: "
                f"{error.strerror or error}; free some space and go on from the last checkpoint"
            ) from None

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.owner} is damaged: {self.folder.name}{os.sep}{what}; restore it from a copy, "
            "or fit anew with --overwrite"
        )
