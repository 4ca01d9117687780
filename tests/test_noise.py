"""Noise belongs to a sequence: what is drawn for it does not depend on what stands beside it."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from known_models import TINY, make_language_model, make_oracle, make_tokens
from pyro.distributions import TorchDistribution
from scipy import stats
from tolerances import EXACT, GOF, MC
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.tokenizer import ByteTokenizer
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide, guide_families
from ltm_pyro.inference.guides.contract import moved_guide
from ltm_pyro.models.word_dropout import WordDropout
from ltm_pyro.random import Drawing, Noise, Stream, derive_seed, draw, noise_size

IDS = torch.tensor([7, -3, 2**62, 0, 100])


@pytest.mark.parametrize("seed", [0, derive_seed(1, Stream.FAST), 2**62 + 1])
def test_the_numbers_are_independent_and_of_their_distributions(seed: int) -> None:
    noise = Noise(seed, torch.arange(50))
    z, u = noise.normal(200, draws=20).numpy(), noise.uniform(200, draws=20).numpy()
    p = [stats.kstest(z.ravel(), "norm").pvalue, stats.kstest(u.ravel(), "uniform").pvalue]
    GOF.assert_fits(np.array(p))
    # Neighbours in draw, row and index are uncorrelated, in size too; each mean has unit variance.
    for axis in range(3):
        moved = np.moveaxis(z, axis, 0)
        a, b = moved[1:].ravel(), moved[:-1].ravel()
        found = [(a * b).mean(), ((a**2 - 1) * (b**2 - 1)).mean() / 2]
        MC.assert_close(np.array(found), 1 / np.sqrt(len(a)), np.zeros(2))


def test_a_number_is_a_function_of_its_place() -> None:
    noise = Noise(3, IDS)
    z, u = noise.normal(6, draws=4), noise.uniform(6, draws=4)
    assert torch.equal(Noise(3, IDS[[4, 1]]).normal(6, draws=4), z[:, [4, 1]])
    assert torch.equal(noise.select(slice(1, 3)).normal(6, draws=4), z[:, 1:3])
    assert torch.equal(noise.normal(3, draws=2, first=2), z[2:, :, :3])
    assert torch.equal(noise.uniform(5, draws=1, first=3), u[3:, :, :5])
    assert not torch.equal(Noise(4, IDS).normal(6), z[:1])
    assert len({float(v) for v in z.flatten()}) == z.numel()
    generators = [g.initial_seed() for d in (0, 1) for g in noise.generators(d)]
    assert len(set(generators)) == 2 * len(IDS)


def test_known_numbers_stay() -> None:
    # Whatever draws by them, a fit that is resumed after an update draws what it would have drawn.
    assert Noise(0, torch.tensor([0, 5])).uniform(2).flatten().tolist() == pytest.approx(
        KNOWN, rel=1e-15
    )


KNOWN = [0.6524484863740323, 0.7012121095215254, 0.00583984783210828, 0.5596462125544688]


# --- draws from distributions ------------------------------------------------------------------


def _two_normals() -> TorchDistribution:
    loc = torch.tensor([-4.0, 4.0]).double().view(2, 1, 1).expand(5, 2, 1, 2)
    parts = dist.Normal(loc, 1.0).to_event(2)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(5, 2).double()), parts)


FOREIGN = {
    "laplace": lambda: dist.Laplace(torch.zeros(5, 1, 2).double(), 1.0).to_event(2),
    "student": lambda: dist.StudentT(torch.full((5, 1, 2), 4.0).double()).to_event(2),
    "gamma": lambda: dist.Gamma(torch.full((5, 1, 2), 2.0).double(), 1.0).to_event(2),
    "lognormal": lambda: dist.LogNormal(torch.zeros(5, 1, 2).double(), 1.0).to_event(2),
    "bernoulli": lambda: dist.Bernoulli(torch.full((5, 1, 2), 0.3).double()).to_event(2),
    "dirichlet": lambda: dist.Dirichlet(torch.ones(5, 1, 3).double()).to_event(1),
    "mixture": _two_normals,
}


def _first(q: TorchDistribution, rows: int) -> TorchDistribution:
    if isinstance(q, dist.MixtureSameFamily):
        parts = q.component_distribution
        base = dist.Normal(parts.base_dist.loc[:rows], parts.base_dist.scale[:rows]).to_event(2)
        return dist.MixtureSameFamily(dist.Categorical(q.mixture_distribution.probs[:rows]), base)
    if isinstance(q, torch.distributions.Independent):
        base = q.base_dist
        kept = {
            name: getattr(base, name)[:rows]
            for name in base.arg_constraints
            if name != "logits" and name in ("loc", "scale", "df", "concentration", "rate", "probs")
        }
        return type(base)(**kept).to_event(q.reinterpreted_batch_ndims)
    raise NotImplementedError(type(q).__name__)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_distribution_that_takes_no_noise_is_drawn_row_by_row(name: str) -> None:
    q = FOREIGN[name]()
    assert noise_size(q) is None
    noise, state = Noise(1, IDS), torch.get_rng_state()
    z = draw(q, noise, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert z.shape == (3, *q.shape())
    if name != "bernoulli":
        assert len({float(v) for v in z[..., 0, 0].flatten()}) == 15
    few = draw(_first(q, 2), noise.select(torch.tensor([3, 1])), 1)
    assert torch.equal(few[0], z[0, [3, 1]])


def test_draws_row_by_row_are_of_the_distribution() -> None:
    q = dist.Gamma(torch.full((400, 2, 2), 2.0).double(), 3.0).to_event(2)
    z = draw(q, Noise(2, torch.arange(400)), 2).numpy()
    GOF.assert_fits(stats.kstest(z.ravel(), "gamma", args=(2.0, 0.0, 1 / 3)).pvalue)


@pytest.mark.parametrize("family", guide_families())
def test_every_family_draws_from_its_own_distribution(family: str) -> None:
    oracle = make_oracle()
    batch = oracle.simulate(2)
    guide = moved_guide(family, oracle, batch)
    with torch.no_grad():
        q = guide.posterior()
        z = draw(q, Noise(0, batch.ids), 20_000)
        mean = q.mean.detach()
    assert noise_size(q) is not None
    if not guide.has_density:
        assert torch.equal(z[0], mean)
        return
    error = z.std(0) / len(z) ** 0.5
    if family != "flow":  # whose mean is an estimate itself
        MC.assert_close(z.mean(0), error, mean)
    torch.manual_seed(0)
    with torch.no_grad():
        other = guide.posterior().sample(torch.Size([20_000]))
    both = (error.square() + other.var(0) / len(other)).sqrt()
    MC.assert_close(z.mean(0), both, other.mean(0))
    spread = (z - z.mean(0)).square(), (other - other.mean(0)).square()
    both = ((spread[0].var(0) + spread[1].var(0)) / len(z)).sqrt()
    MC.assert_close(spread[0].mean(0), both, spread[1].mean(0))
    cross = [(d[..., 0, 0] - d[..., 0, 0].mean(0)) * (d[..., 1, 1] - d[..., 1, 1].mean(0))
             for d in (z, other)]  # fmt: skip
    both = ((cross[0].var(0) + cross[1].var(0)) / len(z)).sqrt()
    MC.assert_close(cross[0].mean(0), both, cross[1].mean(0))


def test_noise_made_ahead_is_the_noise_made_one_by_one() -> None:
    q = dist.Normal(torch.zeros(5, 2, 3).double(), 1.0).to_event(2)
    noise = Noise(1, IDS)
    whole = draw(q, noise, 9)
    for ahead in (1, 4, 9, 100):
        drawing = Drawing(noise, ahead=ahead)
        assert torch.equal(torch.cat([drawing(q, s) for s in (1, 3, 2, 1, 2)]), whole)
        drawing.rewind()
        assert torch.equal(drawing(q, 2), whole[:2])


# --- inference, scores, text ---------------------------------------------------------------------


class Laplaces(LocalGuide):
    """A family of another's making, whose distribution takes no noise."""

    family = "laplaces"

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        shape = (len(batch), *self.thought_shape)
        return {"loc": self.anchor.new_zeros(shape), "log_scale": self.anchor.new_zeros(shape)}

    def posterior(self) -> TorchDistribution:
        return dist.Laplace(self.local["loc"], self.local["log_scale"].exp()).to_event(2)


