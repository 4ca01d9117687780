"""A point mass has no ELBO: its log joint has a name of its own, and teaches no prior."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import MICRO, run_program, write_text
from known_models import TINY, LearnedOracle, make_language_model, make_oracle, make_tokens

from ltm_pyro import plots
from ltm_pyro.config import Fast, Slow
from ltm_pyro.diagnostics.published import score_on_own_draws
from ltm_pyro.errors import InputError
from ltm_pyro.export import to_datatree
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel

LEARNED = ("flow", "mixture", "autoregressive")


def point_mass(model: LatentThoughtModel, **options: object) -> DualRateSVI:
    return DualRateSVI(model, build_guide("delta", model), Fast(steps=3), Slow(lr=1e-3), **options)  # type: ignore[arg-type]


def test_the_metrics_of_a_point_mass_name_the_log_joint() -> None:
    oracle = LearnedOracle(make_oracle())
    batch = oracle.simulate(4, seed=1)
    svi = DualRateSVI(oracle, build_guide("delta", oracle), Fast(steps=5), Slow(lr=1e-9))
    row = svi.step(batch)
    assert not {"elbo", "elbo_per_token", "kl"} & set(row)
    # A step that moves no weight: the guide still holds the points that the row is about.
    z = svi.guide.posterior().mean.detach()
    likelihood, prior = oracle.log_likelihood(z, batch), oracle.prior().log_prob(z)
    assert row["log_joint"] == pytest.approx(float((likelihood + prior).mean().detach()), rel=1e-6)
    assert row["nll"] == pytest.approx(-float(likelihood.mean().detach()), rel=1e-6)
    assert row["log_prior"] == pytest.approx(float(prior.mean()), rel=1e-6)
    assert row["log_joint_per_token"] == pytest.approx(row["log_joint"] / 5)
    assert row["objective"] == pytest.approx(row["log_joint"])


@pytest.mark.parametrize("family", ["mean_field", "amortized", "flow"])
def test_the_metrics_of_a_density_name_the_elbo(family: str) -> None:
    model, batch = make_language_model(), make_tokens(3)
    row = DualRateSVI(model, build_guide(family, model), Fast(steps=1)).step(batch)
    assert {"elbo", "elbo_per_token", "kl"} <= set(row)
    assert not any("joint" in name for name in row)


@pytest.mark.parametrize("prior", LEARNED)
def test_a_point_mass_does_not_teach_a_prior(prior: str) -> None:
    model = LatentThoughtModel(replace(TINY, prior=prior))
    batch = make_tokens(4)
    svi = point_mass(model)
    with pytest.raises(InputError, match=f"'delta' is a point mass.*'{prior}'.*standard_normal"):
        svi.step(batch)
    assert svi.slow_step == 0
    # Under a prior that stands still the mode is as good a summary as any.
    assert svi.infer(batch).mean.isfinite().all()
    for weight in model.thought_prior.parameters():
        weight.requires_grad_(False)
    assert np.isfinite(point_mass(model).step(batch)["log_joint"])


def test_the_command_refuses_the_pair_in_one_line(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    done = run_program(
        "fit", "--corpus", str(text), "--guide", "delta", "--model.prior", "flow", "--out", "run",
        *MICRO, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "standard_normal" in done.stderr
    assert not (tmp_path / "run").exists()


def test_own_draws_of_a_point_mass_have_no_excess() -> None:
    oracle = make_oracle()
    svi = DualRateSVI(oracle, build_guide("delta", oracle), Fast(steps=2, noise="fixed"))
    with pytest.raises(InputError, match="'delta' is a point mass"):
        score_on_own_draws(svi, oracle.simulate(3))


def test_export_and_figures_say_log_joint() -> None:
    model, batch = make_language_model(dtype=torch.float32), make_tokens(4)
    svi = point_mass(model)
    rows = [svi.step(batch) for _ in range(3)]
    post = svi.infer(batch)
    tree = to_datatree(post, batch, draws=2, model=model, fit_trace=rows)
    trace = tree["fit_trace"]
    assert not {"elbo", "kl", "fast_elbo", "fast_kl"} & set(trace.data_vars)
    np.testing.assert_allclose(trace["log_joint"], trace["log_prior"] - trace["nll"])
    np.testing.assert_allclose(
        trace["fast_log_joint"], trace["fast_log_prior"] - trace["fast_nll"], rtol=1e-5
    )
    assert trace["log_joint"].attrs["units"] == "nats per sequence"
    for figure in (plots.two_clock_curves(rows), plots.fast_loop_traces(post)):
        words = " ".join(
            text.get_text()
            for part in (figure, *figure.axes)
            for text in part.findobj(lambda artist: hasattr(artist, "get_text"))
        )
        assert "log joint" in words.lower()
        assert "no ELBO" in words or "ELBO" not in words
        assert "KL" not in words
