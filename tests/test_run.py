"""The run folder: whole checkpoints, exact resumption, and clear words where something is wrong."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from cli_helpers import micro_fit, write_text

from ltm_pyro.config import CorpusConfig, FitConfig
from ltm_pyro.data.corpus import load_corpus
from ltm_pyro.data.mixture import MixtureCorpus
from ltm_pyro.data.tokenizer import ByteTokenizer
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.errors import InputError, NonFiniteError
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.run import Interrupted, Run, create_run, load_run, train, train_control
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.building import absolute_paths, open_device
from ltm_pyro.run.changes import first_change
from ltm_pyro.run.checkpoint import Checkpoint
from ltm_pyro.run.extending import extend
from ltm_pyro.run.files import new_folder, refuse_protected, write_atomic, writing
from ltm_pyro.run.metrics import MetricsFile
from ltm_pyro.run.opening import recorded_config
from ltm_pyro.run.scoring import json_value, per_sequence_csv, score_run, summary

STEPS = 4


@pytest.fixture
def config(tmp_path):
    """A fit of a second."""
    return micro_fit(write_text(tmp_path / "text.txt"))


def finish(run: Run) -> Run:
    """Model and control to the end."""
    train(run, run.corpus(), progress=False)
    train_control(run, run.corpus(), progress=False)
    return run


def tensor_files(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensor files, by their place in the run folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def stop_after(steps: int):
    """Asks to stop when it has seen that many steps."""
    seen = []
    return lambda row: seen.append(row) or len(seen) == steps


def test_a_run_is_read_back_as_it_was_left(tmp_path, config):
    run = finish(create_run(tmp_path / "run", config))
    again = load_run(tmp_path / "run")
    assert again.config == run.config
    assert again.svi.slow_step == STEPS == len(again.metrics)
    assert again.metrics == run.metrics
    assert again.tokenizer == run.tokenizer
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert again.corpus().sha256 == run.facts["corpus"]["sha256"]
    assert again.control().slow_step == STEPS == len(again.control_metrics())
    assert f"step {STEPS} of {STEPS}" in repr(again)


def test_a_run_of_before_there_was_a_choice_keeps_its_clock(tmp_path, config):
    finish(create_run(tmp_path / "run", config))
    _edit(tmp_path / "run/config.json", lambda c: c["config"]["fast"].pop("optimizer"))
    assert recorded_config(tmp_path / "run").fast.optimizer == "adam"


def test_nothing_in_a_run_folder_can_execute(tmp_path, config):
    finish(create_run(tmp_path / "run", config))
    suffixes = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".csv", ".safetensors"}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_fit_ends_with_the_same_bits(tmp_path, config, stop, persistent):
    config = dataclasses.replace(config, persistent=persistent, batch_size=40)
    whole = finish(create_run(tmp_path / "whole", config))
    broken = create_run(tmp_path / "broken", config)
    with pytest.raises(Interrupted):
        train(broken, broken.corpus(), progress=False, after_step=stop_after(stop))
    assert load_run(tmp_path / "broken").svi.slow_step == stop
    resumed = load_run(tmp_path / "broken")
    train(resumed, resumed.corpus(), progress=False)
    with pytest.raises(Interrupted):
        train_control(resumed, resumed.corpus(), progress=False, after_step=stop_after(stop))
    finish(load_run(tmp_path / "broken"))
    assert tensor_files(tmp_path / "broken") == tensor_files(tmp_path / "whole")
    elbo = [[row["elbo"] for row in load_run(p).metrics] for p in (whole.folder, broken.folder)]
    assert elbo[0] == elbo[1]


def test_rows_after_the_checkpoint_are_written_again(tmp_path, config):
    whole = finish(create_run(tmp_path / "whole", config))
    run = create_run(tmp_path / "run", config)

    def die_in_step_3(row):
        if row["step"] == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(run, run.corpus(), progress=False, after_step=die_in_step_3)
    with open(run.folder / "metrics.csv", "a") as stream:
        stream.write("4.0,-9")  # a row cut short by the kill
    resumed = load_run(run.folder)
    assert resumed.svi.slow_step == 2 == len(resumed.metrics)
    finish(resumed)
    with open(run.folder / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert tensor_files(run.folder) == tensor_files(whole.folder)


def test_a_finished_fit_stays_as_it_is(tmp_path, config):
    run = finish(create_run(tmp_path / "run", config))
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file()}
    finish(load_run(run.folder))
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file()}


def test_nan_keeps_the_last_good_step(tmp_path, config):
    run = create_run(tmp_path / "run", config)

    def spoil_after_step_3(row):
        if row["step"] == 3:
            with torch.no_grad():
                saved.update({k: v.clone() for k, v in run.model.state_dict().items()})
                run.model.decoder.norm.weight.fill_(torch.nan)
        return False

    saved: dict[str, torch.Tensor] = {}
    with pytest.raises(NonFiniteError) as caught:
        train(run, run.corpus(), progress=False, after_step=spoil_after_step_3)
    assert caught.value.ids
    assert caught.value.step == 3
    assert checkpoints.load(run.folder / "checkpoint", "run").state["slow_step"] == 3


def test_the_checkpoint_before_survives_a_failing_write(tmp_path, config, monkeypatch):
    run = create_run(tmp_path / "run", config)
    real, calls = os.fsync, []

    def full_disk(handle):
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        train(run, run.corpus(), progress=False)
    monkeypatch.undo()
    assert not list(run.folder.rglob("*.partial"))
    assert load_run(run.folder).svi.slow_step in (0, 2)
    finish(load_run(run.folder))


@pytest.mark.parametrize("when", range(6))
def test_a_kill_at_any_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch, when):
    old = Checkpoint({"a": torch.zeros(3)}, {"slow_step": 1})
    new = Checkpoint({"a": torch.ones(3)}, {"slow_step": 2})
    checkpoints.save(tmp_path / "c", old)

    class Killed(BaseException):
        pass

    steps = []

    def dying(name):
        real = getattr(Path, name)

        def call(self, *args, **kwargs):
            if len(steps) == when:
                raise Killed
            steps.append(name)
            return real(self, *args, **kwargs)

        return call

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, dying(name))
    with contextlib.suppress(Killed):
        checkpoints.save(tmp_path / "c", new)
    monkeypatch.undo()
    found = checkpoints.load(tmp_path / "c", "run")
    expected = {1: old, 2: new}[found.state["slow_step"]]
    assert torch.equal(found.tensors["a"], expected.tensors["a"])
    checkpoints.save(tmp_path / "c", new)
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_tensors_that_share_memory_are_saved_one_by_one(tmp_path):
    tied = torch.arange(6.0)
    checkpoints.save(tmp_path / "c", Checkpoint({"a": tied, "b": tied, "c": tied[2:4]}, {}))
    found = checkpoints.load(tmp_path / "c", "run").tensors
    assert found["a"].tolist() == found["b"].tolist() == tied.tolist()
    assert found["c"].tolist() == [2.0, 3.0]


def test_fit_and_control_are_compiled_alike(tmp_path, config, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        LatentThoughtModel, "compile_fast_loop", lambda model: compiled.append(model)
    )
    run = create_run(tmp_path / "run", dataclasses.replace(config, compile=True))
    train(run, run.corpus(), progress=False)
    control = train_control(run, run.corpus(), progress=False)
    assert [id(model) for model in compiled] == [id(run.model), id(control.model)]


def test_held_out_sequences_are_inferred_some_at_a_time(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    sizes = []
    reset = run.svi.guide.reset
    run.svi.guide.reset = lambda batch: sizes.append(len(batch)) or reset(batch)
    rows = 2 * config.batch_size + 1
    run.svi.infer(run.corpus().train.batch(range(rows)), 1)
    assert sizes[:3] == [config.batch_size, config.batch_size, 1]


def test_a_checkpoint_is_read_while_another_takes_its_place(tmp_path, monkeypatch):
    first = Checkpoint({"a": torch.zeros(3)}, {"slow_step": 1})
    second = Checkpoint({"a": torch.ones(3)}, {"slow_step": 2})
    checkpoints.save(tmp_path / "c", first)
    real, reads = checkpoints.read_json, []

    def overtaken(path, owner):
        found = real(path, owner)
        if not reads:
            reads.append(path)
            checkpoints.save(tmp_path / "c", second)
        return found

    monkeypatch.setattr(checkpoints, "read_json", overtaken)
    assert checkpoints.load(tmp_path / "c", "run").state == {"slow_step": 2}


def test_a_run_is_replaced_only_when_asked(tmp_path, config):
    create_run(tmp_path / "run", config)
    with pytest.raises(InputError, match=r"exists: go on with it by --resume.*--overwrite"):
        create_run(tmp_path / "run", config)
    create_run(tmp_path / "run", dataclasses.replace(config, seed=1), overwrite=True)
    assert load_run(tmp_path / "run").config.seed == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text.txt"]


def test_what_is_no_run_is_never_replaced(tmp_path, config):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is no run folder"):
        create_run(tmp_path / "mine", config, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    create_run(tmp_path / "empty", config)


def _edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _tensors(run: Path, part: str = "checkpoint") -> Path:
    return next((run / part).glob("*.safetensors"))


DAMAGES = {
    "config cut": (lambda r: _cut(r / "config.json"), "config.json is not JSON"),
    "config missing": (lambda r: (r / "config.json").unlink(), "config.json is missing"),
    "config a list": (lambda r: (r / "config.json").write_text("[]"), "holds no JSON object"),
    "config without settings": (
        lambda r: _edit(r / "config.json", lambda c: c.pop("config")),
        "config.json: config is missing",
    ),
    "config unknown key": (
        lambda r: _edit(r / "config.json", lambda c: c["config"].update(stepz=3)),
        "did you mean 'config.steps'",
    ),
    "config of an older version": (
        lambda r: _edit(r / "config.json", lambda c: c["config"].update(shard=False)),
        "was written by an older version",
    ),
    "config without format": (
        lambda r: _edit(r / "config.json", lambda c: c.pop("format")),
        "format is missing",
    ),
    "format of another version": (
        lambda r: _edit(r / "config.json", lambda c: c.update(format=99)),
        "format 99",
    ),
    "newer version": (
        lambda r: _edit(r / "config.json", lambda c: c.update(version="9.1.0")),
        "written by ltm-pyro 9.1.0",
    ),
    "changed model": (
        lambda r: _edit(r / "config.json", lambda c: c["config"]["model"].update(width=32)),
        "model.width is 32",
    ),
    "changed clock": (
        lambda r: _edit(r / "config.json", lambda c: c["config"]["slow"].update(lr=0.5)),
        "slow.lr is 0.5",
    ),
    "tokenizer missing": (lambda r: (r / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer changed": (
        lambda r: (r / "tokenizer.json").write_text('{"type": "symbols", "vocab_size": 256}'),
        "tokenizer.json does not match",
    ),
    "checkpoint missing": (lambda r: shutil.rmtree(r / "checkpoint"), "state.json is missing"),
    "state cut": (lambda r: _cut(r / "checkpoint" / "state.json"), "state.json is not JSON"),
    "state changed": (
        lambda r: _edit(r / "checkpoint" / "state.json", lambda s: s["state"].update(slow_step=1)),
        "does not match its own checksum",
    ),
    "tensors missing": (lambda r: _tensors(r).unlink(), "is missing"),
    "tensors cut": (lambda r: _cut(_tensors(r)), "does not match its checksum"),
    "tensors changed": (lambda r: _flip(_tensors(r)), "does not match its checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_told_in_one_line(tmp_path, config, damage):
    run = create_run(tmp_path / "run", config)
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, after_step=stop_after(2))
    act, message = DAMAGES[damage]
    act(run.folder)
    with pytest.raises(InputError) as caught:
        load_run(run.folder)
    assert message in str(caught.value)
    assert str(run.folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "cut", "too long", "a cell of 200 kB", "inf"])
def test_a_lost_history_does_not_lose_the_weights(tmp_path, config, damage):
    run = create_run(tmp_path / "run", config)
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, after_step=stop_after(3))
    file = run.folder / "metrics.csv"
    text = file.read_text()
    header, first, second, third, _ = text.split("\n")
    wide = second.partition(",")[0] + "," + "1" * 200_000
    file.write_text(
        {
            "missing": "",
            "cut": text[: -len(third) // 2],
            "too long": f"{text}{second}\n{third}\n",
            "a cell of 200 kB": f"{header}\n{first}\n{wide}\n{third}\n",
            "inf": f"{header}\n{first}\ninf{second[3:]}\n{third}\n",
        }[damage]
    )
    if damage == "missing":
        file.unlink()
    expected = pytest.warns(UserWarning, match="history is incomplete")
    with contextlib.nullcontext() if damage == "too long" else expected:
        again = load_run(run.folder)
    assert again.svi.slow_step == 3
    assert torch.equal(again.model.decoder.bos, run.model.decoder.bos)
    kept = {"too long": [1, 2, 3], "cut": [1, 2]}.get(damage, [] if damage == "missing" else [1])
    assert [row["step"] for row in again.metrics][: len(kept)] == kept
    finish(again)
    with contextlib.nullcontext() if damage == "too long" else expected:
        assert load_run(run.folder).metrics[-1]["step"] == STEPS


def test_steps_taken_by_hand_are_saved_with_their_history(tmp_path, config):
    finish(create_run(tmp_path / "run", config))
    run = load_run(tmp_path / "run")
    run.svi.fit(run.corpus().train, steps=2, batch_size=8, progress=False)
    run.save()
    again = load_run(tmp_path / "run")
    assert again.svi.slow_step == STEPS + 2
    assert again.metrics == run.metrics
    assert [row["step"] for row in again.metrics] == list(range(1, STEPS + 3))


def test_scoring_settings_change_where_the_fit_does_not(tmp_path, config):
    finish(create_run(tmp_path / "run", config))
    run = load_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"eval_draws is 1: .*2 or more"):
        extend(run, {"eval_draws": 1})
    extend(run, {"eval_draws": 6, "eval_sequences": 3})
    again = load_run(tmp_path / "run")
    assert (again.config.eval_draws, again.config.eval_sequences) == (6, 3)
    assert again.svi.slow_step == STEPS == again.control().slow_step
    with pytest.raises(InputError, match="eval_draws is 1"):
        create_run(tmp_path / "new", dataclasses.replace(config, eval_draws=1))
    assert not (tmp_path / "new").exists()


def test_a_corpus_in_memory_is_recorded_as_such(tmp_path, config):
    texts = [f"{i} is a number and {i * i} is its square, which is more" for i in range(60)]
    corpus = load_corpus(texts, seq_len=16)
    run = create_run(tmp_path / "run", config, corpus=corpus)
    train(run, corpus, progress=False)
    again = load_run(tmp_path / "run")
    assert again.config.corpus.name == "in-memory"
    assert again.svi.slow_step == STEPS
    with pytest.raises(InputError, match="in the memory of a program: load it again"):
        again.corpus()


class Reversed(ByteTokenizer):
    """A kind that nobody has registered."""

    def to_json(self):
        return {"type": "reversed"}


def test_a_run_that_could_not_be_opened_again_is_not_made(tmp_path, config):
    corpus = load_corpus(config.corpus.name, seq_len=16)
    corpus = dataclasses.replace(corpus, tokenizer=Reversed())
    with pytest.raises(InputError, match="register_tokenizer"):
        create_run(tmp_path / "run", config, corpus=corpus)
    assert not (tmp_path / "run").exists()


def test_a_foreign_but_whole_checkpoint_is_refused(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    tensors = {**run.checkpoint().tensors, "model.decoder.bos": torch.zeros(7)}
    state = run.checkpoint().state
    checkpoints.save(run.folder / "checkpoint", Checkpoint(tensors, state))
    with pytest.raises(InputError, match=r"decoder\.bos should be \(16,\) and is \(7,\)"):
        load_run(run.folder)
    checkpoints.save(run.folder / "checkpoint", Checkpoint(run.checkpoint().tensors, {}))
    with pytest.raises(InputError, match=r"state\.json: .* is missing"):
        load_run(run.folder)
    files = checkpoints.to_files(run.checkpoint())
    data = b"no tensors"
    body = {**json.loads(files["state.json"]), "sha256": checkpoints.sha256(data)}
    body.pop("checksum")
    body["checksum"] = checkpoints._checksum(body)
    (run.folder / "checkpoint" / body["tensors"]).write_bytes(data)
    (run.folder / "checkpoint" / "state.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="is damaged"):
        load_run(run.folder)


def test_a_missing_run_offers_the_nearest(tmp_path, config):
    create_run(tmp_path / "first", config)
    with pytest.raises(InputError, match=r"did you mean '.*first'"):
        load_run(tmp_path / "frist")
    with pytest.raises(InputError, match="make one with ltm-pyro fit"):
        load_run(tmp_path / "none" / "x")


def test_a_changed_corpus_is_refused(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    write_text(tmp_path / "text.txt", blocks=50)
    with pytest.raises(InputError, match="is not the one that run folder"):
        run.corpus()


def test_a_read_only_folder_stays_as_it_is(tmp_path, config):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        with pytest.raises(InputError, match="is read-only"):
            create_run(locked / "run", config)
        assert not list(locked.iterdir())
    finally:
        locked.chmod(0o755)
    with pytest.raises(InputError, match="is not a folder"):
        refuse_protected(tmp_path / "text.txt" / "run")


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    files = {"a": b"1", "inner/b": b"2"}
    new_folder(tmp_path / "one" / "two", files)
    assert (tmp_path / "one" / "two" / "inner" / "b").read_bytes() == b"2"
    with pytest.raises(InputError, match="cannot write"):
        new_folder(tmp_path / "three" / "four", {**files, "a/c": b"3"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    write_atomic(target, b"old")
    with pytest.raises(InputError, match="cannot write"), writing(target):
        raise OSError(28, "No space left on device")
    (tmp_path / ".file.partial").mkdir()  # in the way of the temporary file
    with pytest.raises(InputError, match="cannot write"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"


def test_settings_that_differ_are_named():
    saved = {"steps": 3, "fast": {"betas": [0.9, 0.99], "lr": 0.1}, "guide_options": {"a": 1}}
    assert first_change(saved, {}) is None
    assert first_change(saved, {"fast": {"betas": (0.9, 0.99)}, "steps": 3}) is None
    assert first_change(saved, {"fast": {"lr": 0.2}}) == "fast.lr"
    assert first_change(saved, {"guide_options": {}}) == "guide_options"


def test_paths_are_made_absolute(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, corpus=CorpusConfig(name="text.txt"))
    assert absolute_paths(config).corpus.name == str(tmp_path / "text.txt")
    (tmp_path / "pydoc").mkdir()
    assert absolute_paths(FitConfig()).corpus.name == "pydoc"


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta", "cpu:9"])
def test_an_absent_device_is_refused(name):
    with pytest.raises(InputError, match=f"device '{name}' is absent: this machine has cpu"):
        open_device(name)


def test_initial_weights_follow_the_seed(tmp_path, config):
    a = create_run(tmp_path / "a", config)
    b = create_run(tmp_path / "b", config)
    c = create_run(tmp_path / "c", dataclasses.replace(config, seed=1))
    assert tensor_files(a.folder) == tensor_files(b.folder)
    assert tensor_files(a.folder) != tensor_files(c.folder)


def test_the_vocabulary_is_the_corpus_s(tmp_path, config):
    config = dataclasses.replace(config, corpus=CorpusConfig(name="mixture"))
    run = create_run(tmp_path / "run", config)
    corpus = run.corpus()
    assert isinstance(corpus, MixtureCorpus)
    assert run.config.model.vocab_size == corpus.vocab_size == run.model.config.vocab_size


def test_metrics_survive_to_the_bit(tmp_path):
    file = MetricsFile(tmp_path / "m.csv", "run")
    rows = [{"step": float(i), "elbo": -1 / (3 + i), "kl": float("inf")} for i in (1, 2)]
    for row in rows:
        file.append(row)
    file.sync()
    assert file.read(2) == rows
    assert file.read(1) == rows[:1]
    assert file.read(0) == []
    file.truncate(rows[:1])
    assert file.read(1) == rows[:1]
    with pytest.warns(UserWarning, match=r"1 of the 2 steps done: the history is incomplete"):
        assert file.read(2) == rows[:1]
    file.complete(rows)
    assert file.read(2) == rows
    (tmp_path / "dir").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        MetricsFile(tmp_path / "dir", "run").read(1)


def test_scores_cover_model_and_control(tmp_path, config):
    run = finish(create_run(tmp_path / "run", config))
    held_out = score_run(run, run.corpus())
    found = summary(run, held_out)
    assert found["mode"] == "oracle"
    assert found["unit"] == "byte"
    assert found["n_sequences"] == 5
    assert found["control"]["ppl_elbo"] == found["control"]["ppl_iw"] > 1
    assert found["collapse"]["n_units"] == 8
    json.dumps(found, allow_nan=False)
    lines = per_sequence_csv(held_out).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("sequence,document,elbo,")
    assert lines[0].endswith("control_nll")
    again = score_run(load_run(run.folder), run.corpus())
    assert again.scores.identical(held_out.scores)


def test_prefix_and_prior_scores(tmp_path, config):
    run = finish(create_run(tmp_path / "run", dataclasses.replace(config, control=False)))
    corpus = run.corpus()
    prefix = score_run(run, corpus, mode="prefix", sequences=1000)
    assert int(prefix.scores["n_tokens"].max()) == 8
    assert len(prefix.batch) <= len(corpus.val)
    assert prefix.panel(1) is None
    assert prefix.control is None
    prior = score_run(run, corpus, mode="prior", split="test", sequences=2, draws=3)
    assert prior.post is None
    assert prior.scores.attrs["draws"] == 3
    assert summary(run, prior)["collapse"] is None
    assert "control_nll" not in per_sequence_csv(prior)


def test_the_control_counts_only_when_it_is_finished(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    train(run, run.corpus(), progress=False)
    assert score_run(run, run.corpus()).control is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "vall"}, "did you mean 'val'"),
        ({"sequences": 0}, "must be 1 or more"),
        ({"prefix": 3}, "a prefix is for mode 'prefix'"),
        ({"mode": "prefix", "prefix": 16}, "prefix is 16: .* at most 15"),
        ({"mode": "orakle"}, "did you mean 'oracle'"),
    ],
)
def test_scoring_refuses_what_it_cannot_do(tmp_path, config, arguments, message):
    run = create_run(tmp_path / "run", config)
    with pytest.raises(InputError, match=message):
        score_run(run, run.corpus(), **arguments)


def test_spread_covers_the_split(tmp_path, config):
    val = create_run(tmp_path / "run", config).corpus().val
    ids = spread(val, 3).ids.tolist()
    assert (ids[0], ids[-1], len(ids)) == (val.ids[0], val.ids[-1], 3)
    assert spread(val, 10**6).ids.tolist() == val.ids.tolist()


def test_spread_gives_every_document_its_share():
    val = load_corpus("pydoc", seq_len=256).val
    whole = np.bincount(val.batch(range(len(val))).documents, minlength=521)
    for count in (16, 64, 256):
        drawn = np.bincount(spread(val, count).documents, minlength=521)
        assert np.abs(drawn - whole * count / len(val)).max() <= 1.01  # rounding at the ends


def test_json_has_no_nan():
    assert json_value({"a": [float("nan"), 1.0], "b": float("inf"), "c": True}) == {
        "a": [None, 1.0],
        "b": None,
        "c": True,
    }


def test_tensor_files_are_plain_safetensors(tmp_path, config):
    run = create_run(tmp_path / "run", config)
    tensors = safetensors.torch.load_file(_tensors(run.folder))
    assert {name.split(".")[0] for name in tensors} == {"model"}
    assert torch.equal(tensors["model.decoder.bos"], run.model.decoder.bos)
