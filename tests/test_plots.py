from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ltm_pyro import plots
from ltm_pyro.config import Fast, ModelConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.collapse import collapse_panel
from ltm_pyro.diagnostics.contraction import contraction
from ltm_pyro.diagnostics.decomposition import reconstruction_by_block, token_surprise
from ltm_pyro.diagnostics.published import score_on_own_draws
from ltm_pyro.errors import InputError
from ltm_pyro.export import to_datatree
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussian

UNITS = (
    *("nats", "step", "rate", "weight", "sequence", "dimension", "s.d.", "score", "scales"),
    *("document", "thought", "component", "token", "k-hat", "variance", "density", "share"),
    *("error", "layer"),
)


def infer(n: int = 6, steps: int = 8, family: str = "mean_field") -> tuple[Posterior, Batch]:
    oracle = model()
    batch = oracle.simulate(n)
    svi = DualRateSVI(oracle, build_guide(family, oracle), fast=Fast(lr=0.3))  # type: ignore[arg-type]
    return svi.infer(batch, steps), batch


def model() -> LinearGaussian:
    return LinearGaussian(torch.eye(4, 8), noise_scale=0.5, shape=(4, 2))


def metrics(n: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, n + 1):
        nll, kl = 100 + 300 / step + rng.normal(), 5 + rng.random()
        rows.append(
            {
                "step": float(step), "elbo": -nll - kl, "nll": nll, "kl": kl,
                "kl_weight": min(1.0, step / n), "lr_fast": 0.1, "lr_slow": 1e-3,
            }
        )  # fmt: skip
    return rows


def scores(post: Posterior, batch: Batch) -> xr.Dataset:
    return evaluate(model(), post, batch, draws=40)  # type: ignore[arg-type]


def pictures() -> dict[str, Figure]:
    """Figures of a language model too small to be any good, and of what is said about it."""
    words, post, batch, table = language()
    documents = [table, table.assign(elbo=table["elbo"] + 1.0, kl=table["kl"] * 2.0)]
    judged = evaluate(words, post, batch, draws=1000)
    by_layer = reconstruction_by_block(words, post, batch, draws=4)
    oracle, rows = infer(24)
    fixed = Fast(steps=8, lr=0.3, noise="fixed")
    own = DualRateSVI(model(), build_guide("mean_field", model()), fast=fixed)  # type: ignore[arg-type]
    return {
        "collapse": plots.collapse_bars(collapse_panel(post, table, n_layers=2)),
        "documents": plots.document_gains(table, table),
        "k-hat": plots.khat_histogram(judged),
        "map": plots.thought_map(post, ["<b>$a$ \N{GRINNING FACE}\0", "b"] * 6, name="author $"),
        "map by lists": plots.thought_map(oracle, pd.Series([["a"], ["b", "c"]] * 12)),
        "map by a number": plots.thought_map(oracle, np.arange(24), name="position"),
        "posterior and prior": plots.posterior_against_prior(oracle),
        "split": plots.elbo_split(
            by_layer, reconstruction_by_block(words, post, batch, by="thought", draws=4)
        ),
        "layers": plots.layer_reconstruction(by_layer),
        "tokens": plots.token_surprise(token_surprise(words, post, batch, draws=2)),
        "between": plots.interpolation_strip(["one $ \N{GRINNING FACE}", "another", "a third\0"]),
        "plane": plots.rate_distortion({0.5: documents[0], 1.0: documents[1]}, table),
        "own draws": plots.own_against_fresh(score_on_own_draws(own, rows, draws=8)),
        "fast steps": plots.score_against_steps({4: documents[0], 8: documents[1]}, table),
        "contraction": plots.contraction_plot(
            contraction(model(), own.infer, replications=20)
        ),
    }  # fmt: skip


