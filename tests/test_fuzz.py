"""Whatever a folder holds and whatever is asked for: a result, or one line; and never a long wait.

Hypothesis makes the cases. In `make test` they are the same few hundred at every run; with
`make test-slow` there are thousands.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MICRO, micro_fit, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltm_pyro.cli import main
from ltm_pyro.config import CorpusConfig, Fast, FitConfig, ModelConfig, Slow
from ltm_pyro.run import create_run, train
from ltm_pyro.run.checkpoint import _checksum

LONGEST = 20  # seconds; most cases take a hundredth

FEW = settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FEW, max_examples=1500, derandomize=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run of two steps, `good`; not to be changed."""
    folder = tmp_path_factory.mktemp("fuzz")
    text = write_text(folder / "text.txt")
    config = micro_fit(text, steps=2, control=False, eval_fast_steps=2)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    os.mkfifo(folder / "pipe")
    run = create_run(folder / "good", config)
    train(run, run.corpus(), progress=False)
    return folder


@pytest.fixture(autouse=True)
def _in_the_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@contextmanager
def in_time() -> Iterator[None]:
    """Fails a case that takes longer than anyone waits."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and error line of a command, which must do its work or refuse in one line."""
    capsys.readouterr()
    with in_time(), warnings.catch_warnings():
        warnings.simplefilter("default")  # printed as one line each, as they are to a person
        status = main(arguments)
    errors = [x for x in capsys.readouterr().err.splitlines() if "warning: " not in x]
    assert status in (0, 2), (arguments, errors)
    if status == 2:
        assert len(errors) == 1, errors
        assert errors[0].startswith("ltm-pyro: error: ")
        assert len(errors[0]) < 2000
        assert errors[0].isprintable()
    return status, " ".join(errors)


def listed(folder: Path) -> dict[str, int]:
    """All files with their times of change, the run under test aside."""
    return {
        str(p): p.lstat().st_mtime_ns
        for p in folder.rglob("*")
        if "case" not in p.relative_to(folder).parts and not p.is_dir()
    }


@contextmanager
def damaged(place: Path, damage: Callable[[Path], object]) -> Iterator[None]:
    """A copy of the run as `case`, damaged; nothing outside it may change."""
    shutil.copytree(place / "good", place / "case")
    try:
        damage(place / "case")
        before = listed(place)
        yield
        assert listed(place) == before
    finally:
        shutil.rmtree(place / "case")


GENERATE = ["generate", "case", "--n", "1", "--length", "3"]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes a JSON file of the run; the checkpoint's checksum is made to fit."""

    def act(run: Path) -> None:
        values = json.loads((run / name).read_text())
        change(values)
        if "checksum" in values:
            values.pop("checksum")
            values = {"checksum": _checksum(values), **values}
        (run / name).write_text(json.dumps(values))

    return act


def put(name: str, data: str | bytes) -> Callable[[Path], object]:
    data = data.encode() if isinstance(data, str) else data
    return lambda run: (run / name).write_bytes(data)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def act(run: Path) -> None:
        (run / name).unlink()
        make(run / name)

    return act


STATE, CONFIG = "checkpoint/state.json", "config.json"


def settings_edit(**values: object) -> Callable[[Path], object]:
    return edit(CONFIG, lambda c: c["config"].update(values))


