"""Every slip ends in one line on stderr, status 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_helpers import MICRO, environment, program, write_text

from ltm_pyro.cli import main
from ltm_pyro.data.corpus import load_corpus
from ltm_pyro.run import load_run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with `text.txt` and `good`, a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("fitted")
    text = write_text(folder / "text.txt")
    arguments = ["--corpus", str(text), "--steps", "2", "--no-control", *MICRO]
    with pytest.MonkeyPatch.context() as patch:  # pictures take longer than a small fit
        patch.setattr("ltm_pyro.cli.artefacts._write_figures", lambda run, held_out: None)
        patch.setattr("ltm_pyro.cli.artefacts.write_page", lambda *arguments: "")
        assert main(["fit", "--out", str(folder / "good"), *arguments]) == 0
    return folder


@pytest.fixture
def here(fitted, tmp_path, monkeypatch):
    """A working folder with copies of both."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(fitted / "text.txt", tmp_path)
    shutil.copytree(fitted / "good", tmp_path / "good")
    return tmp_path


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail with status 2; returns its one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    streams = capsys.readouterr()
    lines = streams.err.splitlines()
    assert len(lines) == 1, streams.err
    assert lines[0].startswith("ltm-pyro: error: ")
    assert "Traceback" not in streams.err
    return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# (arguments after `fit --out new`, what the line must say)
WRONG_FITS = {
    "missing file": (["--corpus", "none.txt"], ["'none.txt'", "check the path"]),
    "empty file": (["--corpus", "empty.txt"], ["'empty.txt' is empty"]),
    "too short": (["--corpus", "short.txt"], ["'short.txt'", "fewer than one sequence of 16"]),
    "not utf-8": (["--corpus", "latin.txt"], ["'latin.txt' is not utf-8", "--encoding latin-1"]),
    "not json": (["--corpus", "bad.jsonl"], ["line 2 of 'bad.jsonl' is not JSON"]),
    "no text field": (["--corpus", "field.jsonl"], ["line 1 of", 'no string "text"']),
    "unknown corpus": (["--corpus", "pydocs"], ["'pydocs'", "did you mean 'pydoc'"]),
    "unknown tokenizer": (["--tokenizer", "byte"], ["did you mean 'bytes'"]),
    "unknown encoding": (["--encoding", "utf-9"], ["unknown encoding 'utf-9'"]),
    "unknown corpus option": (
        ["--corpus", "mixture", "--corpus.options.clases", "4"],
        ["'clases'", "did you mean 'classes'"],
    ),
    "an argument as corpus option": (
        ["--corpus.options", '{"seq_len": 3}'],
        ["seq_len", "model.seq_len"],
    ),
    "a cache chosen by a run": (["--corpus.options.cache_dir", "x"], ["cache_dir"]),
    "unknown preset": (["--preset", "nanno"], ["'nanno'", "did you mean 'nano'"]),
    "unknown guide": (["--guide", "meanfield"], ["'meanfield'", "did you mean 'mean_field'"]),
    "unknown guide option": (
        ["--guide_options.init_log_var", "1"],
        ["'init_log_var'", "did you mean 'init_log_variance'"],
    ),
    "unknown option": (["--stepz", "3"], ["'--stepz'", "did you mean '--steps'"]),
    "unknown dotted option": (["--fast.step=3"], ["'--fast.step'", "did you mean '--fast.steps'"]),
    "stray argument": (["thing"], ["unexpected argument 'thing'"]),
    "expanded pattern": (["--corpus", "a.txt", "text.txt"], ["'text.txt'", "in quotes"]),
    "no value": (["--steps"], ["--steps: expected one argument"]),
    "zero steps": (["--steps", "0"], ["steps is 0", "above 0"]),
    "negative steps": (["--steps", "-5"], ["steps is -5", "above 0"]),
    "steps no number": (["--steps", "many"], ["steps is 'many'", "a whole number"]),
    "negative fast steps": (["--fast.steps", "-1"], ["fast.steps is -1"]),
    "negative seed": (["--seed", "-1"], ["seed is -1"]),
    "rate no number": (["--slow.lr", "quick"], ["slow.lr is 'quick'", "a number"]),
    "unknown schedule": (["--fast.schedule", "cos"], ["fast.schedule is 'cos'", "cosine"]),
    "betas": (["--slow.betas", "0.9"], ["slow.betas", "two numbers"]),
    "no cuda": (["--device", "cuda:9"], ["'cuda:9' is absent", "cpu"]),
    "a second cpu": (["--device", "cpu:9"], ["'cpu:9' is absent", "cpu"]),
    "no such device": (["--device", "gpu"], ["'gpu' is absent", "cpu"]),
    "width": (["--model.width", "15"], ["model.width 15"]),
    "missing yaml": (["--config", "none.yaml"], ["'none.yaml'", "--config"]),
    "yaml key": (["--config", "key.yaml"], ["'key.yaml'", "'fast.stepz'", "'fast.steps'"]),
    "yaml value": (["--config", "value.yaml"], ["slow.lr is 'quick'", "a number"]),
    "yaml empty value": (["--config", "none-value.yaml"], ["steps has no value"]),
    "yaml group": (["--config", "group.yaml"], ["fast is 3", "group of settings"]),
    "yaml syntax": (["--config", "syntax.yaml"], ["'syntax.yaml' is not YAML at line"]),
    "yaml nothing": (["--config", "nothing.yaml"], ["holds no settings"]),
    "yaml not utf-8": (["--config", "latin.txt"], ["'latin.txt' is not UTF-8"]),
    "yaml folder": (["--config", "good"], ["cannot read 'good'"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["choose one"]),
    "resume what is not there": (["--resume"], ["there is no run folder 'new'"]),
}


def write_inputs(folder: Path) -> None:
    """The files that `WRONG_FITS` names."""
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    (folder / "latin.txt").write_bytes("voilà, du texte\n".encode("latin-1") * 99)
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "field.jsonl").write_text('{"txt": "fine"}\n')
    (folder / "key.yaml").write_text("fast:\n  stepz: 3\n")
    (folder / "value.yaml").write_text("slow: {lr: quick}\n")
    (folder / "none-value.yaml").write_text("steps:\n")
    (folder / "group.yaml").write_text("fast: 3\n")
    (folder / "syntax.yaml").write_text("steps: 3\nfast: [1\n")
    (folder / "nothing.yaml").write_text("# nothing\n")


