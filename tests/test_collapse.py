from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from tolerances import MC

from ltm_pyro.config import Fast, ModelConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.collapse import CollapsePanel, collapse_panel, format_panel
from ltm_pyro.diagnostics.information import information_by_block
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.linear_gaussian import LinearGaussian

SMALL = ModelConfig(
    vocab_size=16, seq_len=24, n_layers=2, width=16, n_heads=2, mlp_hidden=32, window=4,
    thoughts_per_layer=2, thought_dim=3,
)  # fmt: skip


def infer(
    model: LatentModel, batch: Batch, family: str = "mean_field", steps: int = 0
) -> Posterior:
    return DualRateSVI(model, build_guide(family, model), fast=Fast(lr=0.3)).infer(batch, steps)


def exactly(oracle: LinearGaussian, batch: Batch, q: TorchDistribution) -> Posterior:
    return Posterior(q, oracle.prior(), batch.ids, batch.mask, family="exact")


def oracle(strength: float, noise: float = 1.0) -> LinearGaussian:
    """Two thoughts of two dimensions, of which only the first thought reaches x."""
    W = torch.zeros(4, 4)
    W[:2, :2] = strength * torch.eye(2)
    return LinearGaussian(W, noise_scale=noise, shape=(2, 2))


def panel_of(model: LatentModel, post: Posterior, batch: Batch, **options: int) -> CollapsePanel:
    return collapse_panel(post, evaluate(model, post, batch, draws=32), **options)


def test_a_collapsed_posterior_shows_nothing() -> None:
    model = LatentThoughtModel(SMALL)
    for layer in model.decoder.layers:  # thoughts that the decoder hears, but that say nothing
        torch.nn.init.normal_(layer.cross_attention.out.weight)
    batch = Batch(torch.randint(16, (32, 24)))
    panel = panel_of(model, infer(model, batch), batch, n_layers=2)
    assert panel.kl == 0
    assert panel.active_units == 0
    assert panel.mutual_information == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(panel.kl_per_thought, np.zeros(4))
    np.testing.assert_array_equal(panel.kl_per_layer, np.zeros(2))
    assert not panel.uses_thoughts
    MC.assert_close(panel.penalty_shuffled, panel.penalty_shuffled_se, 0.0, draws=32)
    assert "not shown" in format_panel(panel)


def test_an_informative_posterior_shows_everything() -> None:
    model = oracle(strength=3.0)
    batch = model.simulate(64, seed=1)
    panel = panel_of(model, infer(model, batch, steps=300), batch)
    exact = exactly(model, batch, model.posterior(batch))
    assert panel.kl == pytest.approx(float(exact.kl().mean()), rel=0.1)
    assert panel.active_units == 2
    assert panel.n_units == 4
    assert panel.kl_per_thought[0] == pytest.approx(panel.kl, rel=0.02)
    assert panel.kl_per_thought[1] < 0.02
    assert panel.penalty_shuffled > 5 * panel.penalty_shuffled_se
    assert panel.penalty_z0 > 2 * panel.penalty_z0_se
    assert panel.uses_thoughts
    assert "yes" in format_panel(panel)


def test_mutual_information_of_a_gaussian_channel() -> None:
    # x = a z + noise in two dimensions: I(x; z) = log(1 + a^2) exactly, far below log N here. The
    # aggregate of the exact posteriors is the prior, but for having 400 members: its KL is small
    # and positive, so the estimate falls short by that much.
    model = oracle(strength=1.0)
    batch = model.simulate(400, seed=2)
    panel = panel_of(model, exactly(model, batch, model.posterior(batch)), batch)
    assert panel.mutual_information == pytest.approx(math.log(2), abs=0.1)
    assert abs(panel.kl_aggregate) < 0.15
    assert 0 < panel.mutual_information_se < 0.03
    assert panel.kl == pytest.approx(panel.mutual_information + panel.kl_aggregate)