def language() -> tuple[LatentThoughtModel, Posterior, Batch, xr.Dataset]:
    """A tiny language model, q of 12 sequences of 6 documents, and their scores."""
    shape = ModelConfig(
        vocab_size=7, seq_len=9, n_layers=2, width=8, n_heads=2, mlp_hidden=8,
        thoughts_per_layer=2, thought_dim=2,
    )  # fmt: skip
    torch.manual_seed(0)
    words = LatentThoughtModel(shape)
    for layer in words.decoder.layers:  # cross-attention starts at 0, where thoughts say nothing
        torch.nn.init.normal_(layer.cross_attention.out.weight)  # type: ignore[union-attr]
    mask = torch.ones(12, 9, dtype=torch.bool)
    mask[3, 5:] = False
    batch = Batch(torch.randint(7, (12, 9)), mask, documents=torch.arange(12) // 2)
    svi = DualRateSVI(words, build_guide("mean_field", words), fast=Fast(steps=4, lr=0.3))
    post = svi.infer(batch)
    return words, post, batch, evaluate(words, post, batch, draws=8)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    """One of each, drawn without a trace."""
    style = dict(mpl.rcParams)
    post, batch = infer()
    table = scores(post, batch)
    figures = {
        "two clocks": plots.two_clock_curves(metrics(60)),
        "two clocks with control": plots.two_clock_curves(metrics(60), metrics(60)),
        "fast loop": plots.fast_loop_traces(post),
        "intervals of a posterior": plots.thought_intervals(post),
        "intervals of a tree": plots.thought_intervals(to_datatree(post, draws=50)),
        "scores": plots.score_panel(table),
        "scores with control": plots.score_panel(table, table),
        **pictures(),
    }
    assert dict(mpl.rcParams) == style
    assert plt.get_fignums() == []
    return figures


def caption(figure: Figure) -> str:
    (text,) = [text for text in figure.texts if text.get_gid() == "caption"]
    return text.get_text().replace("\n", " ")


def test_figures_say_what_they_show(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        panels = [axes for axes in figure.axes if axes.get_subplotspec()]  # no colour bars
        outer = [axes for axes in panels if axes.get_subplotspec().is_first_col()]
        lowest = [axes for axes in panels if axes.get_subplotspec().is_last_row()]
        for label in [*(a.get_ylabel() for a in outer), *(a.get_xlabel() for a in lowest)]:
            assert any(unit in label for unit in UNITS), f"{name}: {label!r} has no unit"
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        if name not in ("map by a number", "between"):  # a colour bar; texts
            assert legends + figure.legends, f"{name} has no legend"
        assert len(caption(figure)) > 100, f"{name} has no caption"
        assert "ppl" not in caption(figure)


def test_scores_over_a_control_claim_no_more_than_is_proved(drawn: dict[str, Figure]) -> None:
    said = caption(drawn["scores with control"])
    assert "this fit" in said
    assert "not that thoughts are why" in said
    assert "proves" not in said
    assert "not judged" in said or "the limit at S" in said  # k-hat, with its S


def test_nothing_overlaps_and_nothing_is_cut_off(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        frame = figure.bbox
        (text,) = [text for text in figure.texts if text.get_gid() == "caption"]
        below = text.get_window_extent()
        assert below.x1 <= frame.x1, f"{name}: the caption is wider than the figure"
        assert below.y0 >= 0, f"{name}: the caption is cut off"
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box is not None
            assert box.y0 >= below.y1, f"{name}: axes and caption overlap"
            assert box.x0 >= -1, name
            assert box.x1 <= frame.x1 + 1, f"{name}: {axes.get_title(loc='left')} is cut off"
            legend, title = axes.get_legend(), axes._left_title  # type: ignore[attr-defined]
            if legend is not None and title.get_text():
                assert title.get_window_extent().x1 < legend.get_window_extent().x0, (
                    f"{name}: title {title.get_text()!r} runs into its legend"
                )


def texts_drawn(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text as it is drawn, ticks included, and where."""
    found: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def record(text: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return found


def test_no_label_lies_on_another_and_no_panel_is_empty(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        for (one, box), (other, beside) in combinations(texts_drawn(figure), 2):
            common = Bbox.intersection(box, beside)
            touch = common is not None and min(common.width, common.height) > 1  # pixels
            assert not touch, f"{name}: {one!r} lies on {other!r}"
        for axes in figure.axes:
            assert axes.has_data() or axes.texts, f"{name}: {axes.get_title('left')!r} is empty"


def test_saving_is_atomic_and_reproducible(tmp_path: Path) -> None:
    figure = plots.two_clock_curves(metrics(50))
    first = plots.save_figure(figure, tmp_path / "a.png", dpi=50)
    plots.save_figure(plots.two_clock_curves(metrics(50)), tmp_path / "b.png", dpi=50)
    assert first.read_bytes() == (tmp_path / "b.png").read_bytes()
    assert imread(first).std() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(InputError, match="cannot write"):
        plots.save_figure(figure, tmp_path / "absent" / "a.png")


def test_a_notebook_shows_figures_without_a_pyplot_backend(drawn: dict[str, Figure]) -> None:
    from IPython.core.formatters import DisplayFormatter

    for figure in drawn.values():
        shown, _ = DisplayFormatter().format(figure)
        assert shown["image/png"].startswith(b"\x89PNG")


def test_two_clocks_draw_what_they_are_given() -> None:
    rows = metrics(30)  # too few to smooth
    figure = plots.two_clock_curves(rows, control=rows)
    main = figure.axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in main.lines}
    np.testing.assert_allclose(lines["ELBO"], [row["elbo"] for row in rows])
    np.testing.assert_allclose(lines["reconstruction"], [-row["nll"] for row in rows])
    np.testing.assert_allclose(lines["control without z"], [-row["nll"] for row in rows])
    assert "below the control" in caption(figure)
    better = [{**row, "nll": row["nll"] + 50} for row in rows]
    assert "above the control" in caption(plots.two_clock_curves(rows, control=better))
    assert "mean of the last" in caption(plots.two_clock_curves(metrics(90)))
    assert "mean of the last" not in caption(figure)


def test_one_step_and_one_sequence_are_drawn() -> None:
    post, batch = infer(1, steps=1)
    for figure in (
        plots.two_clock_curves(metrics(1), metrics(1)),
        plots.fast_loop_traces(post),
        plots.thought_intervals(post),
        plots.score_panel(scores(post, batch)),
    ):
        assert caption(figure)
        assert any(axes.has_data() for axes in figure.axes)


def test_a_point_mass_is_drawn() -> None:
    post, _ = infer(family="delta")
    for figure in (plots.fast_loop_traces(post), plots.thought_intervals(post)):
        assert caption(figure)
        assert any(axes.has_data() for axes in figure.axes)


def test_intervals_say_what_they_leave_out() -> None:
    post, _ = infer()
    few, _ = infer(2)
    assert "Shown" not in caption(plots.thought_intervals(few))
    figure = plots.thought_intervals(post, sequences=2, thoughts=3, dims=1)
    assert "the first 2 of 6 sequences, 3 of 4 thoughts, 1 of 2 dims" in caption(figure)
    assert len(figure.axes) == 6


def test_intervals_of_the_prior_fill_its_band() -> None:
    post, _ = infer(steps=0)
    figure = plots.thought_intervals(post)
    assert "0% of the medians" in caption(figure)
    segments = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(segments[0][:, 1], [-1.645, 1.645], atol=0.25)


def test_large_posteriors_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    post, _ = infer(2)
    monkeypatch.setattr("ltm_pyro.plots.thoughts._FLOATS_AT_ONCE", 100)
    figure = plots.thought_intervals(post, sequences=1, thoughts=1)
    median = figure.axes[0].lines[-1].get_ydata()
    np.testing.assert_allclose(median, post.mean[0, 0], atol=0.2)  # 5 standard errors


def test_what_cannot_be_drawn_is_named() -> None:
    post, batch = infer()
    with pytest.raises(InputError, match="no metrics"):
        plots.two_clock_curves([])
    with pytest.raises(InputError, match="no course"):
        plots.fast_loop_traces(infer(steps=0)[0])
    with pytest.raises(InputError, match="1 or more"):
        plots.thought_intervals(post, dims=0)
    with pytest.raises(InputError, match="to_datatree"):
        plots.thought_intervals(xr.DataTree())
    table = scores(post, batch)
    with pytest.raises(InputError, match="other sequences"):
        plots.score_panel(table, table.isel(sequence=[0]))


def test_the_gallery_shows_every_figure() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "gallery.md").read_text(encoding="utf-8")
    for name in set(plots.__all__) - {"save_figure", "LiveFigure"}:
        assert f"plots.{name}(" in page, f"run benchmarks/gallery.py with {name} in it"
    for image in (docs / "gallery").iterdir():
        assert f"(gallery/{image.name})" in page
        assert image.stat().st_size < 60_000
        assert imread(image).std() > 0.01
