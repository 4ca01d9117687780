"""Stores of local parameters: what comes back is what was stored, whatever happens in between."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import environment
from torch import Tensor

from ltm_pyro.engine.rows import file as row_file
from ltm_pyro.engine.rows.database import RowDatabase, new_store_files
from ltm_pyro.engine.rows.layout import RowLayout
from ltm_pyro.engine.rows.store import MemoryRows
from ltm_pyro.errors import InputError


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


def new_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, data in new_store_files().items():
        (folder / name).write_bytes(data)
    return folder


def put(store: RowDatabase | MemoryRows, ids: list[int], visit: int = 0) -> None:
    store.scatter(torch.tensor(ids), rows_of(torch.tensor(ids), visit))


def publish(store: RowDatabase, step: int) -> None:
    store.prepare(step)
    store.publish(step)


def assert_holds(store: RowDatabase | MemoryRows, visits: dict[int, int]) -> None:
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
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RowDatabase | MemoryRows:
    return MemoryRows() if request.param == "memory" else RowDatabase(new_folder(tmp_path / "s"), 0)


def test_what_is_stored_comes_back(store: RowDatabase | MemoryRows) -> None:
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


def test_a_store_keeps_copies(store: RowDatabase | MemoryRows) -> None:
    ids, rows = torch.tensor([1, 2]), rows_of(torch.tensor([1, 2]))
    store.scatter(ids, rows)
    rows["loc"].zero_()
    store.gather(ids, rows)["loc"].zero_()
    assert_holds(store, {1: 0, 2: 0})


def test_rows_of_another_guide_are_refused(store: RowDatabase | MemoryRows) -> None:
    put(store, [1, 2])
    ids = torch.tensor([1, 2])
    wide = {**rows_of(ids), "loc": torch.zeros(2, 2, 4)}
    with pytest.raises(InputError, match=r"'loc' .*another guide|another guide.*'loc'"):
        store.gather(ids, wide)
    with pytest.raises(InputError, match=r"'cov'.*float32"):
        store.scatter(ids, {**rows_of(ids), "cov": torch.zeros(2, 5)})
    with pytest.raises(InputError, match="'other'"):
        store.gather(ids, {"other": torch.zeros(2)})
    with pytest.raises(InputError, match="'half' is missing"):
        store.scatter(ids, {k: v for k, v in rows_of(ids).items() if k != "half"})
    assert_holds(store, {1: 0, 2: 0})


def test_many_ids_at_once(tmp_path: Path) -> None:
    store = RowDatabase(new_folder(tmp_path / "s"), 0)
    put(store, list(range(1300)))
    assert_holds(store, dict.fromkeys(range(1300), 0))


def test_a_store_goes_on_over_many_checkpoints_and_keeps_one_row_each(tmp_path: Path) -> None:
    store = RowDatabase(new_folder(tmp_path / "s"), 0)
    visits: dict[int, int] = {}
    generator = np.random.default_rng(0)
    for step in range(1, 40):
        ids = generator.choice(300, size=4, replace=False).tolist()
        put(store, ids, step)
        visits |= dict.fromkeys(ids, step)
        if step % 3 == 0:
            publish(store, step)
            assert_holds(RowDatabase(tmp_path / "s", step), visits)
    assert_holds(store, visits)
    assert f"{len(visits)} rows, step 39" in repr(store)
    assert store._files[0].facts["rows"] == len(visits)
    store.close()


def test_what_no_checkpoint_has_seen_is_gone(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    put(store, [1, 2])
    publish(store, 3)
    put(store, [2, 4], visit=1)
    assert_holds(store, {1: 0, 2: 1, 4: 1})
    assert_holds(RowDatabase(folder, 3), {1: 0, 2: 0})
    store.prepare(5)  # and then its checkpoint was not written
    store.close()
    again = RowDatabase(folder, 3)
    assert_holds(again, {1: 0, 2: 0})
    put(again, [9], visit=2)
    publish(again, 5)
    assert_holds(RowDatabase(folder, 5), {1: 0, 2: 0, 9: 2})


def test_opening_changes_nothing(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    put(store, [1, 2])
    store.prepare(3)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    for step, visits in ((0, {}), (3, {1: 0, 2: 0})):
        assert_holds(RowDatabase(folder, step), visits)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_a_store_can_be_read_while_another_writes(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    put(store, list(range(200)))
    publish(store, 1)
    put(store, list(range(200)), visit=1)
    reader = RowDatabase(folder, 1)
    assert_holds(reader, dict.fromkeys(range(200), 0))
    store.prepare(2)
    assert_holds(reader, dict.fromkeys(range(200), 0))


def test_a_checkpoint_that_could_not_be_written_may_be_tried_again(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    put(store, [1, 2])
    store.prepare(3)  # its checkpoint fails, or seems to
    put(store, [2, 4], visit=1)
    assert_holds(store, {1: 0, 2: 1, 4: 1})
    assert_holds(RowDatabase(folder, 3), {1: 0, 2: 0})  # it was written after all
    store.prepare(5)
    assert_holds(RowDatabase(folder, 3), {1: 0, 2: 0})
    store.publish(5)
    assert_holds(RowDatabase(folder, 5), {1: 0, 2: 1, 4: 1})


def test_rows_that_changed_after_a_step_need_a_later_one(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    publish(store, 2)  # a family without local parameters never stores a row
    put(store, [1])
    publish(store, 4)
    publish(store, 4)
    put(store, [1], visit=1)
    with pytest.raises(InputError, match="give a later step"):
        store.prepare(4)


LIFE = """
import os, sys
from pathlib import Path
import torch
from ltm_pyro.engine.rows.database import RowDatabase