def test_more_information_than_the_sequences_can_show_is_called_at_least() -> None:
    # Sixteen dimensions that each say 1.83 nats: printed as 4.16 +- 0.000, and 25.1 nats between
    # the aggregate and the prior, which are one and the same.
    model = LinearGaussian(math.sqrt(38.2) * torch.eye(16), 1.0, shape=(4, 4))
    truth = 8 * math.log(1 + 38.2)
    batch = model.simulate(64, seed=3)
    panel = panel_of(model, exactly(model, batch, model.posterior(batch)), batch, n_layers=2)
    assert truth == pytest.approx(29.35, abs=0.02)
    assert panel.mutual_information_is == "at least"
    assert panel.mutual_information <= math.log(64) + 1e-9 < truth < panel.mutual_information_upper
    assert panel.kl_aggregate_is == "at most"
    assert panel.kl_aggregate > 0
    text = format_panel(panel)
    assert "at least, at most" in text
    assert "64 sequences cap it at 4.16" in text
    assert json.loads(json.dumps(panel.as_dict()))["mutual_information_is"] == "at least"


def test_both_bounds_hold_a_gaussian_channels_information() -> None:
    # I(x; z) = log(1 + a^2) in two dimensions; 40 batches know the means of both bounds to 0.01.
    model, truth = oracle(strength=1.0), math.log(2)
    found = []
    for seed in range(40):
        batch = model.simulate(64, seed=seed)
        post = exactly(model, batch, model.posterior(batch))
        found.append(information_by_block(post, draws=8, seed=seed))
    lower, upper = (
        np.array([float(data[name]) for data in found])
        for name in ("mutual_information", "mutual_information_upper")
    )
    MC.assert_at_most(lower.mean(), lower.std(ddof=1) / 40**0.5, truth, draws=40)
    MC.assert_at_most(-upper.mean(), upper.std(ddof=1) / 40**0.5, -truth, draws=40)
    assert upper.mean() - lower.mean() < 0.1
    assert all(data.attrs["mutual_information_is"] == "estimate" for data in found[:5])


def test_copies_of_one_text_tell_nothing_apart() -> None:
    # The fast loop's own noise moved each copy's q elsewhere: 0.61 +- 0.04 nats were printed.
    model = oracle(strength=1.0)
    batch = Batch(model.simulate(1, seed=4).observed.repeat(48, 1))
    fast = Fast(steps=8, optimizer="adam", lr=0.3)
    svi = DualRateSVI(model, build_guide("mean_field", model), fast=fast)
    post = svi.infer(batch)
    assert float(information_by_block(replace(post, x=None))["mutual_information"]) > 0.1
    panel = panel_of(model, post, batch)
    assert panel.mutual_information == pytest.approx(0.0, abs=1e-9)
    assert f"{panel.mutual_information_cap:.2f}" == "0.00"
    assert panel.mutual_information_is == "at least"
    # KL(q_agg || prior) = kl - I(fit; z), whatever the fits are of.
    of_fits = float(information_by_block(replace(post, x=None))["mutual_information"])
    assert panel.kl_aggregate == pytest.approx(panel.kl - of_fits)
    # Nearly the same text: a second inference does not find the same differences again.
    noise = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    near = Batch(batch.observed + 1e-3 * noise)
    post, again = svi.infer(near), svi.infer(near, seed=9)
    alone = collapse_panel(post, evaluate(model, post, near, draws=2))
    both = collapse_panel(post, evaluate(model, post, near, draws=2), again=again)
    assert alone.mutual_information > 0.1
    assert both.mutual_information < 0.01
    assert "fast loop" in alone.mutual_information_counts
    assert "second inference" in both.mutual_information_counts
    # How far all these fits together are from the prior is a matter of the fits as they are.
    assert both.kl_aggregate == pytest.approx(alone.kl_aggregate)


def test_a_second_inference_keeps_what_the_text_says() -> None:
    model = oracle(strength=1.0)
    batch = model.simulate(100, seed=6)
    svi = DualRateSVI(model, build_guide("mean_field", model), fast=Fast(steps=300, lr=0.1))
    post, again = svi.infer(batch), svi.infer(batch, seed=1)
    panel = collapse_panel(post, evaluate(model, post, batch, draws=2), again=again)
    # Converged fits agree: the bound is that of the exact posteriors, log 2 but for 100 members.
    assert panel.mutual_information == pytest.approx(math.log(2), abs=0.12)
    with pytest.raises(InputError, match="other sequences"):
        information_by_block(post, again=replace(again, ids=again.ids + 1))


