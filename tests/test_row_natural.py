"""`RowNatural` steps in units of q, row by row."""

from __future__ import annotations

import pytest
import torch
from known_models import exact_elbo, make_language_model, make_oracle, make_tokens
from tolerances import EXACT
from torch import Tensor

from ltm_pyro.config import Fast
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, LONGEST, RowNatural, Unit
from ltm_pyro.inference.clocks.fast import local_optimizer
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide, guide_families
from ltm_pyro.inference.objectives import OBJECTIVES

HAVE_A_NORMAL = {"mean_field", "low_rank", "full_rank", "mixture", "flow", "semi_amortized"}


def _normal(rows: int = 4, dims: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    loc, log_variance = torch.randn(2, rows, dims, generator=generator, dtype=torch.float64)
    return {"loc": loc, "log_variance": log_variance}


def _optimizer(params: dict[str, Tensor], momentum: float = 0.0) -> RowNatural:
    def units() -> dict[str, Unit]:
        return {"loc": (0.5 * params["log_variance"]).exp(), "log_variance": LOG_VARIANCE_UNIT}

    return RowNatural(params, units, momentum, (0.9, 0.999))


def test_a_small_step_is_the_natural_gradient() -> None:
    params = _normal()
    before = {name: p.clone() for name, p in params.items()}
    gradients = {name: p.sin() for name, p in before.items()}
    _optimizer(params).step(gradients, lr=1e-3)
    variance = before["log_variance"].exp()
    EXACT.assert_close(params["loc"], before["loc"] - 1e-3 * variance * gradients["loc"])
    # The inverse Fisher information of a log variance is 2, of which a quarter is taken.
    expected = before["log_variance"] - 1e-3 * LOG_VARIANCE_UNIT**2 * gradients["log_variance"]
    EXACT.assert_close(params["log_variance"], expected)


def test_no_step_leaves_the_trust_region() -> None:
    params = _normal(dims=50)
    before = {name: p.clone() for name, p in params.items()}
    gradients = {name: 1e9 * p.sign() for name, p in before.items()}
    gradients["loc"][:2, 1:] = 0  # one dimension alone reaches one unit
    _optimizer(params).step(gradients, lr=0.3)
    moved = (params["loc"] - before["loc"]) / (0.5 * before["log_variance"]).exp()
    EXACT.assert_close(moved[:2].norm(dim=1), torch.ones(2, dtype=torch.float64))
    EXACT.assert_close(moved[2:].norm(dim=1), torch.full((2,), LONGEST, dtype=torch.float64))
    assert float((params["log_variance"] - before["log_variance"]).abs().max()) <= LOG_VARIANCE_UNIT


def test_a_quadratic_with_one_curvature_is_solved_whatever_its_scale() -> None:
    # E_q of (z - 3 s)^2 / 2 s^2, in closed form: q = N(3 s, s^2).
    for scale in (1e-3, 1.0, 1e3):
        params = {name: torch.zeros(1, 1, dtype=torch.float64) for name in ("loc", "log_variance")}
        optimizer = _optimizer(params, momentum=0.3)
        for _ in range(300):
            variance = params["log_variance"].exp()
            by_log_variance = 0.5 * (variance / scale**2 - 1)
            by_loc = (params["loc"] - 3 * scale) / scale**2
            optimizer.step({"loc": by_loc, "log_variance": by_log_variance}, lr=0.3)
        assert float(params["loc"]) == pytest.approx(3 * scale, rel=1e-3)
        assert float(params["log_variance"].exp()) == pytest.approx(scale**2, rel=1e-3)


def test_rows_are_independent_and_momentum_comes_back() -> None:
    together, alone = _normal(), {name: p[1:2].clone() for name, p in _normal().items()}
    optimizer, other = _optimizer(together, 0.6), _optimizer(alone, 0.6)
    for step in range(4):
        optimizer.step({name: (p + step).sin() for name, p in together.items()}, lr=0.3)
        other.step({name: (p + step).sin() for name, p in alone.items()}, lr=0.3)
        back = _optimizer(alone, 0.6)
        back.load(other.state())
        other = back
    for name, p in alone.items():
        assert torch.equal(together[name][1:2], p)


@pytest.mark.parametrize("family", guide_families())
def test_families_with_a_normal_step_along_it_and_others_say_adam(family: str) -> None:
    model, batch = make_language_model(), make_tokens(3)
    guide = build_guide(family, model)
    guide.reset(batch)
    optimizer = local_optimizer(guide, Fast())
    if not guide.local_parameters():
        return
    assert optimizer.name.startswith("natural") == (family in HAVE_A_NORMAL)
    assert set(guide.units()) <= set(guide.local_parameters())
    post = DualRateSVI(model, guide, Fast(steps=2)).infer(batch)
    assert post.optimizer == optimizer.name
    for rest in set(guide.local_parameters()) - set(guide.units()):
        assert rest in post.optimizer
    adam = DualRateSVI(model, guide, Fast(steps=1, optimizer="adam"))
    assert adam.infer(batch).optimizer == "adam"


def test_sixteen_steps_do_what_adam_does_not_in_forty() -> None:
    """Nats per sequence below the best mean field, on the oracle."""
    oracle = make_oracle()
    batch = oracle.simulate(64)

    def behind(fast: Fast) -> float:
        post = DualRateSVI(oracle, build_guide("mean_field", oracle), fast).infer(batch)
        reached = exact_elbo(oracle, post.distribution, batch)
        return float((oracle.best_mean_field_elbo(batch) - reached).mean())

    assert behind(Fast(steps=16)) < behind(Fast(steps=40, optimizer="adam", lr=0.1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_carries_q_off(name: str) -> None:
    """Natural steps on weighed draws made scales of thousands in 150 steps."""
    oracle = make_oracle()
    guide = build_guide("mean_field", oracle)
    post = DualRateSVI(oracle, guide, Fast(steps=150), elbo=name).infer(oracle.simulate(8))
    assert post.optimizer.startswith("adam" if name in ("iwae", "dreg", "renyi") else "natural")
    # The prior's scale is 1, and data can only narrow it.
    assert float(post.sd.max()) < 2