# A checkpoint every second step; its name is put in place by a rename, as a run's is.
folder = Path(sys.argv[1])
saved = folder / "checkpoint"
step = int(saved.read_text())
store = RowDatabase(folder / "s", step)
while step < 60:
    step += 1
    ids = torch.tensor([step, 61 - step, 100 + step % 7])
    store.scatter(ids, {"loc": torch.full((3, 400), float(step))})
    if step % 2 == 0:
        store.prepare(step)
        (folder / "new").write_text(str(step))
        os.replace(folder / "new", saved)
        print(step, flush=True)
        store.publish(step)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_anywhere_leaves_the_step_before_or_the_new_one(tmp_path: Path, kills: int) -> None:
    """SIGKILL of a child at random moments; what is then on disk is of its checkpoint's step."""
    new_folder(tmp_path / "s")
    (tmp_path / "checkpoint").write_text("0")
    generator = np.random.default_rng(kills)
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", LIFE, str(tmp_path)], env=environment(), stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(int(generator.integers(1, 4))):
            child.stdout.readline()
        time.sleep(float(generator.random()) * 3e-3)  # in any act, not only after one
        child.kill()
        child.communicate()
        step = int((tmp_path / "checkpoint").read_text())
        assert_life(tmp_path / "s", step)
        if step == 60:
            break
    subprocess.run([sys.executable, "-c", LIFE, str(tmp_path)], env=environment(), check=True)
    assert_life(tmp_path / "s", 60)