def test_errors_are_over_documents_and_one_document_is_not_judged() -> None:
    model = oracle(strength=3.0)
    pieces = model.simulate(8, seed=12).observed.repeat_interleave(4, 0)
    known = Batch(pieces, documents=torch.arange(8).repeat_interleave(4))
    post = exactly(model, known, model.posterior(known))
    scores = evaluate(model, post, known, draws=32)
    document = ("sequence", np.arange(8).repeat(4))
    clustered = collapse_panel(post, scores.assign_coords(document=document))
    alone = collapse_panel(post, scores.drop_vars("document", errors="ignore"))
    assert (clustered.n_documents, alone.n_documents) == (8, None)
    # Four equal pieces are one: their error is twice that of as many independent ones, and more.
    assert clustered.kl_se > 1.9 * alone.kl_se
    assert "32 sequences of 8 documents" in format_panel(clustered)
    one = Batch(pieces, documents=torch.zeros(32, dtype=torch.long))
    panel = panel_of(model, exactly(model, one, model.posterior(one)), one)
    assert math.isnan(panel.penalty_shuffled)
    assert not panel.uses_thoughts
    assert "not judged" in format_panel(panel)


def test_mutual_information_error_is_that_of_its_draws() -> None:
    model = oracle(strength=1.0)
    batch = model.simulate(40, seed=3)
    post = infer(model, batch, steps=60)
    scores = evaluate(model, post, batch, draws=2)
    panels = [collapse_panel(post, scores, draws=8, seed=seed) for seed in range(60)]
    spread = np.std([panel.mutual_information for panel in panels], ddof=1)
    assert panels[0].mutual_information_se == pytest.approx(spread, rel=0.5)
    again = collapse_panel(post, scores, draws=8, seed=0)
    assert again.as_dict() == panels[0].as_dict()


def test_mutual_information_saturates_at_log_n() -> None:
    model = oracle(strength=1.0, noise=1e-3)
    batch = model.simulate(8, seed=4)
    panel = panel_of(model, exactly(model, batch, model.posterior(batch)), batch)
    assert panel.mutual_information == pytest.approx(math.log(8), abs=1e-3)
    assert panel.mutual_information_cap == pytest.approx(math.log(8))
    assert panel.kl > 10


def test_kl_by_thought_is_exact_or_a_lower_bound() -> None:
    W = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.0, 1.0, -1.0, 2.0], [0.3, 0.0, 1.0, 1.0]])
    model = LinearGaussian(W, noise_scale=0.5, shape=(2, 2))
    batch = model.simulate(16, seed=5)
    factorised = panel_of(model, infer(model, batch, steps=30), batch)
    assert factorised.kl_per_thought.sum() == pytest.approx(factorised.kl, rel=1e-4)
    correlated = panel_of(model, exactly(model, batch, model.posterior(batch)), batch)
    assert correlated.kl_estimator == "monte_carlo"
    assert 0.3 * correlated.kl < correlated.kl_per_thought.sum() < correlated.kl
    kl_by_thought = [
        next(line for line in format_panel(panel).splitlines() if "KL by thought" in line)
        for panel in (correlated, factorised)
    ]
    assert ["at least" in line for line in kl_by_thought] == [True, False]


def test_a_layer_that_collapsed_is_seen_in_that_layer_only() -> None:
    # Of two layers of one thought each, only the first reaches x.
    model = oracle(strength=3.0)
    batch = model.simulate(48, seed=11)
    post = exactly(model, batch, model.posterior(batch))
    panel = panel_of(model, post, batch, n_layers=2, draws=64)
    for per_block in (panel.kl_per_layer, panel.mutual_information_per_layer):
        assert per_block[0] > 1
        assert per_block[1] == pytest.approx(0, abs=1e-3)
    MC.assert_close(
        panel.mutual_information_per_layer[0],
        panel.mutual_information_per_layer_se[0] + 1e-4,
        panel.mutual_information,
    )
    np.testing.assert_allclose(
        panel.mutual_information_per_layer, panel.mutual_information_per_thought, atol=1e-4
    )
    assert panel.mutual_information_per_layer.max() < panel.mutual_information_cap + 1e-4
    assert panel.kl_per_layer.sum() == pytest.approx(panel.kl, rel=0.05)
    text = format_panel(panel)
    assert "MI by layer" in text
    assert "MI by thought" in text
    # Without layers none are listed.
    assert "by layer" not in format_panel(panel_of(model, post, batch))


