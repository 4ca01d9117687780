"""Documents in segments: one story told twice, exact filters, and what any model gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from known_models import TINY, make_language_model, make_oracle
from pyro import poutine
from pyro.infer import Predictive
from tolerances import EXACT, MC
from torch.distributions import kl_divergence

import ltm_pyro as ltm
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.models.full_normal import FullNormal, LowRankNormal
from ltm_pyro.models.priors import build_prior
from ltm_pyro.models.segmented import SegmentedThoughtModel, SessionThoughtModel
from ltm_pyro.tasks.filtering import CLOCK, LOC, SCALE, Segment
from studies.kalman import LIMITS, distances, kalman_filter, random_system
from studies.sessions import coverage

CLASSES = [SegmentedThoughtModel, SessionThoughtModel]
BOTH = pytest.mark.parametrize("kind", CLASSES)


def shaken(model: Any) -> Any:
    """A prior whose blocks lean on each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.thought_prior.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def linear(kind: Any, segments: int = 3) -> Any:
    return shaken(kind(make_oracle(), segments))


def text(kind: Any) -> Any:
    return shaken(kind(make_language_model(), 2))


def ragged(model: Any, rows: int = 4) -> Batch:
    """Documents of the model's own; the last one is shorter."""
    made = ltm.simulate(model, rows, seed=3).batch
    mask = made.mask.clone()
    mask[-1, -mask.shape[1] // 3 :] = False
    return Batch(made.observed, mask)


@BOTH
@pytest.mark.parametrize("make", [linear, text])
def test_the_contract(kind: Any, make: Any) -> None:
    model = make(kind)
    batch = ragged(model)
    ltm.check_model(model, batch)
    ltm.check_guide("full_rank", model, batch)
    z = model.prior().sample(torch.Size([2, len(batch)]))
    tokens = model.token_log_likelihood(z, batch)
    assert tokens.shape == (2, *batch.observed.shape)
    EXACT.assert_close(tokens.sum(-1), model.log_likelihood(z, batch))


@BOTH
@pytest.mark.parametrize("make", [linear, text])
def test_step_by_step_it_is_the_same_story(kind: Any, make: Any) -> None:
    """Any values of the blocks have one density, whichever way the program is written."""
    model = make(kind)
    batch = ragged(model)
    trace = poutine.trace(model.stepwise).get_trace(batch)
    sites = [n for n, s in trace.nodes.items() if n.startswith("z_") and s["type"] == "sample"]
    shape = model.emission.thought_shape
    z = torch.stack([trace.nodes[n]["value"].unflatten(-1, shape) for n in sites], 1).flatten(1, 2)
    assert z.shape == (len(batch), *model.thought_shape)
    joint = model.prior().log_prob(z) + model.log_likelihood(z, batch)
    EXACT.assert_close(joint.sum(), trace.log_prob_sum())


@BOTH
def test_it_runs_forward(kind: Any) -> None:
    model = text(kind)
    with torch.no_grad():
        drawn = Predictive(model, num_samples=3)(size=2)
    assert drawn["x"].shape == (3, 2, 2 * TINY.seq_len)
    assert model(size=5).shape == (5, 2 * TINY.seq_len)
    assert model.stepwise(size=5).shape == (5, 2 * TINY.seq_len)


def test_a_session_is_simulated_given_its_thoughts_or_its_first_turns() -> None:
    model = linear(SessionThoughtModel, segments=4)
    session = torch.full((2000, 4), 2.0, dtype=torch.float64)
    given = pyro.condition(model.stepwise, data={"z_session": session})
    x = given(size=2000).unflatten(1, (4, -1))
    a = model.thought_prior.transition
    wanted = (session[0] @ a.T) @ model.emission.W.T + model.emission.bias
    for turn in x.unbind(1):
        MC.assert_close(
            turn.mean(0).detach(), turn.std(0).detach() / 2000**0.5, wanted.detach(), draws=2000
        )
    first = torch.zeros(3, 5, dtype=torch.float64)
    continued = pyro.condition(model.stepwise, data={"x_0": first})(size=3)
    assert torch.equal(continued[:, :5], first)


@pytest.mark.parametrize("name", ["state_space", "hierarchical"])
def test_the_kl_is_that_of_the_whole_normal(name: str) -> None:
    """Held against torch's formula for two normals; the covariance is that of the draws' map."""
    torch.manual_seed(0)
    prior = build_prior(name, 6, 2, blocks=3).double()
    with torch.no_grad():
        for p in prior.parameters():
            p.copy_(0.4 * torch.randn(p.shape, dtype=torch.float64))
        p = prior()
    map_ = p.from_noise(torch.eye(12, dtype=torch.float64)).flatten(1).T
    whole = FullNormal(torch.zeros(6, 2, dtype=torch.float64), torch.linalg.cholesky(map_ @ map_.T))
    EXACT.assert_close(p.variance.flatten(), (map_ @ map_.T).diagonal())
    EXACT.assert_close(p.entropy(), whole.entropy())
    z = p.sample(torch.Size([5]))
    EXACT.assert_close(p.log_prob(z), whole.log_prob(z))
    loc = torch.randn(4, 6, 2, dtype=torch.float64)
    lower = torch.tril(0.3 * torch.randn(4, 12, 12, dtype=torch.float64), -1)
    scale = 0.5 + torch.rand(4, 6, 2, dtype=torch.float64)
    factor = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    q = FullNormal(loc, lower + torch.eye(12, dtype=torch.float64))
    wanted = kl_divergence(q.flat, whole.flat)
    EXACT.assert_close(kl_divergence(q, p), wanted)
    low = LowRankNormal(loc, scale, factor)
    as_full = FullNormal(loc, torch.linalg.cholesky(low.covariance))
    EXACT.assert_close(kl_divergence(low, p), kl_divergence(as_full, p))
    factorised = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 2)
    as_full = FullNormal(loc, torch.diag_embed(scale.flatten(1)))
    EXACT.assert_close(kl_divergence(factorised, p), kl_divergence(as_full, p))


