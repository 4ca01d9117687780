"""The gradient by hand: what autograd finds, to the bit, and only where it is the same function."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from known_models import make_language_model, make_oracle, make_tokens
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.dual_rate import DualRateSVI
from ltm_pyro.inference.fast_loop import by_autograd, frozen
from ltm_pyro.inference.guides import LocalGuide, MeanField, build_guide, guide_families
from ltm_pyro.inference.guides.contract import moved_guide
from ltm_pyro.inference.objectives import (
    OBJECTIVES,
    Elbo,
    ElboByHand,
    KLWeight,
    Repeat,
    TermRecorder,
    build_objective,
)
from ltm_pyro.models.linear_gaussian import LinearGaussian


class Elsewhere(LinearGaussian):
    """An oracle whose prior is normal, but not the standard one."""

    def prior(self) -> TorchDistribution:
        shape = self.thought_shape
        loc = torch.linspace(-1.0, 2.0, shape[0] * shape[1], dtype=self.W.dtype).view(shape)
        return dist.Normal(loc, 0.7 + loc.square()).to_event(2)


def _problem(kind: str, dtype: torch.dtype) -> tuple[Any, Batch]:
    if kind == "language":
        return make_language_model(dtype=dtype), make_tokens(7)
    model = make_oracle(dtype=dtype)
    if kind == "elsewhere":
        model = Elsewhere(model.W, float(model.noise_scale), model.bias, model.thought_shape)
    return model, model.simulate(7)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["language", "oracle", "elsewhere"])
def test_the_same_numbers_to_the_bit(kind: str, dtype: torch.dtype, weight: float) -> None:
    model, batch = _problem(kind, dtype)
    guide = moved_guide("mean_field", model, batch)
    params: dict[str, Tensor] = dict(guide.local_parameters())
    loss = build_objective("elbo")(model, guide)
    with frozen(model.parameters()), KLWeight(weight):
        torch.manual_seed(0)
        with TermRecorder() as expected:
            value, gradients = by_autograd(loss, batch, 1, params)
        with Repeat(model.prior()):
            by_hand = ElboByHand.of(loss)
        assert by_hand is not None
        for _ in range(2):  # the second time at other values of the same parameters
            torch.manual_seed(0)
            recorder = TermRecorder()
            found, moves = by_hand(batch, recorder)
            assert torch.equal(found, value)
            assert list(moves) == list(params)
            assert all(torch.equal(moves[name], gradients[name]) for name in params)
            assert torch.equal(recorder.nll(), expected.nll())
            assert recorder.closed_kl is not None
            assert expected.closed_kl is not None
            assert torch.equal(recorder.closed_kl, expected.closed_kl)
            with torch.no_grad():
                for p in params.values():
                    p.add_(0.1)
            torch.manual_seed(0)
            with TermRecorder() as expected:
                value, gradients = by_autograd(loss, batch, 1, params)


@pytest.mark.parametrize("kind", ["language", "oracle", "elsewhere"])
def test_a_fast_loop_fits_the_same_posterior(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _problem(kind, torch.float32)

    def fit() -> tuple[dict[str, Tensor], Any]:
        svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=120))
        posterior = svi.infer(batch)
        return svi.guide.rows(), posterior.trace

    rows, trace = fit()
    monkeypatch.setattr(ElboByHand, "of", classmethod(lambda cls, loss: None))
    expected, course = fit()
    assert all(torch.equal(rows[name], expected[name]) for name in expected)
    assert torch.equal(trace.elbo, course.elbo)
    assert torch.equal(trace.grad_norm, course.grad_norm)


class Wider(MeanField):
    """Another's posterior, with this family's parameters."""

    def posterior(self) -> TorchDistribution:
        return dist.Normal(self.local["loc"], 2 * torch.exp(self.local["log_variance"])).to_event(2)


class Charged(Elbo):
    """Another's objective."""

    def charge(self, draws: Any) -> Tensor:
        return 3 * super().charge(draws)


def _known(model: Any, guide: LocalGuide, elbo: Any) -> bool:
    with Repeat(model.prior()):
        return ElboByHand.of(elbo(model, guide)) is not None


def test_only_for_this_objective_of_this_family() -> None:
    model = make_oracle()
    batch = model.simulate(4)

    def guide(family: str = "mean_field") -> LocalGuide:
        return moved_guide(family, model, batch)

    known = {name for name in OBJECTIVES if _known(model, guide(), build_objective(name))}
    assert known == {"elbo"}
    families = {name for name in guide_families() if _known(model, guide(name), Elbo())}
    assert families == {"mean_field"}
    assert not _known(model, guide(), Elbo(particles=2))
    assert not _known(model, guide(), Charged())
    assert not _known(model, guide(), pyro.infer.Trace_ELBO())
    wider = Wider(model)
    wider.reset(batch)
    assert not _known(model, wider, Elbo())
    patched = guide()
    patched.kl = lambda prior: None  # type: ignore[method-assign]
    assert not _known(model, patched, Elbo())
    correlated = make_language_model()
    correlated.prior = lambda: dist.LowRankMultivariateNormal(  # type: ignore[method-assign]
        torch.zeros(12), torch.ones(12, 1), torch.ones(12)
    )
    assert not _known(correlated, moved_guide("mean_field", make_language_model(), make_tokens(2)),
                      Elbo())  # fmt: skip


def test_only_where_no_handler_has_to_see_the_sites() -> None:
    model = make_oracle()
    loss = Elbo()(model, moved_guide("mean_field", model, model.simulate(4)))
    assert ElboByHand.of(loss) is None
    with Repeat(model.prior()):
        assert ElboByHand.of(loss) is not None
        with TermRecorder():
            assert ElboByHand.of(loss) is None
        with Messenger():
            assert ElboByHand.of(loss) is None


def test_a_row_that_diverges_is_named() -> None:
    model = make_oracle()
    batch = model.simulate(4)
    svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=4))
    svi.infer(batch)  # so that no step goes through Pyro
    far = batch.observed.clone()
    far[2] = 1e200  # finite, its square is not
    with pytest.raises(NonFiniteError) as error:
        svi.infer(Batch(far, batch.mask, batch.ids))
    assert error.value.ids == [int(batch.ids[2])]
