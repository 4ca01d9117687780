"""Runs compared: paired by document and by seed, in units that all of them share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from cli_helpers import write_text

import ltm_pyro as ltm
from ltm_pyro.cli import main
from ltm_pyro.config import CorpusConfig, FitConfig, ModelConfig
from ltm_pyro.diagnostics.estimates import clustered_ratio
from ltm_pyro.errors import InputError
from ltm_pyro.run import create_run
from ltm_pyro.run.run_comparison import RunComparison, clustered_contrast

ROUNDING = 1e-12  # of float64
FRACTIONS = {"fractions": [0.5, 0.4, 0.1]}
MODEL = ModelConfig(seq_len=16, n_layers=1, width=16, n_heads=2, mlp_hidden=16, thought_dim=4)


def config(text: Path, tokenizer: str = "bytes", seq_len: int = 16, **changes) -> FitConfig:
    options = FRACTIONS if tokenizer == "bytes" else {**FRACTIONS, "vocab_size": 270}
    settings = {
        "steps": 2, "batch_size": 4, "compile": False, "eval_draws": 4, "eval_fast_steps": 2,
        "eval_sequences": 30, **changes,
    }  # fmt: skip
    shape = {**MODEL.__dict__, "seq_len": seq_len}
    corpus = CorpusConfig(name=str(text), tokenizer=tokenizer, options=options)
    return FitConfig(corpus=corpus, model=ModelConfig(**shape), **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs at step 0: their scores differ as their initial weights and tokens do."""
    folder = tmp_path_factory.mktemp("runs")
    text = write_text(folder / "text.txt", 40)
    made = {
        "a0": config(text),
        "a1": config(text, seed=1),
        "b0": config(text, guide="low_rank", guide_options={"rank": 1}, eval_sequences=9),
        "bpe": config(text, tokenizer="bpe"),
        "long": config(text, seq_len=32),
    }
    return {name: create_run(folder / name, c).folder for name, c in made.items()}


def test_runs_that_differ_in_seed_only_are_one_group(runs: dict[str, Path]) -> None:
    found = ltm.compare_runs([runs["a0"], runs["a1"], runs["b0"]], progress=False)
    assert list(found.settings.columns) == ["guide", "guide_options.rank"]
    frame = found.frame()
    assert list(frame.index) == ["guide=mean_field", "b0"]
    assert list(frame["fits"]) == [2, 1]
    assert list(frame["seeds"]) == ["0 1", "0"]
    told = str(found)
    assert "b0: one fit" in told
    assert "guide_options.rank: -, 1" in told
    assert "Not fitted to the end" in told
    np.testing.assert_allclose(
        frame["elbo_fit_sd_per_byte"].iloc[0], found.fits(frame.index[0]).std(), rtol=ROUNDING
    )
    # The largest of the numbers of sequences that their settings name.
    assert found.dataset.attrs["n_sequences"] == 30
    assert len(repr(found)) < 160


def test_scores_are_those_of_evaluate(runs: dict[str, Path]) -> None:
    found = ltm.compare_runs([runs["a0"], runs["b0"]], sequences=8, draws=4, progress=False)
    run = ltm.load_run(runs["b0"])
    held_out = ltm.run.scoring.score_run(run, run.corpus(), sequences=8, draws=4)
    for score, column in (("elbo", "ppl_elbo"), ("iw", "ppl_iw")):
        mine = found.estimate("b0", score)
        np.testing.assert_allclose(np.exp(-mine.value), held_out.scores.attrs[column], rtol=1e-6)
        se = held_out.scores.attrs[f"{column}_sampling_se"] / held_out.scores.attrs[column]
        np.testing.assert_allclose(mine.error, se, rtol=1e-6)


def test_other_tokens_and_lengths_are_compared_per_byte(runs: dict[str, Path]) -> None:
    found = ltm.compare_runs([runs[n] for n in ("a0", "bpe", "long")], sequences=10_000)
    assert found.unit == "byte"
    corpus = ltm.load_run(runs["a0"]).corpus()
    assert corpus.text is not None
    size = corpus.text.lengths[corpus.parts["val"]]
    # The text is ASCII, so that every tokenizer's sequences hold all of its bytes.
    for _, run in found.dataset.groupby("run"):
        np.testing.assert_array_equal(np.sort(run["size"].values.ravel()), np.sort(size))
    assert "other tokens or sequences" in str(found)
    bpe = ltm.load_run(runs["bpe"])
    batch = bpe.corpus().val.batch(slice(None))
    post = bpe.svi.infer(batch, 2)
    elbo = ltm.evaluate(bpe.model, post, batch, 4)["elbo"].sum() / size.sum()
    np.testing.assert_allclose(found.estimate("bpe").value, elbo, rtol=1e-6)


