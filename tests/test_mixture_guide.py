"""The mixture posterior: its draws' gradient against closed forms, and modes that it covers."""

from __future__ import annotations

import math

import pytest
import torch
from known_models import make_oracle
from tolerances import EXACT, MC
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.linear_gaussian import LinearGaussian
from ltm_pyro.models.normal_mixture import NormalMixture


class Folded(LinearGaussian):
    """x = W |z - shift| + noise: z and its mirror image explain a sequence equally well."""

    shift = 0.0

    def _predict(self, z: Tensor) -> Tensor:
        return (z - self.shift).flatten(-2).abs() @ self.W.T + self.bias


def make_mixture(
    rows: int = 1, components: int = 3, dims: int = 4, apart: float = 0.7
) -> dict[str, Tensor]:
    """Parameters of overlapping components, the same for all rows."""
    generator = torch.Generator().manual_seed(3)
    draw = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((components,), (components, dims // 2, 2), (components, dims // 2, 2))
    ]
    values = {"logits": 0.5 * draw[0], "loc": apart * draw[1], "scale": (0.3 * draw[2]).exp()}
    return {name: v.expand(rows, *v.shape).clone().requires_grad_() for name, v in values.items()}


def test_density_and_moments_are_those_of_the_mixture() -> None:
    p = make_mixture(rows=2)
    q = NormalMixture(**p)
    same = MixtureSameFamily(
        Categorical(logits=p["logits"]), Independent(Normal(p["loc"], p["scale"]), 2)
    )
    z = q.sample(torch.Size([5]))
    assert z.shape == (5, 2, 2, 2)
    EXACT.assert_close(q.log_prob(z), same.log_prob(z))
    EXACT.assert_close(q.mean, same.mean)
    EXACT.assert_close(q.variance, same.variance)
    wide = q.expand((3, 2))
    assert wide.rsample().shape == (3, 2, 2, 2)
    EXACT.assert_close(wide.log_prob(z[:3]), q.log_prob(z[:3]))


def _cubic(z: Tensor) -> Tensor:
    """A function with a known mean that mixes all dimensions, (..., 2, 2) to (...)."""
    a, b, c, d = z.flatten(-2).unbind(-1)
    return a**3 + 2 * b * c - d**2 + a * b * d


def _mean_of_cubic(logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """E_q of `_cubic` for independent dimensions within components, (...)."""
    a, b, c, d = loc.flatten(-2).unbind(-1)
    va, *_, vd = scale.square().flatten(-2).unbind(-1)
    each = a**3 + 3 * a * va + 2 * b * c - d**2 - vd + a * b * d
    return (logits.softmax(-1) * each).sum(-1)


def test_gradients_of_draws_are_those_of_the_expectation() -> None:
    # A row is one independent estimate from 100 draws.
    rows, draws = 400, 100
    p, exact = make_mixture(rows), make_mixture()
    _cubic(NormalMixture(**p).rsample(torch.Size([draws]))).mean(0).sum().backward()
    _mean_of_cubic(**exact).sum().backward()
    for name, value in p.items():
        assert value.grad is not None
        error = value.grad.std(0) / rows**0.5
        expected = exact[name].grad
        assert expected is not None
        assert bool((expected.abs() > 4 * error).any()), name
        MC.assert_close(value.grad.mean(0), error, expected[0], draws=rows)


def test_the_gradient_of_weights_in_one_dimension() -> None:
    # Pyro's own mixture refuses one dimension, and here two components share a mean.
    rows = 400
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64).expand(rows, 3)
    logits = logits.clone().requires_grad_()
    loc = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64)[:, None, None].expand(rows, 3, 1, 1)
    scale = torch.tensor([0.5, 1.5, 0.8], dtype=torch.float64)[:, None, None].expand_as(loc)
    z = NormalMixture(logits, loc, scale).rsample(torch.Size([100]))
    z.square().mean(0).sum().backward()
    weights, seconds = logits[0].softmax(0), (loc**2 + scale**2)[0].flatten()
    expected = weights * (seconds - (weights * seconds).sum())
    assert logits.grad is not None
    error = logits.grad.std(0) / rows**0.5
    MC.assert_close(logits.grad.mean(0), error, expected.detach(), draws=rows)


