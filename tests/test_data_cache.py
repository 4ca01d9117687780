"""The cache: whole entries or none, whatever happens on the way."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from ltm_pyro.data import cache as module
from ltm_pyro.data.cache import Cache, Entry, EntryWriter, default_folder
from ltm_pyro.errors import InputError

DTYPES = {"tokens": np.uint16, "lengths": np.int64, "none": np.uint8}


class Builder:
    """Builds one small entry, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, writer: EntryWriter) -> Mapping[str, Any]:
        self.calls += 1
        for part in ([1, 2, 3], [], [65_535]):
            writer.append("tokens", np.array(part, dtype=np.int64))
            writer.append("lengths", np.array([len(part)]))
        return {"answer": 42}

    def get(self, cache: Cache) -> Entry:
        entry = cache.get("some label/é", {"source": 1}, DTYPES, self)
        assert entry.arrays["tokens"].tolist() == [1, 2, 3, 65_535]
        assert entry.arrays["lengths"].tolist() == [3, 0, 1]
        assert entry.arrays["none"].tolist() == []
        assert entry.meta == {"answer": 42}
        return entry


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("building-")]


def test_an_entry_is_built_once_and_mapped(tmp_path: Path) -> None:
    build = Builder()
    build.get(Cache(tmp_path / "new" / "cache"))
    entry = build.get(Cache(tmp_path / "new" / "cache"))
    assert build.calls == 1
    assert isinstance(entry.arrays["tokens"], np.memmap)
    assert entry.arrays["tokens"].dtype == np.uint16
    assert not entry.arrays["tokens"].flags.writeable
    (folder,) = (tmp_path / "new" / "cache").iterdir()
    assert folder.name.startswith("some_label__-")


def test_another_identity_is_another_entry(tmp_path: Path) -> None:
    build = Builder()
    for identity in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        Cache(tmp_path).get("x", identity, DTYPES, build)
    assert build.calls == 2


def damage(folder: Path) -> Iterator[None]:
    """Every way in which an entry may be spoilt, one at a time."""
    tokens, meta = folder / "tokens.bin", folder / "meta.json"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    yield
    tokens.write_bytes(b"\xff" + tokens.read_bytes()[1:])
    yield
    tokens.unlink()
    yield
    meta.write_text("{")
    yield
    meta.write_text("[]")
    yield
    meta.write_text(meta.read_text().replace("42", "43"))
    yield
    meta.write_bytes(b"\xff")
    yield
    meta.unlink()
    yield


def test_a_damaged_entry_is_built_again(tmp_path: Path) -> None:
    build = Builder()
    build.get(Cache(tmp_path))
    (folder,) = tmp_path.iterdir()
    for number, _ in enumerate(damage(folder), start=2):
        build.get(Cache(tmp_path))
        assert build.calls == number
    build.get(Cache(tmp_path))
    assert build.calls == number
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_damage_of_a_long_file_is_noticed_though_it_is_verified_but_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ALWAYS_VERIFIED_BYTES", 1)
    build = Builder()
    build.get(Cache(tmp_path))
    (folder,) = tmp_path.iterdir()
    file = folder / "tokens.bin"
    hashed: list[str] = []
    digest = hashlib.file_digest

    def spy(stream: BinaryIO, name: str) -> object:
        hashed.append(Path(stream.name).name)
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    build.get(Cache(tmp_path))
    assert hashed == []
    # The same size and time, one bit flipped: the system still tells that the file was touched.
    before = file.stat()
    with open(file, "r+b") as stream:
        stream.write(bytes([file.read_bytes()[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    build.get(Cache(tmp_path))
    assert build.calls == 2
    assert "tokens.bin" in hashed
    # A stamp is no proof of another content.
    hashed.clear()
    shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "aside")
    (tmp_path / "copy").rename(folder)
    build.get(Cache(tmp_path))
    assert build.calls == 2
    assert "tokens.bin" in hashed


def test_what_only_building_tells_is_kept_once(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(2):
        entry = Cache(tmp_path).get("x", None, DTYPES, build)
        assert entry.arrays["tokens"].tolist() == [1, 2, 3, 65_535]
    assert build.calls == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_an_array_that_is_no_file_is_built_again(tmp_path: Path) -> None:
    build = Builder()
    build.get(Cache(tmp_path))
    (folder,) = tmp_path.iterdir()
    (folder / "tokens.bin").unlink()
    os.mkfifo(folder / "tokens.bin")
    build.get(Cache(tmp_path))
    assert build.calls == 2


def test_nothing_stays_of_a_build_that_fails(tmp_path: Path) -> None:
    def refuse(writer: EntryWriter) -> Mapping[str, Any]:
        writer.append("tokens", np.arange(10))
        raise InputError("bad input")

    with pytest.raises(InputError, match="bad input"):
        Cache(tmp_path).get("x", {}, DTYPES, refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="No space left on device; free some space"):
        Cache(tmp_path).get("x", {}, DTYPES, full)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module.tempfile, "mkdtemp", full)
    with pytest.raises(InputError, match=r"no space left .* LTM_PYRO_CACHE"):
        Builder().get(Cache(tmp_path))


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    build = Builder()
    entry = build.get(cache)
    temporary = cache.folder
    assert temporary.is_dir()
    build.get(cache)
    assert build.calls == 1
    del cache
    gc.collect()
    assert not temporary.exists()
    assert entry.arrays["tokens"].tolist() == [1, 2, 3, 65_535]
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_entry_that_reads_back_wrong_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_open_entry", lambda _: None)
    with pytest.raises(InputError, match="reads back differently"):
        Builder().get(Cache(tmp_path))


def test_many_builders_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    failures: list[BaseException] = []

    class Meeting(Builder):
        def __call__(self, writer: EntryWriter) -> Mapping[str, Any]:
            together.wait(timeout=10)  # nobody has published yet
            return super().__call__(writer)

    def work() -> None:
        try:
            Meeting().get(Cache(tmp_path))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_swept_in_time(tmp_path: Path) -> None:
    for name, age in (("old", 2 * 86_400), ("new", 60)):
        (tmp_path / f"building-{name}").mkdir()
        os.utime(tmp_path / f"building-{name}", (time.time() - age,) * 2)
    Builder().get(Cache(tmp_path))
    assert leftovers(tmp_path) == ["building-new"]


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path))
    assert Cache().folder == default_folder() == tmp_path
    monkeypatch.delenv("LTM_PYRO_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    expected = {
        "linux": Path("/home/someone/.cache/ltm_pyro"),
        "darwin": Path("/home/someone/Library/Caches/ltm_pyro"),
    }
    for platform, folder in expected.items():
        monkeypatch.setattr(module.sys, "platform", platform)
        assert default_folder() == folder
    monkeypatch.setattr(module.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert default_folder() == tmp_path / "ltm_pyro" / "cache"
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_folder() == Path("/elsewhere/ltm_pyro")
