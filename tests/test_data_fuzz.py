"""Whatever is given as a corpus: a corpus, or one line that says why not; no traceback, no hang."""

from __future__ import annotations

import gzip
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltm_pyro.data import load_corpus
from ltm_pyro.data.readers import SUFFIXES
from ltm_pyro.errors import InputError

SETTINGS = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=60
)
TEXT = st.text(max_size=40)
LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.binary(max_size=10),
    st.just(np.float32(1)),
    st.just(object),
    st.just(pd.NaT),
)
NAMES = st.one_of(st.sampled_from(["text", "train", "val", "test", "data", "data.text"]), TEXT)
VALUES = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(NAMES, inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=20,
)
RECORDS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), min_size=1, max_size=12)
WHOLE = st.lists(
    st.fixed_dictionaries({"text": st.text(min_size=1, max_size=60)}, optional={"n": VALUES}),
    min_size=4,
    max_size=20,
)
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "text_field": st.one_of(NAMES, VALUES),
    "turn_separator": VALUES,
    "newlines": st.one_of(st.sampled_from(["keep", "lf"]), VALUES),
    "split": st.one_of(st.sampled_from(["document", "given", "group"]), VALUES),
    "split_by": st.one_of(st.sampled_from(["n", "file", "file:(", "file:a"]), VALUES),
    "fractions": st.one_of(st.just((0.5, 0.25, 0.25)), VALUES),
    "encoding": st.one_of(st.sampled_from(["latin-1", "utf-16", "hex"]), VALUES),
    "tokenizer": st.one_of(st.sampled_from(["bytes", "bpe"]), VALUES),
    "vocab_size": st.one_of(st.just(260), VALUES),
    "seed": st.one_of(st.just(1), VALUES),
    "seq_len": st.one_of(st.just(4), VALUES),
    "name": VALUES,
    "config": VALUES,
    "hub_split": VALUES,
}
OPTIONS = st.lists(st.sampled_from(sorted(CHOICES)), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: CHOICES[name] for name in names})
)
DATA = st.text('"{}[],:;\n\r\t\\textab1é\ufeff\0', max_size=200)
BYTES = st.one_of(
    DATA.map(str.encode),
    DATA.map(lambda text: text.encode("utf-16")),
    DATA.map(lambda text: gzip.compress(text.encode())),
    st.binary(max_size=200),
    st.binary(max_size=60).map(lambda data: gzip.compress(data * 20)[:100]),
    st.binary(max_size=60).map(lambda data: b"\x28\xb5\x2f\xfd" + data),
)


def answered(data: Any, cache: Path, **options: Any) -> None:
    """`data` makes a corpus whose facts can be told, or is refused in one line."""
    refusal = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            corpus = load_corpus(data, cache_dir=cache, **{"seq_len": 4, **options})
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert len(refusal) < 600
        assert not list(cache.glob("building-*"))
        return
    assert corpus.describe()
    assert len(corpus.train.metadata) == len(corpus.train)
    assert len(corpus.train.batch([0]).texts()) == 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@SETTINGS
@given(data=st.one_of(VALUES, RECORDS, WHOLE), options=OPTIONS)
def test_any_object_is_answered(data: Any, options: dict[str, Any], cache: Path) -> None:
    answered(data, cache, **options)


@SETTINGS
@given(data=WHOLE, options=OPTIONS)
def test_any_option_is_answered(data: Any, options: dict[str, Any], cache: Path) -> None:
    answered(data, cache, **options)


@SETTINGS
@given(
    data=BYTES,
    suffix=st.sampled_from([s + packed for s in SUFFIXES for packed in ("", ".gz", ".zst")]),
    options=OPTIONS,
)
def test_any_file_is_answered(
    data: bytes, suffix: str, options: dict[str, Any], cache: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"train{suffix}")
        file.write_bytes(data)
        answered(file, cache, **options)
        answered(folder, cache, **options)
