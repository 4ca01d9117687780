"""Nothing is lost when a step, a disk or another process fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import MICRO, environment, micro_fit, program, write_text

from ltm_pyro.cli import main
from ltm_pyro.config import Fast, FitConfig
from ltm_pyro.errors import InputError, NonFiniteError
from ltm_pyro.export import load_datatree
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import guide_families
from ltm_pyro.run import Run, create_run, load_run, train, train_control
from ltm_pyro.run.building import open_corpus
from ltm_pyro.run.files import write_atomic
from ltm_pyro.run.lock import sole_writer
from ltm_pyro.run.replacing import undo_new


def micro(text: Path) -> FitConfig:
    """A fit of a second, with one checkpoint at its end."""
    return micro_fit(text, checkpoint_every=100)


@pytest.fixture
def config(tmp_path: Path) -> FitConfig:
    return micro(write_text(tmp_path / "text.txt"))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def spoil_rows(run: Run, number: int) -> None:
    """From slow step `number` on, the rows of the third sequence start out of range."""
    reset = run.guide.reset

    def spoiled(batch):
        reset(batch)
        if run.svi.slow_step >= number:
            for p in dict(run.guide.local_parameters()).values():
                p.data[2] = torch.nan

    run.guide.reset = spoiled


@pytest.mark.parametrize("family", [f for f in guide_families() if f != "amortized"])
def test_every_family_that_leaves_the_numbers_keeps_its_last_step(tmp_path, config, family):
    config = dataclasses.replace(config, guide=family)
    run = create_run(tmp_path / "run", config)
    spoil_rows(run, 3)
    with pytest.raises(NonFiniteError) as caught:
        train(run, run.corpus(), progress=False)
    assert caught.value.step == 3
    assert len(caught.value.ids) == 1
    again = load_run(run.folder)
    assert again.svi.slow_step == 3
    assert again.svi.whole
    for name, value in weights(run).items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize("family", ["low_rank", "full_rank", "mixture"])
def test_a_rate_too_high_is_told_with_the_sequences(tmp_path, config, family):
    fast = Fast(steps=16, lr=1e4, schedule="constant", optimizer="adam")
    config = dataclasses.replace(config, guide=family, fast=fast, steps=60)
    run = create_run(tmp_path / "run", config)
    with pytest.raises(NonFiniteError, match="lower the learning rates") as caught:
        train(run, run.corpus(), progress=False)
    assert caught.value.ids
    assert load_run(run.folder).svi.slow_step == caught.value.step == run.svi.slow_step


def fail_at(step: int, of: DualRateSVI, error: Exception, target, name: str):
    """`target.name` raises `error` once, in the step after `step` slow steps."""
    real, done = getattr(target, name), []

    def failing(*args, **kwargs):
        if of.slow_step == step and not done:
            done.append(step)
            raise error
        return real(*args, **kwargs)

    setattr(target, name, failing)


ERRORS = [RuntimeError("a bug"), MemoryError(), KeyError("name"), BrokenPipeError()]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_ends_a_step_the_steps_before_are_kept(tmp_path, config, error, persistent):
    config = dataclasses.replace(config, persistent=persistent, steps=6)
    whole = create_run(tmp_path / "whole", config)
    train(whole, whole.corpus(), progress=False)
    run = create_run(tmp_path / "run", config)
    # After the first part of a batch has left its gradient.
    fail_at(3, run.svi, error, run.svi.clock, "exchange")
    with pytest.raises(type(error)):
        train(run, run.corpus(), progress=False)
    again = load_run(run.folder)
    assert again.svi.slow_step == 3
    train(again, again.corpus(), progress=False)
    train(load_run(run.folder), run.corpus(), progress=False)
    for name, value in weights(whole).items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_a_gradient_left_by_an_error_is_not_added_to(tmp_path, config):
    whole = create_run(tmp_path / "whole", config)
    train(whole, whole.corpus(), progress=False)
    run = create_run(tmp_path / "run", config)
    fail_at(2, run.svi, RuntimeError("a bug"), run.svi.clock, "exchange")
    with pytest.raises(RuntimeError, match="a bug"):
        train(run, run.corpus(), progress=False)
    train(run, run.corpus(), progress=False)
    for name, value in weights(whole).items():
        assert torch.equal(value, run.model.state_dict()[name])


def test_a_step_that_failed_half_way_is_not_saved(tmp_path, config):
    config = dataclasses.replace(config, persistent=True, checkpoint_every=2)
    run = create_run(tmp_path / "run", config)
    fail_at(3, run.svi, RuntimeError("a bug"), run.svi.store, "scatter")
    with pytest.raises(RuntimeError, match="a bug"):
        train(run, run.corpus(), progress=False)
    with pytest.raises(InputError, match="load the run again"):
        run.save()
    assert load_run(run.folder).svi.slow_step == 2


def test_the_control_keeps_its_steps_too(tmp_path, config, monkeypatch):
    run = create_run(tmp_path / "run", config)
    train(run, run.corpus(), progress=False)
    fit = run.control()
    fail_at(2, fit, MemoryError(), fit.clock, "exchange")
    monkeypatch.setattr(run, "control", lambda: fit)
    with pytest.raises(MemoryError):
        train_control(run, run.corpus(), progress=False)
    assert load_run(run.folder).control().slow_step == 2


SAVE_ON_FULL_DISKS = """
import resource, sys
import numpy as np, xarray as xr
from ltm_pyro.errors import InputError
from ltm_pyro.export import save_datatree
path, *shares = sys.argv[1:]
values = xr.Dataset({"z": (("draw", "dim"), np.arange(4000.0).reshape(100, 40))})
tree = xr.DataTree.from_dict({"/posterior": values, "/scores": values})
length = save_datatree(tree, path).stat().st_size
for share in shares:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(float(share) * length), -1))
    try:
        save_datatree(tree, path)
        print("written")
    except InputError as error:
        print(error)