@pytest.mark.parametrize("slip", WRONG_FITS)
def test_a_fit_that_cannot_start_leaves_nothing(here, capsys, slip):
    write_inputs(here)
    arguments, wanted = WRONG_FITS[slip]
    small = [] if slip == "resume what is not there" else [*MICRO, "--corpus", "text.txt"]
    before = files(here)
    line = fails(["fit", "--out", "new", *small, *arguments], capsys)
    for part in wanted:
        assert part in line
    assert files(here) == before
    assert not list(here.glob("*new*"))
    assert not list(here.glob(".*"))


WRONG_COMMANDS = {
    "unknown command": (["fitt"], ["unknown command 'fitt'", "did you mean 'fit'"]),
    "no run": (["evaluate"], ["required: run"]),
    "run missing": (["evaluate", "goood"], ["no run folder 'goood'", "did you mean 'good'"]),
    "run a file": (["generate", "text.txt"], ["no run folder 'text.txt'"]),
    "long prompt": (["generate", "good", "--prompt", "x" * 17], ["17 tokens", "at most 15"]),
    "no texts": (["generate", "good", "--n", "0"], ["n is 0"]),
    "temperature": (["generate", "good", "--temperature", "0"], ["temperature is 0"]),
    "top-p": (["generate", "good", "--top-p", "2"], ["top_p is 2"]),
    "length": (["generate", "good", "--length", "99"], ["length is 99"]),
    "seed": (["generate", "good", "--seed", "-1"], ["seed is -1"]),
    "mode": (["evaluate", "good", "--mode", "orakle"], ["did you mean 'oracle'"]),
    "split": (["evaluate", "good", "--split", "tset"], ["did you mean 'test'"]),
    "prefix": (["evaluate", "good", "--mode", "prefix", "--prefix", "16"], ["prefix is 16"]),
    "draws": (["evaluate", "good", "--draws", "1"], ["draws is 1"]),
    "score seed": (["evaluate", "good", "--seed", "-1"], ["seed is -1"]),
    "export seed": (["export", "good", "--seed", "-1"], ["seed is -1"]),
    "export nowhere": (["export", "good", "--out", "text.txt/p.nc"], ["is not a folder"]),
    "device": (["evaluate", "good", "--device", "gpu"], ["'gpu' is absent"]),
    "cost": (["cost", "nanno"], ["did you mean 'nano'"]),
    "cost of an argument": (
        ["cost", "nano", "--corpus.options", '{"seq_len": 3}'],
        ["seq_len", "model.seq_len"],
    ),
    "cost of no option": (["cost", "nano", "--corpus.options.vocab", "9"], ["'vocab_size'"]),
    "run exists": (["fit", "--out", "good"], ["'good' exists", "--resume", "--overwrite"]),
    "not a run": (["fit", "--out", "text.txt", "--overwrite"], ["'text.txt' exists"]),
    "under a file": (["fit", "--out", "text.txt/new"], ["is not a folder"]),
    "other model": (
        ["fit", "--resume", "--out", "good", "--model.width", "32"],
        ["model.width is 16 in", "and 32"],
    ),
    "other guide": (
        ["fit", "--resume", "--out", "good", "--guide", "delta"],
        ["guide is 'mean_field'"],
    ),
    "other text": (["fit", "--resume", "--out", "good", "--corpus", "x.txt"], ["corpus.name is"]),
    "fewer steps": (
        ["fit", "--resume", "--out", "good", "--steps", "1"],
        ["steps is 1", "extended"],
    ),
}


