"""Watching a run from outside: what is told of a fit by the files that it writes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import time
from pathlib import Path

import pytest
from cli_helpers import MICRO, environment, program, write_text

from ltm_pyro.cli import main
from ltm_pyro.errors import InputError
from ltm_pyro.run.lock import sole_writer, writer_of
from ltm_pyro.run.watching import BARS, PLAIN, glance, sparkline, watch

HELD = ["--held_out.every", "2", "--held_out.sequences", "4", "--held_out.draws", "2"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A finished run of six steps, with a held-out bound and a control."""
    folder = tmp_path_factory.mktemp("watched")
    text, out = write_text(folder / "text.txt"), folder / "run"
    arguments = ["fit", "--corpus", str(text), "--out", str(out), "--steps", "6", *MICRO, *HELD]
    assert main(arguments) == 0
    return out


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([math.nan], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        (range(8), BARS),
        ([0.0, math.nan, 1.0], "▁ █"),
        ([0.0, 0.0, 7.0, 7.0], "▁▁██"),
    ],
)
def test_a_sparkline_runs_from_the_lowest_to_the_highest(values, line) -> None:
    assert sparkline(list(values)) == line


def test_a_long_series_is_averaged_into_the_width() -> None:
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"
    assert len(sparkline([math.sin(i / 9) for i in range(1000)])) == 32
    assert set(sparkline(list(range(100)), bars=PLAIN)) <= set(PLAIN)


def test_a_finished_run_is_told(fitted, capsys) -> None:
    assert main(["watch", str(fitted), "--once"]) == 0
    told = capsys.readouterr().out
    assert "slow step 6 of 6, done" in told
    for name in ("elbo/token", "held-out/token", "kl, nats/sequence", "steps/second", "control"):
        assert name in told
    assert "best at step" in told
    assert "0:00:00 left" in told
    rows = [line.split(",") for line in (fitted / "metrics.csv").read_text().splitlines()]
    last = float(rows[-1][rows[0].index("elbo_per_token")])
    assert f"{last:.4g}" in told


def test_a_fit_of_another_process_is_followed_to_its_end(tmp_path) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    arguments = ["--corpus", str(text), "--out", str(out), "--steps", "400", "--no-control", *MICRO]
    fit = subprocess.Popen(
        program("fit", *arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (out / "config.json").exists():
            assert fit.poll() is None
            time.sleep(0.02)
        assert f"process {fit.pid}" in str(writer_of(out))
        assert f"written by process {fit.pid}" in glance(out)
        stream = io.StringIO()
        watch(out, every=0.1, stream=stream)
    finally:
        fit.kill()
        fit.wait()
    assert stream.getvalue().count("slow step") > 1
    assert "slow step 400 of 400, done" in stream.getvalue()


def test_a_fit_that_has_died_is_told_as_such(fitted, tmp_path) -> None:
    with sole_writer(fitted):
        assert "written by process" in glance(fitted)
        lock = fitted.parent / f".{fitted.name}.lock"
        noted = json.loads(lock.read_text())
        lock.write_text(json.dumps({**noted, "pid": 2**22 + 1}))  # no process has this number
        assert writer_of(fitted) is None
        lock.write_text(json.dumps({**noted, "pid": 2**22 + 1, "host": "elsewhere"}))
        assert "elsewhere" in str(writer_of(fitted))
    assert writer_of(fitted) is None


def test_a_run_without_a_step_is_told(tmp_path) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    from ltm_pyro.config import CorpusConfig, FitConfig
    from ltm_pyro.run import create_run

    create_run(out, FitConfig(corpus=CorpusConfig(name=str(text)), steps=5))
    assert "slow step 0 of 5, nobody writes to it" in glance(out)


def test_small_alphabets_get_plain_bars(fitted) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    watch(fitted, once=True, stream=stream)
    stream.flush()
    stream.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("every", [0.0, -1.0, math.nan, 1e9, "2"])
def test_what_cannot_be_watched_is_refused(fitted, tmp_path, every) -> None:
    with pytest.raises(InputError, match="every"):
        watch(fitted, every=every)
    with pytest.raises(InputError, match="no run folder"):
        watch(tmp_path / "none", once=True)
