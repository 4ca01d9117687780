"""A sweep: every point of a grid in a run of its own, whatever comes between."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from cli_helpers import environment, micro_fit, program, run_program, write_text

import ltm_pyro as ltm
from ltm_pyro.cli import main
from ltm_pyro.config import CorpusConfig, FitConfig
from ltm_pyro.errors import InputError
from ltm_pyro.run.sweeping import points

SWEEP = """\
corpus: {text}
steps: {steps}
guide: [mean_field, low_rank:rank=1]
seed: [0, 1, 2]
model: {{seq_len: 16, n_layers: 1, width: 16, n_heads: 2, mlp_hidden: 16, thought_dim: 4}}
fast.steps: 2
batch_size: 4
compile: false
eval_sequences: 30
eval_draws: 4
eval_fast_steps: 2
checkpoint_every: 2
corpus.options.fractions: [0.5, 0.4, 0.1]
"""
NAMES = [f"guide={g},seed={s}" for g in ("mean_field", "low_rank-rank=1") for s in range(3)]


def write_sweep(folder: Path, steps: int = 2) -> Path:
    text = write_text(folder / "text.txt", 40)
    file = folder / "sweep.yaml"
    file.write_text(SWEEP.format(text=text, steps=steps))
    return file


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltm_pyro.cli.artefacts._write_figures", lambda run, held_out: None)
    monkeypatch.setattr("ltm_pyro.cli.artefacts.write_posterior", lambda *arguments: None)


def config(text: Path, **changes) -> FitConfig:
    corpus = CorpusConfig(name=str(text), options={"fractions": [0.5, 0.4, 0.1]})
    few = {"steps": 2, "eval_fast_steps": 2, "control": False}
    return micro_fit(text, **{"corpus": corpus, **few, **changes})


@pytest.mark.usefixtures("no_figures")
def test_a_stopped_sweep_finishes_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--sweep", str(write_sweep(tmp_path)), "--out", str(tmp_path / "runs")]
    real, scored = ltm.run.scoring.score_run, []

    def interrupted(run, *arguments, **options):
        scored.append(run.folder.name)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return real(run, *arguments, **options)

    monkeypatch.setattr("ltm_pyro.run.scoring.score_run", interrupted)
    assert main(command) == 130
    assert "the same command" in capsys.readouterr().err
    assert main(command) == 0
    assert scored == [*NAMES[:3], *NAMES[2:]]  # none twice but the one that was stopped
    assert "compare" in capsys.readouterr().out
    assert main(command) == 0
    assert len(scored) == 7
    for name in NAMES:
        assert json.loads((tmp_path / "runs" / name / "scores.json").read_text())["step"] == 2
    table, figure = tmp_path / "table.csv", tmp_path / "table.png"
    folders = [str(tmp_path / "runs" / name) for name in NAMES]
    capsys.readouterr()
    assert main(["compare", *folders, "--csv", str(table), "--figure", str(figure)]) == 0
    told = capsys.readouterr().out
    assert "verdict" in told
    assert "guide: mean_field, low_rank" in told
    frame = pd.read_csv(table, index_col=0)
    assert list(frame.index) == ["guide=mean_field", "guide=low_rank, rank=1"]
    assert list(frame["fits"]) == [3, 3]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_sweep_finishes_by_the_same_command(tmp_path: Path) -> None:
    """SIGKILL at random moments; the weights are those of a sweep that nobody stopped."""
    file = write_sweep(tmp_path, steps=6)
    command = ["fit", "--sweep", str(file), "--out"]
    for _ in range(3):
        process = subprocess.Popen(
            program(*command, "killed"), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE
        )
        time.sleep(random.uniform(4, 14))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for out in ("killed", "whole"):
        done = run_program(*command, out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_sweep_in_python_skips_what_is_done_and_refuses_what_is_other(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", 40)
    grid = {"fast.steps": [1, 2], "seed": [0, 1]}
    folders = ltm.sweep(tmp_path / "runs", config(text), grid, progress=False)
    assert [f.name for f in folders][:2] == ["fast.steps=1,seed=0", "fast.steps=1,seed=1"]
    assert [ltm.load_run(f).svi.slow_step for f in folders] == [2] * 4
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*")}
    shutil.rmtree(folders[1])
    assert ltm.sweep(tmp_path / "runs", config(text), grid, progress=False) == folders
    after = {f: f.stat().st_mtime_ns for f in before}
    assert {f for f in before if folders[1] not in (f, *f.parents) and after[f] != before[f]} <= {
        tmp_path / "runs"
    }
    shutil.rmtree(folders[0])
    with pytest.raises(InputError, match=r"batch_size is 4 in run folder .* and 5 in this sweep"):
        ltm.sweep(tmp_path / "runs", config(text, batch_size=5), grid, progress=False)
    assert not folders[0].exists()  # nothing of a sweep that cannot be done


def test_a_sweep_in_python_fits_restarts_and_controls_as_the_command_does(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", 40)
    many = config(text, restarts=2, control=True)
    [folder] = ltm.sweep(tmp_path / "runs", many, {"seed": [3]}, progress=False)
    again = ltm.load_run(folder / "restarts" / "1")
    assert (again.config.seed, again.svi.slow_step) == (4, 2)
    assert [fit.control().slow_step for fit in (ltm.load_run(folder), again)] == [2, 2]


def test_the_corpus_of_a_sweep_may_be_in_memory(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", 40).read_text().split("\n\n")
    corpus = ltm.load_corpus(text, seq_len=16, fractions=[0.5, 0.4, 0.1])
    for _ in range(2):
        folders = ltm.sweep(
            tmp_path / "runs", config(tmp_path), {"seed": [0, 1]}, corpus=corpus, progress=False
        )
    found = ltm.compare_runs(folders, corpus=corpus, progress=False)
    assert list(found.frame()["fits"]) == [2]


def test_a_bad_point_is_found_before_the_first_fit(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(InputError, match="ful_rank"):
        ltm.sweep(tmp_path / "runs", config(text), {"guide": ["mean_field", "ful_rank"]})
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("lines", "arguments", "named"),
    [
        ("seed: 1", [], "no setting has a list"),
        ("seeds: [0, 1]", [], "'seed'"),
        ("seed: [0, zero]", [], "seed"),
        ("seed: []", [], "give a list"),
        ("seed: [0, 0]", [], "twice"),
        ("seed: [0, 1]", ["--seed", "2"], "leave --seed out"),
        ("seed: [0, 1]", ["--overwrite"], "--overwrite"),
        ("fast.steps: [0, -1]", [], "fast.steps"),
        ("- 1", [], "no settings"),
        (f"seed: {list(range(40))}\nsteps: {list(range(1, 40))}", [], "1560 points"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, arguments: list[str], named: str
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(lines)
    out = tmp_path / "runs"
    assert main(["fit", "--sweep", str(file), "--out", str(out), *arguments]) == 2
    told = capsys.readouterr().err
    assert named in told
    assert told.count("\n") == 1
    assert not out.exists()


def test_names_of_points_tell_their_settings_and_differ() -> None:
    grid = {"corpus.name": ["/a/b c.txt", "/d/b-c.txt"], "persistent": [True, False]}
    names = [name for name, _ in points(grid)]
    assert names[:2] == [
        "corpus.name=b-c.txt,persistent=true",
        "corpus.name=b-c.txt,persistent=false",
    ]
    assert len(set(names)) == 4
    assert points({"slow.lr": [0.1]}) == [("slow.lr=0.1", {"slow": {"lr": 0.1}})]
    assert len(points({"guide": ["x" * 400]})[0][0]) < 200
