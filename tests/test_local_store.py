"""Stores of local parameters: what comes back is what was stored, whatever happens in between."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ltm_pyro.errors import InputError
from ltm_pyro.inference import row_index, shard
from ltm_pyro.inference.local_store import LocalStore
from ltm_pyro.inference.mapped_store import MappedStore, new_store_files
from ltm_pyro.inference.row_index import RowIndex
from ltm_pyro.inference.row_layout import RowLayout

LANES = 4


class Killed(BaseException):
    """The process ends here."""


def rows_of(ids: Tensor, visit: int | Tensor = 0) -> dict[str, Tensor]:
    """Rows (B, ...) of several kinds that tell id and visit."""
    value = 1000.0 * visit + ids
    return {
        "loc": value[:, None, None] + torch.arange(6.0).reshape(2, 3),
        "cov": value[:, None].double() + torch.arange(5.0, dtype=torch.float64) / 7,
        "half": (value[:, None] + torch.arange(3)).bfloat16(),
        "adam_steps": value.float(),
    }


def fresh_rows(n: int) -> dict[str, Tensor]:
    return {name: torch.full_like(v, -1) for name, v in rows_of(torch.zeros(n)).items()}


def new_folder(folder: Path, lanes: int = LANES, processes: int = 1) -> Path:
    folder.mkdir()
    for name, data in new_store_files(lanes, processes).items():
        (folder / name).write_bytes(data)
    return folder


def put(store: MappedStore | LocalStore, ids: list[int], visit: int = 0) -> None:
    store.scatter(torch.tensor(ids), rows_of(torch.tensor(ids), visit))


def publish(store: MappedStore, step: int) -> None:
    store.prepare(step)
    store.publish(step)


def assert_holds(store: MappedStore | LocalStore, visits: dict[int, int]) -> None:
    """Every id with the row of its visit, and no other id."""
    ids = torch.tensor([*visits, 10_000_000])
    found = store.gather(ids, fresh_rows(len(ids)))
    at = torch.tensor([*visits.values()], dtype=torch.long)
    for name, value in rows_of(ids[:-1], at).items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name][:-1], value)
        assert bool((found[name][-1] == -1).all())
    assert len(store) == len(visits)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MappedStore | LocalStore:
    return LocalStore() if request.param == "memory" else MappedStore(new_folder(tmp_path / "s"), 0)


def test_what_is_stored_comes_back(store: MappedStore | LocalStore) -> None:
    assert len(store) == 0
    assert torch.equal(store.gather(torch.tensor([5]), fresh_rows(1))["loc"], fresh_rows(1)["loc"])
    put(store, [5, 3, -7, 2**40])
    put(store, [3, 8, 11, 9], visit=1)
    assert_holds(store, {5: 0, 3: 1, -7: 0, 2**40: 0, 8: 1, 11: 1, 9: 1})
    # A part of the columns, a batch of another size, known ids and others in any order.
    ids = torch.tensor([77, 9, 5])
    loc = store.gather(ids, {"loc": fresh_rows(3)["loc"]})["loc"]
    assert torch.equal(loc[1:], torch.cat([rows_of(ids[1:2], 1)["loc"], rows_of(ids[2:])["loc"]]))
    assert bool((loc[0] == -1).all())


def test_a_store_keeps_copies(store: MappedStore | LocalStore) -> None:
    ids, rows = torch.tensor([1, 2]), rows_of(torch.tensor([1, 2]))
    store.scatter(ids, rows)
    rows["loc"].zero_()
    store.gather(ids, rows)["loc"].zero_()
    assert_holds(store, {1: 0, 2: 0})


def test_a_store_grows_over_many_checkpoints(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(row_index, "_LEAST_RECENT", 8)
    store = MappedStore(new_folder(tmp_path / "s"), 0)
    visits: dict[int, int] = {}
    generator = np.random.default_rng(0)
    for step in range(1, 40):
        ids = generator.choice(300, size=4, replace=False).tolist()
        put(store, ids, step)
        visits |= dict.fromkeys(ids, step)
        if step % 3 == 0:
            publish(store, step)
            assert_holds(MappedStore(tmp_path / "s", step), visits)
    assert_holds(store, visits)
    assert f"{len(visits)} rows, step 39" in repr(store)
    store.close()


def test_what_no_checkpoint_has_seen_is_gone(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = MappedStore(folder, 0)
    put(store, [1, 2])
    publish(store, 3)
    put(store, [2, 4], visit=1)
    assert_holds(store, {1: 0, 2: 1, 4: 1})
    assert_holds(MappedStore(folder, 3), {1: 0, 2: 0})
    store.prepare(5)  # and then its checkpoint was not written
    again = MappedStore(folder, 3)
    assert_holds(again, {1: 0, 2: 0})
    put(again, [9], visit=2)
    publish(again, 5)
    assert_holds(MappedStore(folder, 5), {1: 0, 2: 0, 9: 2})
    assert not list(folder.glob("*.delta-*")) + list(folder.glob("*.new"))


def test_opening_changes_nothing(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = MappedStore(folder, 0)
    put(store, [1, 2])
    store.prepare(3)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    for step, visits in ((0, {}), (3, {1: 0, 2: 0})):
        assert_holds(MappedStore(folder, step), visits)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_a_checkpoint_that_could_not_be_written_may_be_tried_again(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = MappedStore(folder, 0)
    put(store, [1, 2])
    store.prepare(3)  # its checkpoint fails, or seems to
    put(store, [2, 4], visit=1)
    assert_holds(store, {1: 0, 2: 1, 4: 1})
    assert_holds(MappedStore(folder, 3), {1: 0, 2: 0})  # it was written after all
    store.prepare(5)
    assert_holds(MappedStore(folder, 3), {1: 0, 2: 0})
    store.publish(5)
    assert_holds(MappedStore(folder, 5), {1: 0, 2: 1, 4: 1})


def test_the_same_step_again_is_no_work_unless_rows_have_changed(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = MappedStore(folder, 0)
    publish(store, 2)  # a family without local parameters never stores a row
    put(MappedStore(folder, 2), [1])
    store = MappedStore(folder, 2)
    put(store, [1])
    publish(store, 4)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    publish(store, 4)
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    put(store, [1], visit=1)
    with pytest.raises(InputError, match="give a later step"):
        store.prepare(4)


class Disaster:
    """Ends the process at the n-th thing that it does to the disk, in the middle of writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
        self.left = when
        real_write = shard._write

        def write(file, data) -> None:
            if self.left == 0:
                flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
                real_write(file, flat[: len(flat) // 2])
            self.count()
            real_write(file, data)

        monkeypatch.setattr(shard, "_write", write)
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, act):
        def call(*args, **kwargs):
            self.count()
            return act(*args, **kwargs)

        return call

    def count(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


def a_life(folder: Path, checkpoint: list[int]) -> None:
    """From the step in `checkpoint` to step 6, a checkpoint every second step."""
    store = MappedStore(folder, checkpoint[0])
    for step in range(checkpoint[0] + 1, 7):
        put(store, [step, 7 - step, 10 + step], visit=step)
        if step % 2 == 0:
            store.prepare(step)
            checkpoint[0] = step
            store.publish(step)


def test_a_kill_anywhere_leaves_the_step_before_or_the_new_one(tmp_path: Path) -> None:
    whole = new_folder(tmp_path / "whole", lanes=2)
    a_life(whole, [0])
    expected = {p.name: p.read_bytes() for p in whole.iterdir()}
    for when in range(10_000):
        folder, checkpoint = new_folder(tmp_path / "s", lanes=2), [0]
        with pytest.MonkeyPatch.context() as patch:
            Disaster(patch, when)
            finished = False
            with suppress(Killed):
                a_life(folder, checkpoint)
                finished = True
        step = checkpoint[0]
        visits: dict[int, int] = {}
        for s in range(1, step + 1):
            visits |= dict.fromkeys([s, 7 - s, 10 + s], s)
        assert_holds(MappedStore(folder, step), visits)
        a_life(folder, checkpoint)
        left = {p.name: p.read_bytes() for p in folder.iterdir() if p.name[0] != "."}
        if step < 6:  # at the last step nothing is written any more, so what was left stays
            assert left == expected
        else:
            assert_holds(MappedStore(folder, 6), visits)
        shutil.rmtree(folder)
        if finished:
            break
    assert when > 60


def test_the_disk_has_the_data_before_the_name(tmp_path: Path, monkeypatch) -> None:
    """The order that a loss of power asks for: data, then the rename, then what it replaces."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("the name of an open file is asked of /proc")
    folder = new_folder(tmp_path / "s", lanes=1)
    store = MappedStore(folder, 0)
    put(store, [1, 2])
    events: list[str] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def log_fsync(handle: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def log_replace(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return replace(self, target)

    def log_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.exists():
            events.append(f"remove {self.name}")
        unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    monkeypatch.setattr(Path, "unlink", log_unlink)
    store.prepare(3)
    seen = [e for e in events if "json" not in e]
    assert seen == ["sync shard-0.new", "rename shard-0.delta-3", "sync s"]
    events.clear()
    store.publish(3)
    assert [e for e in events if "partial" not in e] == [
        "sync shard-0.rows",
        "sync shard-0.ids",
        "rename shard-0.json",
        "sync s",
        "remove shard-0.delta-3",
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_shares_the_folder(tmp_path: Path, world: int) -> None:
    """Filled by two processes, gone on with by `world`: each has the rows of its own lanes."""
    folder, lanes, step = new_folder(tmp_path / "s", lanes=8, processes=2), 8, 0
    visits: dict[int, int] = {}
    for owners in (2, world):
        stores = [MappedStore(folder, step, rank=r, world=owners) for r in range(owners)]
        for _ in range(3):
            step += 1
            for rank, store in enumerate(stores):
                own = range(rank * lanes // owners, (rank + 1) * lanes // owners)
                ids = [lane + lanes * (step % 5) for lane in own]
                if step > 3:  # what the other number of processes has left is found
                    found = store.gather(torch.tensor(ids), fresh_rows(len(ids)))["adam_steps"]
                    expected = [1000 * visits[i] + i if i in visits else -1 for i in ids]
                    assert found.tolist() == expected
                put(store, ids, step)
                visits |= dict.fromkeys(ids, step)
        for store in stores:
            store.prepare(step)
        for store in stores:
            store.publish(step)
        assert sum(len(store) for store in stores) == len(visits)
    assert_holds(MappedStore(folder, step), visits)


def test_a_process_keeps_to_its_lanes(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s", lanes=8)
    store = MappedStore(folder, 0, rank=1, world=2)
    ids = torch.tensor([3, 5])
    store.scatter(ids, rows_of(ids), lanes=torch.tensor([4, 7]))
    with pytest.raises(InputError, match="lane that another process keeps"):
        store.scatter(ids + 10, rows_of(ids), lanes=torch.tensor([5, 3]))
    with pytest.raises(InputError, match="in 8 parts, which cannot be shared by 3 processes"):
        MappedStore(folder, 0, world=3)


@pytest.mark.parametrize(
    ("lanes", "processes", "parts"),
    [(8, 1, 8), (16, 4, 16), (24, 1, 12), (1, 1, 1), (7, 7, 7), (512, 64, 64), (34, 1, 2)],
)
def test_parts_divide_the_batch(tmp_path: Path, lanes: int, processes: int, parts: int) -> None:
    store = MappedStore(new_folder(tmp_path / "s", lanes, processes), 0)
    ids = torch.arange(lanes)
    store.scatter(ids, rows_of(ids))
    publish(store, 1)
    assert len(list((tmp_path / "s").glob("*.rows"))) == parts
    with pytest.raises(InputError, match="multiple of the number of processes"):
        new_store_files(lanes, lanes + 1)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """But for the index of 16 bytes a row; a batch's own cost is the same at any size."""
    held, busy = [], []
    for n in (1_000, 40_000):
        folder = new_folder(tmp_path / str(n))
        filled = MappedStore(folder, 0)
        for start in range(0, n, 1_000):
            ids = torch.arange(start, start + 1_000)
            filled.scatter(ids, {"loc": torch.zeros(1_000, 100)})
        publish(filled, 1)
        filled.close()
        tracemalloc.start()
        store = MappedStore(folder, 1)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.reset_peak()
        for start in range(0, 800, 8):
            ids = torch.arange(start, start + 8)
            store.scatter(ids, store.gather(ids, {"loc": torch.zeros(8, 100)}))
        publish(store, 2)
        busy.append(tracemalloc.get_traced_memory()[1] - held[-1])
        tracemalloc.stop()
    assert held[1] - held[0] < 20 * 39_000
    assert busy[1] < busy[0] + 100_000


def test_the_mapping_is_let_go_of_now_and_then(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shard, "_MAPPED_BYTES", 3 * shard._FAULT_BYTES)
    folder = new_folder(tmp_path / "s", lanes=1)
    store = MappedStore(folder, 0)
    put(store, list(range(50)))
    publish(store, 1)
    assert_holds(store, dict.fromkeys(range(50), 0))


def damages(folder: Path) -> Iterator[str]:
    """Every way to spoil a store, one at a time, with what must then be said."""
    for name, said in (("store.json", "store.json"), ("layout.json", "layout.json")):
        path = folder / name
        saved = path.read_bytes()
        path.unlink()
        yield f"{said} is missing"
        path.write_bytes(saved.replace(b"1", b"2"))
        yield f"{said} does not match its own checksum"
        path.write_bytes(saved)
    for name in ("shard-0.rows", "shard-0.ids"):
        path = folder / name
        saved = path.read_bytes()
        path.unlink()
        yield f"{name} is missing"
        path.write_bytes(saved[:-9])
        yield f"{name} has been cut"
        path.write_bytes(saved)
    path = folder / "shard-0.json"
    saved = path.read_bytes()
    path.write_bytes(b"[]")
    yield "shard-0.json does not match"
    path.unlink()
    yield "shard-0 holds rows of slow step 0 and the checkpoint is of 7"
    path.write_bytes(saved)


def test_a_damaged_store_is_told_in_one_line(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s", lanes=1)
    store = MappedStore(folder, 0)
    put(store, [1, 2, 3])
    publish(store, 7)
    for said in damages(folder):
        with pytest.raises(InputError) as caught:
            MappedStore(folder, 7, owner="run folder 'x'")
        assert said in str(caught.value)
        assert str(caught.value).startswith("run folder 'x' is damaged: s")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="holds rows of slow step 7 and the checkpoint is of 6"):
        MappedStore(folder, 6)
    assert_holds(MappedStore(folder, 7), {1: 0, 2: 0, 3: 0})


def test_a_changed_row_is_told(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s", lanes=1)
    store = MappedStore(folder, 0)
    put(store, [1, 2, 3])
    store.prepare(7)
    for name in ("shard-0.delta-7", "shard-0.rows"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(bytes(data))
        with pytest.raises(InputError, match=r"what was written|sequence id 2 does not match"):
            MappedStore(folder, 7).gather(torch.tensor([1, 2, 3]), fresh_rows(3))
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(bytes(data))
        if name.endswith("7"):
            (folder / name).write_bytes(bytes(data[:-1]))
            with pytest.raises(InputError, match="has been cut"):
                MappedStore(folder, 7)
            (folder / name).write_bytes(bytes(data))
            store.publish(7)
    # Two rows that changed places are not what was written either.
    size = len(data) // 3
    (folder / name).write_bytes(bytes(data[size : 2 * size] + data[:size] + data[2 * size :]))
    with pytest.raises(InputError, match="sequence id 1 does not match"):
        MappedStore(folder, 7).gather(torch.tensor([1, 2, 3]), fresh_rows(3))


def test_rows_of_another_guide_are_refused(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = MappedStore(folder, 0)
    put(store, [1, 2])
    publish(store, 1)
    store = MappedStore(folder, 1)
    ids = torch.tensor([1, 2])
    wide = {**rows_of(ids), "loc": torch.zeros(2, 2, 4)}
    with pytest.raises(InputError, match=r"loc should be \(2, 4\) float32 and is \(2, 3\) float32"):
        store.gather(ids, wide)
    with pytest.raises(InputError, match=r"cov should be .* float32 and is .* float64"):
        store.scatter(ids, {**rows_of(ids), "cov": torch.zeros(2, 5)})
    with pytest.raises(InputError, match=r"other should be .* and is absent"):
        store.gather(ids, {"other": torch.zeros(2)})
    with pytest.raises(InputError, match="lack 'half'"):
        store.scatter(ids, {k: v for k, v in rows_of(ids).items() if k != "half"})
    with pytest.raises(InputError, match="'a' is bool"):
        MappedStore(new_folder(tmp_path / "t"), 0).scatter(ids, {"a": torch.zeros(2).bool()})


def test_a_layout_from_another_kind_of_machine_is_refused() -> None:
    saved = RowLayout.of(rows_of(torch.arange(2))).to_json()
    assert RowLayout.from_json(saved).to_json() == saved
    with pytest.raises(ValueError, match="endian"):
        RowLayout.from_json({**saved, "byteorder": "middle"})
    with pytest.raises(ValueError, match="do not add up"):
        RowLayout.from_json({**saved, "record_bytes": 8})


@pytest.mark.parametrize("act", ["scatter", "prepare", "publish"])
def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path, monkeypatch, act: str) -> None:
    folder = new_folder(tmp_path / "s")
    store = MappedStore(folder, 0)
    put(store, [1, 2, 3, 4])
    publish(store, 1)
    put(store, [3, 4, 5, 6], visit=1)
    calls = []

    def full(*args) -> None:
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(*args)

    owner, name = (shard, "_write") if act == "scatter" else (os, "fsync")
    real = getattr(owner, name)
    if act == "publish":
        store.prepare(2)
    monkeypatch.setattr(owner, name, full)
    acts = {
        "scatter": lambda: put(store, [7, 8, 9, 10], visit=2),
        "prepare": lambda: store.prepare(2),
        "publish": lambda: store.publish(2),
    }
    with pytest.raises(InputError, match=r"cannot write .*No space left on device; free some"):
        acts[act]()
    monkeypatch.undo()
    if act == "publish":  # its checkpoint was written before, so it counts
        assert_holds(MappedStore(folder, 2), {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1})
    else:
        assert_holds(MappedStore(folder, 1), {1: 0, 2: 0, 3: 0, 4: 0})
    put(store, [7, 8, 9, 10], visit=2)
    publish(store, 3)
    visits = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2}
    assert_holds(store, visits)
    assert_holds(MappedStore(folder, 3), visits)


def test_the_index_finds_old_and_new(monkeypatch) -> None:
    monkeypatch.setattr(row_index, "_LEAST_RECENT", 2)
    index = RowIndex([np.array([5, 1]), np.array([9])])
    index.add(1, np.array([7]), np.array([1]))
    index.add(0, np.array([2, 3]), np.array([2, 3]))
    assert len(index) == 6
    shards, slots = index.find(np.array([1, 2, 3, 4, 5, 7, 9]))
    assert shards.tolist() == [0, 0, 0, -1, 0, 1, 1]
    assert slots.tolist() == [1, 2, 3, -1, 0, 1, 0]
    assert RowIndex([]).find(np.array([1]))[0].tolist() == [-1]