@pytest.mark.parametrize("spread", [0.0, 0.05, 5.0])
def test_gradients_are_finite_in_many_dimensions_and_single_precision(spread: float) -> None:
    # Densities of 600 dimensions vanish in single precision; their logarithms do not.
    generator = torch.Generator().manual_seed(0)
    loc = (spread * torch.randn(2, 3, 30, 20, generator=generator)).requires_grad_()
    scale = (0.01 * torch.ones_like(loc)).detach().requires_grad_()
    logits = torch.zeros(2, 3, requires_grad=True)
    q = NormalMixture(logits, loc, scale)
    z = q.rsample(torch.Size([8]))
    (q.log_prob(z).sum() + z.square().sum()).backward()
    for value in (loc, scale, logits):
        assert value.grad is not None
        assert bool(value.grad.isfinite().all())
    assert loc.grad is not None
    assert bool((loc.grad != 0).any())


def test_components_start_apart_and_near_the_prior() -> None:
    oracle = make_oracle(shape=(3, 4))
    guide = build_guide("mixture", oracle, components=4)
    guide.reset(oracle.simulate(3))
    loc = guide.rows()["loc"]
    assert torch.equal(loc[0], loc[2])
    distances = torch.pdist(loc[0].flatten(1))
    assert float(distances.min()) > 0.5
    # The mean of components' KL, half their squared distances from 0, bounds the mixture's.
    assert float(0.5 * loc[0].square().sum((1, 2)).mean()) < 0.5
    EXACT.assert_close(guide.posterior().mean, torch.zeros_like(guide.posterior().mean))
    assert guide.start_log_variance == 0.0


def test_one_component_is_mean_field() -> None:
    oracle = make_oracle()
    batch = oracle.simulate(3)
    guide, plain = build_guide("mixture", oracle, components=1), build_guide("mean_field", oracle)
    plain.reset(batch)
    guide.reset(batch)
    EXACT.assert_close(guide.posterior().mean, plain.posterior().mean)
    kl, expected = guide.kl(oracle.prior()), plain.kl(oracle.prior())
    assert kl is not None
    assert expected is not None
    EXACT.assert_close(kl, expected)
    two = build_guide("mixture", oracle)
    two.reset(batch)
    assert two.kl(oracle.prior()) is None


def test_zero_components_are_refused() -> None:
    oracle = make_oracle()
    with pytest.raises(InputError, match=r"components is 0: .* 1 or more"):
        build_guide("mixture", oracle, components=0)
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="components is"):
            build_guide("mixture", oracle, components=wrong)
    with pytest.raises(InputError, match="init_log_variance is inf"):
        build_guide("mixture", oracle, init_log_variance=math.inf)


def test_two_components_cover_two_modes_and_mean_field_one() -> None:
    # The second dimension is not observed, the first only by its size.
    model = Folded(torch.tensor([[1.0, 0.0]], dtype=torch.float64), 0.3, shape=(1, 2))
    x = torch.tensor([[1.5], [2.0], [2.5], [3.0]], dtype=torch.float64)
    batch = Batch(x)
    axis = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(axis) + Normal(axis.abs(), 0.3).log_prob(x)
    evidence = density.logsumexp(1) + math.log(float(axis[1] - axis[0]))
    fast = Fast(steps=300, lr=0.1, final_fraction=0.0)
    objective = build_objective("elbo", particles=8)
    gaps = {}
    for name in ("mean_field", "mixture"):
        post = DualRateSVI(model, build_guide(name, model), fast, elbo=objective).infer(batch)
        scores = evaluate(model, post, batch, draws=2000)
        gaps[name] = evidence.numpy() - scores["elbo"].values
        MC.assert_at_most(-gaps[name], scores["elbo_se"].values, 0.0, draws=2000)
    # Half of the mass lies on the mode that mean field does not see: log 2 nats.
    assert bool((gaps["mean_field"] > 0.9 * math.log(2)).all()), gaps["mean_field"]
    assert bool((gaps["mixture"] < 0.1).all()), gaps["mixture"]
    # The loop ended with the mixture.
    loc = post.parameters["loc"][:, :, 0, 0]
    assert bool((loc[:, 0] * loc[:, 1] < -1).all())
