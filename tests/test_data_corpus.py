"""`load_corpus`: from names and paths to splits, and every refusal in one line."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ltm_pyro.data import ByteTokenizer, Corpus, SymbolTokenizer, load_corpus
from ltm_pyro.data.bpe import BPETokenizer
from ltm_pyro.data.reference import PydocSource
from ltm_pyro.data.sources import FileSource
from ltm_pyro.data.split import SPLITS
from ltm_pyro.errors import InputError

WORDS = ["the", "with", "statement", "café", "中文", "returns", "value", "list", "key", "or", "not"]


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    ends = [" "] * 12 + ["\n", ".\r\n\r\n", ".\n\n"]
    return "".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(words))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    file = tmp_path / "novel.txt"
    file.write_bytes(prose(0, 4_000).encode())
    return file


def write_documents(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def texts_of(corpus: Corpus) -> dict[str, list[str]]:
    """The documents of each split, put together again from their sequences."""
    out = {}
    for name in SPLITS:
        joined: list[list[int]] = []
        for batch in getattr(corpus, name).batches(64):
            for row, mask, new in zip(
                batch.observed, batch.mask, starts(corpus, batch.ids), strict=True
            ):
                joined += [[]] if new else []
                joined[-1] += row[mask].tolist()
        out[name] = [corpus.tokenizer.decode(ids) for ids in joined]
    return out


def starts(corpus: Corpus, ids: Any) -> np.ndarray:
    first = corpus.train._layout._first_id
    return np.isin(ids.numpy(), first)


def test_a_text_file_is_all_there(novel: Path) -> None:
    corpus = load_corpus(novel, seq_len=32, newlines="keep")
    data = novel.read_bytes()
    assert corpus.name == "novel"
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()
    assert corpus.n_tokens == corpus.n_bytes == len(data)
    assert corpus.vocab_size == 256
    # Put in the order of their ids, the sequences are the file again.
    rows = [
        (i, row[mask].tolist())
        for name in SPLITS
        for batch in getattr(corpus, name).batches(100)
        for i, row, mask in zip(batch.ids.tolist(), batch.observed, batch.mask, strict=True)
    ]
    assert [i for i, _ in sorted(rows)] == list(range(len(rows)))
    assert bytes(token for _, tokens in sorted(rows) for token in tokens) == data


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_survive_and_are_not_shared(tmp_path: Path, tokenizer: str) -> None:
    texts = [prose(seed % 60, 5 + seed % 60) for seed in range(90)] + [
        "",
        "x",
        "\r\n",
        "\U0001f600",
    ]
    file = write_documents(tmp_path / "notes.jsonl", texts)
    corpus = load_corpus(str(file), seq_len=16, tokenizer=tokenizer)
    split = texts_of(corpus)
    assert sorted(text for part in split.values() for text in part) == sorted(filter(None, texts))
    train, val, test = (set(part) for part in split.values())
    assert train.isdisjoint(val | test)
    assert val.isdisjoint(test)
    assert corpus.train.n_documents == len(split["train"])


def test_the_split_is_of_the_text_alone(tmp_path: Path) -> None:
    texts = [prose(seed, 30) for seed in range(60)]
    file = write_documents(tmp_path / "a.jsonl", texts)
    backwards = write_documents(tmp_path / "b.jsonl", texts[::-1])
    reference = texts_of(load_corpus(file, seq_len=16))
    for corpus in (
        load_corpus(file, seq_len=50),
        load_corpus(file, seq_len=16, tokenizer="bpe", vocab_size=300),
        load_corpus(backwards, seq_len=16),
    ):
        assert {k: sorted(v) for k, v in texts_of(corpus).items()} == {
            k: sorted(v) for k, v in reference.items()
        }
    assert texts_of(load_corpus(file, seq_len=16, seed=1)) != reference


def test_ids_do_not_depend_on_the_split(novel: Path) -> None:
    one = load_corpus(novel, seq_len=32)
    other = load_corpus(novel, seq_len=32, seed=3, fractions=(0.4, 0.3, 0.3))
    shared = np.intersect1d(one.train.ids, other.val.ids)
    assert shared.size
    assert one.train.batch(ids=shared).observed.equal(other.val.batch(ids=shared).observed)


def test_byte_pairs_are_learned_from_the_training_split_only(tmp_path: Path) -> None:
    # Each document repeats a word of its own: what the vocabulary holds tells where it looked.
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=12)) for _ in range(40)]
    file = write_documents(tmp_path / "a.jsonl", [f" {word}" * 20 for word in words])
    corpus = load_corpus(file, seq_len=16, tokenizer="bpe", vocab_size=2_000)
    split = texts_of(corpus)
    lengths = {
        name: [len(corpus.tokenizer.encode(" " + text.split()[0])) for text in part]
        for name, part in split.items()
    }
    assert max(lengths["train"]) == 1
    assert min(lengths["val"] + lengths["test"]) > 1
    assert isinstance(corpus.tokenizer, BPETokenizer)
    assert corpus.tokenizer.name == f"bpe-{corpus.vocab_size}"


def test_token_arrays_are_mapped_and_small(novel: Path, tmp_path: Path) -> None:
    for tokenizer, dtype in (("bytes", np.uint8), ("bpe", np.uint16)):
        tokens = load_corpus(novel, tokenizer=tokenizer).train._layout.tokens
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == dtype


def test_a_second_load_reads_no_source(novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[dict[str, Any]] = [{}, {"tokenizer": "bpe"}]
    before = [load_corpus(novel, **options) for options in loads]
    monkeypatch.setattr(FileSource, "documents", None)
    monkeypatch.setattr(BPETokenizer, "train", None)
    monkeypatch.setattr(BPETokenizer, "encode", None)
    for corpus, options in zip(before, loads, strict=True):
        again = load_corpus(novel, **options)
        assert again.describe() == corpus.describe()
        assert again.tokenizer == corpus.tokenizer
        assert again.val.batch([0]).observed.equal(corpus.val.batch([0]).observed)


def test_a_changed_file_is_read_again(novel: Path) -> None:
    before = load_corpus(novel, tokenizer="bpe", newlines="keep")
    novel.write_bytes(prose(1, 4_000).encode())
    after = load_corpus(novel, tokenizer="bpe", newlines="keep")
    assert after.sha256 == hashlib.sha256(novel.read_bytes()).hexdigest() != before.sha256
    assert after.tokenizer != before.tokenizer


def test_a_tokenizer_at_hand(novel: Path, tmp_path: Path) -> None:
    learned = load_corpus(novel, tokenizer="bpe", vocab_size=400)
    other = tmp_path / "other.md"
    other.write_text(prose(9, 2_000))
    corpus = load_corpus(
        other, tokenizer=learned.tokenizer, vocab_size=400, cache_dir=tmp_path / "c"
    )
    assert corpus.tokenizer is learned.tokenizer
    assert corpus.n_tokens < corpus.n_bytes
    assert "".join(sorted(t for part in texts_of(corpus).values() for t in part))
    assert load_corpus(other, tokenizer=ByteTokenizer()).n_tokens == corpus.n_bytes
    assert (tmp_path / "c").is_dir()


def test_a_tokenizer_from_a_folder(novel: Path, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "encoder.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (tmp_path / "gpt" / "vocab.bpe").write_text("#version: 0.2\nt h\n")
    corpus = load_corpus(novel, tokenizer=tmp_path / "gpt")
    assert corpus.vocab_size == 257
    assert corpus.train._layout.tokens.dtype == np.uint16
    assert 0 < corpus.n_bytes - corpus.n_tokens == novel.read_text().count("th")


def test_describe_is_json(novel: Path) -> None:
    corpus = load_corpus(novel, seq_len=np.int64(32), seed=np.int64(4))  # type: ignore[arg-type]
    facts = json.loads(json.dumps(corpus.describe()))
    assert facts == corpus.describe()
    assert facts["seq_len"] == 32
    told = {"source": str(novel), "seed": 4, "fractions": [0.9, 0.05, 0.05]}
    assert {key: facts["settings"][key] for key in told} == told
    assert sum(part["tokens"] for part in facts["splits"].values()) == facts["n_tokens"]
    assert sum(part["sequences"] for part in facts["splits"].values()) == sum(
        len(part) for part in (corpus.train, corpus.val, corpus.test)
    )
    assert facts["unit"] == "byte"
    assert repr(corpus).startswith("Corpus(novel: ")


def test_a_folder_of_all_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(prose(1, 300))
    (folder / "b.md").write_text(prose(2, 300))
    write_documents(folder / "c.jsonl", [prose(3, 30), prose(4, 30)])
    corpus = load_corpus(str(folder), seq_len=64, newlines="keep")
    assert corpus.n_bytes == sum(
        len(prose(*a).encode()) for a in ((1, 300), (2, 300), (3, 30), (4, 30))
    )


def test_a_small_file_has_three_splits(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("".join(f"Line {i} of a small note.\n" for i in range(20)))
    corpus = load_corpus(file)
    assert min(len(corpus.train), len(corpus.val), len(corpus.test)) >= 1


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
            asked.append((args, options))
            return [{"text": prose(i, 40)} for i in range(20)]

    monkeypatch.setitem(sys.modules, "datasets", Hub)  # type: ignore[arg-type]
    assert load_corpus("hf:data", config="small", hub_split="all", seq_len=16).name == "data"
    assert load_corpus("owner/data", seq_len=16).n_tokens > 0
    assert asked == [
        (("data", "small"), {"split": "all"}),
        (("owner/data", None), {"split": "train"}),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_corpus("owner/data", seq_len=16).n_tokens > 0  # kept
    with pytest.raises(InputError, match=r"pip install \"ltm-pyro\[hf\]\""):
        load_corpus("owner/other")


def test_pydoc(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load_corpus("pydoc")
    assert 1_500_000 < corpus.n_bytes < 3_000_000
    assert corpus.train.n_documents > 300
    shares = [getattr(corpus, name).n_tokens / corpus.n_tokens for name in SPLITS]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    monkeypatch.setattr(PydocSource, "documents", None)
    assert load_corpus("pydoc").sha256 == corpus.sha256
    # No full sequence of one split occurs in another.
    seen: dict[bytes, str] = {}
    for name in SPLITS:
        for batch in getattr(corpus, name).batches(512):
            full = batch.observed[batch.mask.all(-1)].numpy().astype(np.uint8)
            for row in full:
                assert seen.setdefault(row.tobytes(), name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pydocs", "unknown corpus 'pydocs': did you mean 'pydoc'.*hf:NAME"),
        ("mixtur", "did you mean 'mixture'"),
        ("", "unknown corpus ''"),
        ("missing.txt", "there is no file or folder 'missing.txt'"),
        ("some/where/missing", "there is no file or folder"),
        ("tests/missing.txt", "there is no file or folder"),
        ("/nowhere/at/all.jsonl", "there is no file or folder"),
        ("https://example.org/a.txt", "is an address: fetch the file"),
    ],
)
def test_corpora_that_are_none(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_corpus(name)


def test_a_slip_in_a_path_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="there is no file or folder 'data/novels'"):
        load_corpus("data/novels")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1: must be a whole number, 2 or more"),
        ({"seq_len": 32.0}, "seq_len is 32.0"),
        ({"seq_len": True}, "seq_len is True"),
        ({"seed": -1}, "seed is -1"),
        ({"fractions": (0.5, 0.5, 0)}, "fractions are"),
        ({"fraction": 0.1}, "unknown option .*did you mean 'fractions'"),
        ({"seqlen": 32}, "did you mean 'seq_len'"),
        ({"classes": 8}, "unknown option of corpus 'novel'"),
        ({"split": "train"}, "unknown split 'train'"),
        ({"hub_split": "train"}, "unknown option"),
        ({"vocab_size": 300}, "vocab_size is for tokenizer 'bpe'"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size is 100"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'.*vocab.bpe"),
        ({"tokenizer": "gpt2"}, "unknown tokenizer 'gpt2'.*folder that holds GPT-2's"),
        ({"tokenizer": SymbolTokenizer(4)}, "symbols of 'mixture'"),
        ({"encoding": "utf9"}, "unknown encoding 'utf9'"),
        ({"seq_len": 10**6}, "fewer than one sequence of 1000000"),
    ],
)
def test_options_that_cannot_be(
    novel: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(novel, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/building-*"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"short", "holds 5 tokens, fewer than one sequence of 128"),
        (b"x" * 130, "has 1 different texts in 1 documents"),
        (b"caf\xe9" * 100, "byte 3 is 0xe9.*--encoding latin-1"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "my.txt"
    file.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(file)
    assert "my.txt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/building-*"))


def test_few_tokens_in_enough_bytes(tmp_path: Path) -> None:
    file = tmp_path / "my.txt"
    file.write_text("\n\n".join(letter * 80 for letter in "abcdefghij"))
    with pytest.raises(InputError, match=r"holds .* tokens, fewer than one sequence of 700"):
        load_corpus(file, tokenizer="bpe", seq_len=700)


def test_a_file_of_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "blank.jsonl"
    file.write_text("\n\n" + json.dumps({"text": ""}))
    with pytest.raises(InputError, match="corpus 'blank' is empty"):
        load_corpus(file)


def test_a_fingerprint_tells_whether_ids_mean_the_same(novel: Path, tmp_path: Path) -> None:
    corpus = load_corpus(novel, seq_len=16)
    batch = corpus.val.batch([0])
    assert batch.corpus == corpus.fingerprint == corpus.test.corpus
    copy = tmp_path / "copy.txt"
    copy.write_bytes(novel.read_bytes())
    assert load_corpus(copy, seq_len=16, seed=1).fingerprint == corpus.fingerprint
    other = tmp_path / "other.txt"
    other.write_text(prose(1, 4_000))
    mixtures = [load_corpus("mixture", seq_len=16, n_sequences=64, seed=seed) for seed in (0, 1)]
    different = [
        corpus,
        load_corpus(other, seq_len=16),
        load_corpus(novel, seq_len=17),
        load_corpus(novel, seq_len=16, tokenizer="bpe", vocab_size=300),
        *mixtures,
    ]
    assert len({c.fingerprint for c in different}) == len(different)
    drawn = mixtures[0].val.batch([0, 1])
    assert drawn.documents is not None
    assert drawn.documents.tolist() == drawn.ids.tolist()