@pytest.mark.parametrize("seed", range(2))
def test_the_full_rank_filter_is_the_kalman_filter(seed: int) -> None:
    model = random_system(seed, state=3, observed=5, segments=2)
    batch = ltm.simulate(model, 8, seed=seed).batch
    off = distances(model, batch, "full_rank", CLOCK.steps, 128, seed)
    for name, limit in LIMITS.items():
        assert off[name] < limit, name


def test_the_exact_filter_adds_up_to_the_evidence() -> None:
    """Against the density of all observations at once: a normal of known covariance."""
    model = random_system(5, state=3, observed=4, segments=3)
    batch = ltm.simulate(model, 6).batch
    prior = model.thought_prior()
    size = prior.noise_size
    map_ = prior.from_noise(torch.eye(size, dtype=torch.float64)).flatten(1).T
    loadings = torch.block_diag(*[model.emission.W] * 3) @ map_
    noise = model.emission.noise_scale**2 * torch.eye(len(loadings), dtype=torch.float64)
    whole = torch.distributions.MultivariateNormal(
        model.emission.bias.repeat(3), loadings @ loadings.T + noise
    )
    _, _, steps = kalman_filter(model, batch.observed)
    EXACT.assert_close(steps.sum(1), whole.log_prob(batch.observed).detach())


def test_a_stream_of_segments_is_read_as_the_document() -> None:
    model = random_system(0, state=3, observed=5, segments=3)
    batch = ltm.simulate(model, 4).batch

    def stream() -> Iterator[Batch]:
        for x in batch.observed.split(5, 1):
            yield Batch(x)

    fast = Fast(steps=4)
    whole = list(ltm.filter_thoughts(model, batch, "mean_field", fast))
    parts = list(ltm.filter_thoughts(model, stream(), "mean_field", fast))
    assert len(whole) == len(parts) == 3
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.loc, other.loc)
        assert torch.equal(one.elbo, other.elbo)


@pytest.mark.parametrize("guide", ["low_rank", "mixture", "flow"])
def test_any_guide_filters(guide: str) -> None:
    model = random_system(0, state=3, observed=5, segments=2)
    batch = ltm.simulate(model, 4).batch
    for known in ltm.filter_thoughts(model, batch, guide, Fast(steps=8)):
        assert known.loc.shape == (4, 3)
        assert bool((torch.linalg.eigvalsh(known.covariance) > 0).all())
        error = 5 * known.log_evidence_se
        assert bool((known.log_evidence >= known.elbo - error).all())


def test_the_error_of_a_segments_evidence_is_its_spread_over_draws() -> None:
    """At 64 draws the spread of 200 estimates is known to 5 %, one error of them to about 30 %."""
    model = random_system(0, state=3, observed=5, segments=2)
    batch = ltm.simulate(model, 4).batch
    found = next(iter(ltm.filter_thoughts(model, batch, "mean_field", Fast(steps=8), draws=64)))
    first = batch.observed[:, :5]
    size = found.loc.shape[-1]
    start = {LOC: torch.zeros(4, size), SCALE: torch.eye(size).expand(4, -1, -1)}
    rows = Batch(first, covariates={name: value.to(first) for name, value in start.items()})
    with torch.no_grad():
        u = found.posterior.sample(200 * 64, seed=7)
        log_weight = Segment(model.emission).log_likelihood(u, rows)
        log_weight += found.posterior.prior.log_prob(u) - found.posterior.log_prob(u)
    spread = log_weight.unflatten(0, (200, 64)).logsumexp(1).std(0)
    ratio = found.log_evidence_se / spread
    assert float(ratio.min()) > 0.4
    assert float(ratio.max()) < 2.5


