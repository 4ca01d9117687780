"""Callbacks of a fit: what they are told and when, how they stop it, and the held-out bound."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from known_models import LearnedOracle, make_oracle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ltm_pyro as ltm
from ltm_pyro.callbacks import Callback
from ltm_pyro.cli import main
from ltm_pyro.diagnostics.held_out import best_step, held_out_bounds

FAST = ltm.Fast(steps=4, lr=0.2)


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.told: list[Any] = []
        self.stop_at = stop_at

    def on_step(self, svi, row):
        assert row is svi.metrics[-1]
        self.told.append(svi.slow_step)
        return svi.slow_step == self.stop_at

    def on_evaluate(self, svi, row):
        self.told.append(("held out", svi.slow_step, row["held_out_elbo"]))

    def on_stop(self, svi, reason):
        self.told.append(reason)


def small_fit(**options: Any) -> tuple[ltm.DualRateSVI, ltm.Batch, ltm.Batch]:
    """A fit of the linear-Gaussian model, its data, and data held out."""
    svi = ltm.DualRateSVI(LearnedOracle(make_oracle()), "mean_field", FAST, seed=3, **options)
    data = make_oracle().simulate(60, seed=1)
    return svi, data.select(slice(0, 40)), data.select(slice(40, 60))


def test_callbacks_are_told_in_order_and_once_of_the_end() -> None:
    svi, data, held_out = small_fit()
    diary = Diary()
    bound = ltm.HeldOutBound(held_out, every=2)
    rows = svi.fit(data, 5, batch_size=8, progress=False, callbacks=[diary], held_out=bound)
    steps = [told for told in diary.told if isinstance(told, int)]
    held = [told[1] for told in diary.told if isinstance(told, tuple)]
    assert steps == [1, 2, 3, 4, 5]
    assert held == [2, 4, 5]  # every two steps, and at the end
    assert diary.told.index(2) + 1 == diary.told.index(("held out", 2, rows[1]["held_out_elbo"]))
    assert diary.told[-1] == "finished"
    assert diary.told.count("finished") == 1
    assert list(held_out_bounds(rows)) == held


@pytest.mark.parametrize("at", [1, 3])
def test_a_callback_stops_a_fit_after_a_whole_step(at: int) -> None:
    svi, data, _ = small_fit()
    diary, after = Diary(stop_at=at), Diary()
    rows = svi.fit(data, 6, batch_size=8, progress=False, callbacks=[diary, after])
    assert (len(rows), svi.slow_step, svi.whole) == (at, at, True)
    assert diary.told[-1] == after.told[-1] == "stopped"
    svi.fit(data, 6 - at, batch_size=8, progress=False)
    other, data, _ = small_fit()
    other.fit(data, 6, batch_size=8, progress=False)
    assert svi.metrics[-1]["elbo"] == other.metrics[-1]["elbo"]


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")]
)
def test_the_end_is_told_whatever_it_is(error: type[BaseException], reason: str) -> None:
    class Fails(Callback):
        def on_step(self, svi, row):
            raise error

    svi, data, _ = small_fit()
    diary = Diary()
    with pytest.raises(error):
        svi.fit(data, 3, batch_size=8, progress=False, callbacks=[diary, Fails()])
    assert diary.told == [1, reason]


def test_the_held_out_bound_changes_nothing_of_the_fit() -> None:
    plain, data, held_out = small_fit(persistent=True)
    watched, *_ = small_fit(persistent=True)
    plain.fit(data, 6, batch_size=8, progress=False)
    bound = ltm.HeldOutBound(held_out, every=1)
    watched.fit(data, 6, batch_size=8, progress=False, held_out=bound)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name])
    assert len(plain.store) == len(watched.store) <= 40


def test_the_held_out_bound_is_the_elbo_that_its_error_covers() -> None:
    svi, _, held_out = small_fit()
    bound = ltm.HeldOutBound(held_out, draws=64, fast_steps=200)
    row = bound.score(svi)
    post = svi.infer(held_out, 200)
    exact = svi.model.log_evidence(held_out).detach()
    scores = ltm.evaluate(svi.model, post, held_out, draws=4096)
    difference = row["held_out_elbo"] - float(scores["elbo"].mean())
    # Another fast loop's noise is in it too: small against the Monte Carlo error of 64 draws.
    assert abs(difference) < 5 * row["held_out_elbo_se"]
    assert row["held_out_elbo"] < float(exact.mean()) + 5 * row["held_out_elbo_se"]
    spread = float(scores["elbo"].values.std(ddof=1)) / np.sqrt(len(held_out))
    assert row["held_out_elbo_sampling_se"] == pytest.approx(spread, rel=0.2)
    tokens = int(held_out.n_tokens.sum())
    per_token = row["held_out_elbo"] * len(held_out) / tokens
    assert row["held_out_elbo_per_token"] == pytest.approx(per_token)


def test_noise_is_a_function_of_seed_step_and_sequence() -> None:
    svi, _, held_out = small_fit()
    bound = ltm.HeldOutBound(held_out)
    first = bound.score(svi)
    torch.manual_seed(99)  # global random numbers play no part
    assert bound.score(svi) == first
    svi.slow_step += 1
    assert bound.score(svi) != first  # fresh draws at each step


def test_a_point_mass_has_a_log_joint_and_no_bound() -> None:
    svi = ltm.DualRateSVI(make_oracle(), "delta", FAST)
    row = ltm.HeldOutBound(make_oracle().simulate(10)).score(svi)
    assert "held_out_log_joint" in row
    assert "held_out_elbo" not in row


@pytest.mark.parametrize(
    ("bounds", "patience", "over"),
    [([], 1, False), ([1.0], 1, False), ([1, 2, 3], 1, False), ([3, 2], 1, True),
     ([3, 2], 2, False), ([1, 3, 2, 2.5], 2, True), ([1, 3, 3, 2], 2, True), ([3, 1, 4], 2, False)],
)  # fmt: skip
def test_patience_counts_bounds_since_the_best(bounds, patience, over) -> None:
    rows = [{"step": 2.0 * i, "held_out_elbo": b} for i, b in enumerate(bounds, start=1)]
    rows.insert(0, {"step": 1.0})
    assert ltm.EarlyStopping(patience).over(rows) is over


def test_early_stopping_stops_a_fit_that_gets_worse() -> None:
    svi, data, held_out = small_fit(slow=ltm.Slow(lr=3.0, schedule="constant"))
    bound = ltm.HeldOutBound(held_out, every=1)
    rows = svi.fit(
        data, 60, batch_size=8, progress=False, callbacks=[ltm.EarlyStopping(3)], held_out=bound
    )
    best = best_step(rows)
    assert best is not None
    assert len(rows) == best + 3 < 60


WRONG = {
    "callbacks": [7, "watch", Diary, [Diary], [print], {Diary()}],
    "held_out": [HELD := "val", ltm.HeldOutBound, 50],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, some in WRONG.items() for v in some])
def test_what_is_no_callback_is_refused_before_the_first_step(name: str, value: Any) -> None:
    svi, data, _ = small_fit()
    with pytest.raises(ltm.InputError, match=name) as caught:
        svi.fit(data, 2, progress=False, **{name: value})
    assert "\n" not in str(caught.value)
    assert svi.slow_step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": 1.5},
        {"sequences": 0},
        {"draws": 1},
        {"fast_steps": 0},
        {"data": "a"},
    ],
)
def test_a_held_out_bound_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ltm.InputError, match=next(iter(options))):
        ltm.HeldOutBound(**{"data": make_oracle().simulate(4), **options})
    with pytest.raises(ltm.InputError, match="patience"):
        ltm.EarlyStopping(0)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard reads: values by step, by tag."""
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {
        tag: {event.step: event.value for event in reader.Scalars(tag)}
        for tag in reader.Tags()["scalars"]
    }


