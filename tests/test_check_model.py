"""The model contract: what keeps it passes, and each way to break it is told apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from known_models import LearnedOracle, make_language_model, make_oracle, make_tokens
from pyro.distributions import TorchDistribution
from pyro.infer import Predictive
from torch import Tensor, nn

import ltm_pyro as ltm
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import ContractError, InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.base import LatentModel, sequences
from ltm_pyro.models.contract import check_model
from ltm_pyro.models.latent_thought import LatentThoughtModel


class Counts(LatentModel):
    """Counts with a log rate of their own: a model in ten lines."""

    x_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.linspace(-0.5, 0.5, 10, dtype=torch.float64).view(2, 5))

    def prior(self) -> TorchDistribution:
        return dist.Normal(self.W.new_zeros(1, 2), 1.0).to_event(2)

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return dist.Poisson((z.flatten(-2) @ self.W).exp()).mask(batch.mask).to_event(1)


def counts(rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, 5, dtype=torch.bool)
    mask[-1, 3:] = False
    return Batch(torch.randint(0, 4, (rows, 5), generator=generator), mask, torch.arange(rows) + 7)


def test_ten_lines_are_a_model_with_everything_that_inference_asks_for() -> None:
    model, batch = Counts(), counts()
    check_model(model, batch)
    assert model.thought_shape == (1, 2)
    assert model.n_layers is None
    assert model.prepare(batch) is batch
    assert model(size=3).shape == (3, 5)
    assert model(batch.unobserved()).shape == (4, 5)
    assert torch.equal(model(batch), batch.observed)
    assert Predictive(model, num_samples=6)()["x"].shape == (6, 1, 5)
    z = model.prior().sample(torch.Size([3, 4]))
    rate = (z.flatten(-2) @ model.W).exp()
    x = batch.observed.double()
    terms = x * rate.log() - rate - torch.lgamma(x + 1)
    expected = torch.where(batch.mask, terms, 0.0).sum(-1)
    torch.testing.assert_close(model.log_likelihood(z, batch), expected)
    svi = DualRateSVI(model, ltm.build_guide("full_rank", model), Fast(steps=3))
    svi.step(batch)
    assert ltm.evaluate(model, svi.infer(batch), batch, draws=8)["elbo"].shape == (4,)


def test_the_package_s_own_models_pass() -> None:
    oracle = make_oracle()
    check_model(oracle, oracle.simulate(4))
    check_model(LearnedOracle(oracle), oracle.simulate(4))
    check_model(make_language_model(), make_tokens(4))
    # In single precision, its cross-attention still at zero: a path for gradients is enough.
    model = LatentThoughtModel.from_preset("nano", prior="mixture")
    check_model(model, Batch(torch.arange(40).view(2, 20)))


def test_a_model_that_tells_no_shape_of_x_still_runs_forward_on_a_batch() -> None:
    model = Counts()
    model.x_shape = None
    check_model(model, counts())
    with pytest.raises(InputError, match=r"Counts.. without a batch: set .* x_shape"):
        model()


class WrongLikelihood(Counts):
    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        return 2.0 * super().log_likelihood(z, batch)


class Program(Counts):
    def forward(self, batch: Batch | None = None, *, size: int = 1) -> Tensor:
        batch = self.blank(size) if batch is None else batch
        with sequences(batch):
            return self.sites(batch)

    def sites(self, batch: Batch) -> Tensor:
        z = pyro.sample("z", self.prior())
        return pyro.sample("x", self.likelihood(z, batch), obs=batch.x)


class SecondLatent(Program):
    def sites(self, batch: Batch) -> Tensor:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        return super().sites(batch)


class WrongName(Program):
    def sites(self, batch: Batch) -> Tensor:
        theta = pyro.sample("theta", self.prior())
        return pyro.sample("x", self.likelihood(theta, batch), obs=batch.x)


class WrongDataName(Program):
    def sites(self, batch: Batch) -> Tensor:
        z = pyro.sample("z", self.prior())
        return pyro.sample("y", self.likelihood(z, batch), obs=batch.x)


class Factor(Program):
    def sites(self, batch: Batch) -> Tensor:
        pyro.factor("penalty", torch.zeros(len(batch)))
        return super().sites(batch)


class NeverObserved(Program):
    def sites(self, batch: Batch) -> Tensor:
        z = pyro.sample("z", self.prior())
        return pyro.sample("x", self.likelihood(z, batch))


class Scaled(Program):
    def sites(self, batch: Batch) -> Tensor:
        with pyro.poutine.scale(scale=0.5):
            return super().sites(batch)


class OtherPrior(Program):
    def sites(self, batch: Batch) -> Tensor:
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 2).double(), 2.0).to_event(2))
        return pyro.sample("x", self.likelihood(z, batch), obs=batch.x)


class NoPlate(Program):
    def forward(self, batch: Batch | None = None, *, size: int = 1) -> Tensor:
        batch = self.blank(size) if batch is None else batch
        z = pyro.sample("z", self.prior().expand([len(batch)]).to_event(1))
        return pyro.sample("x", self.likelihood(z, batch).to_event(1), obs=batch.x)


class VectorPrior(Counts):
    def prior(self) -> TorchDistribution:
        return dist.Normal(self.W.new_zeros(2), 1.0).to_event(1)


class BatchPrior(Counts):
    def prior(self) -> TorchDistribution:
        return dist.Normal(self.W.new_zeros(4, 1, 2), 1.0).to_event(2)


class NoEvent(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return dist.Poisson((z.flatten(-2) @ self.W).exp())


class BatchNorm(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        rate = (z.flatten(-2) @ self.W).exp()
        return dist.Poisson(rate / rate.mean(-2, keepdim=True)).mask(batch.mask).to_event(1)


class Detached(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return super().likelihood(z.detach(), batch)


class Deaf(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        rate = self.W[0].exp().expand(*z.shape[:-2], 5)
        return dist.Poisson(rate).mask(batch.mask).to_event(1)


class Dropout(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        kept = nn.functional.dropout(z.flatten(-2), 0.5)
        return dist.Poisson((kept @ self.W).exp()).mask(batch.mask).to_event(1)


class NotANumber(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        rate = (z.flatten(-2) @ self.W).exp() * torch.where(batch.ids == 8, torch.nan, 1.0)[:, None]
        return dist.Poisson(rate, validate_args=False).mask(batch.mask).to_event(1)


class OneDraw(Counts):
    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        rate = torch.einsum("bkd,dn->bn", z, self.W).exp()
        return dist.Poisson(rate).mask(batch.mask).to_event(1).log_prob(batch.observed)


class Prepares(Counts):
    def prepare(self, batch: Batch) -> Batch:
        return Batch(batch.observed, torch.ones_like(batch.mask), batch.ids)


class OtherData(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        rate = (z.flatten(-2) @ self.W).exp()
        shape = dist.Poisson(rate).mask(batch.mask).to_event(1)
        if batch.x is None:
            return dist.Poisson(rate[..., :3]).to_event(1)
        return shape


class ClampsData(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        if batch.x is not None:
            batch.x.clamp_(0, 2)
        return super().likelihood(z, batch)


class FillsTheMask(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        batch.mask.fill_(True)
        return super().likelihood(z, batch)


class CountsTheMasked(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return dist.Poisson((z.flatten(-2) @ self.W).exp()).to_event(1)


class ReturnsNothing(Program):
    def forward(self, batch: Batch | None = None, *, size: int = 1) -> Tensor:
        super().forward(batch, size=size)
        return None  # type: ignore[return-value]


class NoPrior(Counts):
    def prior(self) -> TorchDistribution:
        return None


class NoLikelihood(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return super().likelihood(z, batch).log_prob(batch.observed)


class NoTensor(Counts):
    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        return float(super().log_likelihood(z, batch).sum())  # type: ignore[return-value]


class HalfLine(Counts):
    def prior(self) -> TorchDistribution:
        return dist.Exponential(self.W.new_ones(1, 2)).to_event(2)


class Rounds(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        return super().likelihood(z.round(), batch)


class LatentInLikelihood(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        return dist.Poisson((z.flatten(-2) @ self.W + u).exp()).mask(batch.mask).to_event(1)


class PyroParam(Counts):
    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        s = pyro.param("s", torch.ones((), dtype=torch.float64))
        return super().likelihood(z * s, batch)


class PreparesNothing(Counts):
    def prepare(self, batch: Batch) -> Batch:
        return None  # type: ignore[return-value]


class OtherEvidence(Counts):
    def log_evidence(self, batch: Batch) -> Tensor:
        return torch.zeros(3)


class OtherTokens(Counts):
    def token_log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        return 2.0 * super().token_log_likelihood(z, batch)


BROKEN: dict[type[Counts], str] = {
    ClampsData: "changes x of the batch",
    FillsTheMask: "changes mask of the batch|in its batch and",
    CountsTheMasked: r"sequence id 10 .* where the mask is false",
    ReturnsNothing: "program returns None, expected x",
    NoPrior: r"prior\(\) returns None, expected a distribution",
    NoLikelihood: r"likelihood\(z, batch\) returns tensor.*expected a distribution",
    NoTensor: r"log_likelihood returns -\d.*expected a tensor",
    HalfLine: r"prior\(\) has support .*GreaterThan.*expected all of R",
    Rounds: "its gradient by z is 0 everywhere",
    LatentInLikelihood: r"beside z it draws \['u'\]",
    PyroParam: "pyro.param 's' .*torch.nn.Parameter",
    PreparesNothing: "prepare returns None",
    OtherTokens: "token_log_likelihood",
    WrongLikelihood: r"log_likelihood.*site 'x'.*a factor of 2",
    SecondLatent: r"second latent site: found \['w', 'z'\]",
    WrongName: r"no latent site 'z': found \['theta'\].*instead of 'theta'",
    WrongDataName: r"observed sites \['y'\], expected \['x'\]",
    Factor: r"observed sites \['penalty', 'x'\]",
    NeverObserved: "site 'x' is drawn though.*obs=batch.x",
    Scaled: r"prior\(\).log_prob.*a factor of 2",
    OtherPrior: r"prior\(\).log_prob\(z\).*site 'z'.*must be equal",
    NoPlate: r"site 'z' is in plates \[\], expected \[\('sequences', -1, 4\)\]",
    VectorPrior: r"event shape \(2,\), expected",
    BatchPrior: r"batch shape \(4,\)",
    NoEvent: "its program fails on .* rows",
    BatchNorm: r"in its batch and .* alone",
    Detached: "no gradient of log_likelihood reaches z",
    Deaf: "no gradient of log_likelihood reaches z",
    Dropout: "log_likelihood",
    NotANumber: r"sequence ids \[8\] is NaN",
    OneDraw: "log_likelihood|fails",
    Prepares: "prepare must not change it",
    OtherData: r"run forward it makes x \(4, 3\), expected \(4, 5\)",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_model_is_told_what_is_broken(broken: type[Counts]) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ContractError, match=BROKEN[broken]) as caught:
        check_model(broken(), counts())
    assert "\n" not in str(caught.value)
    assert broken.__name__ in str(caught.value)
    assert isinstance(caught.value, AssertionError)
    assert torch.equal(torch.get_rng_state(), state)


REFUSED_AT_ONCE = (
    WrongLikelihood, SecondLatent, WrongName, WrongDataName, Factor, Scaled, OtherPrior, NoPlate,
)  # fmt: skip


@pytest.mark.parametrize("broken", REFUSED_AT_ONCE, ids=lambda broken: broken.__name__)
@pytest.mark.parametrize(
    "use",
    [
        lambda model, batch: fitted(model).infer(batch),
        lambda model, batch: fitted(model).step(batch),
        lambda model, batch: ltm.evaluate(model, None, batch, mode="prior"),
        lambda model, batch: ltm.sample_posterior(model, batch, warmup=50, draws=20),
        lambda model, batch: ltm.compare(model, batch, guides=["mean_field", "delta"]),
    ],
    ids=["infer", "step", "evaluate", "sample_posterior", "compare"],
)
def test_what_numbers_depend_on_is_refused_at_the_first_use(
    broken: type[Counts], use: Callable[[LatentModel, Batch], Any]
) -> None:
    with pytest.raises(ContractError, match=BROKEN[broken].replace("4", "2")):
        use(broken(), counts())


IN_A_PROGRAM = """
import torch
import ltm_pyro as ltm
import pyro.distributions as dist

