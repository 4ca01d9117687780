"""Objectives: what each is, what is refused, and that none is mistaken for the ELBO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from known_models import (
    TINY,
    LearnedOracle,
    exact_elbo,
    loss_on_noise,
    make_language_model,
    make_oracle,
    make_tokens,
)
from pyro.distributions import TorchDistribution
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from tolerances import EXACT, MC
from torch import Tensor

from ltm_pyro.config import CorpusConfig, Fast, FitConfig, ModelConfig, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide, guide_families
from ltm_pyro.inference.objectives import (
    OBJECTIVES,
    Elbo,
    Terms,
    build_objective,
    stopped_log_prob,
)
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.random import Drawing, Noise, draw
from ltm_pyro.run import create_run, load_run


def moved(family: str, model: LatentModel, batch: Batch, **options: Any) -> LocalGuide:
    """A guide away from its start."""
    guide = build_guide(family, model, **options)
    guide.reset(batch)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return guide


def oracle_case(family: str = "mean_field") -> tuple[LinearGaussian, LocalGuide, Batch]:
    oracle = make_oracle()
    batch = oracle.simulate(4)
    return oracle, moved(family, oracle, batch), batch


def value_and_gradient(loss: Tensor, guide: LocalGuide) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(guide.parameters()))]


def test_the_clocks_descend_the_elbo_unless_told_otherwise() -> None:
    model = make_language_model()
    svi = DualRateSVI(model, build_guide("mean_field", model))
    assert repr(svi.elbo) == "Elbo(particles=1)"
    named = DualRateSVI(model, build_guide("mean_field", model), elbo="iwae")
    assert repr(named.elbo) == "ImportanceWeighted(particles=8)"


@pytest.mark.parametrize("block", ["whole", "thought"])
def test_correlated_families_get_their_kl_in_closed_form(block: str) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    guide = moved("full_rank", oracle, batch, block=block)
    loss, terms = build_objective("elbo").descend(
        oracle, guide, batch, Drawing(Noise(0, batch.ids)), 0.3
    )
    kl = guide.kl(oracle.prior())
    assert kl is not None
    nll, reported = terms.report()
    EXACT.assert_close(reported, kl.detach())
    EXACT.assert_close(loss.detach(), (nll + 0.3 * kl.detach()).sum())


class Doubled(Elbo):
    """Charges twice the KL."""

    def charge(self, terms: Terms) -> Tensor:
        return 2 * super().charge(terms)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_what_an_objective_charges_and_the_kl_are_told_apart(weight: float) -> None:
    oracle, guide, batch = oracle_case()
    loss, terms = Doubled().descend(oracle, guide, batch, Drawing(Noise(0, batch.ids)), weight)
    nll, kl = terms.report()
    EXACT.assert_close(kl, guide.kl(oracle.prior()).detach())  # type: ignore[union-attr]
    assert not kl.requires_grad
    EXACT.assert_close(loss.detach(), (nll + 2 * weight * kl).sum())


@pytest.mark.parametrize("name", ["elbo", "stl", "iwae", "dreg", "renyi"])
def test_a_point_mass_descends_the_joint(name: str) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    guide = moved("delta", oracle, batch)
    found = value_and_gradient(build_objective(name)(oracle, guide)(batch), guide)
    point = guide.local["point"]
    joint = oracle.log_likelihood(point, batch) + oracle.prior().log_prob(point)
    for a, b in zip(found, value_and_gradient(-joint.sum(), guide), strict=True):
        EXACT.assert_close(a, b)


def test_particles_average_for_the_elbo_and_tighten_the_others() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(64)
    guide = build_guide("mean_field", oracle)
    guide.reset(batch)
    best = oracle.best_mean_field(batch)
    guide.load_rows({"loc": best.mean, "log_variance": best.variance.log()})
    evidence = oracle.log_evidence(batch).sum().item()

    def value(name: str, **options: Any) -> tuple[float, float]:
        """Mean and standard error, nats above the evidence in all."""
        objective = build_objective(name, **options)
        found = [-objective.loss(oracle, guide, batch) - evidence for _ in range(50)]
        return float(np.mean(found)), float(np.std(found) / 50**0.5)

    exact = exact_elbo(oracle, best, batch).sum().item() - evidence
    for particles in (1, 16):
        mean, error = value("elbo", particles=particles)
        MC.assert_close(mean, error, exact, draws=50)
    # At the best mean-field q the gaps are far apart: -45, -26, -17 with errors up to 2.
    rising = [value("iwae", particles=s)[0] for s in (1, 4, 16)]
    assert exact == pytest.approx(rising[0], abs=8)
    assert rising[0] + 10 < rising[1] < rising[2] - 5 < -10
    # Orders fall from the importance-weighted 0 over the ELBO's 1 to a looser bound.
    orders = [value("renyi", alpha=a, particles=16)[0] for a in (0.0, 0.5, 2.0)]
    assert orders[0] == pytest.approx(rising[2], abs=8)
    assert orders[0] > orders[1] > exact > orders[2]


def test_dreg_reports_the_bound_that_it_descends() -> None:
    oracle, guide, batch = oracle_case()
    losses = []
    for name in ("iwae", "dreg"):
        torch.manual_seed(0)
        losses.append(build_objective(name, particles=3)(oracle, guide)(batch).detach())
    EXACT.assert_close(losses[0], losses[1])


def test_the_decoder_gets_the_same_gradient_from_iwae_and_dreg() -> None:
    model = LearnedOracle(make_oracle())
    batch = make_oracle().simulate(3)
    guide = moved("mean_field", model, batch)
    found = []
    for name in ("iwae", "dreg"):
        torch.manual_seed(0)
        loss = build_objective(name, particles=3)(model, guide)(batch)
        found.append(torch.autograd.grad(loss, model.bias)[0])
    EXACT.assert_close(found[0], found[1])


def test_stopped_parameters_are_the_same_numbers_without_a_gradient() -> None:
    for family in ("mean_field", "full_rank", "flow"):
        _, guide, batch = oracle_case(family)
        z = guide.posterior().sample().requires_grad_()
        held, free = stopped_log_prob(guide, z), guide.posterior().log_prob(z)
        EXACT.assert_close(held, free)
        (by_z,) = torch.autograd.grad(held.sum(), z, retain_graph=True)
        assert bool(by_z.any())
        parameters = list(guide.parameters())
        by_parameters = torch.autograd.grad(held.sum(), parameters, allow_unused=True)
        assert all(g is None for g in by_parameters)
        # The guide itself is as it was.
        assert all(p.requires_grad for p in parameters)
        assert len(guide.local_parameters()) > 0
        assert guide.n_rows == len(batch)


@pytest.mark.parametrize("level", ["total", "layer", "thought"])
def test_free_bits_by_hand(level: str) -> None:
    model, batch = make_language_model(), make_tokens(4)
    guide = moved("mean_field", model, batch)
    loc, variance = guide.local["loc"], guide.local["log_variance"].exp()
    by_thought = 0.5 * (loc.square() + variance - 1 - variance.log()).sum(-1)
    kl = {
        "total": by_thought.sum(1, keepdim=True),
        "layer": by_thought.unflatten(1, (TINY.n_layers, -1)).sum(-1),
        "thought": by_thought,
    }[level]
    nats = 1.001 * kl.median().item()  # some groups are charged and some are free
    z = draw(guide.posterior(), Noise(0, batch.ids), 1)[0]
    by_hand = 0.3 * kl.clamp(min=nats).sum() - model.log_likelihood(z, batch).sum()
    objective = build_objective("free_bits", nats=nats, level=level)
    loss = loss_on_noise(objective, model, guide, batch, 0.3)
    for a, b in zip(
        value_and_gradient(loss, guide), value_and_gradient(by_hand, guide), strict=True
    ):
        EXACT.assert_close(a, b)


def test_free_bits_of_blocks_that_lean_inside_themselves_only() -> None:
    model, batch = make_language_model(), make_tokens(3)
    inner = {"thought": ("layer", "thought"), "layer": ("layer",)}
    for block, levels in inner.items():
        guide = moved("full_rank", model, batch, block=block)
        kl = guide.kl(model.prior())
        assert kl is not None
        for level in levels:
            # Without free nats the groups add up to the whole KL, whatever the level.
            torch.manual_seed(0)
            grouped = build_objective("free_bits", nats=0.0, level=level)(model, guide)(batch)
            torch.manual_seed(0)
            whole = build_objective("elbo")(model, guide)(batch)
            EXACT.assert_close(grouped.detach(), whole.detach())
    guide = moved("full_rank", model, batch, block="layer")
    with pytest.raises(InputError, match="between thoughts, which guide 'full_rank'"):
        build_objective("free_bits", level="thought")(model, guide)(batch)


class Laplaces(LocalGuide):
    """Independent marginals without a closed KL."""

    family = "laplaces"

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        shape = (len(batch), *self.thought_shape)
        return {"loc": self.anchor.new_zeros(shape), "log_scale": self.anchor.new_zeros(shape)}

    def posterior(self) -> TorchDistribution:
        return dist.Laplace(self.local["loc"], self.local["log_scale"].exp()).to_event(2)


class HalfLearned(LinearGaussian):
    """An oracle whose prior is no normal."""

    def prior(self) -> TorchDistribution:
        zero = self.W.new_zeros(self.thought_shape)
        return dist.StudentT(zero + 5, zero, zero + 1).to_event(2)


def test_free_bits_by_group_without_a_closed_form() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    other = HalfLearned(oracle.W, 0.8, oracle.bias, oracle.thought_shape)
    guide = Laplaces(oracle)
    guide.reset(batch)
    for model in (oracle, other):
        torch.manual_seed(0)
        objective = build_objective("free_bits", nats=0.0, level="thought", particles=500)
        grouped = objective(model, guide)(batch).detach()
        torch.manual_seed(0)
        whole = build_objective("elbo", particles=500)(model, guide)(batch).detach()
        # Closed and Monte Carlo KL of 3 sequences on 500 draws: within 0.3 nats, and not equal
        # where the entropy is known.
        assert grouped.item() == pytest.approx(whole.item(), abs=0.8)
    EXACT.assert_close(grouped, whole)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("elbow", {}, "unknown objective 'elbow': did you mean 'elbo'"),
        ("iwae", {"particle": 4}, "'iwae' 'particle': did you mean 'particles'"),
        ("elbo", {"options": 1}, "unknown option"),
        ("iwae", {"particles": 0}, "particles is 0: must be a whole number, 1 or more"),
        ("iwae", {"particles": 2.5}, "particles is 2.5"),
        ("iwae", {"particles": True}, "particles is True"),
        ("renyi", {"alpha": 1}, "alpha is 1: must be 0 or more and not 1"),
        ("renyi", {"alpha": -0.5}, "alpha is -0.5"),
        ("renyi", {"alpha": math.nan}, "alpha is nan: must be a finite number"),
        ("beta", {"weight": -1}, "weight is -1"),
        ("beta", {"weight": "high"}, "weight is 'high': must be a finite number"),
        ("free_bits", {"nats": -1.0}, "nats is -1.0: must be 0 or more"),
        ("free_bits", {"nats": math.inf}, "nats is inf"),
        ("free_bits", {"level": "thoughts"}, "did you mean 'thought'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_objective(name, **options)
    assert "\n" not in str(caught.value)


def test_what_a_model_or_guide_cannot_do_is_refused() -> None:
    oracle, guide, batch = oracle_case()
    with pytest.raises(InputError, match="this model has no layers"):
        build_objective("free_bits", level="layer")(oracle, guide)(batch)

    class Stuck(type(guide)):  # type: ignore[misc]
        def posterior(self) -> TorchDistribution:
            q = super().posterior()
            return dist.Bernoulli(logits=q.mean).to_event(2)

    guide.__class__ = Stuck
    with pytest.raises(InputError, match="'elbo' needs a path"):
        build_objective("elbo")(oracle, guide)(batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_drives_both_clocks(name: str) -> None:
    oracle = make_oracle()
    model, batch = LearnedOracle(oracle), oracle.simulate(3)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), Fast(steps=40, lr=0.2), Slow(), elbo=name
    )
    svi.horizon = 10
    state = torch.get_rng_state()
    post = svi.infer(batch)
    assert torch.equal(svi.infer(batch).mean, post.mean)
    start = exact_elbo(model, model.prior().expand(torch.Size([3])), batch)
    assert exact_elbo(model, post.distribution, batch).mean() > start.mean() + 5
    assert post.objective.startswith(f"{name}(")
    closed = name in ("elbo", "beta", "free_bits")
    assert post.objective_kl == ("analytic" if closed else "monte_carlo")
    before = model.bias.clone()
    row = svi.step(batch)
    assert row["elbo"] == pytest.approx(-row["nll"] - row["kl"])
    assert not torch.equal(model.bias, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("elbo", "name", "kl"),
    [
        (build_objective("renyi", alpha=0.5), "renyi(alpha=0.5, particles=8)", "monte_carlo"),
        (TraceMeanField_ELBO(), "TraceMeanField_ELBO(num_particles=1)", "analytic"),
        (Trace_ELBO(num_particles=2), "Trace_ELBO(num_particles=2)", "monte_carlo"),
        (RenyiELBO(0.5, 2), "RenyiELBO(alpha=0.5, num_particles=2)", "monte_carlo"),
    ],
)
def test_which_estimator_ran_is_recorded(elbo: Any, name: str, kl: str) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    svi = DualRateSVI(oracle, build_guide("mean_field", oracle), Fast(steps=2), elbo=elbo)
    post = svi.infer(batch)
    assert (post.objective, post.objective_kl) == (name, kl)
    scores = evaluate(oracle, post, batch, draws=2)
    assert scores.attrs["objective"] == name
    assert scores.attrs["objective_kl"] == kl


def test_silent_fall_backs_are_told() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(2)
    # torch knows a Laplace against a normal; against Student's t both objectives fall back.
    other = HalfLearned(oracle.W, 0.8, oracle.bias, oracle.thought_shape)
    for model, expected in ((oracle, "analytic"), (other, "monte_carlo")):
        for elbo in ("elbo", TraceMeanField_ELBO()):
            svi = DualRateSVI(model, Laplaces(model), Fast(steps=1), elbo=elbo)
            assert svi.infer(batch).objective_kl == expected
    point = DualRateSVI(oracle, build_guide("delta", oracle), Fast(steps=1)).infer(batch)
    assert point.objective_kl == "none"


@pytest.mark.parametrize(
    ("name", "options", "above"),
    [
        ("iwae", {"particles": 16}, True),
        ("dreg", {"particles": 16}, True),
        ("renyi", {"alpha": 0.2, "particles": 16}, True),
        ("beta", {"weight": 0.1}, True),
        ("beta", {"weight": 4.0}, False),
        ("free_bits", {"nats": 50.0}, False),
    ],
)
def test_the_elbo_column_is_the_plain_elbo(name: str, options: dict[str, Any], above: bool) -> None:
    oracle = make_oracle()
    model, batch = LearnedOracle(oracle), oracle.simulate(500)
    objective = build_objective(name, **options)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), Fast(steps=0), Slow(lr=1e-9), elbo=objective
    )
    row = svi.step(batch)
    # Without a fast step q is the prior, so the ELBO is known; over 500 sequences its estimate is
    # within a few nats of some eighty.
    exact = exact_elbo(model, model.prior().expand(torch.Size([500])), batch).mean().item()
    assert row["elbo"] == pytest.approx(exact, abs=6.0)
    if name == "beta":
        assert row["objective"] == pytest.approx(row["elbo"], rel=1e-9)  # KL is 0 at the prior
    else:
        assert (row["objective"] > row["elbo"] + 6.0) == above


def test_the_annealing_weight_and_the_objective_are_told_apart() -> None:
    model, batch = make_language_model(), make_tokens(4)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), Fast(steps=5, lr=0.3), Slow(kl_start=0.2),
        elbo=build_objective("beta", weight=0.5),
    )  # fmt: skip
    svi.horizon = 10
    row = svi.step(batch)
    assert row["kl_weight"] == 0.2
    assert row["kl"] > 0.1
    assert row["objective"] == pytest.approx(-row["nll"] - 0.2 * 0.5 * row["kl"], rel=1e-9)
    assert row["elbo"] == pytest.approx(-row["nll"] - row["kl"], rel=1e-12)


def test_what_a_guide_adds_for_its_shared_parameters_is_no_part_of_the_objective() -> None:
    model, batch = make_language_model(), make_tokens(4)

    class Adding(type(build_guide("mean_field", model))):  # type: ignore[misc]
        def shared_loss(self, loss: Any, batch: Batch) -> Tensor:
            return 7.0 * loss(batch)

    guide = build_guide("mean_field", model)
    guide.__class__ = Adding
    row = DualRateSVI(model, guide, Fast(steps=2)).step(batch)
    assert row["objective"] == pytest.approx(row["elbo"], rel=1e-9)


@pytest.mark.parametrize("name", ["stl", "iwae", "dreg", "renyi"])
@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_no_bound_exceeds_the_evidence(name: str, family: str) -> None:
    # A fitted q on fresh draws.
    oracle = make_oracle()
    batch = oracle.simulate(16)
    svi = DualRateSVI(oracle, build_guide(family, oracle), Fast(steps=60, lr=0.2), elbo=name)
    svi.infer(batch)
    objective = build_objective(name)
    draw = Drawing(Noise(0, batch.ids))
    values = torch.stack(
        [
            objective.per_sequence(objective.terms(oracle, svi.guide, batch, draw))
            for _ in range(200)
        ]
    ).detach()
    error = values.std(0) / 200**0.5
    MC.assert_at_most(values.mean(0), error, oracle.log_evidence(batch), draws=200)


DENSITIES = sorted(set(guide_families()) - {"delta"})


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSITIES)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_no_pair_of_guide_and_objective_exceeds_the_evidence(name: str, family: str) -> None:
    """Twenty seeds of loadings, data and noise; ELBO and importance-weighted bound."""
    excess: dict[str, list[float]] = {"elbo": [], "iw_bound": []}
    for seed in range(20):
        oracle = make_oracle(noise_scale=(0.1, 0.3, 1.0)[seed % 3], seed=seed)
        batch = oracle.simulate(8, seed=seed)
        svi = DualRateSVI(
            oracle, build_guide(family, oracle), Fast(steps=30, lr=0.2), elbo=name, seed=seed
        )
        post = svi.infer(batch)
        scores = evaluate(oracle, post, batch, draws=200, seed=seed, controls=False)
        evidence = oracle.log_evidence(batch).numpy()
        for column, values in excess.items():
            error = np.sqrt(np.square(scores[f"{column}_se"].values).sum())
            values.append(float((scores[column].values - evidence).sum() / max(error, 1e-9)))
    # The largest of 40 standard normal numbers exceeds 4.5 once in 7,000 times.
    assert max(max(values) for values in excess.values()) < 4.5, excess


def test_a_run_keeps_its_objective(tmp_path: Path) -> None:
    config = FitConfig(
        corpus=CorpusConfig(name="mixture", options={"n_sequences": 40}),
        model=ModelConfig(
            vocab_size=16, seq_len=8, n_layers=1, width=8, n_heads=1, mlp_hidden=8, window=1,
            thoughts_per_layer=2, thought_dim=2,
        ),
        fast=Fast(steps=1), slow=Slow(word_dropout=0.25), steps=1, batch_size=2, compile=False,
        control=False, objective="iwae", objective_options={"particles": 3},
    )  # fmt: skip
    run = create_run(tmp_path / "run", config)
    assert repr(run.svi.elbo) == "ImportanceWeighted(particles=3)"
    again = load_run(tmp_path / "run")
    assert repr(again.svi.elbo) == "ImportanceWeighted(particles=3)"
    assert again.config.slow.word_dropout == 0.25
    bad = FitConfig(**{**vars(config), "objective_options": {"particles": 0}})
    with pytest.raises(InputError, match="particles is 0"):
        create_run(tmp_path / "other", bad)
    assert not (tmp_path / "other").exists()