def test_a_segment_in_units_of_its_prediction_keeps_the_contract() -> None:
    loc = torch.randn(4, 4, dtype=torch.float64)
    scale = torch.eye(4, dtype=torch.float64).expand(4, -1, -1) * 0.5
    batch = Batch(torch.randn(4, 5, dtype=torch.float64), covariates={LOC: loc, SCALE: scale})
    ltm.check_model(Segment(make_oracle()), batch)


@BOTH
@pytest.mark.parametrize("family", ["mean_field", "low_rank", "full_rank", "flow"])
def test_it_gets_everything_that_any_model_gets(kind: Any, family: str, tmp_path: Any) -> None:
    model = linear(kind)
    batch = ltm.simulate(model, 6, seed=1).batch
    svi = ltm.DualRateSVI(model, family, Fast(steps=4))
    svi.fit(batch, 2, batch_size=4, progress=False)
    post = svi.infer(batch)
    scores = ltm.evaluate(model, post, batch, draws=8)
    assert scores["elbo"].shape == (6,)
    diagnosis = ltm.diagnose(
        model, post, batch, draws=200, steps=2, chains=4, rungs=4, progress=False
    )
    assert diagnosis.problems or diagnosis.passed
    tree = ltm.to_datatree(post, batch=batch, scores=scores, draws=12, model=model)
    assert tree["posterior/z"].sizes["thought"] == model.thought_shape[0]
    n = len(model.thought_prior.log_scale)
    stored = tree["learned_prior/prior_transition"] if "learned_prior" in tree else None
    assert stored is None or stored.shape == (n, n)


def test_the_clocks_learn_the_transition() -> None:
    """The exact evidence rises to that of the system which made the data."""
    true = random_system(2, state=2, observed=4, segments=6)
    batch = ltm.simulate(true, 256).batch
    model = SegmentedThoughtModel(true.emission, 6)
    svi = ltm.DualRateSVI(
        model, "full_rank", Fast(steps=8), ltm.Slow(lr=0.08, warmup=0.0), persistent=True
    )
    before = kalman_filter(model, batch.observed)[2].sum(1).mean()
    svi.fit(batch, 30, batch_size=64, progress=False)
    after = kalman_filter(model, batch.observed)[2].sum(1).mean()
    wanted = kalman_filter(true, batch.observed)[2].sum(1).mean()
    assert float(wanted - before) > 0.5
    assert float(wanted - after) < 0.2 * float(wanted - before)


@pytest.mark.slow
def test_intervals_of_both_levels_cover() -> None:
    """400 sessions: the share's own error is near 0.7 points, clustered by session."""
    settings = {"seed": 1, "turns": 4, "sessions": 400, "coverage_fast_steps": 256}
    rows = {(row["arm"], row["level"]): row for row in coverage(settings)}
    for guide in ("exact", "full_rank"):
        assert rows[guide, "both"]["coverage"] == pytest.approx(0.9, abs=0.03)
    assert rows["full_rank", "both"]["mean_off_scales"] < 0.02


def test_the_clocks_learn_that_turns_share_a_session() -> None:
    """From a start where they share a tenth of their variance, towards the two thirds of the truth.

    Nothing but the session makes turns alike, and a start without would stay there.
    """
    true = linear(SessionThoughtModel, 4)
    with torch.no_grad():
        true.thought_prior.transition.copy_(1.4 * torch.eye(4))
        true.thought_prior.log_scale.zero_()
    batch = ltm.simulate(true, 256).batch
    model = SessionThoughtModel(true.emission, 4)
    svi = ltm.DualRateSVI(
        model, "full_rank", Fast(steps=8), ltm.Slow(lr=0.08, warmup=0.0), persistent=True
    )
    svi.fit(batch, 30, batch_size=64, progress=False)
    variance = model.prior().variance.detach()[-2:].flatten()
    a = model.thought_prior.transition.detach()
    shared = (a @ a.T).diagonal() / variance
    assert 0.3 < float(shared.mean()) < 0.75  # 30 steps are not the whole way


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SegmentedThoughtModel(make_oracle(), 1), "2 blocks"),
        (lambda: SegmentedThoughtModel(3, 2), "emission is 3"),  # type: ignore[arg-type]
        (lambda: build_prior("state_space", 4, 3, blocks=3), "equally many"),
        (lambda: linear(SegmentedThoughtModel)(Batch(torch.zeros(2, 7))), "3 segments"),
        (lambda: next(ltm.filter_thoughts(linear(SessionThoughtModel), Batch(torch.zeros(2, 15)))),
         "SegmentedThoughtModel"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()


def test_an_emission_whose_own_prior_learns_is_refused() -> None:
    model = ltm.LatentThoughtModel.from_preset("nano", vocab_size=8, prior="mixture")
    with pytest.raises(InputError, match="standard_normal"):
        SegmentedThoughtModel(model, 2)
