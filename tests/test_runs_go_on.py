"""Runs that go on: extended, stopped early, started from another run, with a best checkpoint."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import MICRO, environment, micro_fit, program, run_program, write_text
from known_models import make_oracle
from pyro.infer import Trace_ELBO

import ltm_pyro as ltm
from ltm_pyro.config import (
    CorpusConfig,
    Fast,
    FitConfig,
    HeldOut,
    ModelConfig,
    Slow,
    from_dict,
    merged,
    to_dict,
)
from ltm_pyro.data.base import Corpus
from ltm_pyro.diagnostics.held_out import held_out_bounds
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.schedules import (
    learning_rate,
    slow_kl_weight,
    thoughts_joined,
)
from ltm_pyro.inference.guides.registry import GUIDES
from ltm_pyro.run import Interrupted, Run, create_run, load_run, train, train_control
from ltm_pyro.run.extending import extend, restated
from ltm_pyro.run.fitting import finished_restarts

STEPS = 6


@pytest.fixture
def config(tmp_path) -> FitConfig:
    """A fit of a second that follows a held-out bound."""
    return micro_fit(
        write_text(tmp_path / "text.txt"),
        slow=Slow(kl_start=0.2, thoughts_start=0.4),
        held_out=HeldOut(every=2, sequences=5, draws=2, fast_steps=2),
        steps=STEPS,
        control=False,
        checkpoint_every=3,
    )


def finish(run: Run) -> Run:
    train(run, run.corpus(), progress=False)
    return run


def files(folder: Path) -> dict[str, bytes]:
    """What a fit has come to: every tensor, and the held-out columns of its metrics."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    with open(folder / "metrics.csv", newline="") as stream:
        rows = [
            {k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(stream)
        ]
    return {**found, "metrics": repr(rows).encode()}


def dies_at(step: int) -> type[ltm.Callback]:
    class Dies(ltm.Callback):
        def on_step(self, svi, row):
            if svi.slow_step == step:
                raise KeyboardInterrupt

    return Dies


def test_the_held_out_bound_is_in_the_metrics(tmp_path, config) -> None:
    run = finish(create_run(tmp_path / "run", config))
    assert list(held_out_bounds(run.metrics)) == [2, 4, 6]
    with open(run.folder / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [bool(row["held_out_elbo_se"]) for row in rows] == [False, True] * 3
    assert float(rows[-1]["held_out_elbo"]) == run.metrics[-1]["held_out_elbo"]
    assert load_run(run.folder).metrics == run.metrics


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_a_fit_that_dies_finds_the_same_bounds_to_the_bit(tmp_path, config, step) -> None:
    whole = finish(create_run(tmp_path / "whole", config))
    broken = create_run(tmp_path / "broken", config)
    with pytest.raises(KeyboardInterrupt):
        train(broken, broken.corpus(), progress=False, callbacks=[dies_at(step)()])
    finish(load_run(broken.folder))
    assert files(broken.folder) == files(whole.folder)


def test_a_fit_that_dies_between_last_and_best_keeps_both(tmp_path, config, monkeypatch) -> None:
    whole = finish(create_run(tmp_path / "whole", config))
    broken = create_run(tmp_path / "broken", config)

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save_best", die)
        with pytest.raises(KeyboardInterrupt):
            finish(broken)
    assert load_run(broken.folder).svi.slow_step == 2
    finish(load_run(broken.folder))
    assert files(broken.folder) == files(whole.folder)


def test_the_best_checkpoint_is_of_the_highest_bound(tmp_path, config) -> None:
    slow = Slow(lr=2.0, schedule="constant")  # soon worse than at the start
    run = finish(create_run(tmp_path / "run", dataclasses.replace(config, slow=slow)))
    bounds = held_out_bounds(run.metrics)
    best = max(bounds, key=bounds.__getitem__)
    assert best < STEPS
    chosen = load_run(run.folder, checkpoint="best")
    assert chosen.svi.slow_step == best == len(chosen.metrics)
    bound = ltm.HeldOutBound(chosen.corpus().val, sequences=5, draws=2, fast_steps=2)
    assert bound.score(chosen.svi)["held_out_elbo"] == bounds[best]
    with pytest.raises(InputError, match=r"best checkpoint of .* save_run"):
        chosen.save()
    with pytest.raises(InputError, match="checkpoint"):
        load_run(run.folder, checkpoint="first")
    plain = create_run(tmp_path / "plain", dataclasses.replace(config, held_out=HeldOut()))
    with pytest.raises(InputError, match=r"held_out\.every"):
        load_run(plain.folder, checkpoint="best")


def test_early_stopping_ends_a_fit_and_stays_ended(tmp_path, config) -> None:
    config = dataclasses.replace(
        config,
        steps=40,
        slow=Slow(lr=2.0, schedule="constant"),
        held_out=HeldOut(every=1, sequences=5, draws=2, fast_steps=2, patience=2),
    )
    run = finish(create_run(tmp_path / "run", config))
    ended = run.svi.slow_step
    assert ended < 40
    again = load_run(run.folder)
    assert again.last_step == ended == finish(again).svi.slow_step
    extend(again, {"held_out": {"patience": 0}})
    assert again.last_step == 40
    assert load_run(run.folder).last_step == 40


def test_an_extended_fit_keeps_what_it_has_passed() -> None:
    slow = Slow(kl_start=0.1, kl_hold=0.2, kl_full=0.5, thoughts_start=0.3, warmup=0.05)
    longer = restated(slow, 300, 700)
    for step in (*range(0, 300, 7), 299):
        assert thoughts_joined(longer, step, 700) == thoughts_joined(slow, step, 300)
        weight = slow_kl_weight(slow, step, 300)
        assert slow_kl_weight(longer, step, 700) == pytest.approx(weight, abs=1e-12)
    for step in range(15):  # the warm-up
        assert learning_rate(longer, step, 700) == pytest.approx(learning_rate(slow, step, 300))
    assert learning_rate(longer, 699, 700) == pytest.approx(slow.lr * slow.final_fraction)
    assert learning_rate(longer, 300, 700) > learning_rate(slow, 299, 300)


def test_a_finished_run_is_extended(tmp_path, config) -> None:
    run = finish(create_run(tmp_path / "run", config))
    lines = "\n".join(extend(run, {"steps": 10}))
    assert "from 6 to 10 slow steps" in lines
    assert "slow.thoughts_start 0.4 -> 0.2" in lines
    again = load_run(run.folder)
    assert again.config.steps == again.svi.horizon == 10
    assert again.svi.slow == again.config.slow == run.svi.slow
    [earlier] = again.facts["earlier"]
    assert (earlier["until_step"], earlier["steps"]) == (6, 6)
    assert earlier["slow"]["thoughts_start"] == 0.4
    broken = load_run(run.folder)
    with pytest.raises(KeyboardInterrupt):
        train(broken, broken.corpus(), progress=False, callbacks=[dies_at(8)()])
    finish(load_run(run.folder))
    assert load_run(run.folder).svi.slow_step == 10
    with pytest.raises(InputError, match=r"steps is 5 .* extended, not shortened"):
        extend(again, {"steps": 5})


@pytest.mark.parametrize("persistent", [False, True])
def test_a_loaded_run_is_fitted_further_and_opens_again(
    tmp_path, config, persistent, capsys
) -> None:
    config = dataclasses.replace(config, persistent=persistent, control=True)
    create_run(tmp_path / "run", config)
    run = load_run(tmp_path / "run")
    assert [row["step"] for row in run.fit(more=2, progress=False)] == [1, 2]
    assert load_run(run.folder).svi.slow_step == 2
    assert len(load_run(run.folder).fit(progress=False)) == STEPS - 2
    run = load_run(run.folder)
    assert len(run.fit(more=3)) == 3
    assert "Extended from 6 to 9" in capsys.readouterr().err
    again = load_run(run.folder)
    assert again.svi.slow_step == 9 == again.control().slow_step == again.config.steps
    again.svi.fit(again.corpus().train, 2, batch_size=8, progress=False)
    again.svi.fast = Fast(steps=3, lr=0.05)
    again.save()
    last = load_run(run.folder)
    assert (last.svi.slow_step, last.config.steps, last.config.fast.steps) == (11, 11, 3)
    assert last.metrics == again.metrics
    last.svi.slow = Slow(schedule=lambda step, total: 1.0)
    with pytest.raises(InputError, match="schedule is a function"):
        last.save()
    assert load_run(run.folder).svi.slow_step == 11


def test_a_callback_stops_a_run_and_is_told(tmp_path, config) -> None:
    run = create_run(tmp_path / "run", config)
    told = []

    class Once(ltm.Callback):
        def on_evaluate(self, svi, row):
            told.append(row["held_out_kl"])
            return True

        def on_stop(self, svi, reason):
            told.append(reason)

    assert len(run.fit(progress=False, callbacks=[Once()])) == 2
    assert told[1] == "stopped"
    assert load_run(run.folder).svi.slow_step == 2
    with pytest.raises(Interrupted):
        train(run, run.corpus(), progress=False, callbacks=[Once()])
    assert json.loads((run.folder / "config.json").read_text())["config"]["steps"] == STEPS
    assert torch.isfinite(run.model.decoder.bos).all()


def small_svi(corpus: Corpus, guide: str = "mean_field", **options) -> ltm.DualRateSVI:
    """A fit made in Python."""
    torch.manual_seed(0)
    model = ltm.LatentThoughtModel(
        ModelConfig(
            vocab_size=corpus.vocab_size, seq_len=16, n_layers=1, width=16, n_heads=2,
            mlp_hidden=16, thought_dim=4, window=4,
        )
    )  # fmt: skip
    built = ltm.build_guide(guide, model, **options.pop("guide_options", {}))
    return ltm.DualRateSVI(model, built, Fast(steps=2), Slow(lr=1e-3), **options)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return ltm.load_corpus(str(write_text(tmp_path / "book.txt")), seq_len=16)


@pytest.mark.parametrize(
    ("guide", "options"),
    [
        ("mean_field", {}),
        ("mean_field", {"persistent": True}),
        ("low_rank", {"guide_options": {"rank": 3}, "elbo": "stl"}),
        ("semi_amortized", {"seed": 4}),
    ],
)
def test_a_fit_made_in_python_is_saved_as_a_run(tmp_path, corpus, guide, options) -> None:
    svi = small_svi(corpus, guide, **options)
    svi.fit(corpus.train, 4, batch_size=6, progress=False)
    run = ltm.save_run(svi, tmp_path / "run", corpus=corpus)
    assert run.svi is svi
    again = load_run(tmp_path / "run")
    assert again.metrics == svi.metrics
    assert again.corpus().sha256 == corpus.sha256
    for name, value in svi.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    batch = corpus.val.batch([0])
    assert torch.equal(again.svi.infer(batch, 3).mean, svi.infer(batch, 3).mean)
    # Both go on alike, stored rows and AdamW's moments included.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copied = load_run(tmp_path / "copy").fit(more=2, progress=False)
    expected = run.fit(more=2, progress=False)
    assert [row["elbo"] for row in copied] == [row["elbo"] for row in expected]


def test_saving_never_replaces_unasked(tmp_path, corpus) -> None:
    svi = small_svi(corpus)
    ltm.save_run(svi, tmp_path / "run", corpus=corpus)
    with pytest.raises(InputError, match="exists"):
        ltm.save_run(svi, tmp_path / "run", corpus=corpus)
    svi.fit(corpus.train, 1, progress=False)
    ltm.save_run(svi, tmp_path / "run", corpus=corpus, overwrite=True)
    assert load_run(tmp_path / "run").svi.slow_step == 1
    memory = ltm.load_corpus([f"a text of number {i}, {i * i}" for i in range(60)], seq_len=16)
    other = small_svi(memory)
    run = ltm.save_run(other, tmp_path / "memory", corpus=memory)
    assert len(run.fit(memory, more=1, progress=False)) == 1
    with pytest.raises(InputError, match="memory of a program"):
        load_run(tmp_path / "memory").fit(more=1)


def _frozen(svi: ltm.DualRateSVI) -> ltm.DualRateSVI:
    svi.model.decoder.bos.requires_grad_(False)
    return ltm.DualRateSVI(svi.model, "mean_field")


UNSAVED = {
    "a function": lambda svi: setattr(svi, "slow", Slow(schedule=lambda *_: 1.0)),
    "LinearGaussian": lambda svi: ltm.DualRateSVI(make_oracle(), "mean_field"),
    "frozen": _frozen,
    "float32": lambda svi: ltm.DualRateSVI(svi.model.double(), "mean_field"),
    "build_guide": lambda svi: ltm.DualRateSVI(svi.model, GUIDES["low_rank"](svi.model, rank=2)),
    "elbo": lambda svi: ltm.DualRateSVI(svi.model, "mean_field", elbo=Trace_ELBO()),
}


@pytest.mark.parametrize("what", UNSAVED)
def test_what_a_run_cannot_record_is_refused_and_leaves_nothing(tmp_path, corpus, what) -> None:
    svi = small_svi(corpus)
    other = UNSAVED[what](svi) or svi
    with pytest.raises(InputError, match=what) as caught:
        ltm.save_run(other, tmp_path / "run", corpus=corpus)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_fit_starts_from_another_s_weights(tmp_path, config) -> None:
    config = dataclasses.replace(config, control=True)
    first = finish(create_run(tmp_path / "first", config))
    train_control(first, first.corpus(), progress=False)
    text = write_text(tmp_path / "other.txt", blocks=20)
    settings = dataclasses.replace(
        config, init_from=str(first.folder), corpus=CorpusConfig(name=str(text)), seed=3
    )
    second = create_run(tmp_path / "second", settings)
    again = load_run(second.folder)
    for one, other in ((first.model, again.model), (first.control().model, again.control().model)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
    assert (again.svi.slow_step, again.control().slow_step) == (0, 0)
    finish(again)
    shutil.rmtree(first.folder)
    assert load_run(second.folder).svi.slow_step == STEPS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"width": 32}}, r"model\.width"),
        ({"model": {"thought_dim": 8}}, r"model\.thought_dim"),
        ({"model": {"prior": "mixture"}}, r"model\.prior"),
        ({"corpus": {"tokenizer": "bpe", "options": {"vocab_size": 270}}}, "tokenizer"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, config, change, told) -> None:
    first = create_run(tmp_path / "first", config)
    values = merged(to_dict(config), {**change, "init_from": str(first.folder)})
    with pytest.raises(InputError, match=told) as caught:
        create_run(tmp_path / "second", from_dict(FitConfig, values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second").exists()


def test_ctrl_c_leaves_the_last_whole_step_saved(tmp_path, config) -> None:
    run = create_run(tmp_path / "run", dataclasses.replace(config, checkpoint_every=100))
    with pytest.raises(KeyboardInterrupt):
        run.fit(progress=False, callbacks=[dies_at(5)()])
    again = load_run(run.folder)
    assert again.svi.slow_step == 5 == len(again.metrics)
    again.fit(progress=False)
    whole = finish(create_run(tmp_path / "whole", config))
    assert files(run.folder) == files(whole.folder)


def test_restarts_are_fitted_from_python_too(tmp_path, config) -> None:
    run = create_run(tmp_path / "run", dataclasses.replace(config, restarts=3, steps=2))
    run.fit(progress=False)
    others = finished_restarts(run)
    assert [other.config.seed for other in others] == [1, 2]
    alone = finish(create_run(tmp_path / "alone", dataclasses.replace(config, seed=2, steps=2)))
    assert torch.equal(others[1].model.decoder.bos, alone.model.decoder.bos)
    run.fit(more=1, progress=False)
    assert [other.svi.slow_step for other in finished_restarts(run)] == [3, 3]


@pytest.mark.slow
def test_sigkill_then_resume_gives_the_same_bounds_to_the_bit(tmp_path) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    held = ["--held_out.every", "2", "--held_out.sequences", "3", "--held_out.fast_steps", "2"]
    given = ["fit", "--corpus", text, "--steps", "16", "--no-control", *MICRO, *held]
    assert run_program(*given, "--out", "whole", cwd=tmp_path).returncode == 0
    fit = subprocess.Popen(
        program(*given, "--out", "broken"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file = tmp_path / "broken" / "metrics.csv"
    while not file.exists() or file.read_text().count("\n") < 7:
        assert fit.poll() is None
        time.sleep(0.001)
    fit.kill()
    fit.wait()
    assert run_program("fit", "--resume", "--out", "broken", cwd=tmp_path).returncode == 0
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
