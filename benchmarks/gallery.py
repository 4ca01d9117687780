"""Makes docs/gallery.md and its figures: one of each kind, from a fit to a corpus with a truth.

    make demo
    python benchmarks/gallery.py runs/demo-mixture

Minutes on two cores; most are the fits of the sweep over beta and of the runs that are compared.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import ltm_pyro as ltm
from ltm_pyro import plots
from ltm_pyro.diagnostics.contraction import contraction
from ltm_pyro.diagnostics.decomposition import reconstruction_by_block, token_surprise
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.plots.style import png_bytes
from ltm_pyro.run import Run, create_run, train, train_control
from ltm_pyro.run.scoring import HeldOut, score_run
from ltm_pyro.tasks.embedding import interpolate

OUT = Path(__file__).resolve().parents[1] / "docs" / "gallery"
PAGE = OUT.with_suffix(".md")
LARGEST = 60_000  # bytes of an image
PIXELS = 800
HEAD = """\
# Gallery

Each figure is a function of `ltm_pyro.plots` that takes a result and returns a Matplotlib `Figure`,
with below it what it shows and what to conclude. Colours can be told apart without red and green.
Made by `benchmarks/gallery.py` from the demo's fit to `mixture`, the corpus whose classes only
thoughts can tell, and from the linear-Gaussian oracle.
"""

Entry = tuple[str, str, Callable[[], Figure]]
"""Title, the call as one writes it, and what makes the figure."""


def of_a_fit(run: Run, held_out: HeldOut) -> list[Entry]:
    """Figures of one run."""
    post, batch, scores, control = (
        held_out.post, held_out.batch, held_out.scores, held_out.control,
    )  # fmt: skip
    assert post is not None
    assert control is not None
    corpus, panel = run.corpus(), held_out.panel(run.config.model.n_layers)
    assert panel is not None
    labels = corpus.classes_of(batch).numpy()  # type: ignore[attr-defined]
    names = np.array([f"class {label}" for label in labels])
    some = batch.select(range(32))
    layers, thoughts = (
        reconstruction_by_block(run.model, post, batch, by=by) for by in ("layer", "thought")
    )
    told = token_surprise(run.model, post[:8], batch.select(range(8)), control=run.control().model)
    best = int(np.argmax((told["nll_without"] - told["nll"]).sum("token").values))
    steps = {
        t: ltm.evaluate(run.model, run.svi.infer(some, t), some, draws=64) for t in (2, 8, 32, 128)
    }
    reference = ltm.evaluate(run.control().model, None, some, draws=2, mode="prior")
    ends = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)[:2]]
    first, second = (batch.select([row]).texts()[0] for row in ends)
    texts = interpolate(run, first, second, n=6)
    return [
        ("The two clocks", "two_clock_curves(run.metrics, run.control_metrics())",
         lambda: plots.two_clock_curves(run.metrics, run.control_metrics())),
        ("Gain by document", "document_gains(scores, control)",
         lambda: plots.document_gains(scores, control)),
        ("Scores sequence by sequence", "score_panel(scores, control)",
         lambda: plots.score_panel(scores, control)),
        ("k-hat", "khat_histogram(scores)", lambda: plots.khat_histogram(scores)),
        ("Collapse panel", "collapse_bars(collapse_panel(post, scores, n_layers=2))",
         lambda: plots.collapse_bars(panel)),
        ("The ELBO, split", "elbo_split(by_layer, by_thought)",
         lambda: plots.elbo_split(layers, thoughts)),
        ("Reconstruction, layer by layer", "layer_reconstruction(by_layer)",
         lambda: plots.layer_reconstruction(layers)),
        ("Map of thoughts", 'thought_map(post, labels, name="class")',
         lambda: plots.thought_map(post, names, name="class (the truth)")),
        ("Posterior against prior", "posterior_against_prior(post)",
         lambda: plots.posterior_against_prior(post)),
        ("Posterior intervals", "thought_intervals(post)",
         lambda: plots.thought_intervals(post, sequences=2, thoughts=4, dims=8)),
        ("Token surprise", "token_surprise(surprise, batch)",
         lambda: plots.token_surprise(told, batch.select(range(8)), row=best, tokens=60)),
        ("Between two texts", "interpolation_strip(interpolate(run, first, second, n=6))",
         lambda: plots.interpolation_strip(texts)),
        ("Score against T_fast", "score_against_steps({2: scores_2, 8: scores_8, ...}, control)",
         lambda: plots.score_against_steps(steps, reference)),
        ("Fast loop", "fast_loop_traces(post)", lambda: plots.fast_loop_traces(post)),
    ]  # fmt: skip


def over_fits(run: Run, folder: Path) -> list[Entry]:
    """Figures of several fits: a sweep over beta, and runs side by side."""
    corpus = run.corpus()
    batch, by_beta = spread(corpus.val, 48), {}
    for beta in (0.1, 1.0, 4.0):
        config = dataclasses.replace(
            run.config, objective="beta", objective_options={"weight": beta}, control=False,
            steps=60, compile=False,
        )  # fmt: skip
        fit = create_run(folder / f"beta{beta}", config, corpus=corpus)
        train(fit, corpus, progress=False)
        by_beta[beta] = ltm.evaluate(fit.model, fit.svi.infer(batch, 32), batch, draws=32)
    control = ltm.evaluate(run.control().model, None, batch, draws=2, mode="prior")
    short = dataclasses.replace(run.config, steps=25, compile=False)
    slow = dataclasses.replace(short, fast=dataclasses.replace(short.fast, steps=4))
    runs = []
    for name, config in (("steps16", short), ("steps4", slow)):
        for seed in (0, 1):
            config = dataclasses.replace(config, seed=seed)
            fit = create_run(folder / f"{name}-{seed}", config, corpus=corpus)
            train(fit, corpus, progress=False)
            train_control(fit, corpus, progress=False)
            runs.append(fit)
    compared = ltm.compare_runs(runs, sequences=32, draws=8)
    return [
        ("Rate and distortion", "rate_distortion({0.1: scores, 1.0: scores, ...}, control)",
         lambda: plots.rate_distortion(by_beta, control)),
        ("Runs side by side", "run_comparison(compare_runs(folders))", compared.plot),
    ]  # fmt: skip


def of_the_oracle() -> list[Entry]:
    """Figures of what is known exactly."""
    torch.manual_seed(0)
    model = ltm.LinearGaussian(torch.randn(8, 8), noise_scale=0.7, shape=(4, 2))
    batch = model.simulate(48)

    def svi(family: str = "full_rank", **fast: object) -> ltm.DualRateSVI:
        clock = ltm.Fast(**{"steps": 64, "lr": 0.3, **fast})  # type: ignore[arg-type]
        return ltm.DualRateSVI(model, ltm.build_guide(family, model), fast=clock)

    narrow = svi("mean_field")
    fixed = svi("mean_field", noise="fixed", fixed_draws=4)
    ranks = ltm.sbc(model, narrow.infer, replications=400, draws=99)
    compared = ltm.compare(
        model, batch, ["mean_field", "low_rank", "full_rank"], budget=64, draws=1000,
        progress=False,
    )  # fmt: skip
    names = ["z[0,0]", "log_likelihood", "log_joint"]
    names = [name for name in names if name in ranks["quantity"].values] or None  # type: ignore[assignment]
    return [
        ("Calibration: ranks", "rank_plot(sbc(model, infer))",
         lambda: plots.rank_plot(ranks, names)),
        ("Calibration: ECDF with a band for the whole curve", "rank_plot(ranks, ecdf=True)",
         lambda: plots.rank_plot(ranks, names, ecdf=True)),
        ("Contraction", "contraction_plot(contraction(model, infer))",
         lambda: plots.contraction_plot(contraction(model, narrow.infer, 200))),
        ("Own draws against fresh draws", "own_against_fresh(score_on_own_draws(svi, batch))",
         lambda: plots.own_against_fresh(ltm.score_on_own_draws(fixed, batch))),
        ("Guides compared", "guide_comparison(compare(model, batch, guides))",
         lambda: plots.guide_comparison(compared)),
        ("Gaps", "gap_bars(gap_decomposition(svi, batch))",
         lambda: plots.gap_bars(ltm.gap_decomposition(narrow, batch, draws=256))),
        ("Is the fast loop long enough?", "convergence_curves(fast_convergence(svi, batch))",
         lambda: plots.convergence_curves(ltm.fast_convergence(narrow, batch))),
    ]  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """A PNG of 800 pixels or fewer across, small enough for a page."""
    data = png_bytes(figure, int(PIXELS / max(figure.get_figwidth(), 8.0)))
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LARGEST, path


def main() -> None:
    """Writes figures and page."""
    OUT.mkdir(exist_ok=True)
    run = ltm.load_run(sys.argv[1])
    held_out = score_run(run, run.corpus(), sequences=64, draws=1000)
    with tempfile.TemporaryDirectory() as folder:
        entries = [*of_a_fit(run, held_out), *of_the_oracle(), *over_fits(run, Path(folder))]
    parts = [HEAD]
    for title, call, draw in entries:
        name = "".join(c if c.isalnum() else "_" for c in call.partition("(")[0])
        name += "_ecdf" if "ecdf" in call else ""
        save(draw(), OUT / f"{name}.png")
        parts.append(
            f"## {title}\n\n```text\nplots.{call}\n```\n\n![{title}](gallery/{name}.png)\n"
        )
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"{len(entries)} figures in {OUT}")


if __name__ == "__main__":
    main()
