"""What objects say of themselves at a prompt or as the last line of a notebook's cell."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from known_models import make_oracle

import ltm_pyro as ltm
from ltm_pyro.course import Course
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.collapse import collapse_panel

LONGEST = 160  # characters: two lines of a terminal


def test_a_fit_and_what_it_gives_are_told_in_a_line() -> None:
    oracle = make_oracle()
    svi = ltm.DualRateSVI(oracle, ltm.build_guide("mean_field", oracle), ltm.Fast(steps=2))
    assert "0 slow steps" in repr(svi)
    batch = oracle.simulate(50)
    rows = svi.fit(batch, steps=3, batch_size=4, progress=False)
    post = svi.infer(batch)
    for thing in (svi, rows, svi.metrics, post, batch, batch.unobserved()):
        told = repr(thing)
        assert len(told) <= LONGEST
        assert "\n" not in told
        assert "tensor(" not in told
    assert "3 slow steps" in repr(svi)
    assert "50 sequences" in repr(post)
    assert "mean_field" in repr(post)
    assert repr(Course()) == "Course(no slow step yet)"


def test_settings_tell_what_is_not_their_default() -> None:
    assert repr(ltm.Fast(steps=3)) == "Fast(steps=3)"
    config = ltm.FitConfig(steps=2, fast=ltm.Fast(lr=0.5), guide_options={"rank": 1})
    assert eval(repr(config), vars(ltm)) == config
    assert len(repr(config)) < LONGEST
    assert "warmup_cosine" in config.slow._repr_html_()  # type: ignore[attr-defined]
    assert len(repr(ltm.Execution())) < LONGEST


TRAP = "<script>alert(1)</script>"


def test_objects_show_themselves_in_a_line_and_as_html_that_is_escaped() -> None:
    texts = [f"{TRAP} {number} and some more of a text " * 3 for number in range(12)]
    given = pd.DataFrame({"text": texts, "author": [TRAP, "b", "c"] * 4})
    corpus = ltm.load_corpus(given, seq_len=16, fractions=(0.4, 0.4, 0.2))
    model = ltm.LatentThoughtModel(
        ltm.ModelConfig(seq_len=16, n_layers=1, width=16, n_heads=2, mlp_hidden=16, thought_dim=4)
    )
    svi = ltm.DualRateSVI(model, "mean_field", ltm.Fast(steps=2))
    svi.fit(corpus.val, steps=2, batch_size=2, progress=False)
    batch = corpus.val.batch(range(4))
    post = svi.infer(batch)
    things = [
        corpus, corpus.val, model, model.thought_prior, svi.guide, svi, svi.metrics, batch, post,
        ltm.simulate(model, 2), ltm.compare(model, batch, ["mean_field", "delta"], budget=2),
        ltm.diagnose(model, post, batch, draws=100, steps=1, chains=0),
        ltm.sample_posterior(model, batch.select([0]), warmup=50, draws=20, progress=False),
        collapse_panel(post, ltm.evaluate(model, post, batch, 4)),
    ]  # fmt: skip
    for thing in things:
        told = repr(thing)
        assert len(told) <= LONGEST, told
        assert "\n" not in told
        if thing is things[3] or thing is things[9]:
            continue  # small parts, a line is enough
        html = thing._repr_html_()  # type: ignore[attr-defined]
        assert html.startswith("<div>")
        assert html.endswith("</div>")
        assert "<script" not in html
        assert len(html) < 20_000
    assert "&lt;script" in batch._repr_html_()


def test_the_course_of_a_fit_is_a_frame() -> None:
    oracle = make_oracle()
    svi = ltm.DualRateSVI(oracle, ltm.build_guide("mean_field", oracle), ltm.Fast(steps=2))
    rows = svi.fit(oracle.simulate(8), steps=3, batch_size=4, progress=False)
    frame = rows.frame()
    assert frame.index.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(frame["elbo"], [row["elbo"] for row in rows])
    assert "<table" in rows._repr_html_()
    np.testing.assert_array_equal(svi.metrics["elbo"], frame["elbo"])
    assert svi.metrics[["elbo", "kl"]].shape == (3, 2)
    assert svi.metrics.tail(2).index.tolist() == [2, 3]
    assert svi.metrics[-1] == rows[2]
    assert repr(svi.metrics[1:]).startswith("Course(slow steps 2 to 3")
    assert copy.deepcopy(svi.metrics) == pickle.loads(pickle.dumps(svi.metrics)) == svi.metrics
    assert len(Course().frame()) == 0


def test_a_posteriors_sd_is_that_of_its_draws() -> None:
    oracle = make_oracle()
    for family in ltm.guide_families():
        post = ltm.DualRateSVI(oracle, ltm.build_guide(family, oracle)).infer(oracle.simulate(2))
        draws = post.sample(4_000, seed=0)
        # 4,000 draws tell an sd to 1.1 %; a flow's own is from draws too.
        assert torch.allclose(post.sd, draws.std(0), rtol=0.08, atol=1e-6), family


def test_a_long_inference_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = make_oracle()
    svi = ltm.DualRateSVI(oracle, "mean_field", ltm.Fast(steps=50))
    svi.infer(oracle.simulate(4))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("ltm_pyro.inference.clocks.fast_posterior.QUIET_SECONDS", 0.0)
    svi.infer(oracle.simulate(4))
    assert "infer" in capsys.readouterr().err
    svi.infer(oracle.simulate(4), progress=False)
    assert capsys.readouterr().err == ""


def test_a_batch_by_hand_tells_its_shape() -> None:
    assert repr(Batch(torch.zeros(2, 3, dtype=torch.long))) == "Batch(2 x 3 sequences)"
