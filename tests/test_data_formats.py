"""One text in every kind of file: the same sequences, the same hash; the rest refused by name."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltm_pyro.data import Corpus, load_corpus
from ltm_pyro.data.files import CHUNK_BYTES, text_size
from ltm_pyro.errors import InputError

TEXTS = [
    f'Document {i}, café 中文 \U0001f600.\nIts second line, "quoted", and number {i * i}.'
    for i in range(40)
]
PROSE = "\n\n".join(f"{text}\n{text[::-1]}" for text in TEXTS) + "\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path / "cache"))


def same(one: Corpus, other: Corpus) -> None:
    assert one.sha256 == other.sha256
    assert one.fingerprint == other.fingerprint
    for name in ("train", "val", "test"):
        a, b = getattr(one, name), getattr(other, name)
        assert np.array_equal(a.ids, b.ids)
        assert a.batch(range(len(a))).observed.equal(b.batch(range(len(b))).observed)


PROSE_VARIANTS: dict[str, Callable[[str], bytes]] = {
    "bom.txt": lambda text: text.encode("utf-8-sig"),
    "utf16.txt": lambda text: text.encode("utf-16"),
    "utf16be.txt": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf16plain.txt": lambda text: text.encode("utf-16-le"),
    "utf32.txt": lambda text: text.encode("utf-32"),
    "utf32plain.txt": lambda text: text.encode("utf-32-be"),
    "packed.txt.gz": lambda text: gzip.compress(text.encode()),
    "packed_bom.txt.gz": lambda text: gzip.compress(text.encode("utf-16")),
    "named_plain.md": lambda text: gzip.compress(text.encode()),
}


@pytest.mark.parametrize("name", PROSE_VARIANTS)
def test_a_text_is_the_same_however_it_is_encoded_or_packed(tmp_path: Path, name: str) -> None:
    plain, other = tmp_path / "plain.txt", tmp_path / name
    plain.write_bytes(PROSE.encode())
    other.write_bytes(PROSE_VARIANTS[name](PROSE))
    expected = load_corpus(plain, seq_len=32)
    same(expected, load_corpus(other, seq_len=32))
    # What a file begins with is believed before an encoding that is asked for.
    if "plain" not in name and name != "packed.txt.gz":
        same(expected, load_corpus(other, seq_len=32, encoding="latin-1"))


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_are_kept_or_made_one(tmp_path: Path, end: str) -> None:
    plain, other = tmp_path / "plain.txt", tmp_path / "other.txt"
    plain.write_bytes(PROSE.encode())
    other.write_bytes(PROSE.replace("\n", end).encode("utf-8-sig"))
    same(load_corpus(plain, seq_len=32), load_corpus(other, seq_len=32))
    same(load_corpus(plain, seq_len=32), load_corpus(other, seq_len=32, newlines="lf"))
    kept = load_corpus(other, seq_len=32, newlines="keep")
    assert kept.n_bytes == len(PROSE.replace("\n", end).encode())
    with pytest.raises(InputError, match="newlines 'crlf'"):
        load_corpus(other, newlines="crlf")  # type: ignore[call-overload]


def write_csv(file: Path, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with open(file, "w", encoding=encoding, newline="") as stream:
        rows = csv.writer(stream, delimiter=delimiter)
        rows.writerow(["number", "text"])
        rows.writerows((i, text) for i, text in enumerate(TEXTS))


def lines() -> str:
    return "".join(json.dumps({"number": i, "text": t}) + "\n" for i, t in enumerate(TEXTS))


def write_parquet(file: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the optional package pyarrow is not installed")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.table({"number": range(len(TEXTS)), "text": TEXTS}), file)


def write_zstandard(file: Path) -> None:
    library = pytest.importorskip("zstandard", reason="the optional package is not installed")
    file.write_bytes(library.compress(lines().encode()))


RECORD_VARIANTS: dict[str, Callable[[Path], object]] = {
    "a.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines().encode())),
    "a.jsonl.zst": write_zstandard,
    "a.ndjson": lambda file: file.write_bytes(lines().encode("utf-8-sig")),
    "crlf.jsonl": lambda file: file.write_bytes(lines().replace("\n", "\r\n").encode()),
    "utf16.jsonl": lambda file: file.write_bytes(lines().encode("utf-16")),
    "lines.json": lambda file: file.write_text(lines()),
    "list.json": lambda file: file.write_text(
        json.dumps([{"number": i, "text": t} for i, t in enumerate(TEXTS)])
    ),
    "a.csv": write_csv,
    "bom.csv": lambda file: write_csv(file, encoding="utf-8-sig"),
    "semicolon.csv": lambda file: write_csv(file, ";"),
    "a.tsv": lambda file: write_csv(file, "\t", "utf-16"),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", RECORD_VARIANTS)
def test_records_are_the_same_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    plain, other = tmp_path / "plain.jsonl", tmp_path / name
    plain.write_text(lines())
    RECORD_VARIANTS[name](other)
    expected, found = load_corpus(plain, seq_len=32), load_corpus(other, seq_len=32)
    same(expected, found)
    numbers = found.val.metadata["number"]
    assert numbers.dtype == np.int64
    assert numbers.tolist() == expected.val.metadata["number"].tolist()
    same(expected, load_corpus(TEXTS, seq_len=32))
    assert load_corpus(str(tmp_path / "[ap]*.jsonl"), seq_len=32).sha256 == expected.sha256


def test_a_folder_is_read_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one of a"}\n{"text": "two of a"}\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one of b"}\n'))
    (folder / "d.csv").write_text("text,n\none of d,1\ntwo of d,2\n")
    (folder / "e.pdf").write_bytes(b"%PDF-1.7")
    (folder / "f.txt").symlink_to(os.devnull)
    with pytest.warns(UserWarning, match=r"not read: e\.pdf .*f\.txt"):
        corpus = load_corpus(folder, seq_len=4, fractions=(0.4, 0.3, 0.3))
    found = {
        text for part in (corpus.train, corpus.val, corpus.test) for text in part.metadata.file
    }
    assert found == {"a.jsonl", "b.jsonl.gz", "d.csv"}
    assert corpus.n_bytes == 5 * len("one of a")
    assert list(corpus.card()["not_read"]) == ["e.pdf", "f.txt"]
    for name in ("a.jsonl", "b.jsonl.gz", "d.csv"):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"holds no .* file; it holds e\.pdf, f\.txt"):
        load_corpus(folder)


def test_several_paths_are_one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[1:]))
    expected = load_corpus(TEXTS, seq_len=32)
    for given in (["a.jsonl", "b.jsonl"], [Path("a.jsonl"), Path("b.jsonl")], "*.jsonl"):
        same(expected, load_corpus(given, seq_len=32))
    recipe = load_corpus(["a.jsonl", "b.jsonl"], seq_len=32).recipe
    assert recipe is not None
    monkeypatch.chdir("/")
    same(expected, load_corpus(recipe["name"], seq_len=32))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no file or folder 'c\.jsonl'"):
        load_corpus(["a.jsonl", "c.jsonl"])


def make_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.txt")
    return folder / "pipe.txt"


def make_link(folder: Path, name: str, target: str) -> Path:
    (folder / name).symlink_to(target)
    return folder / name


DOORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fifo": (make_fifo, "neither a file nor a folder"),
    "device": (lambda folder: make_link(folder, "zero.txt", "/dev/zero"), "neither a file"),
    "loop": (lambda folder: make_link(folder, "loop.txt", "loop.txt"), "cannot read .*loop.txt"),
    "dangling": (lambda folder: make_link(folder, "gone.txt", "nowhere"), "there is no file"),
    "nobody": (lambda folder: "~no-such-user/a.txt", "a.txt"),
    "nul": (lambda folder: "a\0b.txt", "cannot be the path"),
    "bytes": (lambda folder: "a\udcff.txt", "cannot be the path"),
    "long": (lambda folder: folder / ("x" * 5000 + ".txt"), "cannot read"),
}


@pytest.mark.parametrize("door", DOORS)
def test_only_regular_files_are_read(tmp_path: Path, door: str) -> None:
    make, message = DOORS[door]
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(make(tmp_path), seq_len=16)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.glob("cache/*"))


def test_names_that_are_no_unicode_are_read_and_shown_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text(PROSE)
    corpus = load_corpus(folder, seq_len=32)
    (file,) = corpus.val.metadata.file.unique()
    assert file.encode()  # ordinary text
    assert "xe9" in file or "udce9" in file


WRONG_BYTES: dict[str, tuple[bytes, str]] = {
    "zip.txt": (b"PK\x03\x04" + bytes(50), "a zip archive"),
    "bzip2.txt": (b"BZh91AY&SY" + bytes(50), "packed by bzip2"),
    "doc.md": (b"%PDF-1.4 text", "a PDF"),
    "noise.txt": (random.Random(0).randbytes(500), "no text, or in another encoding"),
    "plain.txt.gz": (PROSE.encode(), r"neither by gzip nor .*take \.gz off"),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(5000))[:900], "packed and damaged"),
    "table.parquet": (b"PAR1", "table"),
    "quotes.csv": (b'text\n"never closed', "quotes"),
    "more.csv": (b"text\na,b\n", "more fields"),
    "numbers.json": (b"[1, 2]", "item 0 .*int 1"),
    "deep.json": (b"[" * 200_000, "nested too deeply"),
    "null.jsonl": (b'{"text": null}', "it is null"),
    "other.csv": (b"body,n\na,1\n", "its fields are body, n"),
    "near.jsonl": (b'{"texts": "a"}', "did you mean 'texts'"),
}


@pytest.mark.parametrize("encoding", ["latin-1", "cp437"])
def test_random_bytes_are_no_text_in_an_encoding_that_takes_any(
    tmp_path: Path, encoding: str
) -> None:
    file = tmp_path / "noise.txt"
    file.write_bytes(np.random.default_rng(0).bytes(4000))
    with pytest.raises(InputError, match=r"noise\.txt.* is no text .*control characters"):
        load_corpus(file, seq_len=32, encoding=encoding)


@pytest.mark.parametrize("name", WRONG_BYTES)
def test_what_is_no_text_is_named_and_never_offered_as_latin_1(tmp_path: Path, name: str) -> None:
    data, message = WRONG_BYTES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(tmp_path / name, seq_len=16)
    assert "\n" not in str(caught.value)
    assert "latin-1" not in str(caught.value)
    assert name in str(caught.value)


def test_a_file_that_unpacks_without_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ltm_pyro.data.files._ALWAYS_BYTES", 2**16)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(97 for _ in range(2**22))))
    with pytest.raises(InputError, match="unpacks to far more"):
        load_corpus(tmp_path / "bomb.txt.gz")
    assert not list(tmp_path.glob("cache/building-*"))


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text(PROSE)
    recipe = load_corpus("~/a.txt", seq_len=32).recipe
    assert recipe is not None
    assert recipe["name"] == str((tmp_path / "a.txt").resolve())


def test_the_size_of_a_text_is_that_of_its_line_feeds(tmp_path: Path) -> None:
    """Blocks are cut by it: a CR LF on the edge of what is read at once counts once."""
    plain, other = tmp_path / "plain.txt", tmp_path / "crlf.txt"
    text = "a" * (CHUNK_BYTES - 1) + "\n" + "b\n" * 5
    plain.write_bytes(text.encode())
    other.write_bytes(text.replace("\n", "\r\n").encode())
    assert text_size(other, "utf-8") == text_size(plain, "utf-8") == len(text)
    assert text_size(other, "utf-8", "keep") == len(text) + 6
