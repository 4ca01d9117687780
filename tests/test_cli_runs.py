"""Runs on the command line: restarts, the best checkpoint, other corpora, extension, new starts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from cli_helpers import MICRO, write_text

from ltm_pyro.cli import main
from ltm_pyro.run import load_run
from ltm_pyro.run.scoring import score_run

HELD = [
    *("--held_out.every", "2", "--held_out.sequences", "4", "--held_out.draws", "2"),
    *("--held_out.fast_steps", "2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a run of four steps from two seeds, and another text."""
    place = tmp_path_factory.mktemp("runs")
    text = str(write_text(place / "text.txt", blocks=30))
    (place / "other.txt").write_text(
        "\n\n".join(f"Ein Satz von {i} Wörtern. " * 5 for i in range(40))
    )
    arguments = ["fit", "--corpus", text, "--steps", "4", "--restarts", "2", *MICRO, *HELD]
    assert main([*arguments, "--out", str(place / "run")]) == 0
    return place


def tell(capsys, *arguments: str) -> str:
    """What a command that succeeds prints."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_restarts_are_the_chains_of_an_export(folder) -> None:
    first, second = load_run(folder / "run"), load_run(folder / "run/restarts/1")
    assert second.config.seed == first.config.seed + 1
    assert second.svi.slow_step == second.control().slow_step == 4
    with xr.open_datatree(folder / "run/posterior.nc", engine="h5netcdf") as tree:
        tree = tree.load()
    assert tree["posterior"].sizes["chain"] == 2
    batch = first.corpus().val.batch(ids=tree["posterior"]["sequence"].values)
    for chain, run in enumerate((first, second)):
        post = run.svi.infer(batch, run.config.eval_fast_steps)
        mean = tree["variational_params"]["loc"].sel(chain=chain).values
        np.testing.assert_allclose(mean, post.parameters["loc"].numpy(), atol=1e-5)
    z = tree["posterior"]["z"].sel(chain=1, draw=0).values
    given = second.model.log_likelihood(second.model.decoder.bos.new_tensor(z), batch)
    told = tree["log_likelihood"]["x"].sel(chain=1, draw=0).values
    np.testing.assert_allclose(told, given.detach().numpy(), rtol=1e-5)


def test_another_corpus_is_scored_as_it_comes(folder, capsys) -> None:
    run, other = str(folder / "run"), str(folder / "other.txt")
    out = json.loads(tell(capsys, "evaluate", run, "--corpus", other, "--json"))
    assert out["zero_shot"] == "other"
    assert out["split"] == "all"
    assert out["control"] is not None
    assert set(out["per_unit"]) >= {"byte"}
    told = tell(capsys, "evaluate", run, "--corpus", other, "--sequences", "3")
    assert "zero-shot (other, all)" in told
    assert "per byte" in told
    assert "control" in told
    loaded = load_run(run)
    held_out = score_run(loaded, other)
    assert float(held_out.scores["elbo"].mean()) == pytest.approx(out["nats_per_sequence"]["elbo"])
    own = json.loads(tell(capsys, "evaluate", run, "--json"))
    assert own["zero_shot"] is None
    assert own["split"] == "val"
    rows = [json.dumps({"body": f"text number {i} of this file, {i * i}"}) for i in range(40)]
    records = folder / "other.jsonl"
    records.write_text("\n".join(rows))
    options = ["--corpus", str(records), "--corpus.text_field", "body", "--split", "train"]
    assert "zero-shot (other, train)" in tell(capsys, "evaluate", run, *options)


def test_the_best_checkpoint_is_evaluated(folder, capsys) -> None:
    run = load_run(folder / "run", checkpoint="best")
    out = json.loads(tell(capsys, "evaluate", str(run.folder), "--checkpoint", "best", "--json"))
    assert out["step"] == run.svi.slow_step in (2, 4)
    assert math.isfinite(out["nats_per_sequence"]["elbo"])
    assert "text 1 of 1" in tell(capsys, "generate", str(run.folder), "--checkpoint", "best")


def test_a_run_is_extended_and_says_what_is_restated(folder, tmp_path, capsys) -> None:
    text, out = str(folder / "text.txt"), str(tmp_path / "run")
    tell(capsys, "fit", "--corpus", text, "--steps", "2", "--out", out, "--no-control", *MICRO)
    told = tell(capsys, "fit", "--resume", "--steps", "5", "--out", out)
    assert "Extended from 2 to 5 slow steps; schedules are restated" in told
    assert "slow.thoughts_start 0.7 -> 0.2" in told
    assert "Resumed  at slow step 2" in told
    assert load_run(out).svi.slow_step == 5
    assert "Extended" not in tell(capsys, "fit", "--resume", "--steps", "5", "--out", out)


def test_a_fit_starts_from_a_run_with_its_settings(folder, tmp_path, capsys) -> None:
    first, out = str(folder / "run"), str(tmp_path / "run")
    other = str(folder / "other.txt")
    arguments = ["--init_from", first, "--corpus", other, "--steps", "2", "--out", out]
    assert "tensorboard" in tell(capsys, "fit", *arguments, "--tensorboard")
    assert list(Path(out, "tensorboard").iterdir())
    second = load_run(out)
    assert second.config.model.width == 16
    assert second.config.init_from == first
    assert second.config.restarts == 1
    assert second.tokenizer == load_run(first).tokenizer
    assert main(["fit", "--resume", *arguments]) == 0


WRONG = {
    "fit --init_from none": "no run folder",
    "fit --init_from RUN --model.width 32": "model.width",
    "fit --init_from RUN --model.thought_dim 8": "model.thought_dim",
    "fit --init_from RUN --tokenizer bpe": "tokenizer",
    "fit --init_from RUN --model.prior mixture": "model.prior",
    "fit --restarts 0": "restarts",
    "fit --restarts 1.5": "restarts",
    "fit --held_out.every -1": "held_out.every",
    "fit --held_out.patience 3": "held_out.every",
    "fit --held_out.every 2 --held_out.draws 1": "held_out.draws",
    "fit --held_out.every 2 --held_out.sequences 0": "held_out.sequences",
    "fit --held_out.evry 2": "held_out.every",
    "fit --resume --steps 3 --out RUN": "extended, not shortened",
    "fit --resume --steps 0 --out RUN": "steps",
    "fit --resume --slow.lr 0.5 --out RUN": "slow.lr",
    "fit --resume --held_out.draws 9 --out RUN": "held_out.draws",
    "fit --resume --init_from RUN --out RUN": "init_from",
    "evaluate RUN --checkpoint first": "checkpoint",
    "evaluate RUN --checkpoint": "checkpoint",
    "evaluate RUN --corpus none.txt": "none.txt",
    "evaluate RUN --corpus.text_field body": "corpus",
    "evaluate RUN --split all": "split",
    "evaluate RUN --corpus OTHER --split nothing": "split",
    "evaluate RUN --corpus OTHER --per letter": "unit",
    "evaluate RUN --corpus mixture": "mixture",
    "evaluate RUN --corpus OTHER --as_published": "as_published",
    "evaluate RUN --corpus OTHER --as-published": "as_published",
    "evaluate RUN --tokenizer bytes": "tokenizer",
    "watch none --once": "no run folder",
    "watch RUN --every 0": "every",
    "watch RUN --every soon": "every",
    "watch": "run",
    "watch RUN OTHER": "argument",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_gives_one_line(folder, tmp_path, monkeypatch, capsys, line) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(folder / "run"), "OTHER": str(folder / "other.txt")}
    before = sorted(p.name for p in (folder / "run").rglob("*"))
    assert main([places.get(word, word) for word in line.split()]) == 2
    told = capsys.readouterr()
    assert WRONG[line] in told.err
    assert told.err.count("\n") == 1
    assert len(told.err) < 700
    assert not list(tmp_path.iterdir())
    assert sorted(p.name for p in (folder / "run").rglob("*")) == before
