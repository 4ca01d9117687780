"""A fit that keeps its local parameters on disk: killed anywhere, it ends with the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cli_helpers import environment, micro_fit, write_text

from ltm_pyro.config import FitConfig
from ltm_pyro.engine.rows.database import RowDatabase
from ltm_pyro.engine.rows.file import RowFile
from ltm_pyro.errors import InputError
from ltm_pyro.run import Interrupted, create_run, load_run, train
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.checkpoint import Checkpoint

STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> FitConfig:
    """A fit of a second, that sees every sequence more than once."""
    text = write_text(tmp_path / "text.txt", blocks=14)
    return micro_fit(text, 64, steps=STEPS, batch_size=8, persistent=True)


def result(folder: Path) -> dict[str, object]:
    """All that a fit leaves for good, but for the figures that tell time.

    Of the rows, what is in them: SQLite lays them out as it likes.
    """
    files: dict[str, object] = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
        and p.name != "metrics.csv"
        and not p.name.startswith(".")
        and p.parent.name != "store"
    }
    rows = RowDatabase(folder / "store", _slow_step(folder))._files[0]
    newest = rows.newest(sorted(rows.ids(None)), None)
    return {**files, "rows": {i: data for i, (_, data) in newest.items()}}


def stop_at(step: int):
    return lambda row: row["step"] == step


def finish(folder: Path) -> None:
    run = load_run(folder)
    train(run, run.corpus(), progress=False)


def test_rows_are_kept_beside_the_checkpoint(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    assert isinstance(run.svi.store, RowDatabase)
    train(run, run.corpus(), progress=False)
    assert not [name for name in run.checkpoint().tensors if name.startswith("store.")]
    again = load_run(tmp_path / "run")
    seen = {
        i
        for step in range(STEPS)
        for i in run.corpus().train.training_batch(step, 8, lanes=True).ids.tolist()
    }
    assert len(again.svi.store) == len(seen) == len(run.svi.store)
    ids = torch.tensor(sorted(seen))
    batch = run.corpus().train.batch(ids=ids)
    warm = again.svi.infer(batch, steps=0, warm_start=True)
    assert torch.equal(warm.mean, run.svi.infer(batch, steps=0, warm_start=True).mean)
    assert int(warm.mean.flatten(1).any(1).sum()) > len(seen) // 2  # not of those with one token


def test_a_warm_start_changes_the_fit(tmp_path, config):
    weights = []
    for persistent in (False, True):
        chosen = dataclasses.replace(config, persistent=persistent)
        run = create_run(tmp_path / f"run-{persistent}", chosen)
        assert (tmp_path / f"run-{persistent}" / "store").exists() == persistent
        train(run, run.corpus(), progress=False)
        weights.append(run.model.state_dict()["decoder.norm.weight"])
    assert not torch.equal(*weights)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fit_killed_in_any_act_of_a_checkpoint_ends_with_the_same_bits(tmp_path, config, stride):
    """Writes, renames, syncs and removals of a save in turn are the last thing that happens."""
    run = create_run(tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, after_step=stop_at(3))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    finish(tmp_path / "whole")
    expected = result(tmp_path / "whole")
    for when in range(stride // 2, 10_000, stride):
        folder = tmp_path / "broken"
        shutil.copytree(tmp_path / "half", folder)
        broken = load_run(folder)
        with pytest.MonkeyPatch.context() as patch:
            killed = die_at(patch, when)
            with suppress(Killed, Interrupted):
                train(broken, broken.corpus(), progress=False, after_step=stop_at(5))
        broken.svi.store.close()  # as the system does when a process ends
        if not killed:
            break
        finish(folder)
        assert result(folder) == expected, f"killed at act {when}"
        shutil.rmtree(folder)
    assert when > 20


class Killed(BaseException):
    """The process ends here."""


def die_at(patch: pytest.MonkeyPatch, when: int) -> list[int]:
    """Raises `Killed` at the `when`-th thing done to the disk; says so in the list returned."""
    killed: list[int] = []
    left = [when]

    def counted(act):
        def call(*args, **kwargs):
            if left[0] == 0:
                killed.append(when)
                raise Killed
            left[0] -= 1
            return act(*args, **kwargs)

        return call

    acts = [(RowFile, "commit"), (RowFile, "write"), (RowFile, "remove_replaced")]
    for owner, name in [*acts, (Path, "replace"), (Path, "unlink"), (os, "fsync")]:
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return killed


FIT = """
import sys
from ltm_pyro.run import load_run, train

run = load_run(sys.argv[1])
train(run, run.corpus(), progress=False)
"""


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigkill_at_any_step_then_resume_gives_the_same_bits(tmp_path, config, compiled):
    config = dataclasses.replace(config, steps=60, checkpoint_every=2, compile=compiled)
    create_run(tmp_path / "whole", config)
    create_run(tmp_path / "killed", config)
    # torch's tracer warns of itself.
    command = [sys.executable, *([] if compiled else ["-W", "error"]), "-c", FIT]
    for after in (6, 30):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + (300 if compiled else 120)
        while _slow_step(tmp_path / "killed") < after:
            assert process.poll() is None, "the fit ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert "uncompiled" not in process.communicate()[1]
        assert process.returncode == -signal.SIGKILL
        assert after <= _slow_step(tmp_path / "killed") < 60
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=environment(), check=True)
    assert _slow_step(tmp_path / "whole") == 60
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def _slow_step(folder: Path) -> int:
    return json.loads((folder / "checkpoint" / "state.json").read_text())["state"]["slow_step"]


def test_a_run_can_be_read_while_its_fit_goes_on(tmp_path, config, monkeypatch):
    run = create_run(tmp_path / "run", config)
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, after_step=stop_at(1))
    real, reads = checkpoints.load, []

    def overtaken(folder, owner):
        found = real(folder, owner)
        if not reads:
            reads.append(folder)
            with pytest.raises(Interrupted):
                train(run, run.corpus(), progress=False, after_step=stop_at(3))
        return found

    monkeypatch.setattr(checkpoints, "load", overtaken)
    assert load_run(tmp_path / "run").svi.slow_step == 3


def test_a_store_that_does_not_belong_is_refused(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, after_step=stop_at(2))
    shutil.copytree(tmp_path / "run" / "store", tmp_path / "old")
    finish(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "store")
    with pytest.raises(InputError, match=r"store.rows-0\.db is missing"):
        load_run(tmp_path / "run")
    shutil.copytree(tmp_path / "old", tmp_path / "run" / "store")
    with pytest.raises(InputError, match="holds rows of slow step 2 and the checkpoint is of 6"):
        load_run(tmp_path / "run")


def test_rows_in_a_checkpoint_of_an_older_version_are_refused(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    whole = run.checkpoint()
    old = Checkpoint({**whole.tensors, "store.ids": torch.arange(3)}, whole.state)
    checkpoints.save(run.folder / "checkpoint", old)
    with pytest.raises(InputError, match="keeps its local parameters in the checkpoint"):
        load_run(run.folder)
