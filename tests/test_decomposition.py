"""Where the nats are: parts that add up to scores, and contraction against the exact posterior."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from test_plots import infer, language, model

from ltm_pyro import plots
from ltm_pyro.config import Fast
from ltm_pyro.diagnostics.contraction import contraction
from ltm_pyro.diagnostics.control import gains_by_document
from ltm_pyro.diagnostics.decomposition import reconstruction_by_block, token_surprise
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide


@pytest.mark.parametrize("by", ["layer", "thought"])
def test_parts_add_up_to_the_scores(by: str) -> None:
    words, post, batch, scores = language()
    parts = reconstruction_by_block(words, post, batch, by=by, draws=8)  # type: ignore[arg-type]
    # The same draws: what is left is rounding of single-precision sums.
    np.testing.assert_allclose(parts["nll"][0], scores["nll_z0"], rtol=1e-5)
    np.testing.assert_allclose(parts["nll"][-1], scores["nll_given_z"], rtol=1e-5)
    np.testing.assert_allclose(parts["kl"].sum("block"), scores["kl"], rtol=1e-4)
    assert parts.sizes["kept"] == (3 if by == "layer" else 5)
    assert ((parts["accuracy"] >= 0) & (parts["accuracy"] <= 1)).all()


def test_tokens_add_up_to_the_scores() -> None:
    words, post, batch, scores = language()
    told = token_surprise(words, post, batch, draws=8)
    np.testing.assert_allclose(told["nll"].sum("token"), scores["nll_given_z"], rtol=1e-5)
    np.testing.assert_allclose(told["nll_without"].sum("token"), scores["nll_z0"], rtol=1e-5)
    assert told["nll"].isnull().sum() == 4  # the padding
    assert told.attrs["without"] == "z = 0"


def test_documents_have_the_means_of_their_sequences() -> None:
    _, _, _, scores = language()
    gains = gains_by_document(scores, scores)
    wanted = (scores["elbo"] + scores["nll_z0"]).groupby("document").mean()
    np.testing.assert_allclose(gains["elbo_gain"], wanted)
    assert gains["sequences"].values.tolist() == [2] * 6
    assert int(gains["tokens"].sum()) == int(scores["n_tokens"].sum())


def test_contraction_of_the_exact_posterior() -> None:
    oracle = model()  # x = W z + 0.5 noise with W'W = 1 on 4 of 8 dimensions
    svi = DualRateSVI(oracle, build_guide("full_rank", oracle), fast=Fast(steps=150, lr=0.1))
    found = contraction(oracle, svi.infer, replications=200)
    # Of 1,600 z-scores the mean square has a standard error of sqrt(2 / 1600) = 0.035; q is not
    # fitted to the end.
    assert float((found["z_score"] ** 2).mean()) == pytest.approx(1.0, abs=0.2)
    shrunk = found["contraction"].mean("replication").values
    seen = shrunk > 0.4
    assert seen.sum() == 4
    # 1 - 0.25 / 1.25 of what is seen; the prior's variance is that of 4,000 draws.
    np.testing.assert_allclose(shrunk[seen], 0.8, atol=0.08)
    np.testing.assert_allclose(shrunk[~seen], 0.0, atol=0.15)


def test_a_map_of_two_dimensions_keeps_distances() -> None:
    post, _ = infer(8)
    figure = plots.thought_map(post)
    place = np.asarray(figure.axes[0].collections[0].get_offsets())
    mean = post.mean.flatten(1).numpy()
    centred = mean - mean.mean(0)
    kept = np.linalg.svd(centred, compute_uv=False)[:2]
    np.testing.assert_allclose(np.linalg.svd(place, compute_uv=False), kept, rtol=1e-5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda post, scores: plots.thought_map(post[:2]),
        lambda post, scores: plots.thought_map(post, ["a"]),
        lambda post, scores: plots.thought_map(post, method="tsne"),
        lambda post, scores: plots.khat_histogram(scores),
        lambda post, scores: plots.elbo_split(),
        lambda post, scores: plots.elbo_split(scores),
        lambda post, scores: plots.layer_reconstruction(scores),
        lambda post, scores: plots.token_surprise(scores),
        lambda post, scores: plots.interpolation_strip("text"),
        lambda post, scores: plots.rate_distortion({1.0: scores}),
        lambda post, scores: plots.own_against_fresh(scores),
        lambda post, scores: plots.score_against_steps({8: scores}),
        lambda post, scores: plots.contraction_plot(scores),
    ],
)
def test_what_cannot_be_drawn_is_told(draw) -> None:
    _, post, _, scores = language()
    with pytest.raises(InputError):
        draw(post, scores)


def test_umap_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(InputError, match="umap-learn"):
        plots.thought_map(infer(8)[0], method="umap")