def test_what_cannot_be_compared_is_told_in_a_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = create_run(tmp_path / "other", config(write_text(tmp_path / "t.txt", 41))).folder
    split = config(Path(ltm.load_run(runs["a0"]).config.corpus.name))
    split = FitConfig(**{**split.__dict__, "corpus": CorpusConfig(
        name=split.corpus.name, seed=1, options=FRACTIONS)})  # fmt: skip
    moved = create_run(tmp_path / "moved", split).folder
    a0 = str(runs["a0"])
    for arguments, named in (
        ([a0, str(other)], "different corpora"),
        ([a0, str(moved)], "different documents"),
        ([a0, a0], "named twice"),
        ([a0, str(tmp_path / "none")], "no run folder"),
        ([a0, str(runs["bpe"]), "--per", "token"], "per='byte'"),
        ([a0, str(runs["a1"]), "--per", "line"], "per"),
        ([a0, str(runs["a1"]), "--split", "dev"], "unknown split"),
        ([a0, str(runs["a1"]), "--guides", "delta,flow"], "--guides is for one run"),
        ([a0, "--csv", "x.csv"], "--csv is for several"),
        ([a0, str(runs["a1"]), "--csv", str(tmp_path)], "a folder"),
    ):
        assert main(["compare", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert named in told, arguments
        assert told.count("\n") == 1
    with pytest.raises(InputError, match="two or more"):
        ltm.compare_runs([runs["a0"]])
    with pytest.raises(InputError, match="runs"):
        ltm.compare_runs([runs["a0"], 3])  # type: ignore[list-item]


def test_a_folder_of_runs_stands_for_them(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(runs["a0"].parent)
    assert main(["compare", place, "--sequences", "6", "--draws", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["runs"]) == set(runs)
    assert told["unit"] == "byte"


def test_the_contrast_is_the_jackknife_over_documents() -> None:
    rng = np.random.default_rng(0)
    totals, sizes = rng.normal(size=(2, 9)) - 3.0, rng.uniform(1.0, 5.0, size=(2, 9))
    found = clustered_contrast(totals, sizes, np.array([1.0, -1.0]))

    def contrast(kept: np.ndarray) -> float:
        rates = totals[:, kept].sum(1) / sizes[:, kept].sum(1)
        return float(rates[0] - rates[1])

    left_out = np.array([contrast(np.arange(9) != g) for g in range(9)])
    np.testing.assert_allclose(found.value, contrast(np.arange(9)), rtol=ROUNDING)
    spread = np.square(found.value - left_out).sum()
    np.testing.assert_allclose(found.se, np.sqrt(8 / 9 * spread), rtol=ROUNDING)
    same = clustered_contrast(totals, sizes[[0, 0]], np.array([1.0, -1.0]))
    paired = clustered_ratio(totals[0] - totals[1], sizes[0], np.arange(9))
    np.testing.assert_allclose((same.value, same.se), (paired.value, paired.se), rtol=ROUNDING)


def simulated(rng: np.random.Generator, seeds: int, documents: int = 20) -> RunComparison:
    """Two recipes that are equal: what differs are documents, and what training came to."""
    groups = np.repeat(["a", "b"], seeds)
    size = np.full((2 * seeds, documents), 50.0)
    text = rng.normal(size=documents)
    trained = rng.normal(scale=0.5, size=(2 * seeds, 1))
    nats = size * (text + trained + 0.3 * rng.normal(size=size.shape))
    names = ("elbo", "iw_bound", "kl", "control")
    data = xr.Dataset(
        {**dict.fromkeys(names, (("run", "document"), nats)), "size": (("run", "document"), size)},
        coords={"group": ("run", groups), "seed": ("run", np.tile(range(seeds), 2))},
        attrs={"unit": "byte", "baseline": "a"},
    )
    return RunComparison(data, pd.DataFrame({"x": [1, 2]}, index=["a", "b"]))


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_verdict_over_seeds_is_wrong_as_often_as_it_says(seeds: int) -> None:
    """The error of training is in the error: of equal recipes 5 % are told apart, not half."""
    rng = np.random.default_rng(0)
    repeats = 400
    told = [simulated(rng, seeds).difference("b", "a").differs() for _ in range(repeats)]
    # Two sampling parts whose degrees of freedom are pooled err by a little; 0.03 is 3 errors.
    assert abs(np.mean(told) - 0.05) < 0.03
