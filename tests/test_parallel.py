"""Processes that share a fit: the numbers of one process, and a common end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import MICRO, environment, program, run_program, write_text
from parallel_worker import SCENARIOS
from tolerances import EXACT

from ltm_pyro.cli import main
from ltm_pyro.engine.processes import (
    Parallel,
    group,
    join,
    refuse_unequal,
)
from ltm_pyro.errors import InputError, ProcessLostError, ToldElsewhereError
from ltm_pyro.run import load_run

PROCESSES = 2
QUICK = ["replicated", "single precision", "control", "scores", "nan", "stop"]
QUICK += ["persistent", "messages"]
SLOW = [name for name in SCENARIOS if name not in QUICK]


def torchrun(*arguments: str) -> list[str]:
    """The command line that starts them."""
    start = ["--standalone", "--nproc-per-node", str(PROCESSES)]
    return [sys.executable, "-m", "torch.distributed.run", *start, *arguments]


def surroundings() -> dict[str, str]:
    """The environment of processes that talk over the loopback interface alone."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {**environment(), "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}


def run_many(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `ltm-pyro` in several processes to the end."""
    return subprocess.run(
        torchrun("-m", "ltm_pyro", *arguments),
        cwd=cwd, env=surroundings(), text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip


def ours(text: str) -> list[str]:
    """What this package writes on stderr; `torchrun` adds a report of its own."""
    return [line for line in text.splitlines() if line.startswith("ltm-pyro:")]


def run_scenarios(folder: Path, names: list[str]) -> dict[str, list[dict[str, object]]]:
    """What each process makes of the scenarios."""
    file = folder / "found.pt"
    worker = Path(__file__).with_name("parallel_worker.py")
    done = subprocess.run(
        torchrun(str(worker), str(file), *names),
        env=surroundings(), text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_scenarios(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory):
    return run_scenarios(tmp_path_factory.mktemp("slow"), SLOW)


def assert_as_one(name: str, found) -> None:
    """All processes hold the answer of one."""
    expected = SCENARIOS[name](Parallel())
    answers = found[name]
    assert len(answers) == PROCESSES
    for answer in answers:
        assert answer.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                EXACT.assert_close(answer[key], value)
        for key, value in expected.get("moments", {}).items():
            EXACT.assert_close(answer["moments"][key], value)
        assert answer.get("moments", {}).keys() == expected.get("moments", {}).keys()
    first = answers[0].get("weights")
    assert first is None or all(torch.equal(first, other["weights"]) for other in answers)


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["replicated", "control", "scores", "persistent"])
def test_two_processes_have_the_numbers_of_one(name, found):
    assert_as_one(name, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_whatever_is_fitted_two_processes_have_the_numbers_of_one(name, found_slowly):
    assert_as_one(name, found_slowly)


def test_in_single_precision_ten_steps_differ_by_a_millionth_at_most(found):
    # Expected is no difference at all; kernels may round one row by how many come with it.
    one = SCENARIOS["single precision"](Parallel())["weights"]
    for answer in found["single precision"]:
        assert float((answer["weights"] - one).abs().max()) <= 1e-6


def test_sequences_stay_with_their_process_in_a_persistent_fit(found):
    stored = [answer["stored"] for answer in found["persistent"]]
    # With lanes no sequence is in two stores.
    assert sum(stored) == SCENARIOS["persistent"](Parallel())["stored"]


def test_nan_in_one_process_ends_all_before_any_weight_changes(found):
    for answer in found["nan"]:
        assert answer == {"ids": [3], "step": 1, "changed": False, "kept": 1}


def test_all_stop_after_the_step_in_which_one_was_asked_to(found):
    for answer in found["stop"]:
        assert answer["stopped"] == [False, False, True, False]


def test_messages_arrive(found):
    for rank, answer in enumerate(found["messages"]):
        assert answer["broadcast"] == "from 0"
        assert answer["rows"].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
        assert answer["flags"] == [True, True, False, True]
        assert answer["columns"] == (3, 3)
        assert answer["broadcast_tensors"] == {"a": [0.0, 0.0], "b": 0}
        assert answer["on_rank_0"] == (0 if rank == 0 else None)
        assert answer["sum"] == 3.0
        assert answer["reports"] == [rank == 0, rank == 1]


# --- one process -----------------------------------------------------------------------------


def test_one_process_exchanges_nothing():
    alone, x = Parallel(), torch.arange(3.0)
    assert alone.sum(x) is x
    assert alone.gather_rows(x) is x
    assert alone.gather(1) == [1]
    assert alone.broadcast("a") == "a"
    assert alone.broadcast_tensors({"x": x})["x"] is x
    assert alone.on_rank_0(lambda: 7) == 7
    assert alone.rows(5) == slice(0, 5)
    assert alone.reports([])
    assert join("cpu").size == 1


@pytest.mark.parametrize(("total", "hint"), [(5, "e.g. 4"), (1, "e.g. 2")])
def test_unequal_parts_are_refused(total, hint):
    with pytest.raises(InputError, match=hint):
        refuse_unequal(total, 2)


def test_nonsense_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE"):
        join("cpu")


@pytest.mark.parametrize(("device", "hint"), [("cuda:0", "--device cuda"), ("cuda", "would need")])
def test_every_process_needs_a_device_of_its_own(device, hint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match=hint):
        join(device)


def test_processes_that_cannot_be_met_are_told_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="start all with torchrun"):
        join("cpu")


@pytest.mark.parametrize(
    ("lost", "told"), [([1], "process 1 .* is"), ([1, 2], "1, 2 .* are"), ([], "not known")]
)
def test_a_lost_process_is_named(lost, told):
    with pytest.raises(ProcessLostError, match=told):
        raise ProcessLostError(lost, 4)


def test_who_has_ended_is_known():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert group.alive(child.pid)
    child.kill()
    deadline = time.monotonic() + 10
    while group.alive(child.pid):  # not buried yet, and gone all the same
        assert time.monotonic() < deadline
    child.wait()
    assert not group.alive(child.pid)


# --- the command line ------------------------------------------------------------------------


def test_commands_for_one_process_say_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["cost", "nano"]) == 2
    assert "cost runs in one process" in capsys.readouterr().err


def test_a_process_whose_error_is_told_elsewhere_is_silent(monkeypatch, capsys):
    def dispatch(arguments):
        raise ToldElsewhereError

    monkeypatch.setattr("ltm_pyro.cli._dispatch", dispatch)
    assert main([]) == 3
    assert capsys.readouterr() == ("", "")


def test_a_batch_that_cannot_be_shared_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["fit", "--batch_size", "4"]) == 2
    assert "multiple of 3" in capsys.readouterr().err


def test_killing_one_process_ends_the_other_and_leaves_a_checkpoint(tmp_path):
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    micro = [*MICRO, "--checkpoint_every", "3"]
    command = ["fit", "--corpus", str(text), "--out", str(out), "--steps", "100000", *micro]
    with open(tmp_path / "err", "w+") as err:
        fit = subprocess.Popen(
            torchrun("-m", "ltm_pyro", *command), env=surroundings(), cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=err,
        )  # fmt: skip
        wait_for_step(fit, out, 5)
        os.kill(process_one(fit.pid), signal.SIGKILL)
        assert fit.wait(timeout=20) != 0
        err.seek(0)
        [line] = ours(err.read())
    run = load_run(out)
    assert run.svi.slow_step >= 3
    assert "process 1 (of 2, numbered from 0) is gone" in line
    assert f"the last checkpoint is of step {run.svi.slow_step};" in line
    assert f"--resume --out {out}" in line


def wait_for_step(fit: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    """Waits until the fit has done some steps."""
    deadline = time.monotonic() + 60
    table = out / "metrics.csv"
    while not table.exists() or len(table.read_text().splitlines()) <= steps:
        assert fit.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def process_one(parent: int) -> int:
    """The id of process 1 among those that `torchrun` has started."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            settings = (folder / "environ").read_bytes().split(b"\0")
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and b"RANK=1" in settings:
            return int(folder.name)
    raise AssertionError("process 1 was not found")


def fit_command(text: Path, out: Path, steps: int, *more: str) -> list[str]:
    return [
        "fit", "--corpus", str(text), "--out", str(out), "--steps", str(steps), *MICRO, *more,
    ]  # fmt: skip


def assert_same_runs(one: Path, other: Path) -> None:
    """Weights, moments, metrics and scores agree to rounding."""
    a, b = load_run(one), load_run(other)
    first, second = a.checkpoint(), b.checkpoint()
    assert first.state["slow_step"] == second.state["slow_step"]
    assert first.tensors.keys() == second.tensors.keys()
    for name, value in first.tensors.items():
        EXACT.assert_close(second.tensors[name], value)
    for x, y in zip(a.metrics, b.metrics, strict=True):
        for name in x.keys() - {"seconds", "tokens_per_second"}:
            assert y[name] == pytest.approx(x[name], rel=1e-3, abs=1e-4)
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (one, other)]
    assert scores[1]["ppl_elbo"] == pytest.approx(scores[0]["ppl_elbo"], rel=1e-4)
    assert scores[1]["control"]["ppl_elbo"] == pytest.approx(scores[0]["control"]["ppl_elbo"])