"""


def test_a_full_disk_while_a_posterior_is_written(tmp_path):
    """In a process of its own: HDF5 would end it where it writes to the disk itself."""
    path, shares = tmp_path / "posterior.nc", ["0", "0.01", "0.2", "0.5", "0.9", "0.999"]
    done = subprocess.run(
        [sys.executable, "-c", SAVE_ON_FULL_DISKS, str(path), *shares],
        env=environment(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(shares)
    assert all("cannot write" in line and "free some space" in line for line in lines)
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.nc"]
    assert load_datatree(path)["posterior/z"].shape == (100, 40)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


IRREGULAR = {
    "a device": make_device,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("target"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_replaced(tmp_path, kind):
    (tmp_path / "target").write_text("old")
    IRREGULAR[kind](tmp_path / "out")
    before = os.lstat(tmp_path / "out")
    with pytest.raises(InputError, match=f"it is {kind[:6]}"):
        write_atomic(tmp_path / "out", b"new")
    assert os.lstat(tmp_path / "out")[:2] == before[:2]
    assert (tmp_path / "target").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "target"]


def test_what_a_killed_write_has_left_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".out.partial").symlink_to("mine")
    write_atomic(tmp_path / "out", b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "out").read_bytes() == b"new"
    assert not (tmp_path / "out").is_symlink()


# --- one writer --------------------------------------------------------------------------------


@contextlib.contextmanager
def another_writer(folder: Path) -> Iterator[None]:
    """Inside the block another thread, which counts as another process does, has the lock."""
    taken, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with sole_writer(folder):
            taken.set()
            enough.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(timeout=60)
    try:
        yield
    finally:
        enough.set()
        thread.join()


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    corpus = run.corpus()
    (tmp_path / "link").symlink_to("run")
    with another_writer(tmp_path / "run"):
        for write in (
            run.save,
            lambda: train(run, corpus, progress=False),
            lambda: train_control(run, corpus, progress=False),
            lambda: create_run(tmp_path / "run", config, overwrite=True),
            lambda: create_run(tmp_path / "link", config, overwrite=True),
        ):
            with pytest.raises(InputError, match=rf"process {os.getpid()} on .* since .*20"):
                write()
        assert load_run(tmp_path / "run").svi.slow_step == 0
    train(run, corpus, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "run", "text.txt"]


def test_a_new_folder_is_locked_before_it_is_there(tmp_path, config):
    with (
        another_writer(tmp_path / "a" / "run"),
        pytest.raises(InputError, match="is being written by"),
    ):
        create_run(tmp_path / "a" / "run", config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os, sys; from ltm_pyro.run.lock import sole_writer; "
    code += "held = sole_writer(sys.argv[1]); held.__enter__(); os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], env=environment(), check=False
    )
    assert killed.returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == [".run.lock"]
    with sole_writer(tmp_path / "run"), sole_writer(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_has_gone_on_with_is_not_written_over(tmp_path, config):
    old = create_run(tmp_path / "run", config)
    new = load_run(tmp_path / "run")
    train(new, new.corpus(), progress=False)
    for write in (old.save, lambda: train(old, new.corpus(), progress=False)):
        with pytest.raises(InputError, match="load it again"):
            write()
    assert load_run(tmp_path / "run").svi.slow_step == config.steps
    new.save()
    create_run(tmp_path / "run", dataclasses.replace(config, seed=1), overwrite=True)
    with pytest.raises(InputError, match="load it again"):
        new.save()
    assert load_run(tmp_path / "run").svi.slow_step == 0


def test_a_run_without_a_step_gives_back_the_one_that_it_replaced(tmp_path, config):
    corpus = open_corpus(config)
    train(create_run(tmp_path / "run", config), corpus, progress=False)
    again = create_run(tmp_path / "run", config, overwrite=True, keep_replaced=True)
    assert load_run(again.folder).svi.slow_step == 0
    undo_new(again.folder)
    assert load_run(again.folder).svi.slow_step == config.steps
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text.txt"]


def test_a_replacement_that_was_killed_half_way_is_taken_back(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    run.folder.rename(tmp_path / ".run.old")
    with pytest.raises(InputError, match="exists: go on with it by --resume"):
        create_run(tmp_path / "run", config)
    assert load_run(tmp_path / "run").svi.slow_step == 0


def test_a_link_stays_when_its_run_is_replaced(tmp_path, config):
    create_run(tmp_path / "run", config)
    (tmp_path / "link").symlink_to("run")
    create_run(tmp_path / "link", dataclasses.replace(config, seed=1), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load_run(tmp_path / "run").config.seed == 1


@pytest.mark.parametrize("place", [".", "..", "/", "loop", "fifo", "/dev/null"])
def test_a_run_is_put_in_no_strange_place(tmp_path, config, monkeypatch, place):
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"choose another|is not a folder|is no run folder"):
        create_run(place, config, overwrite=True)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


# --- many tries --------------------------------------------------------------------------------

ON_FULL_DISKS = """
import resource, sys
from pathlib import Path
from ltm_pyro.cli import main
from ltm_pyro.run import load_run
sizes, *command = sys.argv[1:]
for size in map(int, sizes.split(",")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    status = main(command)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    steps = {str(r.parent): load_run(r.parent).svi.slow_step for r in Path().glob("*/config.json")}
    left = [str(p) for p in Path().rglob(".*")]
    print("RESULT", size, status, steps, left, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "export", "compare"])