def _guide(family: str, model: ltm.LatentThoughtModel) -> LocalGuide:
    return Laplaces(model) if family == "laplaces" else build_guide(family, model)


def _assert_row(row: Tensor, alone: Tensor) -> None:
    torch.testing.assert_close(row, alone, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
@pytest.mark.parametrize("family", [*guide_families(), "laplaces"])
def test_one_sequence_alone_gets_what_it_gets_in_any_batch(family: str, noise: str) -> None:
    model, batch = make_language_model(dtype=torch.float32), make_tokens(64)
    fast = Fast(steps=8, lr=0.1, noise=noise, fixed_draws=2)  # type: ignore[arg-type]
    svi = DualRateSVI(model, _guide(family, model), fast)
    alone = svi.infer(batch.select(slice(3, 4)))
    for rows in (8, 64):
        post = svi.infer(batch.select(slice(rows)))
        for name, value in alone.parameters.items():
            _assert_row(post.parameters[name][3], value[0])
        _assert_row(post.mean[3], alone.mean[0])
        _assert_row(post.sample(5, seed=1)[:, 3], alone.sample(5, seed=1)[:, 0])
        _assert_row(post.sample(2, seed=1)[:, 3], alone.sample(5, seed=1)[:2, 0])


def test_parts_of_a_batch_get_what_the_batch_gets() -> None:
    model, batch = make_language_model(), make_tokens(7)
    whole = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=5)).infer(batch)
    guide = build_guide("mean_field", model)
    parts = DualRateSVI(model, guide, Fast(steps=5), execution=ltm.Execution(micro_batch=3)).infer(
        batch
    )
    EXACT.assert_close(parts.mean, whole.mean)