@pytest.mark.parametrize("slip", WRONG_COMMANDS)
def test_a_command_that_cannot_run_changes_nothing(here, capsys, slip):
    arguments, wanted = WRONG_COMMANDS[slip]
    before = files(here)
    line = fails(arguments, capsys)
    for part in wanted:
        assert part in line
    assert files(here) == before


def _truncate(run: Path) -> None:
    tensors = next((run / "checkpoint").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:100])


def _corrupt(run: Path) -> None:
    (run / "config.json").write_text("{")


def _other_version(run: Path) -> None:
    facts = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**facts, "format": 0, "version": "0.0.1"}))


BAD_RUNS = {
    "truncated": (_truncate, "does not match its checksum"),
    "corrupt": (_corrupt, "config.json is not JSON"),
    "other version": (_other_version, "written by ltm-pyro 0.0.1 (format 0)"),
}
COMMANDS = {
    "evaluate": ["evaluate", "good"],
    "generate": ["generate", "good"],
    "export": ["export", "good"],
    "resume": ["fit", "--resume", "--out", "good"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", BAD_RUNS)
def test_a_bad_run_folder_is_refused(here, capsys, damage, command):
    act, message = BAD_RUNS[damage]
    act(here / "good")
    before = files(here)
    line = fails(COMMANDS[command], capsys)
    assert "run folder 'good'" in line
    assert message in line
    assert files(here) == before


@pytest.mark.parametrize("command", [COMMANDS["export"], COMMANDS["resume"]])
def test_a_read_only_run_is_refused(here, capsys, command):
    before = files(here)
    (here / "good").chmod(0o555)
    try:
        line = fails(command, capsys)
    finally:
        (here / "good").chmod(0o755)
    assert "cannot write 'good'" in line
    assert "is read-only" in line
    assert files(here) == before


@pytest.mark.parametrize("limit", [1, 12])
def test_no_disk_space(here, limit):
    """A limit on file sizes stands for a full disk: at its start, and at a later write."""
    fit = program("fit", "--corpus", "text.txt", *MICRO, "--steps", "40", "--out", "new")
    # Coverage's own data file would hit the limit too.
    unmeasured = {k: v for k, v in environment().items() if not k.startswith("COVERAGE")}
    limited = ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash", *fit]
    load_corpus("text.txt", seq_len=16)  # into the cache, so that the fit writes its run alone
    done = subprocess.run(
        limited, cwd=here, env=unmeasured, text=True, capture_output=True, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith("ltm-pyro: error: cannot write")
    assert "free some space" in lines[0]
    assert not list(here.glob(".*new*"))
    if (here / "new").exists():
        assert "the last checkpoint is whole: go on with" in lines[0]
        load_run("new")


def test_a_full_device_for_the_output(here):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            program("cost", "nano"), cwd=here, env=environment(), stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("ltm-pyro: error: cannot write")
    assert "Traceback" not in done.stderr