def assert_life(folder: Path, step: int) -> None:
    visits: dict[int, int] = {}
    for s in range(1, step + 1):
        visits |= dict.fromkeys([s, 61 - s, 100 + s % 7], s)
    store = RowDatabase(folder, step)
    assert len(store) == len(visits)
    if visits:
        ids = torch.tensor([*visits])
        found = store.gather(ids, {"loc": torch.zeros(len(ids), 400)})["loc"]
        assert torch.equal(found[:, 0], torch.tensor([*visits.values()]).float())
    store.close()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_shares_the_folder(tmp_path: Path, world: int) -> None:
    """Filled by two processes, gone on with by `world`: each finds its ids' newest rows."""
    folder, lanes, step = new_folder(tmp_path / "s"), 8, 0
    visits: dict[int, int] = {}
    for owners in (2, world, 2):
        stores = [RowDatabase(folder, step, rank=r, world=owners) for r in range(owners)]
        for _ in range(3):
            step += 1
            for rank, store in enumerate(stores):
                own = range(rank * lanes // owners, (rank + 1) * lanes // owners)
                ids = [lane + lanes * (step % 5) for lane in own]
                found = store.gather(torch.tensor(ids), fresh_rows(len(ids)))["adam_steps"]
                assert found.tolist() == [1000 * visits[i] + i if i in visits else -1 for i in ids]
                put(store, ids, step)
                visits |= dict.fromkeys(ids, step)
        for store in stores:
            store.prepare(step)
        for store in stores:
            store.publish(step)
            store.close()
    assert_holds(RowDatabase(folder, step), visits)


def test_rows_of_a_process_that_is_gone_do_not_come_back(tmp_path: Path) -> None:
    """Two processes die after they prepared step 2; one goes on from step 1 beyond it."""
    folder = new_folder(tmp_path / "s")
    stores = [RowDatabase(folder, 0, rank=r, world=2) for r in range(2)]
    for rank, store in enumerate(stores):
        put(store, [rank])
        store.prepare(1)
    for rank, store in enumerate(stores):
        store.publish(1)
        put(store, [rank, 10 + rank], visit=7)
        store.prepare(2)
        store.close()
    store = RowDatabase(folder, 1)
    assert_holds(store, {0: 0, 1: 0})
    put(store, [0], visit=2)
    publish(store, 5)
    assert_holds(RowDatabase(folder, 5), {0: 2, 1: 0})


def test_a_missing_file_of_another_process_is_told(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    stores = [RowDatabase(folder, 0, rank=r, world=2) for r in range(2)]
    for rank, store in enumerate(stores):
        put(store, [rank])
        store.prepare(1)
    for store in stores:
        store.publish(1)
        store.close()
    (folder / "rows-1.db").unlink()
    with pytest.raises(InputError, match=r"rows-1\.db is missing"):
        RowDatabase(folder, 1)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A visit holds a batch, whatever lies on disk; the kernel's page cache is not counted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of resident memory is asked of Linux")
    peaks = []
    for n in (1_000, 40_000):
        folder = new_folder(tmp_path / str(n))
        filled = RowDatabase(folder, 0)
        for start in range(0, n, 1_000):
            filled.scatter(torch.arange(start, start + 1_000), {"loc": torch.zeros(1_000, 100)})
        publish(filled, 1)
        filled.close()
        code = (
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from ltm_pyro.engine.rows.database import RowDatabase\n"
            "store = RowDatabase(Path(sys.argv[1]), 1)\n"
            "for start in range(0, 800, 8):\n"
            "    ids = torch.arange(start, start + 8)\n"
            "    store.scatter(ids, store.gather(ids, {'loc': torch.zeros(8, 100)}))\n"
            "store.prepare(2); store.publish(2)\n"
            "status = Path('/proc/self/status').read_text()\n"
            "print(status.partition('VmHWM:')[2].split()[0])"
        )
        told = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env=environment(), capture_output=True, check=True,
        )  # fmt: skip
        peaks.append(int(told.stdout))  # kilobytes
    # 39,000 rows more are 16 MB; what opening reads of each is let go ten thousand at a time.
    assert peaks[1] - peaks[0] < 12_000


def test_a_damaged_store_is_told_in_one_line(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    put(store, [1, 2, 3])
    publish(store, 7)
    store.close()
    path = folder / "rows-0.db"
    saved = path.read_bytes()
    for data in (None, b"", saved[:100], saved[:-8192], b"no database" * 1000):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            RowDatabase(folder, 7, owner="run folder 'x'")
        assert str(caught.value).startswith("run folder 'x' is damaged: s/rows-0.db")
        assert "\n" not in str(caught.value)
        path.write_bytes(saved)
    for step, held in ((6, 7), (8, 7)):
        with pytest.raises(InputError, match=rf"slow step {held} and the checkpoint is of {step}"):
            RowDatabase(folder, step)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        RowDatabase(folder, 7)


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_one_flipped_bit_is_told_or_changes_nothing(tmp_path: Path, every: int) -> None:
    """In ids, tags, rows, facts, SQLite's own pages: never another row without a word."""
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    put(store, [1, 2, 3])
    publish(store, 3)
    put(store, [2, 4], visit=1)
    publish(store, 7)
    store.close()
    path = folder / "rows-0.db"
    saved = path.read_bytes()
    told = 0
    for place in range(0, len(saved), every):
        data = bytearray(saved)
        data[place] ^= 1 << place % 8
        path.write_bytes(bytes(data))
        try:
            opened = RowDatabase(folder, 7)
        except InputError:
            told += 1
            continue
        try:
            assert_holds(opened, {1: 0, 2: 1, 3: 0, 4: 1})
        except InputError:
            told += 1
        opened.close()
    assert told > 0


def full_disk(limit: int) -> None:
    """Files of this process end at `limit` bytes; a write beyond is an error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


FULL = """
import sys, torch
from pathlib import Path
from ltm_pyro.engine.rows.database import RowDatabase
from ltm_pyro.errors import InputError

store = RowDatabase(Path(sys.argv[1]), 1)
try:
    for step in range(2, 50):
        ids = torch.arange(8 * step, 8 * step + 8)
        store.scatter(ids, {"loc": torch.zeros(8, 300)})
        store.prepare(step)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [36_000, 60_000, 110_000])
def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path, limit: int) -> None:
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    store.scatter(torch.arange(2), {"loc": torch.ones(2, 300)})
    publish(store, 1)
    store.close()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder)], preexec_fn=lambda: full_disk(limit),
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "cannot write the local parameters" in done.stdout
    assert "go on from the last checkpoint" in done.stdout
    assert done.stdout.count("\n") == 1
    again = RowDatabase(folder, 1)
    assert len(again) == 2
    found = again.gather(torch.arange(2), {"loc": torch.zeros(2, 300)})["loc"]
    assert torch.equal(found, torch.ones(2, 300))


def test_a_long_stretch_without_a_checkpoint_is_written_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "_PENDING_BYTES", 1000)
    folder = new_folder(tmp_path / "s")
    store = RowDatabase(folder, 0)
    for visit in range(5):
        put(store, [1, 2, 3, 4], visit)
    with sqlite3.connect(folder / "rows-0.db") as on_disk:
        assert on_disk.execute("SELECT count(*) FROM rows").fetchone() == (4,)
    on_disk.close()
    assert_holds(RowDatabase(folder, 0), {})  # no checkpoint has seen them
    publish(store, 9)
    assert_holds(RowDatabase(folder, 9), dict.fromkeys([1, 2, 3, 4], 4))


def test_a_layout_comes_back_from_json() -> None:
    layout = RowLayout.of(rows_of(torch.arange(2)))
    assert RowLayout.from_json(layout.to_json()) == layout
    for wrong in (None, [], {"a": ["float33", [2]]}, {"a": ["float32", "x"]}, {"a": 3}):
        with pytest.raises(ValueError, match="columns"):
            RowLayout.from_json(wrong)
