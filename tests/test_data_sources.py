"""Reading files: every character kept, every fault named."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ltm_pyro.data import files, reference
from ltm_pyro.data.blocks import blocks
from ltm_pyro.data.hub import HubSource
from ltm_pyro.data.records import Reading, Source
from ltm_pyro.data.reference import PydocSource
from ltm_pyro.data.sources import FileSource
from ltm_pyro.errors import InputError


def random_prose(seed: int, length: int) -> str:
    """Words, blank lines of several kinds, all line endings, and long stretches of neither."""
    rng = random.Random(seed)
    pieces = ["word ", "é中\U0001f600", "\n", "\n\n", "\r\n\r\n", "\n \t\n", "\n\n\n\n", "x" * 90]
    return "".join(rng.choices(pieces, weights=[20, 3, 3, 1, 1, 1, 1, 2], k=length))


def texts(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


def chunks(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_keep_the_text_however_it_is_streamed(seed: int) -> None:
    text = random_prose(seed, 800)
    whole = list(blocks(iter([text]), 100))
    assert "".join(whole) == text
    assert len(whole) > 5
    assert all(1 <= len(block) <= 400 for block in whole)
    assert all(len(block) >= 100 for block in whole[:-1])
    for size in (1, 7, 99, 1000):
        assert list(blocks(iter(chunks(text, size)), 100)) == whole


def test_blocks_end_after_blank_lines_then_line_ends_then_anywhere() -> None:
    assert list(blocks(iter(["aaaa\n\nbbb\n\n\n\nccc"]), 5)) == ["aaaa\n\n", "bbb\n\n\n\n", "ccc"]
    assert list(blocks(iter(["aaaa\r\n \t\r\nbbb"]), 5)) == ["aaaa\r\n \t\r\n", "bbb"]
    assert list(blocks(iter(["aaaa\nbbbbbb\ncc"]), 6)) == ["aaaa\nbbbbbb\n", "cc"]
    assert list(blocks(iter(["abcdefghij"]), 2)) == ["abcdefgh", "ij"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_a_text_file_is_kept_to_the_character(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 61)  # cuts characters in two
    text = random_prose(0, 400)
    file = tmp_path / "some.TXT"
    file.write_bytes(text.encode(encoding))
    documents = texts(FileSource(file, reading=Reading(encoding, "keep")))
    assert len(documents) > 3
    assert "".join(documents) == text


def test_blocks_grow_with_the_text(tmp_path: Path) -> None:
    sizes = {}
    for length in (1, 1_000, 10_000, 1_000_000):
        file = tmp_path / f"{length}.txt"
        file.write_bytes(b"x" * length)
        sizes[length] = FileSource(file).block
    assert sizes == {1: 64, 1_000: 124, 10_000: 400, 1_000_000: 4_000}
    sparse = tmp_path / "sparse.txt"
    with open(sparse, "wb") as stream:
        stream.truncate(2**40)  # a terabyte that takes no room
    assert FileSource(sparse).block == 65_536


@pytest.mark.parametrize("chunk", [11, 2**20])
def test_the_offending_byte_is_named(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    file = tmp_path / "latin.txt"
    file.write_bytes(("é" * 50).encode() + b"caf\xe9 \n")
    with pytest.raises(InputError, match=r"byte 103 is 0xe9 .* --encoding latin-1"):
        texts(FileSource(file))
    assert "".join(texts(FileSource(file, reading=Reading("latin-1")))).endswith("café \n")


def test_a_file_that_ends_in_mid_character(tmp_path: Path) -> None:
    file = tmp_path / "cut.txt"
    file.write_bytes("abc中".encode()[:-1])
    with pytest.raises(InputError, match="byte 3 is 0xe4"):
        texts(FileSource(file))


def test_utf16_without_its_mark(tmp_path: Path) -> None:
    file = tmp_path / "plain.txt"
    file.write_bytes(b"plain ascii")
    with pytest.raises(InputError, match=r"not utf-16: .*--encoding utf-8"):
        texts(FileSource(file, reading=Reading("utf-16")))


def test_an_encoding_goes_by_any_of_its_names(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"text")
    assert (
        FileSource(file, reading=Reading("latin")).reading.encoding
        == FileSource(file, reading=Reading("L1")).reading.encoding
        == "iso8859-1"
    )


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "undefined"])
def test_encodings_that_are_none(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"text")
    with pytest.raises(InputError, match=f"unknown encoding '{encoding}'.* try utf-8"):
        FileSource(file, reading=Reading(encoding))


def write_lines(file: Path, *lines: str) -> Path:
    file.write_bytes("\n".join(lines).encode())
    return file


def test_each_json_line_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 13)
    expected = ["one", "two\r\nlines", "sep \u2028 \x85 \u2029", "\U0001f600", " "]
    lines = [json.dumps({"id": 1, "text": t}, ensure_ascii=False) for t in expected]
    file = write_lines(tmp_path / "a.jsonl", "\ufeff" + lines[0], "", *lines[1:], "  ", "")
    assert texts(FileSource(file)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", 'line 3 of .* is not JSON .Expecting value.*string "text"'),
        ('{"text": "cut', "line 3 of .* is not JSON"),
        ("[" * 100_000, "line 3 of .* (too deeply|is not JSON)"),
        ('{"body": "x"}', 'line 3 of .* has no string "text"'),
        ('{"text": 3}', 'line 3 of .* has no string "text"'),
        ('["text"]', 'line 3 of .* has no string "text"'),
        ('{"text": "\\ud83d"}', "line 3 of .* lone surrogate"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", '{"text": "fine"}', "", line, '{"text": "fine"}')
    with pytest.raises(InputError, match=message) as caught:
        texts(FileSource(file))
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "deep" / "one.md").write_text("1")
    (tmp_path / "a.txt").write_text("2")
    write_lines(tmp_path / "c.jsonl", '{"text": "3"}')
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / ".git" / "note.txt").write_text("never")
    with pytest.warns(UserWarning, match=r"not read: \.git .*\.hidden\.txt .*picture\.png"):
        source = FileSource(tmp_path)
    assert texts(source) == ["2", "1", "3"]
    assert list(source.skipped) == [".git", ".hidden.txt", "picture.png"]
    assert source.files == ("a.txt", "b/deep/one.md", "c.jsonl", "empty.txt")
    assert source.name == tmp_path.name


def test_identity_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    before = FileSource(file).identity()
    assert FileSource(file).identity() == before == json.loads(json.dumps(before))
    assert FileSource(file, reading=Reading("latin-1")).identity() != before
    os.utime(file, ns=(1, 1))
    assert FileSource(file).identity() != before


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        FileSource(tmp_path / "missing.txt")
    with pytest.raises(InputError, match=r"holds no \.txt, .* or \.parquet file"):
        FileSource(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match="is empty"):
        FileSource(tmp_path / "empty.txt")
    (tmp_path / "book.pdf").write_text("text")
    with pytest.raises(InputError, match=r"give a \.txt, .* or \.parquet file"):
        FileSource(tmp_path / "book.pdf")
    with pytest.raises(InputError, match=r"cannot read .*empty.txt/x.txt"):
        FileSource(tmp_path / "empty.txt" / "x.txt")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        FileSource(Path(os.devnull))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "locked")

    (tmp_path / "locked.txt").write_text("text")
    source = FileSource(tmp_path / "locked.txt")
    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(InputError, match=r"cannot read .*locked\.txt': Permission denied"):
        texts(source)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="cannot read 'locked': Permission denied"):
        FileSource(tmp_path)


class FakeHub(ModuleType):
    """Stands in for the package `datasets`."""

    def __init__(self, rows: object) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: tuple[object, ...] = ()

    def load_dataset(self, name: str, config: str | None, split: str) -> object:
        self.asked = (name, config, split)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub([{"text": "one"}, {"text": "two", "label": 1}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = HubSource("owner/data", "small", "validation")
    assert texts(source) == ["one", "two"]
    assert hub.asked == ("owner/data", "small", "validation")
    assert source.name == "data"
    assert source.identity() != HubSource("owner/data").identity()


def test_hub_datasets_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=re.escape('pip install "ltm-pyro[hf]"')):
        texts(HubSource("owner/data"))
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(FileNotFoundError("no such\ndataset")))
    with pytest.raises(InputError, match=r"cannot load .*'owner/data': no such dataset"):
        texts(HubSource("owner/data"))
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": "one"}, {"body": "two"}]))
    with pytest.raises(InputError, match=r'owner/data.*item 1 has no string "text".*body'):
        texts(HubSource("owner/data"))


LIBRARY = {
    "alpha.py": '''"""Alpha is about this and that, at some length, so that it is a document.

    A second paragraph which both of the modules hold, word for word.
    """

if True:
    class A:
        """A class, with a docstring that is not found anywhere else in here."""

        def method(self):
            """A method, whose docstring is not repeated anywhere else either."""
            def inner():
                """Never seen."""
else:
    try:
        def f():
            r"""An invalid \\escape, and other things that would warn in a plain string."""
            return "\\d"
    except ImportError:
        pass
''',
    "beta/__init__.py": '''"""Beta.

A second paragraph which both of the modules hold,
word for word.

What is only in Beta is this rather long sentence, which goes on and on and on and on and on, and
then, at long last, stops.
"""''',
    "gamma.py": '"""Too short to keep."""',
    "broken.py": "def (:",
    "surrogate.py": '"""\\udc80' + "and text " * 40 + '"""',
    "test/test_alpha.py": '"""' + "never read " * 40 + '"""',
    "site-packages/other.py": '"""' + "never read " * 40 + '"""',
}


def test_docstrings_are_read_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(reference, "_library", lambda: tmp_path)
    monkeypatch.setattr(reference, "_topics", list)
    alpha, beta = texts(PydocSource())
    assert alpha.startswith("Alpha is about")
    assert "A class," in alpha
    assert "A method," in alpha
    assert "An invalid" in alpha
    assert "Never seen" not in alpha
    assert alpha.endswith("string.\n")
    assert "both of the modules" in alpha
    assert beta.startswith("Beta.\n\nWhat is only in Beta")


def test_a_python_without_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="full standard library"):
        texts(PydocSource())
