"""The language model: its likelihood, its fast paths and its draws against plain references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
import torch.nn.functional as F
from known_models import TINY, make_language_model, make_oracle, make_tokens
from pyro import poutine
from pyro.infer import Predictive
from scipy import stats
from tolerances import EXACT, GOF
from torch import Tensor
from torch.distributions import Categorical

from ltm_pyro.config import ModelConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.kernels import vocabulary
from ltm_pyro.engine.kernels.likelihood import token_log_prob
from ltm_pyro.engine.rows.optimizers import RowAdam
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.decoder import windowed_attention
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.sampling import SamplingRule, write_tokens


@pytest.fixture
def model() -> LatentThoughtModel:
    return make_language_model()


def _thoughts(*lead: int) -> Tensor:
    return torch.randn(*lead, TINY.n_thoughts, TINY.thought_dim, dtype=torch.float64)


def _reference_log_prob(model: LatentThoughtModel, z: Tensor, batch: Batch) -> Tensor:
    """Sum of Categorical log-probabilities at scored positions, for z (B, K, D)."""
    each = Categorical(logits=model.decoder.logits(batch.observed, z)).log_prob(batch.observed)
    return torch.where(batch.mask, each, 0.0).sum(-1)


@pytest.mark.parametrize("window", [1, 3, 12, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_and_uncached_logits_agree(window: int, dtype: torch.dtype) -> None:
    model = make_language_model(replace(TINY, window=window), dtype=dtype)
    batch, z = make_tokens(3), _thoughts(3).to(dtype)
    tokens = batch.observed
    with torch.no_grad():
        state = model.decoder.start(z)
        steps = [model.decoder.step(None, state)]
        steps += [model.decoder.step(tokens[:, t], state) for t in range(TINY.seq_len - 1)]
        EXACT.assert_close(torch.stack(steps, 1), model.decoder.logits(tokens, z))


@pytest.mark.parametrize("window", [1, 2, 5, 64, 65, 150, 200])
def test_windowed_attention_is_masked_attention(window: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 150, 4, dtype=torch.float64, requires_grad=True)
    gap = torch.arange(150)[:, None] - torch.arange(150)
    visible = (gap >= 0) & (gap < window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    actual = windowed_attention(q, k, v, window)
    EXACT.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weight).sum(), v)[0] for out in (actual, expected)]
    EXACT.assert_close(*gradients)


@pytest.mark.parametrize("window", [1, 4])
def test_a_logit_depends_on_earlier_tokens_within_reach_only(window: int) -> None:
    # Two layers of a window of W positions reach 2 (W - 1) + 1 inputs back.
    model = make_language_model(replace(TINY, window=window))
    tokens, z = make_tokens(1).observed, _thoughts(1)
    base = model.decoder.logits(tokens, z)[0]
    for t in range(TINY.seq_len - 1):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % TINY.vocab_size
        moved = (model.decoder.logits(changed, z)[0] - base).abs().amax(-1) > 1e-12
        reached = torch.zeros(TINY.seq_len, dtype=torch.bool)
        reached[t + 1 : t + 1 + 2 * (window - 1) + 1] = True
        assert torch.equal(moved, reached)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_likelihood_is_the_sum_of_categoricals(
    model: LatentThoughtModel, lead: tuple[int, ...]
) -> None:
    batch = make_tokens(4)
    z = _thoughts(*lead, 4)
    expected = torch.stack(
        [_reference_log_prob(model, rows, batch) for rows in z.reshape(-1, *z.shape[-3:])]
    ).view(*lead, 4)
    EXACT.assert_close(model.log_likelihood(z, batch), expected)
    EXACT.assert_close(model.log_likelihood(z, model.prepare(batch)), expected)
    likelihood = model.likelihood(z, batch)
    assert likelihood.batch_shape == (*lead, 4)
    assert likelihood.event_shape == (TINY.seq_len,)
    EXACT.assert_close(likelihood.log_prob(batch.observed), expected)


def test_likelihood_has_the_references_gradients(model: LatentThoughtModel) -> None:
    batch, z = make_tokens(3), _thoughts(3).requires_grad_()
    wanted = [z, *model.parameters()]
    ours = torch.autograd.grad(model.log_likelihood(z, batch).sum(), wanted)
    reference = torch.autograd.grad(_reference_log_prob(model, z, batch).sum(), wanted)
    for a, b in zip(ours, reference, strict=True):
        EXACT.assert_close(a, b)


@pytest.mark.parametrize("most", [1, 4 * 5 * 10, 10**6])
def test_cross_entropy_in_chunks_is_log_softmax(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MOST_LOGITS", most)
    h = torch.randn(23, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (23,))
    ours = token_log_prob(h, weight, targets)
    reference = (h @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    EXACT.assert_close(ours, reference)
    cotangent = torch.randn(23, dtype=torch.float64)
    gradients = [torch.autograd.grad(out @ cotangent, (h, weight)) for out in (ours, reference)]
    for a, b in zip(*gradients, strict=True):
        EXACT.assert_close(a, b)


def test_each_layer_reads_its_own_block_of_thoughts(model: LatentThoughtModel) -> None:
    batch, z = make_tokens(1), _thoughts(1)
    last = model.decoder.layers[-1]
    torch.nn.init.zeros_(last.cross_attention.out.weight)
    other = z.clone()
    other[:, TINY.thoughts_per_layer :] += 1.0
    EXACT.assert_close(model.log_likelihood(other, batch), model.log_likelihood(z, batch))
    other[:, : TINY.thoughts_per_layer] += 1.0
    assert (model.log_likelihood(other, batch) - model.log_likelihood(z, batch)).abs() > 1e-4


def test_thoughts_of_zero_switch_cross_attention_off(model: LatentThoughtModel) -> None:
    tokens, zero = make_tokens(2).observed, torch.zeros_like(_thoughts(2))
    with_zero = model.decoder.logits(tokens, zero)
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.cross_attention.out.weight)
    # Without cross-attention no thought matters, and z = 0 was no different.
    EXACT.assert_close(model.decoder.logits(tokens, _thoughts(2)), with_zero)


def test_a_fresh_model_starts_as_the_autoregressive_one() -> None:
    model = LatentThoughtModel(TINY).double()
    tokens = make_tokens(2).observed
    EXACT.assert_close(
        model.decoder.logits(tokens, _thoughts(2)), model.decoder.logits(tokens, _thoughts(2))
    )
    uniform = -torch.log(torch.tensor(float(TINY.vocab_size)))
    mean = Categorical(logits=model.decoder.logits(tokens, _thoughts(2))).log_prob(tokens).mean()
    assert abs(mean - uniform) < 1.0  # the first logits are O(1)


@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_presets_score_and_write(preset: str) -> None:
    model = LatentThoughtModel.from_preset(preset, vocab_size=50, seq_len=6)
    tokens = model()
    assert tokens.shape == (1, 6)
    assert model.log_likelihood(model.prior().sample((1,)), Batch(tokens)).isfinite().all()


def test_from_preset_names_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="did you mean 'nano'"):
        LatentThoughtModel.from_preset("nanoo")
    with pytest.raises(InputError, match="did you mean 'vocab_size'"):
        LatentThoughtModel.from_preset("nano", vocabsize=3)
    with pytest.raises(InputError, match="heads"):
        ModelConfig(width=30, n_heads=4)


def test_predictive_writes_token_sequences(model: LatentThoughtModel) -> None:
    draws = Predictive(model, num_samples=4)()
    assert draws["x"].shape == (4, 1, TINY.seq_len)
    assert draws["x"].dtype == torch.int64
    assert draws["z"].shape == (4, 1, TINY.n_thoughts, TINY.thought_dim)
    assert 0 <= draws["x"].min() <= draws["x"].max() < TINY.vocab_size
    rows = Predictive(model, num_samples=4)(make_tokens(3).unobserved())["x"]
    assert rows.shape == (4, 3, TINY.seq_len)
    assert not torch.equal(rows[0], rows[1])
    assert model(size=5, length=4).shape == (5, 4)


def test_posterior_predictive_is_the_same_path(model: LatentThoughtModel) -> None:
    batch = make_tokens(2)
    guide = build_guide("mean_field", model)
    guide.reset(batch)
    rows = Predictive(model, guide=guide, num_samples=3)(batch.unobserved())["x"]
    assert rows.shape == (3, 2, TINY.seq_len)
    observed = Predictive(model, guide=guide, num_samples=3)(batch)["x"]
    assert torch.equal(observed, batch.observed.expand(3, -1, -1))


def test_the_program_has_two_sites_in_one_plate(model: LatentThoughtModel) -> None:
    batch = make_tokens(3)
    trace = poutine.trace(model).get_trace(batch)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert trace.observation_nodes == ["x"]
    EXACT.assert_close(trace.nodes["x"]["unscaled_log_prob"], model.log_likelihood(z, batch))
    EXACT.assert_close(trace.nodes["z"]["unscaled_log_prob"], model.prior().log_prob(z))


def test_draws_follow_the_decoders_distribution() -> None:
    # A vocabulary of 3 and 3 positions: all 27 sequences, with probabilities from the logits.
    config = replace(TINY, vocab_size=3, seq_len=3, window=2)
    model = make_language_model(config)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    z = torch.randn(1, config.n_thoughts, config.thought_dim, dtype=torch.float64)
    with torch.no_grad():
        probability = model.log_likelihood(z.expand(27, -1, -1), Batch(every)).exp()
        EXACT.assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
        n = 5000
        x = model.likelihood(z, Batch(every[:1])).sample(torch.Size([n]))[:, 0]
    counts = torch.bincount((x * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    assert float(n * probability.min()) > 5  # so that the chi-square holds
    GOF.assert_fits(stats.chisquare(counts.numpy(), n * probability.numpy()).pvalue)
    shifted = n * probability.roll(1).numpy()
    assert GOF.rejects(stats.chisquare(counts.numpy(), shifted).pvalue)


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SamplingRule(), [0.5, 0.3, 0.15, 0.05]),
        (SamplingRule(greedy=True), [1.0, 0.0, 0.0, 0.0]),
        (SamplingRule(top_k=1), [1.0, 0.0, 0.0, 0.0]),
        (SamplingRule(top_k=2), [0.625, 0.375, 0.0, 0.0]),
        (SamplingRule(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (SamplingRule(top_p=0.5), [1.0, 0.0, 0.0, 0.0]),
        (SamplingRule(top_p=0.6), [0.625, 0.375, 0.0, 0.0]),
        (SamplingRule(top_p=1e-9), [1.0, 0.0, 0.0, 0.0]),
        (SamplingRule(top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingRule(temperature=0.5), [0.6849, 0.2466, 0.0616, 0.0068]),
        (SamplingRule(top_k=3, top_p=0.6), [0.625, 0.375, 0.0, 0.0]),
        (SamplingRule(temperature=1e-3), [1.0, 0.0, 0.0, 0.0]),
    ],
    ids=repr,
)
def test_sampling_rules(rule: SamplingRule, expected: list[float]) -> None:
    n = 5000
    # In another order of tokens too: the nucleus is by probability, not by id.
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        chosen = rule.choose(LOGITS[:, order].expand(n, -1), torch.rand(n))
        counts = torch.bincount(order[chosen], minlength=4).double()
        possible = torch.tensor(expected) > 0
        assert counts[~possible].sum() == 0
        if possible.sum() > 1:
            p = torch.tensor(expected, dtype=torch.float64)[possible]
            GOF.assert_fits(stats.chisquare(counts[possible], n * p / p.sum()).pvalue)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_sampling_rules_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingRule(**options)


def test_a_prompt_is_kept_and_greedy_text_is_the_likeliest(model: LatentThoughtModel) -> None:
    z = _thoughts(2)
    prompt = torch.tensor([[1, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rule = SamplingRule(greedy=True)
    x = write_tokens(model.decoder, z, TINY.seq_len, rule, prompt, mask)
    assert x[0, :3].tolist() == [1, 2, 3]
    assert x[1, 0] == 4
    likeliest = model.decoder.logits(x, z).argmax(-1)
    assert torch.equal(x[0, 3:], likeliest[0, 3:])
    assert torch.equal(x[1, 1:], likeliest[1, 1:])
    whole = write_tokens(model.decoder, z, TINY.seq_len, rule, prompt)
    assert torch.equal(whole[:, :3], prompt)


def test_nothing_is_left_on_the_wrong_device() -> None:
    # A tensor made on the CPU by mistake cannot meet one on the meta device, which has shapes
    # and no values; so there is nothing to validate either.
    with pyro.validation_enabled(False):
        model = LatentThoughtModel(TINY).to("meta")
        assert model.device.type == "meta"
        shape = (3, TINY.seq_len)
        batch = Batch(torch.zeros(shape, dtype=torch.long, device="meta"))
        guide = build_guide("mean_field", model)
        guide.reset(batch)
        z = guide.posterior().rsample(torch.Size([2]))
        for scored in (batch, model.prepare(batch)):
            assert model.log_likelihood(z, scored).device.type == "meta"
        kl = guide.kl(model.prior())
        assert kl is not None
        loss = kl.sum() - model.log_likelihood(z[0], model.prepare(batch)).sum()
        gradients = torch.autograd.grad(loss, list(guide.parameters()))
        RowAdam(guide.local_parameters(), (0.9, 0.999)).step(
            dict(zip(guide.local_parameters(), gradients, strict=True)), 0.1
        )
        state = model.decoder.start(z[0])
        for previous in (None, batch.observed[:, 0]):
            assert model.decoder.step(previous, state).device.type == "meta"
        windowed = torch.zeros(1, 2, 150, 8, device="meta")
        assert windowed_attention(windowed, windowed, windowed, 4).device.type == "meta"


def test_a_model_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LatentThoughtModel.from_preset("ltm-large")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) > 70e6


def test_batches_that_do_not_fit_are_refused(model: LatentThoughtModel) -> None:
    for x, message in (
        (torch.full((1, 4), 7), "token id 7 is outside the model's vocabulary of 7"),
        (torch.tensor([[3, -1, 2, 0]]), "token id -1 is outside the model's vocabulary"),
        (torch.zeros(1, 13, dtype=torch.long), "13 tokens: the model takes at most 12"),
        (make_oracle().simulate(1).observed, "needs token ids"),
    ):
        with pytest.raises(InputError, match=message):
            model.check(Batch(x))
    with pytest.raises(InputError, match="no x"):
        model.check(make_tokens(1).unobserved())