STEPS = 150


def stopped_in_between(start: list[str], out: Path, cwd: Path) -> list[str]:
    """Starts a fit, asks it by SIGTERM to stop once it has done some steps; what it tells."""
    with open(cwd / "stopped", "w+") as err:
        fit = subprocess.Popen(
            start, env=surroundings(), cwd=cwd, stdout=subprocess.DEVNULL, stderr=err
        )
        wait_for_step(fit, out, 5)
        fit.terminate()
        assert fit.wait(timeout=60) != 0
        err.seek(0)
        return ours(err.read())


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one", "many"])
@pytest.mark.parametrize("options", [[], ["--persistent"]])
def test_a_fit_goes_on_with_any_number_of_processes(options, first, tmp_path):
    text = write_text(tmp_path / "text.txt")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped-run"
    done = run_program(*fit_command(text, straight, STEPS, *options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = fit_command(text, stopped, STEPS, *options)
    start = program(*command) if first == "one" else torchrun("-m", "ltm_pyro", *command)
    told = stopped_in_between(start, stopped, tmp_path)
    assert any("stopped; go on with" in line for line in told)
    assert 5 <= load_run(stopped).svi.slow_step < STEPS
    go_on = run_many if first == "one" else run_program
    done = go_on("fit", "--resume", "--out", str(stopped), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_runs(straight, stopped)


@pytest.mark.slow
def test_many_processes_evaluate_as_one(tmp_path):
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    command = fit_command(text, out, 4)
    assert run_program(*command, cwd=tmp_path).returncode == 0
    for more in ([], ["--mode", "prefix"], ["--mode", "prior"]):
        ask = ["evaluate", str(out), "--json", *more]
        one, many = (start(*ask, cwd=tmp_path) for start in (run_program, run_many))
        a, b = (json.loads(done.stdout) for done in (one, many))
        for name, rel in (("nats_per_sequence", 1e-4), ("khat", 0.05)):
            expected, found = (numbers(answer[name]) for answer in (a, b))
            assert found == pytest.approx(expected, rel=rel, abs=1e-4)


def numbers(answer: dict[str, object] | None) -> dict[str, object]:
    """What of an answer is a number."""
    return {k: v for k, v in (answer or {}).items() if isinstance(v, int | float)}


@pytest.mark.slow
def test_what_one_process_refuses_many_tell_once(tmp_path):
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    for command, told in (
        (fit_command(text, out, 4, "--batch_size", "5"), "multiple of 2"),
        (fit_command(text, out, 4, "--guide", "meanfield"), "mean_field"),
        (fit_command(tmp_path / "absent.txt", out, 4), "absent"),
        (fit_command(text, out, 4, "--slow.lr", "1e30"), "not finite"),
    ):
        done = run_many(*command, cwd=tmp_path)
        assert done.returncode != 0
        [line] = ours(done.stderr)
        assert told in line