def test_tensorboard_reads_the_metrics_and_a_fit_that_goes_on(tmp_path: Path) -> None:
    svi, data, held_out = small_fit()
    bound = ltm.HeldOutBound(held_out, every=2)
    board = ltm.TensorBoard(tmp_path / "events")
    svi.fit(data, 4, batch_size=8, progress=False, callbacks=[board], held_out=bound)
    found = scalars(tmp_path / "events")
    assert found["fit/elbo"] == pytest.approx({r["step"]: r["elbo"] for r in svi.metrics})
    assert list(found["held_out/elbo"]) == [2, 4]
    # As after a kill: steps 3 and 4 are done again.
    svi.slow_step, svi.horizon = 2, 4
    again = ltm.TensorBoard(tmp_path / "events")
    svi.fit(data, 2, batch_size=8, progress=False, callbacks=[again])
    assert list(scalars(tmp_path / "events")["fit/elbo"]) == [1, 2, 3, 4]


def test_without_tensorboard_a_line_says_how_to_get_it(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ltm.InputError, match=r"pip install 'ltm-pyro\[tensorboard\]'"):
        ltm.TensorBoard(tmp_path / "events")
    assert main(["fit", "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_live_figure_is_drawn_anew(monkeypatch) -> None:
    with pytest.raises(ltm.InputError, match="notebook"):
        ltm.plots.LiveFigure()
    drawn: list[Any] = []
    handle = SimpleNamespace(update=drawn.append)
    fake = SimpleNamespace(get_ipython=lambda: 1, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    display = SimpleNamespace(display=lambda figure, display_id: drawn.append(figure) or handle)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    svi, data, held_out = small_fit()
    bound = ltm.HeldOutBound(held_out, every=2)
    live = ltm.plots.LiveFigure(every=2)
    svi.fit(data, 5, batch_size=8, progress=False, callbacks=[live], held_out=bound)
    assert len(drawn) == 3  # steps 2 and 4, and the end
    labels = drawn[-1].axes[0].get_legend_handles_labels()[1]
    assert "ELBO, held-out text" in labels
    with pytest.raises(ltm.InputError, match="every"):
        ltm.plots.LiveFigure(every=0)