DAMAGES = {
    "empty state": put(STATE, ""),
    "state {}": put(STATE, "{}"),
    "state null": put(STATE, "null"),
    "state without tensors": edit(STATE, lambda s: s.pop("tensors")),
    "state without sha256": edit(STATE, lambda s: s.pop("sha256")),
    "state without state": edit(STATE, lambda s: s.pop("state")),
    "state a list": edit(STATE, lambda s: s.update(state=[1])),
    "step a text": edit(STATE, lambda s: s["state"].update(slow_step="2")),
    "step inf": edit(STATE, lambda s: s["state"].update(slow_step=float("inf"))),
    "step negative": edit(STATE, lambda s: s["state"].update(slow_step=-1)),
    "other settings": edit(STATE, lambda s: s["state"]["config"].update(batch_size=3)),
    "fast a number": settings_edit(fast=3),
    "model null": settings_edit(model=None),
    "corpus a text": settings_edit(corpus="x"),
    "options a list": settings_edit(guide_options=[1]),
    "config a text": edit(CONFIG, lambda c: c.update(config="x")),
    "no checksum of the tokenizer": edit(CONFIG, lambda c: c.pop("tokenizer_sha256")),
    "corpus facts a list": edit(CONFIG, lambda c: c.update(corpus=[])),
    "version of a superscript": edit(CONFIG, lambda c: c.update(version="\N{SUPERSCRIPT TWO}")),
    "version of 5,000 digits": edit(CONFIG, lambda c: c.update(version="9" * 5000)),
    "format true": edit(CONFIG, lambda c: c.update(format=True)),
    "a number of 5,000 digits": put(CONFIG, '{"format": ' + "1" * 5000 + "}"),
    "10,000 lists": put(CONFIG, "[" * 10_000),
    "10,000 groups": put(STATE, '{"a":' * 10_000 + "1" + "}" * 10_000),
    "400 groups": put(STATE, '{"a":' * 400 + "1" + "}" * 400),
    "not UTF-8": put(CONFIG, b"\xff\xfe{}"),
    "tokenizer a list": put("tokenizer.json", "[]"),
    "a device for tensors": edit(STATE, lambda s: s.update(tensors="/dev/zero")),
    "a folder above": edit(STATE, lambda s: s.update(tensors="../config.json")),
    "a name with NUL": edit(STATE, lambda s: s.update(tensors="a\0b")),
    "a name of 5,000 characters": edit(STATE, lambda s: s.update(tensors="a" * 5000)),
    "tensors a folder": edit(STATE, lambda s: s.update(tensors=".")),
    **{
        f"{name} {kind}": instead(name, make)
        for name in (STATE, CONFIG, "tokenizer.json", "metrics.csv")
        for kind, make in {
            "a pipe": os.mkfifo,
            "a link to a device": lambda path: path.symlink_to("/dev/zero"),
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link": lambda path: path.symlink_to("../good/config.json"),
            "a folder": lambda path: path.mkdir(),
        }.items()
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(place, capsys, damage):
    with damaged(place, DAMAGES[damage]):
        status, line = told(GENERATE, capsys)
    assert status == 2
    assert "run folder 'case' is damaged: " in line


def test_a_checkpoint_elsewhere_is_refused(place, capsys):
    def link(run: Path) -> None:
        shutil.rmtree(run / "checkpoint")
        (run / "checkpoint").symlink_to("../good/checkpoint")

    with damaged(place, link):
        status, line = told(GENERATE, capsys)
    assert status == 2
    assert "checkpoint is a link" in line


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=8),
    st.sampled_from(["/dev/zero", "..", "\0", "\ud800", "9" * 5000, "\N{SUPERSCRIPT TWO}", "inf"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def json_damages(draw) -> Callable[[Path], object]:
    """One to three values of a JSON file replaced, removed or added."""
    name = draw(st.sampled_from([STATE, CONFIG, "tokenizer.json"]))
    picks = draw(
        st.lists(st.tuples(st.floats(0, 0.999), VALUES, st.integers(0, 3)), min_size=1, max_size=3)
    )

    def change(values: dict[str, Any]) -> None:
        for share, value, what in picks:
            groups = [values]
            for group in groups:
                groups += [v for v in group.values() if isinstance(v, dict) and v]
            group = groups[int(share * len(groups))]
            key = sorted(group)[int(share * 7919 % 1 * len(group))]
            if what == 0 and len(group) > 1:
                del group[key]
            else:
                group["extra" if what == 1 else key] = value

    return edit(name, change)


@st.composite
def byte_damages(draw) -> Callable[[Path], object]:
    """A file cut, emptied, doubled, or with bytes changed in it."""
    share, act = draw(st.floats(0, 1)), draw(st.sampled_from(["cut", "double", "flip", "insert"]))
    junk = draw(st.binary(min_size=1, max_size=8))
    which = draw(st.integers(0, 10**6))

    def damage(run: Path) -> None:
        files = sorted(p for p in run.rglob("*") if p.is_file())
        path = files[which % len(files)]
        data = path.read_bytes()
        at = int(share * len(data))
        path.write_bytes(
            {
                "cut": data[:at],
                "double": data + data,
                "flip": data[:at] + junk + data[at + len(junk) :],
                "insert": data[:at] + junk + data[at:],
            }[act]
        )

    return damage


def _damages(place: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    with damaged(place, damage):
        told(GENERATE, capsys)


@FEW
@given(damage=json_damages())
def test_any_change_of_a_json_file(place, capsys, damage):
    _damages(place, capsys, damage)


@pytest.mark.slow
@MANY
@given(damage=json_damages())
def test_any_change_of_a_json_file_often(place, capsys, damage):
    _damages(place, capsys, damage)


@FEW
@given(damage=byte_damages())
def test_any_change_of_bytes(place, capsys, damage):
    _damages(place, capsys, damage)


@pytest.mark.slow
@MANY
@given(damage=byte_damages())
def test_any_change_of_bytes_often(place, capsys, damage):
    _damages(place, capsys, damage)


NEW = ["fit", "--out", "case", "--corpus", "text.txt", *MICRO, "--steps", "1", "--no-control"]
COST = ["cost", "nano", "--model.seq_len", "16", "--batch_size", "2", "--no-compile"]
HUGE = "10000000000"
FLOW = ["--guide", "flow", "--guide_options.transforms"]
ENCODER = ["--guide", "amortized", "--guide_options.width"]
PARTICLES = ["--objective", "iwae", "--objective_options.particles"]
COMPONENTS = ["--guide_options.components"]
BOMB = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
BOMB = f"a: &a [1, 2]\n{BOMB}"

# (arguments, what the line must say)
REFUSED = {
    "layers": ([*NEW, "--model.n_layers", "9e18"], ["model.n_layers", "whole number"]),
    "more layers": ([*NEW, "--model.n_layers", str(9 * 10**18)], ["model.n_layers", "at most"]),
    "draws": ([*NEW, "--eval_draws", "1e30"], ["eval_draws"]),
    "more draws": ([*NEW, "--eval_draws", str(10**9)], ["eval_draws", "GB", "at most"]),
    "one draw": ([*NEW, "--eval_draws", "1"], ["eval_draws is 1", "2 or more"]),
    "width": ([*NEW, "--model.width", "1000000"], ["model.width 1000000", "GB"]),
    "transforms": ([*NEW, *FLOW, HUGE], ["transforms", "at most"]),
    "hidden": ([*NEW, *FLOW[:2], "--guide_options.hidden", HUGE], ["hidden", "at most"]),
    "particles": ([*NEW, *PARTICLES, HUGE], ["particles", "at most"]),
    "many particles": ([*NEW, *PARTICLES, str(10**6), "--batch_size", str(10**5)], ["GB"]),
    "components": ([*NEW, "--guide", "mixture", *COMPONENTS, HUGE], ["components", "at most"]),
    "prior": (
        [*NEW, "--model.prior", "mixture", "--model.prior_options.components", HUGE],
        ["components", "at most"],
    ),
    "encoder": ([*NEW, *ENCODER, HUGE], ["width", "at most"]),
    "batch": ([*NEW, "--batch_size", str(10**9)], ["batch_size is 1000000000", "at most"]),
    "sequence": ([*NEW, "--model.seq_len", str(10**9)], ["model.seq_len"]),
    "cost": (["cost", "nano", "--batch_size", str(10**9)], ["batch_size"]),
    "prefix": (["evaluate", "good", "--mode", "prefix", "--prefix", "1e20"], ["prefix"]),
    "long prefix": (
        ["evaluate", "good", "--mode", "prefix", "--prefix", str(10**20)],
        ["prefix", "whole number"],
    ),
    "scored draws": (["evaluate", "good", "--draws", str(10**30)], ["draws", "whole number"]),
    "texts": (["generate", "good", "--n", "1000000"], ["n is 1000000", "at most"]),
    "length": (["generate", "good", "--length", str(10**20)], ["length"]),
    "name": ([*NEW, "--guide_options.name", "x"], ["'name'", "init_log_variance"]),
    "thoughts": ([*NEW, "--model.prior_options.n_thoughts", "2"], ["n_thoughts"]),
    "a number as a name": ([*NEW, "--model.prior_options", "{1: 2}"], ["model.prior_options"]),
    "an argument of the corpus": ([*NEW, "--corpus.options", '{"seq_len": 3}'], ["seq_len"]),
    "the cache": ([*NEW, "--corpus.options.cache_dir", "x"], ["cache_dir"]),
    **{
        f"{guide} from {start}": (
            [*NEW, "--guide", guide, "--guide_options.init_log_variance", start],
            ["init_log_variance", "from -30 to 30"],
        )
        for guide in ("mean_field", "full_rank", "flow")
        for start in ("nan", "abc", "null", "[1]", "1e30")
    },
    "yaml of compare": (["compare", "good", "--guides", "low_rank:rank=["], ["rank"]),
    "a bomb": ([*NEW, "--config", "bomb.yaml"], ["bomb.yaml", "aliases"]),
    "a bomb as option": ([*NEW, "--guide_options", f"{{{BOMB}}}"], ["guide_options"]),
    "depth": ([*NEW, "--config", "deep.yaml"], ["deep.yaml", "deeply"]),
    "recursion": ([*NEW, "--config", "self.yaml"], ["self.yaml", "itself"]),
    "digits": ([*NEW, "--config", "digits.yaml"], ["digits.yaml"]),
    "a long file": ([*NEW, "--config", "long.yaml"], ["long.yaml", "longer"]),
    "a date": ([*NEW, "--config", "date.yaml"], ["date.yaml", "quote it"]),
    "a pipe as settings": ([*NEW, "--config", "pipe"], ["'pipe'", "no regular file"]),
    "a device as settings": ([*NEW, "--config", "/dev/zero"], ["no regular file"]),
    "a device of its own": ([*NEW, "--device", "hpu"], ["'hpu'", "cpu"]),
    "privateuseone": ([*NEW, "--device", "privateuseone"], ["'privateuseone'", "cpu"]),
    "NUL": (["fit", "--out", "a\0b"], ["NUL"]),
    "a long name": (["generate", "a" * 5000], ["too long"]),
}
FILES = {
    "bomb.yaml": f"guide_options:\n{textwrap.indent(BOMB, '  ')}",
    "deep.yaml": "[" * 100 + "]" * 100,
    "self.yaml": "guide_options: &a\n  x: *a\n",
    "digits.yaml": "seed: " + "9" * 5000,
    "long.yaml": "#" * 2_000_000,
    "date.yaml": "guide_options:\n  a: 2020-01-01\n",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_it_is_tried(place, capsys, case):
    arguments, words = REFUSED[case]
    before = listed(place)
    status, line = told(arguments, capsys)
    assert status == 2
    for word in words:
        assert word in line
    assert listed(place) == before
    assert not (place / "case").exists()


OPTIONS = [f"--{f.name}" for f in dataclasses.fields(FitConfig)] + [
    f"--{group}.{f.name}"
    for group, cls in {
        "corpus": CorpusConfig,
        "model": ModelConfig,
        "fast": Fast,
        "slow": Slow,
    }.items()
    for f in dataclasses.fields(cls)
]
WORDS = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=6),
    st.sampled_from(["1e30", str(10**18), "-1", "0", "nan", "null", "[1]", "{a: 1}", "true", "["]),
).filter(lambda word: not word.startswith("-") or word[1:2].isdigit())  # fmt: skip


@settings(FEW, max_examples=15)
@given(options=st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), min_size=1, max_size=3))
def test_any_options_of_cost(place, capsys, options):
    told([*COST, *(f"{name}={word}" for name, word in options)], capsys)


@FEW
@given(text=st.text(alphabet="abc:{}[]&*-!|>?#'\"\n\t 123.~%@", max_size=40))
def test_any_text_as_settings(place, capsys, text):
    (place / "any.yaml").write_text(text)
    told([*NEW, "--out", "good", "--config", "any.yaml"], capsys)
