"""The two clocks: what each touches, what it leaves alone, and that both can be repeated."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from known_models import (
    TINY,
    LearnedOracle,
    make_language_model,
    make_oracle,
    make_tokens,
)
from tolerances import EXACT
from torch import Tensor

from ltm_pyro.callbacks import Callback
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError, NonFiniteError
from ltm_pyro.inference.clocks.schedules import slow_kl_weight
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.run.checkpoint import restore, tensors_of

FAST = Fast(steps=4)
SLOW = Slow(lr=0.01, kl_start=0.1)
METRICS = {
    "step", "elbo", "nll", "kl", "elbo_per_token", "objective", "kl_weight", "lr_fast", "lr_slow",
    "grad_norm_fast", "grad_norm_slow", "fast_gain", "tokens_per_second", "seconds",
}  # fmt: skip


class Data:
    """Twenty sequences of an oracle, batches a function of the step."""

    def __init__(self) -> None:
        self.all = make_oracle().simulate(20, seed=5)

    def training_batch(
        self, step: int, batch_size: int, seed: int = 0, *, lanes: bool = False
    ) -> Batch:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return self.all.select(torch.randperm(20, generator=generator)[:batch_size])


def oracle_svi(**options: Any) -> DualRateSVI:
    """Two clocks on an oracle whose bias starts at the wrong place."""
    model = LearnedOracle(make_oracle())
    with torch.no_grad():
        model.bias.zero_()
    guide = build_guide("mean_field", model)
    return DualRateSVI(model, guide, **{"fast": FAST, "slow": SLOW, **options})


def language_svi(**options: Any) -> DualRateSVI:
    model = make_language_model()
    guide = build_guide("mean_field", model)
    return DualRateSVI(model, guide, **{"fast": FAST, "slow": SLOW, **options})


def weights(svi: DualRateSVI) -> dict[str, Tensor]:
    assert isinstance(svi.model, torch.nn.Module)
    return {name: p.detach().clone() for name, p in svi.model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("held", [False, True], ids=["empty", "holding values"])
def test_infer_touches_neither_weights_nor_gradients(held: bool) -> None:
    svi = language_svi()
    parameters = list(svi.model.parameters())
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(i)) if held else None
    before = weights(svi)
    svi.infer(make_tokens(3))
    assert_same(weights(svi), before)
    for i, p in enumerate(parameters):
        assert p.requires_grad
        assert p.grad is None if not held else torch.equal(p.grad, torch.full_like(p, float(i)))
    assert svi.metrics == []
    assert svi.slow_step == 0


class Watched(LatentThoughtModel):
    """Notes down at each score whether a weight asks for a gradient."""

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        asked = any(p.requires_grad for p in self.parameters())
        self.asked = [*getattr(self, "asked", []), asked]
        return super().log_likelihood(z, batch)


def test_the_fast_loop_computes_no_weight_gradient() -> None:
    model = Watched(TINY)
    svi = DualRateSVI(model, build_guide("mean_field", model), FAST, SLOW)
    svi.step(make_tokens(2))
    # Before, the model may have been held to its contract.
    assert model.asked[-FAST.steps - 1 :] == [False] * FAST.steps + [True]


def test_the_trunk_is_computed_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    svi = language_svi()
    decoder = svi.model.decoder  # type: ignore[attr-defined]
    svi.infer(make_tokens(2))  # the first batch shows that the model keeps its contract
    trunk, calls = decoder.trunk, []
    monkeypatch.setattr(decoder, "trunk", lambda *inputs: calls.append(1) or trunk(*inputs))
    svi.infer(make_tokens(2))
    assert len(calls) == 1


def test_infer_repeats_and_leaves_the_global_generator_alone() -> None:
    svi, batch = language_svi(), make_tokens(3)
    state = torch.get_rng_state()
    first = svi.infer(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert_same(svi.infer(batch).parameters, first.parameters)
    other = svi.infer(batch, seed=1).parameters
    assert not torch.equal(other["loc"], first.parameters["loc"])
    assert_same(language_svi(seed=1).infer(batch).parameters, other)


def test_a_later_inference_does_not_change_an_earlier_answer() -> None:
    svi = language_svi()
    post = svi.infer(make_tokens(3, seed=1))
    mean = post.mean.clone()
    svi.infer(make_tokens(3, seed=2))
    svi.step(make_tokens(3, seed=3))
    assert torch.equal(post.mean, mean)
    assert not post.mean.requires_grad


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_a_permuted_batch_gets_the_permuted_answer(noise: str) -> None:
    fast = Fast(steps=4, noise=noise, fixed_draws=2)  # type: ignore[arg-type]
    svi, batch = language_svi(fast=fast), make_tokens(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    straight, permuted = svi.infer(batch), svi.infer(batch.select(order))
    assert torch.equal(permuted.ids, straight.ids[order])
    assert torch.equal(permuted.mask, straight.mask[order])
    for name, value in straight.parameters.items():
        EXACT.assert_close(permuted.parameters[name], value[order])
    assert straight.trace is not None
    assert permuted.trace is not None
    for name in ("elbo", "nll", "kl", "grad_norm"):
        EXACT.assert_close(getattr(permuted.trace, name), getattr(straight.trace, name)[:, order])
    assert (straight.own_draw_elbo is None) == (noise == "fresh")
    if straight.own_draw_elbo is not None and permuted.own_draw_elbo is not None:
        EXACT.assert_close(permuted.own_draw_elbo, straight.own_draw_elbo[order])


@pytest.mark.parametrize("rows", [1, 2])
def test_small_and_ragged_batches_work(rows: int) -> None:
    svi, batch = language_svi(), make_tokens(rows)
    assert batch.mask.sum() < batch.mask.numel()
    post = svi.infer(batch)
    assert post.mean.shape == (rows, TINY.n_thoughts, TINY.thought_dim)
    assert svi.step(batch)["nll"] > 0


def test_what_the_mask_hides_changes_nothing() -> None:
    batch = make_tokens(2)
    other = torch.where(batch.mask, batch.observed, (batch.observed + 1) % TINY.vocab_size)
    changed = Batch(other, batch.mask, batch.ids)
    assert_same(language_svi().infer(changed).parameters, language_svi().infer(batch).parameters)


def test_no_fast_steps_leave_q_where_the_guide_starts_it() -> None:
    svi = language_svi()
    post = svi.infer(make_tokens(2), steps=0)
    assert not post.mean.any()
    assert post.trace is None
    with pytest.raises(InputError, match="steps is -1"):
        svi.infer(make_tokens(2), steps=-1)


def test_the_trace_records_every_fast_step() -> None:
    post = language_svi(fast=Fast(steps=5, lr=0.2, final_fraction=0.0)).infer(make_tokens(3))
    trace = post.trace
    assert trace is not None
    for values in (trace.elbo, trace.nll, trace.kl, trace.grad_norm):
        assert values.shape == (5, 3)
    EXACT.assert_close(trace.elbo, -trace.nll - trace.kl)
    assert trace.lr[0].item() == pytest.approx(0.2)
    assert trace.lr[-1].item() == pytest.approx(0.0)
    assert not trace.kl[0].any()  # q starts at the prior


def test_metrics_of_a_step() -> None:
    svi = language_svi()
    batch = make_tokens(3)
    row = svi.step(batch)
    assert row.keys() == METRICS
    assert all(isinstance(value, float) for value in row.values())
    assert row["step"] == 1.0
    assert row["elbo"] == pytest.approx(-row["nll"] - row["kl"], rel=1e-12)
    assert row["objective"] == pytest.approx(row["elbo"], rel=1e-9)  # KL weight 1 without horizon
    assert row["elbo_per_token"] == pytest.approx(row["elbo"] * 3 / int(batch.n_tokens.sum()))
    assert svi.metrics == [row]


def test_fit_weighs_the_kl_and_records_the_unweighted_elbo() -> None:
    svi = oracle_svi()
    rows = svi.fit(Data(), steps=10, batch_size=5, progress=False)
    assert [row["kl_weight"] for row in rows] == [slow_kl_weight(SLOW, s, 10) for s in range(10)]
    assert rows[0]["kl_weight"] == 0.1
    for row in rows:
        assert row["elbo"] == pytest.approx(-row["nll"] - row["kl"], rel=1e-12)
        weighted = -row["nll"] - row["kl_weight"] * row["kl"]
        assert row["objective"] == pytest.approx(weighted, rel=1e-9)


def test_before_thoughts_join_the_decoder_trains_alone() -> None:
    model = LatentThoughtModel(TINY).double()
    guide = build_guide("mean_field", model)
    svi = DualRateSVI(model, guide, FAST, Slow(thoughts_start=0.5), persistent=True)
    svi.horizon = 4
    batch, state = make_tokens(3), torch.get_rng_state()
    zero = torch.zeros(3, *model.thought_shape, dtype=torch.float64)
    for _ in range(2):
        expected = model.log_likelihood(zero, batch).mean().item()
        row = svi.step(batch)
        assert row["elbo"] == pytest.approx(expected, rel=1e-12)
        assert row["kl"] == row["fast_gain"] == row["grad_norm_fast"] == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert svi.store is not None
    assert len(svi.store) == 0
    # Cross-attention is still the zero that it started as, so thoughts join without a jump.
    outputs = [layer.cross_attention.out.weight for layer in model.decoder.layers]
    assert not any(weight.any() for weight in outputs)
    rows = [svi.step(batch) for _ in range(2)]
    assert len(svi.store) == 3
    assert any(weight.any() for weight in outputs)
    assert rows[-1]["kl"] > 0.0


def test_fit_learns_where_the_data_lie() -> None:
    svi = oracle_svi(fast=Fast(steps=20, lr=0.3), slow=Slow(lr=0.2))
    model, batch = svi.model, Data().all
    assert isinstance(model, LearnedOracle)
    with torch.no_grad():
        model.bias.copy_(make_oracle().bias + 3.0)
    start = model.log_evidence(batch).mean()
    rows = svi.fit(Data(), steps=20, batch_size=20, progress=False)
    assert model.log_evidence(batch).mean() > start + 5
    assert rows[-1]["elbo"] > rows[0]["elbo"] + 5
    assert rows[0]["fast_gain"] > 0


def test_the_slow_step_uses_draws_that_inference_did_not_see() -> None:
    # With one fixed draw the objective on that draw, which fast_gain ends near, beats fresh draws.
    fast = Fast(steps=100, lr=0.3, noise="fixed")
    svi = oracle_svi(fast=fast)
    batch = make_oracle().simulate(200)
    own = svi.infer(batch).own_draw_elbo
    assert own is not None
    assert own.mean() > svi.step(batch)["elbo"] + 1.0


def test_fit_goes_on_where_it_ended() -> None:
    straight, halved = oracle_svi(persistent=True), oracle_svi(persistent=True)
    straight.fit(Data(), steps=6, batch_size=5, progress=False)
    halved.horizon = 6
    seen: list[float] = []
    halved.fit(Data(), steps=3, batch_size=5, progress=False)

    class Seen(Callback):
        def on_step(self, svi: DualRateSVI, row: dict[str, float]) -> None:
            seen.append(row["step"])

    halved.fit(Data(), 3, batch_size=5, progress=False, callbacks=[Seen()])
    assert seen == [4.0, 5.0, 6.0]
    assert_same(weights(halved), weights(straight))


@pytest.mark.parametrize("persistent", [False, True])
def test_resuming_from_saved_state_gives_the_same_weights_bit_for_bit(persistent: bool) -> None:
    straight, first = oracle_svi(persistent=persistent), oracle_svi(persistent=persistent)
    straight.fit(Data(), steps=6, batch_size=8, progress=False)
    first.horizon = 6
    first.fit(Data(), steps=3, batch_size=8, progress=False)
    resumed = oracle_svi(persistent=persistent)
    saved = {name: value.clone() for name, value in tensors_of(first).items()}
    restore(resumed, saved, first.slow_step, "the fit")
    resumed.store, resumed.horizon = copy.deepcopy(first.store), first.horizon
    torch.manual_seed(99)  # global random numbers play no part
    rows = resumed.fit(Data(), steps=3, batch_size=8, progress=False)
    assert_same(weights(resumed), weights(straight))
    timing = {"seconds", "tokens_per_second"}
    for row, expected in zip(rows, straight.metrics[3:], strict=True):
        assert {k: v for k, v in row.items() if k not in timing} == {
            k: v for k, v in expected.items() if k not in timing
        }


def test_fresh_noise_differs_between_fast_steps_and_fixed_noise_does_not() -> None:
    # A rate near 0 keeps q where it is, so only the noise can move the terms.
    batch = make_oracle().simulate(3)
    for noise, constant in (("fresh", False), ("fixed", True)):
        fast = Fast(steps=3, lr=1e-12, noise=noise)  # type: ignore[arg-type]
        trace = oracle_svi(fast=fast).infer(batch).trace
        assert trace is not None
        spread = (trace.nll - trace.nll[0]).abs().max().item()
        assert (spread < 1e-8) == constant


def test_more_fixed_draws_average() -> None:
    batch = make_oracle().simulate(40)

    def own(draws: int) -> Tensor:
        fast = Fast(steps=60, lr=0.3, noise="fixed", fixed_draws=draws)
        value = oracle_svi(fast=fast).infer(batch).own_draw_elbo
        assert value is not None
        return value

    # The excess over the evidence shrinks with the number of draws that q can adapt to; at other
    # seeds these means are within 0.2 of each other.
    assert own(1).mean() > own(4).mean() + 2.0 > own(12).mean() + 2.2


def test_persistent_parameters_start_from_the_last_visit() -> None:
    svi, batch = oracle_svi(persistent=True), make_oracle().simulate(4)
    svi.step(batch)
    assert svi.store is not None
    assert len(svi.store) == 4
    kept = svi.store.gather(batch.ids, svi.guide.rows())
    assert_same(svi.infer(batch, steps=0, warm_start=True).parameters, kept)
    assert not svi.infer(batch, steps=0).mean.any()
    # Known and unknown ids side by side, in another order.
    x = make_oracle().simulate(3).observed
    mixed = svi.infer(Batch(x, ids=torch.tensor([50, 2, 0])), steps=0, warm_start=True)
    assert not mixed.mean[0].any()
    assert torch.equal(mixed.mean[1:], kept["loc"][[2, 0]])


def test_a_warm_start_carries_the_moments_of_adam() -> None:
    svi, batch = oracle_svi(persistent=True), make_oracle().simulate(2)
    svi.fast = replace(FAST, optimizer="adam")
    svi.step(batch)
    svi.step(batch)
    assert svi.store is not None
    kept = svi.store.gather(batch.ids, {"adam_steps": torch.zeros(2, dtype=torch.float64)})
    assert kept["adam_steps"].tolist() == [2.0 * FAST.steps] * 2


@pytest.mark.parametrize(("steps", "batch_size"), [(0, 4), (-1, 4), (2, 0)])
def test_fit_refuses_nothing_to_do(steps: int, batch_size: int) -> None:
    with pytest.raises(InputError, match="must be above 0"):
        oracle_svi().fit(Data(), steps=steps, batch_size=batch_size, progress=False)


def test_a_batch_that_does_not_fit_is_refused_by_both_clocks() -> None:
    svi = language_svi()
    for act in (svi.infer, svi.step):
        with pytest.raises(InputError, match="vocabulary"):
            act(Batch(torch.full((2, 4), 7)))
        with pytest.raises(InputError, match="at most 12"):
            act(Batch(torch.zeros(2, 13, dtype=torch.long)))


def test_frozen_weights_stay() -> None:
    svi_model = make_language_model()
    svi_model.decoder.embedding.weight.requires_grad_(False)
    svi = DualRateSVI(svi_model, build_guide("mean_field", svi_model), FAST, SLOW)
    before = weights(svi)
    svi.step(make_tokens(2))
    after = weights(svi)
    assert torch.equal(after["decoder.embedding.weight"], before["decoder.embedding.weight"])
    assert not torch.equal(after["decoder.bos"], before["decoder.bos"])
    assert not svi_model.decoder.embedding.weight.requires_grad


class Poisoned(LatentThoughtModel):
    """Its likelihood is not finite for one sequence."""

    def __init__(self, bad_id: int, poison: str) -> None:
        super().__init__(TINY)
        self.bad_id, self.poison = bad_id, poison

    def log_likelihood(self, z: Tensor, batch: Batch) -> Tensor:
        score = super().log_likelihood(z, batch)
        bad = batch.ids == self.bad_id
        if self.poison == "value":
            return torch.where(bad, torch.nan, score)
        return score * torch.where(bad, torch.nan, 1.0)


@pytest.mark.parametrize("poison", ["value", "gradient"])
@pytest.mark.parametrize("fast_steps", [0, 1, 4])
def test_nan_in_one_sequence_names_it(poison: str, fast_steps: int) -> None:
    batch = make_tokens(4)
    bad_id = int(batch.ids[2])
    model = Poisoned(bad_id, poison)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), Fast(steps=fast_steps), persistent=True
    )
    before = weights(svi)
    with pytest.raises(
        NonFiniteError, match=f"sequence ids {bad_id} is not finite at slow step 0"
    ) as caught:
        svi.step(batch)
    assert caught.value.ids == [bad_id]
    assert caught.value.step == 0
    assert_same(weights(svi), before)
    assert svi.slow_step == 0
    assert svi.metrics == []
    assert svi.store is not None
    assert len(svi.store) == 0
    assert all(p.requires_grad for p in model.parameters())
    if fast_steps:
        with pytest.raises(NonFiniteError, match="the fast loop") as caught:
            svi.infer(batch)
        assert caught.value.ids == [bad_id]


def test_nan_in_a_weight_stops_before_any_weight_changes() -> None:
    svi, batch = language_svi(), make_tokens(3)
    svi.step(batch)
    with torch.no_grad():
        svi.model.decoder.norm.weight[0] = torch.nan  # type: ignore[attr-defined]
    before = weights(svi)
    with pytest.raises(NonFiniteError, match="slow step 1") as caught:
        svi.step(batch)
    assert sorted(caught.value.ids) == sorted(batch.ids.tolist())
    for name, value in weights(svi).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert svi.slow_step == 1


def test_an_infinite_slow_gradient_stops_before_any_weight_changes() -> None:
    svi = language_svi(fast=Fast(steps=0))
    svi.model.decoder.bos.register_hook(lambda g: g * torch.inf)  # type: ignore[attr-defined]
    before = weights(svi)
    with pytest.raises(NonFiniteError, match="gradient of the slow parameters"):
        svi.step(make_tokens(2))
    assert_same(weights(svi), before)
    assert all(p.grad is None for p in svi.model.parameters())


def test_new_settings_of_both_clocks_are_obeyed_whole_and_others_refused() -> None:
    oracle = LearnedOracle(make_oracle())
    svi = DualRateSVI(oracle, "mean_field", Fast(steps=2))
    svi.step(oracle.simulate(3))
    svi.fast = Fast(steps=3, lr=0.02)
    svi.slow = Slow(lr=0.03, schedule="constant", betas=(0.5, 0.6), weight_decay=0.2)
    row = svi.step(oracle.simulate(3))
    assert row["lr_slow"] == 0.03
    assert row["lr_fast"] == pytest.approx(0.02)
    assert all(group["betas"] == (0.5, 0.6) for group in svi.clock.optimizer.param_groups)
    for name, wrong in (("fast", 3), ("slow", Fast()), ("slow", {"lr": 1.0})):
        with pytest.raises(InputError, match=f"{name} is "):
            setattr(svi, name, wrong)
