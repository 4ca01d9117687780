"""However a command ends, it says so in one line, and what it had done is on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import MICRO, environment, program, write_text

from ltm_pyro import cli
from ltm_pyro.cli import main
from ltm_pyro.cli.out_of_memory import explain, is_out_of_memory
from ltm_pyro.cli.printing import shell_quoted
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.run import load_run


def shell(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `ltm-pyro ARGUMENTS` where the script says `"$@"`."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *program(*arguments)],
        cwd=cwd, env=environment(), text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip


def test_a_reader_who_leaves_stops_a_fit_with_its_steps_saved(tmp_path):
    write_text(tmp_path / "text.txt")
    fit = ["fit", "--corpus", "text.txt", "--out", "my run", "--steps", "100000", *MICRO]
    done = shell('"$@" | head -4; exit "${PIPESTATUS[0]}"', *fit, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGPIPE
    run = load_run(tmp_path / "my run")
    # The rows that were watched and the checkpoint are of the same step.
    rows = (tmp_path / "my run" / "metrics.csv").read_text().splitlines()
    assert run.svi.slow_step == len(rows) - 1 >= 2
    [line] = done.stderr.splitlines()
    assert "nobody reads" in line
    assert line.endswith("go on with: ltm-pyro fit --resume --out 'my run'")


@pytest.mark.parametrize(
    ("script", "arguments", "status", "told"),
    [
        ('"$@" >&-', ["cost", "nano"], 2, "standard output is closed"),
        ('"$@" 2>&-', ["cost", "nanno"], 2, "did you mean 'nano'"),
        ('PYTHONIOENCODING=ascii "$@"', ["cost", "nänö"], 2, "n\\xe4n\\xf6"),
    ],
)
def test_closed_streams_and_small_alphabets(tmp_path, script, arguments, status, told):
    done = shell(script, *arguments, cwd=tmp_path)
    assert done.returncode == status
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith("ltm-pyro: error: ")
    assert told in line


def test_text_that_a_stream_cannot_hold_is_escaped(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w+", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(cli, "_dispatch", lambda arguments: print("žluť\udcff") or 0)
        assert main([]) == 0
        assert stream.errors == "strict"
    assert (tmp_path / "out").read_text() == "\\u017elu\\u0165\\udcff\n"


ENDS = [
    (MemoryError(), 2, "out of memory: more was asked for"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 "
                  "bytes. Error code 12"), 2, "out of memory: 3 GiB was asked for and "),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total "
                            "capacity of 79.11 GiB of which 10.50 GiB is free."), 2,
     "20 GiB was asked for and 10.5 GiB are free; choose fewer --sequences or --draws"),
    (PermissionError(13, "Permission denied", "a\x1bb"), 2, "cannot use 'a\\x1bb'"),
    (OSError(28, "No space left on device", "x"), 2, "free some space"),
    (KeyError("name"), 1, "unexpected KeyError: 'name'"),
    (RuntimeError("first\nsecond"), 1, "unexpected RuntimeError: first ("),
    (torch.linalg.LinAlgError("linalg.cholesky"), 1, "unexpected"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "status", "told"), ENDS, ids=lambda e: type(e).__name__)
def test_any_error_is_one_line(monkeypatch, capsys, error, status, told):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["evaluate"]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ltm-pyro: error: ")
    assert told in line
    assert line.isprintable()


def test_an_allocation_that_fails_is_taken_for_what_it_is():
    def told(act) -> str:
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            act()
        assert is_out_of_memory(caught.value)
        return explain(caught.value, "fit")

    assert "8 EiB" in told(lambda: torch.empty(2**60 - 1, dtype=torch.float64))
    assert "--batch_size" in told(lambda: bytearray(2**62))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_without_memory_a_command_says_so(tmp_path, monkeypatch, capsys):
    """A real allocation that no machine can serve, inside a fit that has done steps."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")

    def greedy(fitted, corpus):
        torch.empty(2**58)

    monkeypatch.setattr("ltm_pyro.cli.fit._report", greedy)
    fit = ["fit", "--corpus", "text.txt", "--out", "run", "--steps", "3", "--no-control", *MICRO]
    assert main(fit) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory: 1 EiB was asked for" in line
    assert line.endswith(
        "the last checkpoint is whole: go on with: ltm-pyro fit --resume --out run"
    )


def test_the_last_checkpoint_is_called_whole_only_when_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")

    def spoil(fitted, corpus):
        (fitted.folder / "checkpoint" / "state.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ltm_pyro.cli.fit._report", spoil)
    fit = ["fit", "--corpus", "text.txt", "--out", "run", "--steps", "3", "--no-control", *MICRO]
    assert main(fit) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in line
    assert "whole" not in line


NAMES = [
    "plain",
    "with space",
    "it's",
    'a"b$c`d',
    "\x1b[31mred",
    "new\nline",
    "\udcff",
    "-rf",
    "ä'\x07",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_shell_takes_a_printed_path_for_the_path(name):
    quoted = shell_quoted(Path(name))
    assert quoted.isprintable()
    said = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert said.stdout == os.fsencode(name)


def test_overwriting_gives_back_the_run_when_the_new_one_does_no_step(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    monkeypatch.setattr("ltm_pyro.cli.fit._report", lambda fitted, corpus: None)
    fit = ["fit", "--corpus", "text.txt", "--out", "run", "--no-control", *MICRO]
    assert main([*fit, "--steps", "3"]) == 0

    def diverge(run, corpus, **options):
        raise NonFiniteError([3], 0)

    with monkeypatch.context() as patch:
        patch.setattr("ltm_pyro.run.train", diverge)
        assert main([*fit, "--steps", "2", "--overwrite"]) == 1
    assert "the run that was in 'run' is kept" in capsys.readouterr().err
    assert load_run("run").svi.slow_step == 3
    assert main([*fit, "--steps", "2", "--overwrite"]) == 0
    assert load_run("run").svi.slow_step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text.txt"]


def test_an_empty_out_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out in ("", " ", "."):
        assert main(["fit", "--out", out]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "out is empty" in lines[0]
    assert "choose another --out" in lines[2]
    assert not list(tmp_path.iterdir())