class Counts(ltm.LatentModel):
    def prior(self):
        return dist.Normal(torch.zeros(1, 2), 1.0).to_event(2)
    def likelihood(self, z, batch):
        rate = z.sum((-2, -1)).exp()[..., None].expand(*z.shape[:-2], 5)
        return dist.Poisson(rate).mask(batch.mask).to_event(1)
    def log_likelihood(self, z, batch):
        return 2.0 * super().log_likelihood(z, batch)

ltm.DualRateSVI(Counts(), "mean_field").infer(ltm.Batch(torch.ones(4, 5)))
"""


def test_a_program_that_never_asks_for_check_model_is_refused_too() -> None:
    """Nothing that this file imports may be what holds the model to its contract."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ContractError" in done.stderr
    assert "log_likelihood" in done.stderr


def test_other_mistakes_are_one_line_too() -> None:
    class NoSuper(Counts):
        def __init__(self) -> None:
            self.k = 1

    class Asks(Counts):
        def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
            return dist.Poisson(batch.covariates["design"]).to_event(1)

    for wrong, match in (
        (NoSuper(), r"NoSuper: call super\(\).__init__"),
        (Asks(), "no covariate 'design'"),
        (OtherEvidence(), r"log_evidence of OtherEvidence is \(3,\).*\(4,\)"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            check_model(wrong, counts())
        assert "\n" not in str(caught.value)


def test_data_and_noise_are_left_alone() -> None:
    batch, before = counts(), counts()
    with pytest.raises(ContractError):
        check_model(ClampsData(), batch)
    assert torch.equal(batch.observed, before.observed)


def fitted(model: LatentModel) -> DualRateSVI:
    return DualRateSVI(model, ltm.build_guide("mean_field", model), Fast(steps=2))


def test_what_is_no_model_is_refused() -> None:
    def program(batch: Batch) -> None: ...

    for wrong in (program, None, nn.Linear(2, 2), "nano", Counts):
        with pytest.raises(InputError, match=r"model is .*ltm_pyro.LatentModel"):
            check_model(wrong, counts())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 2 rows"):
        check_model(Counts(), counts().select(slice(1)))