def test_full_disks_of_thirty_sizes(tmp_path, monkeypatch, command):
    """No signal, nothing left over, and what was saved before still opens."""
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "text.txt")
    fit = ["fit", "--corpus", str(text), "--no-control", *MICRO]
    assert main([*fit, "--steps", "4", "--out", "good"]) == 0
    ask = {
        "fit": [*fit, "--steps", "3", "--out", "new", "--overwrite"],
        "export": ["export", "good"],
        "compare": ["compare", "good", "--guides", "mean_field,delta", "--no-gaps"],
    }[command]
    sizes = [0, *(round(2 ** (0.65 * k)) for k in range(29))]  # to 300 kB
    before = (tmp_path / "good" / "posterior.nc").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", ON_FULL_DISKS, ",".join(map(str, sizes)), *ask],
        cwd=tmp_path, env=environment(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    found = [line.split(maxsplit=3) for line in done.stdout.splitlines() if "RESULT" in line]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(found) == len(sizes)
    assert {status for _, _, status, _ in found} <= {"0", "2"}
    assert all("'good': 4" in rest and rest.endswith("[]") for *_, rest in found)
    assert found[0][2] == "2"
    assert "Traceback" not in done.stderr
    if command == "export":
        assert len((tmp_path / "good" / "posterior.nc").read_bytes()) == len(before)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("new", "new"), ("resume", "resume"), ("overwrite", "resume")])
def test_two_fits_at_once_leave_one_of_them(tmp_path, kinds):
    text, steps = write_text(tmp_path / "text.txt"), 30
    fit = ["fit", "--corpus", str(text), "--no-control", "--steps", str(steps), "--out", "run"]
    ask = {
        "new": [*fit, *MICRO],
        "resume": ["fit", "--resume", "--out", "run"],
        "overwrite": [*fit, *MICRO, "--overwrite", "--seed", "1"],
    }

    def start(kind: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            program(*ask[kind]), cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    for _ in range(7):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        if kinds != ("new", "new"):
            create_run(tmp_path / "run", dataclasses.replace(micro(text), steps=steps))
        both = [start(kind) for kind in kinds]
        told = [process.communicate()[1] for process in both]
        assert sorted(process.returncode for process in both)[0] == 0, told
        assert all(process.returncode in (0, 2) for process in both), told
        run = load_run(tmp_path / "run")
        assert run.svi.slow_step == steps
        whole = create_run(tmp_path / f"whole-{run.config.seed}", run.config, overwrite=True)
        train(whole, whole.corpus(), progress=False)
        for name, value in weights(whole).items():
            assert torch.equal(value, run.model.state_dict()[name])
        assert not list(tmp_path.glob(".*"))
