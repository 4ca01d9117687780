"""Priors over thoughts: one contract for all families, and what each of them promises."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cli_helpers import environment
from known_models import TINY, make_language_model, make_tokens
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from scipy import stats
from tolerances import EXACT, GOF, MC
from torch import nn
from torch.distributions import kl_divergence

from ltm_pyro.cli.parsing import Parser
from ltm_pyro.cli.settings import add_settings, build_config, given_settings
from ltm_pyro.config import CorpusConfig, Fast, FitConfig, ModelConfig, Slow, from_dict, to_dict
from ltm_pyro.data.tokenizer import SymbolTokenizer
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.collapse import collapse_panel
from ltm_pyro.diagnostics.cost import cost_report, format_cost
from ltm_pyro.errors import InputError
from ltm_pyro.export import to_datatree
from ltm_pyro.inference.clocks.slow import SlowClock
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.learning import embedding_weights
from ltm_pyro.models.priors import (
    MixturePrior,
    StandardNormal,
    ThoughtPrior,
    build_prior,
    prior_names,
    register_prior,
)
from ltm_pyro.models.priors.autoregressive import StationaryAR1
from ltm_pyro.models.priors.base import PRIORS
from ltm_pyro.models.priors.em import fit_mixture
from ltm_pyro.models.priors.mixture import DRAWS_PER_COMPONENT
from ltm_pyro.run import Interrupted, create_run, load_run, train
from ltm_pyro.tasks.generation import generate
from studies.clusters import adjusted_rand_index

K, D = 4, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "mixture": {"components": 3},
    "flow": {"transforms": 2, "hidden": 8},
}
"""Small ones, where the defaults are for real models."""
LEARNED = sorted(set(prior_names()) - {"standard_normal"})
EVERY = pytest.mark.parametrize("name", prior_names())
EVERY_LEARNED = pytest.mark.parametrize("name", LEARNED)


def fresh(name: str, dtype: torch.dtype = torch.float64) -> ThoughtPrior:
    return build_prior(name, K, D, **OPTIONS.get(name, {})).to(dtype)


def shaken(name: str, dtype: torch.dtype = torch.float64, by: float = 0.3) -> ThoughtPrior:
    """A prior that has learned something: every weight moved by noise."""
    prior = fresh(name, dtype)
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(by * torch.randn_like(p))
    return prior


def model_with(name: str, **options: Any) -> LatentThoughtModel:
    options = options or OPTIONS.get(name, {})
    return make_language_model(replace(TINY, prior=name, prior_options=options))


# The contract


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtype(name: str, dtype: torch.dtype) -> None:
    prior = shaken(name, dtype)
    p = prior()
    assert isinstance(p, TorchDistributionMixin)
    assert prior.shape == (K, D)
    assert (p.batch_shape, p.event_shape) == ((), (K, D))
    rows = p.expand(torch.Size([5]))
    assert (rows.batch_shape, rows.event_shape) == ((5,), (K, D))
    for q, lead in ((p, ()), (rows, (5,))):
        for sample_shape in ((), (7,), (2, 3)):
            z = q.sample(torch.Size(sample_shape))
            assert z.shape == (*sample_shape, *lead, K, D)
            assert z.dtype == dtype
            assert q.log_prob(z).shape == (*sample_shape, *lead)
            assert q.log_prob(z).dtype == dtype
    z = p.sample(torch.Size([2, 5]))
    EXACT.assert_close(rows.log_prob(z), p.log_prob(z))


@EVERY
def test_draws_follow_the_density(name: str) -> None:
    """E_p[g(z) / p(z)] is 1 for any density g where p is not 0: wrong draws or density change it.

    g is narrower than p by a little, so that the ratio is bounded and varies little.
    """
    with torch.no_grad():
        p = shaken(name, by=0.15)()
    z = p.sample(torch.Size([40_000]))
    g = dist.Normal(torch.zeros(K, D, dtype=torch.float64), 0.8).to_event(2)
    ratio = (g.log_prob(z) - p.log_prob(z)).exp()
    assert float(ratio.std()) < 4  # or the test could not fail
    MC.assert_close(float(ratio.mean()), float(ratio.std() / 200), 1.0, draws=40_000)


@EVERY
def test_moments_where_they_are_known(name: str) -> None:
    p = shaken(name)()
    if name == "flow":
        with pytest.raises(NotImplementedError):
            _ = p.mean
        return
    z = p.sample(torch.Size([10_000]))
    mean, variance = p.mean.detach(), p.variance.detach()
    assert mean.shape == variance.shape == (K, D)
    MC.assert_close(z.mean(0), z.std(0) / 100, mean, draws=10_000)
    squares = (z - mean).square()
    MC.assert_close(squares.mean(0), squares.std(0) / 100, variance, draws=10_000)


@EVERY_LEARNED
def test_every_weight_has_a_gradient(name: str) -> None:
    prior = shaken(name)
    z = torch.randn(6, K, D, dtype=torch.float64, requires_grad=True)
    prior().log_prob(z).sum().backward()
    for parameter_name, p in prior.named_parameters():
        assert p.grad is not None, parameter_name
        assert bool(p.grad.isfinite().all())
        assert float(p.grad.abs().max()) > 0, parameter_name
    assert z.grad is not None


@pytest.mark.parametrize("name", ["autoregressive", "flow", "standard_normal"])
def test_reparametrised_draws(name: str) -> None:
    p = shaken(name)()
    assert p.has_rsample
    z = p.rsample(torch.Size([5]))
    assert z.requires_grad == (name != "standard_normal")


@EVERY
def test_made_without_gradients_it_stays_what_it_was(name: str) -> None:
    """A stored posterior keeps its prior while the fit goes on."""
    prior = shaken(name)
    with torch.no_grad():
        p = prior()
    z = torch.randn(5, K, D, dtype=torch.float64)
    before = p.log_prob(z)
    assert not before.requires_grad
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(1.0)
    assert torch.equal(p.log_prob(z), before)
    if name != "standard_normal":
        assert not torch.allclose(prior().log_prob(z), before)


@EVERY
def test_state_dict_round_trip(name: str) -> None:
    prior, other = shaken(name), shaken(name)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(5, K, D, dtype=torch.float64)
    assert torch.equal(prior().log_prob(z), other().log_prob(z))


@EVERY
def test_slow_steps_learn_it_and_fast_steps_do_not(name: str) -> None:
    model = model_with(name)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), fast=Fast(steps=2), slow=Slow(warmup=0.0)
    )
    batch = make_tokens(4)

    def weights() -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in model.thought_prior.state_dict().items()}

    start = weights()
    post = svi.infer(batch)
    evaluate(model, post, batch, draws=4)
    assert all(torch.equal(v, start[k]) for k, v in weights().items())
    assert not post.prior.log_prob(post.sample(2)).requires_grad
    svi.step(batch)
    learned = [k for k, _ in model.thought_prior.named_parameters()]
    if name == "flow":  # behind a last layer of zeros the first has no gradient yet
        learned = [k for k in learned if ".2." in k]
    moved = {k for k in learned if not torch.equal(weights()[k], start[k])}
    assert moved == set(learned)


@EVERY
def test_every_mode_of_scoring_and_the_panel(name: str) -> None:
    model = model_with(name)
    batch = make_tokens(5)
    svi = DualRateSVI(model, build_guide("mean_field", model), fast=Fast(steps=4))
    post = svi.infer(batch)
    scores = evaluate(model, post, batch, draws=16)
    assert np.isfinite(scores["elbo"].values).all()
    assert (scores["iw_bound"] >= scores["elbo"] - 4 * scores["elbo_se"] - 1e-6).all()
    if name in ("flow", "mixture"):
        assert post.kl_estimator == "monte_carlo"
    panel = collapse_panel(post, scores, n_layers=2)
    assert math.isfinite(panel.kl)
    assert math.isfinite(panel.penalty_z0)
    # A part of z has no known density under a flow.
    assert np.isnan(panel.kl_per_thought).all() == (name == "flow")
    prior = evaluate(model, None, batch, draws=16, mode="prior")
    half = svi.infer(batch.prefix(4))
    prefix = evaluate(model, half, batch, draws=16, mode="prefix")
    assert np.isfinite(prior["iw_bound"].values).all()
    assert np.isfinite(prefix["log_predictive"].values).all()


@EVERY_LEARNED
def test_generation_draws_from_it(name: str) -> None:
    model = model_with(name)
    texts = [generate(model, SymbolTokenizer(7), n=4, seed=1, greedy=True)]
    with torch.no_grad():
        for p in model.thought_prior.parameters():
            p.add_(torch.randn_like(p))
    texts.append(generate(model, SymbolTokenizer(7), n=4, seed=1, greedy=True))
    assert texts[0] != texts[1]


@EVERY
def test_the_decoder_starts_the_same_under_every_prior(name: str) -> None:
    torch.manual_seed(0)
    plain = LatentThoughtModel(TINY)
    torch.manual_seed(0)
    ours = LatentThoughtModel(replace(TINY, prior=name, prior_options=OPTIONS.get(name, {})))
    for key, value in plain.decoder.state_dict().items():
        assert torch.equal(ours.decoder.state_dict()[key], value)


@EVERY
def test_an_interrupted_fit_ends_with_the_same_bits(name: str, tmp_path: Any) -> None:
    config = FitConfig(
        corpus=CorpusConfig(name="mixture", options={"n_sequences": 64, "symbols": 4}),
        model=ModelConfig(
            vocab_size=4, seq_len=8, n_layers=2, width=8, n_heads=2, mlp_hidden=8, thought_dim=2,
            thoughts_per_layer=1, window=2, prior=name,
            prior_options={"components": 1} if name == "mixture" else OPTIONS.get(name, {}),
        ),
        fast=Fast(steps=1), steps=8, batch_size=20, compile=False, control=False,
    )  # fmt: skip
    whole = create_run(tmp_path / "whole", config)
    train(whole, whole.corpus(), progress=False)
    parted = create_run(tmp_path / "parted", config)
    with pytest.raises(Interrupted):
        train(parted, parted.corpus(), progress=False, after_step=lambda row: row["step"] == 3)
    again = load_run(tmp_path / "parted")
    assert again.config == config
    train(again, again.corpus(), progress=False)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    if name == "mixture":  # 8 batches of 20 draws, 64 kept: they were renewed, on both sides
        assert int(again.model.thought_prior.seen) == 160


@EVERY
def test_export(name: str) -> None:
    model = model_with(name)
    with torch.no_grad():
        for p in model.thought_prior.parameters():
            p.add_(torch.randn_like(p))  # far from the standard normal
    post = DualRateSVI(model, build_guide("mean_field", model), fast=Fast(steps=1)).infer(
        make_tokens(3)
    )
    tree = to_datatree(post, make_tokens(3), draws=200, model=model, predictive_draws=0)
    assert tree.attrs["prior"] == name
    learned = {n for n in tree["constant_data"].data_vars if str(n).startswith("prior_")}
    assert learned == set(model.thought_prior.named_values())
    # The group `prior` holds draws of the learned prior.
    z = torch.from_numpy(tree["prior"]["z"].values[0])
    log_p = model.prior().log_prob(z).detach()
    drawn = model.prior().sample(torch.Size([200]))
    expected = model.prior().log_prob(drawn).detach()
    error = float((log_p.var() / 200 + expected.var() / 200).sqrt())
    MC.assert_close(float(log_p.mean()), error, float(expected.mean()), draws=200)
    if name == "mixture":
        weight = tree["constant_data"]["prior_weight"]
        assert weight.dims == ("component",)
        assert float(weight.sum()) == pytest.approx(1.0)
        assert tree["constant_data"]["prior_mean"].dims == ("component", "thought", "dim")


def test_cost_counts_the_prior_s_weights() -> None:
    plain = cost_report(FitConfig(model=TINY))
    assert plain.n_prior_weights == 0
    assert "weights of the prior" not in format_cost(plain)
    for name in LEARNED:
        config = replace(TINY, prior=name, prior_options=OPTIONS.get(name, {}))
        report = cost_report(FitConfig(model=config))
        weights = sum(p.numel() for p in fresh(name).parameters())
        assert report.n_prior_weights == weights
        assert report.weight_bytes == plain.weight_bytes + 16 * weights
        assert re.search(rf"weights of the prior +{weights}\n", format_cost(report))


# Names, options, settings


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtur", {}, "unknown prior 'mixtur': did you mean 'mixture'?"),
        ("mixture", {"component": 4}, "unknown option of prior 'mixture' 'component': did you"),
        ("standard_normal", {"components": 4}, "prior 'standard_normal' has no options"),
        ("mixture", {"components": 0}, "components of the mixture prior is 0: must be a whole"),
        ("mixture", {"components": 2.0}, "is 2.0: must be a whole number, 1 or more"),
        ("mixture", {"components": True}, "is True: must be a whole number"),
        ("flow", {"transforms": 1}, "transforms of the flow prior is 1: must be a whole number, 2"),
        ("flow", {"hidden": 0}, "hidden of the flow prior is 0"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        build_prior(name, K, D, **options)
    assert "\n" not in str(caught.value)


def test_shapes_that_a_prior_cannot_have_are_refused() -> None:
    with pytest.raises(InputError, match="over 1 thought is the standard normal"):
        build_prior("autoregressive", 1, D)
    with pytest.raises(InputError, match="needs at least 2"):
        build_prior("flow", 1, 1)


def test_a_prior_of_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRIORS, "_known", dict(PRIORS._known))

    @register_prior("shifted")
    class Shifted(ThoughtPrior):
        def __init__(self, n_thoughts: int, thought_dim: int, by: float = 1.0) -> None:
            super().__init__(n_thoughts, thought_dim)
            self.loc = nn.Parameter(torch.full(self.shape, by))

        def forward(self) -> TorchDistribution:
            return dist.Normal(self.loc.clone(), 1.0).to_event(2)

    model = model_with("shifted", by=2.0)
    assert float(model.prior().mean.detach().mean()) == 2.0


def settings(*options: str, file: str | None = None) -> FitConfig:
    parser = Parser("fit", "", "", "")
    add_settings(parser, FitConfig())
    given = parser.parse_args(list(options), defaults=False).as_dict()
    return build_config(given_settings(parser, given, file))


def test_settings_from_options_and_yaml(tmp_path: Any) -> None:
    found = settings("--model.prior", "mixture", "--model.prior_options.components", "8")
    assert (found.model.prior, found.model.prior_options) == ("mixture", {"components": 8})
    file = tmp_path / "fit.yaml"
    file.write_text("model:\n  prior: flow\n  prior_options:\n    hidden: 16\n")
    found = settings(file=str(file))
    assert (found.model.prior, found.model.prior_options) == ("flow", {"hidden": 16})
    assert from_dict(FitConfig, to_dict(found)) == found
    file.write_text("model:\n  prior_options: 3\n")
    with pytest.raises(InputError, match="must be a group of settings"):
        settings(file=str(file))
    with pytest.raises(InputError, match="must be a group of settings"):
        ModelConfig(prior_options=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model\.prior is None: must be a text"):
        ModelConfig(prior=None)  # type: ignore[arg-type]


# Standard normal, flow, autoregressive


@pytest.mark.parametrize("name", ["flow", "autoregressive"])
def test_the_start_is_the_standard_normal(name: str) -> None:
    z = 2 * torch.randn(50, K, D, dtype=torch.float64)
    EXACT.assert_close(fresh(name)().log_prob(z), StandardNormal(K, D).double()().log_prob(z))


def test_a_flow_moves_every_dimension_and_learns_a_shape() -> None:
    """Maximum likelihood of a curved density gains what a normal cannot have.

    z_2 = (z_1^2 - 1) / 2 + noise: a banana, whose entropy is known, so that the flow's loss beyond
    it is KL(data || flow). Less than a third of the best normal's is asked.
    """
    prior = build_prior("flow", 1, 2, transforms=4, hidden=32).double()
    z1 = torch.randn(2000, dtype=torch.float64)
    data = torch.stack([z1, 0.5 * z1.square() - 0.5 + 0.3 * torch.randn_like(z1)], -1)[:, None]
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss = -prior().log_prob(data[:1000]).mean()
        loss.backward()
        optimizer.step()
    entropy = 1 + math.log(2 * math.pi) + math.log(0.3)
    held_out = -float(prior().log_prob(data[1000:]).mean().detach())
    # The best normal: variances 1 and 0.5 + 0.09, and uncorrelated because z_1^3 has mean 0.
    normal = 1 + math.log(2 * math.pi) + 0.5 * math.log(0.59)
    assert held_out - entropy < 0.3 * (normal - entropy)


def test_flows_leave_validation_on() -> None:
    """zuko turns it off for the whole process when it is imported."""
    code = (
        "from torch.distributions import Distribution; from ltm_pyro.models.priors import "
        "build_prior; build_prior('flow', 2, 2)().log_prob; assert Distribution._validate_args"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_ar1_is_the_normal_with_that_covariance() -> None:
    raw = torch.tensor([-0.8, 0.0, 1.5], dtype=torch.float64)
    p = StationaryAR1(raw, K)
    lag = (torch.arange(K)[:, None] - torch.arange(K)).abs()
    z = torch.randn(6, K, D, dtype=torch.float64)
    normals = [
        dist.MultivariateNormal(torch.zeros(K, dtype=torch.float64), a**lag) for a in raw.tanh()
    ]
    expected = sum(normal.log_prob(z[..., d]) for d, normal in enumerate(normals))
    EXACT.assert_close(p.log_prob(z), expected)
    EXACT.assert_close(p.entropy(), sum(normal.entropy() for normal in normals))
    # Standardised by its Cholesky factor a draw is white: one p-value per dimension.
    draws = p.rsample(torch.Size([5000]))
    p_values = []
    for d, normal in enumerate(normals):
        white = torch.linalg.solve_triangular(
            normal.scale_tril, draws[..., d].T, upper=False
        ).flatten()
        p_values.append(stats.kstest(white.numpy(), "norm").pvalue)
    GOF.assert_fits(p_values)


def test_kl_against_ar1_in_closed_form() -> None:
    """For independent normals: against draws, and against the standard normal at a = 0.

    Without it the fast loop's noise cost 0.7 nats of ELBO per sequence on `mixture`.
    """
    shape = (3, K, D)
    q = dist.Normal(
        torch.randn(shape, dtype=torch.float64), 0.2 + torch.rand(shape, dtype=torch.float64)
    ).to_event(2)
    p = StationaryAR1(torch.tensor([-0.8, 0.3, 1.5], dtype=torch.float64), K).expand([3])
    z = q.sample(torch.Size([20_000]))
    gap = q.log_prob(z) - p.log_prob(z)
    MC.assert_close(gap.mean(0), gap.std(0) / 20_000**0.5, kl_divergence(q, p), draws=20_000)
    start = StationaryAR1(torch.zeros(D, dtype=torch.float64), K).expand([3])
    normal = StandardNormal(K, D).double()().expand([3])
    EXACT.assert_close(kl_divergence(q, start), kl_divergence(q, normal))
    with pytest.raises(NotImplementedError):
        kl_divergence(dist.Laplace(q.mean, 1.0).to_event(2), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ar1_stays_finite_at_its_edge(dtype: torch.dtype) -> None:
    """At raw = 30 the coefficient rounds to 1, and 1 - a^2 computed from it would be 0."""
    raw = torch.tensor([30.0, -30.0], dtype=dtype, requires_grad=True)
    p = StationaryAR1(raw, 3)
    z = torch.zeros(3, 2, dtype=dtype)
    value = p.log_prob(z)
    # log density of innovations that are 0: -log scale = log cosh(30) = 30 - log 2, four of them.
    expected = 4 * (30 - math.log(2)) - 3 * math.log(2 * math.pi)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert bool(raw.grad.isfinite().all())  # type: ignore[union-attr]


# The mixture


def test_mixture_density_and_responsibilities_by_hand() -> None:
    prior = MixturePrior(1, 2, components=2).double()
    with torch.no_grad():
        prior.pseudo_thoughts.copy_(torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]]))
        prior.log_variance.zero_()
        prior.logits.copy_(torch.tensor([1.0, 3.0], dtype=torch.float64).log())
    z = torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)[:, None]
    # At the middle both densities are equal and the weights 1 : 3 decide; at (1, .5) the second
    # component's density is e^2 times the first's.
    EXACT.assert_close(
        prior.responsibilities(z),
        torch.tensor(
            [[0.25, 0.75], [1 / (1 + 3 * math.e**2), 3 / (3 + math.e**-2)]], dtype=torch.float64
        ),
    )
    log_normal = -math.log(2 * math.pi)
    by_hand = [log_normal - 0.5, log_normal - 0.125 + math.log(0.25 * math.e**-2 + 0.75)]
    EXACT.assert_close(prior().log_prob(z).detach(), torch.tensor(by_hand, dtype=torch.float64))
    with pytest.raises(InputError, match=r"must end in \(K, D\) = \(1, 2\)"):
        prior.responsibilities(torch.zeros(3, 2))


def test_components_start_apart_around_the_standard_normal() -> None:
    torch.manual_seed(0)
    prior = MixturePrior(8, 8, components=16)
    torch.manual_seed(0)
    again = MixturePrior(8, 8, components=16)
    assert torch.equal(prior.pseudo_thoughts, again.pseudo_thoughts)
    means = prior.pseudo_thoughts.detach().flatten(1)
    scale = float((0.5 * prior.log_variance.detach()).exp().mean())
    nearest = (torch.cdist(means, means) + 1e9 * torch.eye(16)).min() / scale
    assert float(nearest) > 4  # standard deviations of a component
    with torch.no_grad():
        p = prior()
    # 16 means of standard deviation 0.5: their mean's error is 0.125 in each of 64 dimensions, and
    # the overall variance's, averaged over dimensions, is below 0.02.
    assert float(p.mean.abs().max()) < 5 * 0.125
    assert float(p.variance.mean()) == pytest.approx(1.0, abs=0.08)


def clusters(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws (n, K, D) around eight centres at a distance, and their labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(8, K, D, generator=torch.Generator().manual_seed(99))
    label = torch.randint(8, (n,), generator=generator)
    return centres[label] + 0.7 * torch.randn(n, K, D, generator=generator), label


@pytest.mark.parametrize("seed", range(5))
def test_em_finds_the_clusters(seed: int) -> None:
    z, label = clusters(256, seed)
    fit = fit_mixture(z.flatten(1), 8, seed)
    found = fit.log_joint(z.flatten(1)).argmax(1)
    assert adjusted_rand_index(found, label) > 0.99
    assert float(fit.weight.sum()) == pytest.approx(1.0)
    variance = fit.variance[found.bincount(minlength=8) > 0]
    assert float(variance.mean()) == pytest.approx(0.49, rel=0.1)


def test_em_survives_fewer_points_than_components() -> None:
    for x in (torch.zeros(3, 2), torch.randn(3, 2), torch.randn(1, 2)):
        fit = fit_mixture(x, 5, seed=0)
        assert bool(fit.log_joint(x).isfinite().all())


def test_draws_from_the_posterior_replace_a_bad_division_of_labour() -> None:
    """Two components on one cluster and one on two: gradients stay there, a fresh fit does not."""
    z, label = clusters(8 * DRAWS_PER_COMPONENT)
    prior = MixturePrior(K, D, components=8)
    first, second = z[label == 0].mean(0), z[label == 1].mean(0)
    with torch.no_grad():
        for c in range(8):
            prior.pseudo_thoughts[c] = z[label == c].mean(0)
        prior.pseudo_thoughts[0] = 0.5 * (first + second)
        prior.pseudo_thoughts[1] = z[label == 2].mean(0) + 0.1
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (-prior().log_prob(z).mean()).backward()
        optimizer.step()

    def agreement() -> float:
        return adjusted_rand_index(prior.responsibilities(z).argmax(-1), label)

    assert agreement() < 0.9
    state = torch.random.get_rng_state()
    for batch in z.split(16):
        before = prior.pseudo_thoughts.detach().clone()
        prior.observe(batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(before, prior.pseudo_thoughts)  # at the last batch, not before
    assert agreement() > 0.99


def test_a_good_mixture_is_kept() -> None:
    """A fresh fit to half of the draws is no better than the truth on the other half."""
    z, label = clusters(4 * 8 * DRAWS_PER_COMPONENT)
    prior = MixturePrior(K, D, components=8)
    with torch.no_grad():
        for c in range(8):
            prior.pseudo_thoughts[c] = z[label == c].mean(0)
        prior.log_variance.fill_(math.log(0.49))
    before = {k: v.clone() for k, v in prior.named_parameters()}
    for batch in z.split(16):
        prior.observe(batch)
    assert int(prior.seen) == len(z)
    assert all(torch.equal(p, before[k]) for k, p in prior.named_parameters())


def test_what_is_observed() -> None:
    prior = MixturePrior(K, D, components=1)
    prior.observe(torch.full((3, K, D), torch.nan))
    assert int(prior.seen) == 0
    prior.observe(torch.ones(2, 30, K, D))  # two particles
    assert int(prior.seen) == 60
    prior.observe(2 * torch.ones(10, K, D))  # the oldest make room
    assert sorted(prior.recent[:, 0, 0].tolist()) == [1.0] * 54 + [2.0] * 10
    prior.observe(3 * torch.ones(1000, K, D))
    assert bool((prior.recent == 3).all())


def test_only_slow_steps_are_observed() -> None:
    model = model_with("mixture")
    batch = make_tokens(4)
    svi = DualRateSVI(model, build_guide("mean_field", model), fast=Fast(steps=3))
    post = svi.infer(batch)
    evaluate(model, post, batch, draws=4)
    model()
    generate(model, SymbolTokenizer(7), n=2)
    assert int(model.thought_prior.seen) == 0
    svi.step(batch)
    assert int(model.thought_prior.seen) == 4


def test_weight_decay_spares_pseudo_thoughts_and_pulls_flows_to_the_start() -> None:
    def after_decay(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        prior = shaken(name)
        before = {k: v.detach().clone() for k, v in prior.named_parameters()}
        clock = SlowClock(
            prior.parameters(), Slow(weight_decay=0.5, warmup=0.0), spare=embedding_weights(prior)
        )
        for p in clock.parameters:
            p.grad = torch.zeros_like(p)  # AdamW moves by decay alone
        clock.step(0, 1)
        return before, {k: p.detach() for k, p in prior.named_parameters()}

    for name in ("mixture", "autoregressive"):
        before, after = after_decay(name)
        assert all(torch.equal(after[k], before[k]) for k in before)
    before, after = after_decay("flow")
    shrunk = {k for k, v in before.items() if float(after[k].norm()) < float(v.norm())}
    assert shrunk == {k for k, v in before.items() if v.dim() > 1}


# Agreement of clusterings


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 3, 3], 1.0),  # names do not matter
        (["a", "a", "b"], ["x", "x", "x"], 0.0),  # one cluster says nothing
        # Pairs in one cluster: 2 of 6 by the first, 3 by the second, 1 by both, and by chance 1.
        ([0, 0, 1, 1], [0, 0, 0, 1], 0.0),
        # 6 of 15 and 3 of 15, 2 by both, 1.2 by chance, at most 4.5 on average.
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], (2 - 1.2) / (4.5 - 1.2)),
        ([0, 1, 2], [0, 1, 2], 1.0),  # all apart, both times
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),  # less than chance: (0 - 2/3) / (2 - 2/3)
    ],
)
def test_adjusted_rand_index_by_hand(first: list[Any], second: list[Any], expected: float) -> None:
    assert adjusted_rand_index(first, second) == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand_index(second, first) == pytest.approx(expected, abs=1e-12)


def test_adjusted_rand_index_of_unrelated_labels_is_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    values = np.array(
        [
            adjusted_rand_index(rng.integers(4, size=50), rng.integers(6, size=50))
            for _ in range(400)
        ]
    )
    MC.assert_close(values.mean(), values.std() / 20, 0.0, draws=400)


def test_adjusted_rand_index_refuses_unequal_lists() -> None:
    with pytest.raises(InputError, match="two lists of the same length"):
        adjusted_rand_index([0, 1, 1], [0, 1])