class Silent(TorchDistribution):
    """A posterior that can be sampled and scored, and states no moments: as flows are."""

    def __init__(self, base: TorchDistribution) -> None:
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008
        return self.base.sample(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return self.base.log_prob(value)


def test_families_without_moments_are_measured_by_draws() -> None:
    model = oracle(strength=3.0)
    batch = model.simulate(16, seed=6)
    stated = exactly(model, batch, model.best_mean_field(batch))
    silent = replace(stated, distribution=Silent(stated.distribution))
    a, b = panel_of(model, stated, batch), panel_of(model, silent, batch)
    np.testing.assert_allclose(a.kl_per_thought, b.kl_per_thought, atol=0.1)
    assert a.active_units == 2
    assert b.kl_per_block_kind == b.mutual_information_per_block_kind == "at least"
    assert "at least" in format_panel(b)


def test_a_point_mass_has_no_kl() -> None:
    model = oracle(strength=3.0)
    batch = model.simulate(8, seed=7)
    panel = panel_of(model, infer(model, batch, "delta", steps=20), batch)
    assert "not known: q has no density" in format_panel(panel)
    assert math.isinf(panel.kl)
    assert math.isnan(panel.mutual_information)
    assert np.isinf(panel.kl_per_thought).all()
    assert np.isnan(panel.mutual_information_per_thought).all()
    assert panel.active_units == 2
    assert "inf" in format_panel(panel)
    assert "MI by" not in format_panel(panel)


def test_what_does_not_belong_together_is_refused() -> None:
    model = oracle(strength=1.0)
    batch = model.simulate(4, seed=8)
    post = infer(model, batch)
    scores = evaluate(model, post, batch, draws=2)
    with pytest.raises(InputError, match="mode 'oracle'"):
        collapse_panel(post, evaluate(model, None, batch, draws=2, mode="prior"))
    with pytest.raises(InputError, match="other sequences"):
        collapse_panel(post, scores.isel(sequence=[1, 0, 2, 3]))
    with pytest.raises(InputError, match="layers"):
        collapse_panel(post, scores, n_layers=3)
    one = batch.select(slice(0, 1))
    with pytest.raises(InputError, match="at least 2"):
        collapse_panel(infer(model, one), evaluate(model, infer(model, one), one, draws=2))


def test_panel_as_json_and_as_text() -> None:
    model = oracle(strength=3.0)
    batch = model.simulate(8, seed=9)
    panel = panel_of(model, infer(model, batch, steps=20), batch, n_layers=2)
    plain = json.loads(json.dumps(panel.as_dict()))
    assert plain["uses_thoughts"] is True
    for name in ("kl", "mutual_information"):
        assert len(plain[f"{name}_per_thought"]) == len(plain[f"{name}_per_layer"]) == 2
    assert plain["kl_per_block_kind"] == "exact"
    text = format_panel(panel)
    for phrase in (
        "nats per sequence",
        "KL by layer",
        "mutual information",
        "cap it at 2.08",
        "active units",
    ):
        assert phrase in text
    assert "ppl" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_scores_need_no_attributes() -> None:
    # Scores that went through a file or an arithmetic operation have lost theirs.
    model = oracle(strength=1.0)
    batch = model.simulate(4, seed=10)
    post = infer(model, batch)
    scores = evaluate(model, post, batch, draws=2)
    bare = xr.Dataset({name: scores[name] for name in scores.data_vars})
    assert collapse_panel(post, bare).kl == collapse_panel(post, scores).kl