@pytest.mark.parametrize("mode", ["oracle", "prior"])
def test_a_score_is_the_same_in_any_batch(mode: str) -> None:
    model, batch = make_language_model(), make_tokens(6)
    svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=3))
    order = torch.tensor([4, 2])
    scores = []
    for part in (batch, batch.select(order)):
        post = svi.infer(part) if mode == "oracle" else None
        scores.append(evaluate(model, post, part, 8, mode=mode, controls=False))  # type: ignore[arg-type]
    for name in ("elbo", "iw_bound", "nll_given_z"):
        few = torch.tensor(scores[1][name].values)
        EXACT.assert_close(few, torch.tensor(scores[0][name].values)[order])


def test_hidden_words_belong_to_the_sequence() -> None:
    model, batch = make_language_model(), make_tokens(6)
    dropout, order = WordDropout(model, 0.4, seed=0), torch.tensor([5, 1])
    z = torch.zeros(6, *model.thought_shape, dtype=torch.float64)
    whole = model.log_likelihood(z, dropout(batch, 2))
    few = model.log_likelihood(z[:2], dropout(batch.select(order), 2))
    EXACT.assert_close(few, whole[order])


def test_a_step_does_not_depend_on_the_order_of_its_batch() -> None:
    rows = []
    for order in (torch.arange(5), torch.tensor([3, 0, 4, 2, 1])):
        model = make_language_model()
        slow = Slow(lr=0.01, word_dropout=0.3)
        svi = DualRateSVI(model, build_guide("mean_field", model), Fast(steps=3), slow)
        rows.append(svi.step(make_tokens(5).select(order)))
    for name in ("elbo", "objective", "fast_gain", "grad_norm_slow"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-9)


def test_the_first_of_three_texts_is_the_only_one_of_one() -> None:
    config = {**vars(TINY), "vocab_size": 256}
    model = make_language_model(ltm.ModelConfig(**config))
    for prompt in (None, "ab", ["ab", "c"]):
        one, three = (ltm.generate(model, ByteTokenizer(), prompt=prompt, n=n) for n in (1, 3))
        assert three[::3] == one
        assert len(set(three)) == len(three)


def test_families_meet_the_same_noise() -> None:
    # At the prior a draw is the noise itself.
    oracle = make_oracle()
    batch, found = oracle.simulate(3), []
    for family in ("mean_field", "full_rank", "flow"):
        guide = build_guide(family, oracle)
        guide.reset(batch)
        found.append(draw(guide.posterior(), Noise(0, batch.ids), 2))
    EXACT.assert_close(found[1], found[0])
    EXACT.assert_close(found[2], found[0])
