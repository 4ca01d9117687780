"""However a step is computed, it is the same step, up to rounding or the precision asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from known_models import make_language_model, make_oracle, make_tokens
from pyro.infer import Trace_ELBO
from reference_decoder import ReferenceModel
from tolerances import EXACT
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.config import Fast, ModelConfig, Slow
from ltm_pyro.data.batches import SHORTEST, Batch
from ltm_pyro.doors import meet
from ltm_pyro.engine.execution import frozen
from ltm_pyro.engine.kernels.compiled import bucket_rows
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.random import seeded

FAST, SLOW = Fast(steps=3), Slow(lr=0.01, kl_start=0.1)
STEPS, ROWS = 3, 5
KINDS = ("compile", "precision", "micro_batch", "checkpointing")


def trained(**options: Any) -> tuple[list[dict[str, float]], dict[str, Tensor], DualRateSVI]:
    """Metrics, slow parameters and the fit after a few slow steps in float64."""
    guide = options.pop("guide", "mean_field")
    model = make_language_model()
    with seeded(1, torch.device("cpu")):
        q = build_guide(guide, model)
    how = {name: options.pop(name) for name in KINDS if name in options}
    options["execution"] = ltm.Execution(**how)
    svi = DualRateSVI(model, q, **{"fast": FAST, "slow": SLOW, **options})
    svi.horizon = STEPS
    # The same sequences come twice, so that a store has something to give back.
    rows = [svi.step(make_tokens(ROWS, seed=step % 2)) for step in range(STEPS)]
    parameters = {f"{i}": p.detach() for i, p in enumerate(svi.clock.parameters)}
    return rows, parameters, svi


def assert_same_fit(changed: dict[str, Any], **shared: Any) -> None:
    """1e-10 relative: sums in another order, through three slow steps."""
    rows, weights, svi = trained(**shared)
    other_rows, other_weights, other = trained(**shared, **changed)
    for row, expected in zip(other_rows, rows, strict=True):
        for name in expected.keys() - {"seconds", "tokens_per_second"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-10), name
        assert row["elbo"] == pytest.approx(expected["elbo"], rel=1e-10)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-8, atol=1e-9)
    if svi.store is not None and other.store is not None:
        assert len(svi.store) == len(other.store) > 0
        fresh = {**svi.guide.rows()}
        stored = other.store.gather(make_tokens(5).ids, fresh)
        for name, value in svi.store.gather(make_tokens(5).ids, fresh).items():
            torch.testing.assert_close(stored[name], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("guide", ["mean_field", "low_rank", "mixture", "amortized"])
@pytest.mark.parametrize("rows", [2, 4])  # 2 + 2 + 1 and 4 + 1
def test_parts_of_a_batch_add_up_to_the_batch(guide: str, rows: int) -> None:
    assert_same_fit({"micro_batch": rows}, guide=guide)


@pytest.mark.parametrize(
    "shared",
    [
        {"persistent": True},
        {"fast": replace(FAST, noise="fixed", fixed_draws=2)},
        {"slow": replace(SLOW, word_dropout=0.4)},
        {"slow": replace(SLOW, thoughts_start=0.5)},
        {"elbo": "iwae"},
    ],
    ids=["persistent", "fixed noise", "word dropout", "late thoughts", "particles"],
)
@pytest.mark.parametrize("changed", [{"micro_batch": 2}, {"checkpointing": True}], ids=str)
def test_the_same_for_other_fits(shared: dict[str, Any], changed: dict[str, Any]) -> None:
    assert_same_fit(changed, **shared)


def test_more_rows_than_there_are_is_the_whole_batch() -> None:
    rows, weights, _ = trained()
    other_rows, other_weights, _ = trained(micro_batch=100)
    assert [r["elbo"] for r in other_rows] == [r["elbo"] for r in rows]
    assert all(torch.equal(other_weights[name], value) for name, value in weights.items())


@pytest.mark.parametrize("guide", ["mean_field", "amortized"])
def test_layers_computed_again_give_the_same_fit(guide: str) -> None:
    assert_same_fit({"checkpointing": True}, guide=guide)
    assert_same_fit({"checkpointing": True, "micro_batch": 3}, guide=guide)


def test_layers_are_computed_again_in_the_slow_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_language_model()
    meet(model, make_tokens(2))  # holds a new model to its contract
    last = model.decoder.layers[-1]
    forward, calls = last.forward, []
    monkeypatch.setattr(last, "forward", lambda *a: calls.append(1) or forward(*a))
    # Three fast steps, then the slow one, forward and, where asked, once more.
    for checkpointing, expected in ((False, 3 + 1), (True, 3 + 2)):
        calls.clear()
        svi = DualRateSVI(
            model,
            build_guide("mean_field", model),
            FAST,
            SLOW,
            execution=ltm.Execution(checkpointing=checkpointing),
        )
        svi.step(make_tokens(2))
        assert len(calls) == expected
        assert not model.decoder.checkpointing


def test_parts_without_word_dropout_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_language_model()
    meet(model, make_tokens(4))  # holds a new model to its contract
    score, calls = model.decoder.score, []

    def spy(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append("slow" if model.decoder.bos.requires_grad else "fast")
        return score(*inputs)

    monkeypatch.setattr(model.decoder, "score", spy)
    svi = DualRateSVI(
        model, build_guide("mean_field", model), FAST, SLOW, execution=ltm.Execution(micro_batch=2)
    )
    svi.step(make_tokens(4))
    assert calls == 2 * (["fast"] * FAST.steps + ["slow"])  # two parts


WIDE = ModelConfig(
    vocab_size=64, seq_len=32, n_layers=2, width=32, n_heads=2, mlp_hidden=48, window=8,
    thoughts_per_layer=2, thought_dim=8,
)  # fmt: skip


def single(window: int = 8, seq_len: int = 32) -> LatentThoughtModel:
    config = replace(WIDE, window=window, seq_len=seq_len)
    return make_language_model(config, dtype=torch.float32)


def test_bf16_stays_near_single_precision_and_away_from_q() -> None:
    """bf16 has 8 bits: about 0.4 % per product, averaged over 32 terms or more of each sum.

    An ELBO of some hundred nats then moves by less than 0.5 %, and a fitted mean of q, whose steps
    are of size lr, by a fraction of its posterior deviation.
    """
    batch = make_tokens(4, WIDE)
    model = single()
    guide = build_guide("mean_field", model)
    plain = DualRateSVI(model, guide, Fast(steps=20)).infer(batch)
    half = DualRateSVI(
        model, guide, Fast(steps=20), execution=ltm.Execution(precision="bf16")
    ).infer(batch)
    assert not torch.equal(half.mean, plain.mean)
    deviation = plain.distribution.variance.sqrt()
    assert ((half.mean - plain.mean).abs() / deviation).mean() < 0.2
    assert half.trace is not None
    assert plain.trace is not None
    torch.testing.assert_close(half.trace.elbo, plain.trace.elbo, rtol=0.005, atol=0.0)
    assert {value.dtype for value in half.parameters.values()} == {torch.float32}
    assert half.trace.kl.dtype == half.trace.nll.dtype == torch.float32


def test_no_bf16_reaches_prior_kl_or_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    model = single()
    guide = build_guide("mean_field", model)
    seen: set[torch.dtype] = set()
    kl = type(guide).kl

    def spy(self: LocalGuide, prior: Any) -> Tensor | None:
        value = kl(self, prior)
        assert value is not None
        seen.add(value.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return value

    monkeypatch.setattr(type(guide), "kl", spy)
    svi = DualRateSVI(model, guide, FAST, SLOW, execution=ltm.Execution(precision="bf16"))
    svi.step(make_tokens(3, WIDE))
    moments = [m for s in svi.clock.optimizer.state.values() for m in s.values()]
    seen |= {t.dtype for t in (*model.parameters(), *guide.rows().values(), *moments)}
    assert seen == {torch.float32}


def test_scores_are_in_single_precision_after_a_fit_in_bf16() -> None:
    model, batch = single(), make_tokens(2, WIDE)
    z = torch.randn(2, *model.thought_shape)
    expected = model.log_likelihood(z, batch)
    svi = DualRateSVI(
        model,
        build_guide("mean_field", model),
        FAST,
        SLOW,
        execution=ltm.Execution(precision="bf16"),
    )
    svi.infer(batch)
    assert torch.equal(model.log_likelihood(z, batch), expected)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"checkpointing": True}, {"compile": True}], ids=str
)
def test_a_model_without_a_decoder_has_one_way_to_compute(options: dict[str, Any]) -> None:
    oracle = make_oracle()
    with pytest.raises(InputError, match="LinearGaussian has no decoder") as caught:
        DualRateSVI(oracle, build_guide("mean_field", oracle), execution=ltm.Execution(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "fp16"),
        ({"micro_batch": 0}, "micro_batch is 0: must be a whole number"),
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"micro_batch": True}, "micro_batch is True"),
        ({"micro_batch": 1.5}, "micro_batch is 1.5"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ltm.Execution(**options)


def test_buckets_are_few_and_hold_what_they_are_for() -> None:
    sizes = {rows: bucket_rows(rows) for rows in range(1, 1025)}
    assert all(rows <= size <= rows * 8 / 7 for rows, size in sizes.items())
    assert len(set(sizes.values())) < 80
    assert sorted(sizes.values()) == list(sizes.values())
    for longest in range(1, 301):
        mask = torch.arange(300) < torch.tensor([1, longest])[:, None]
        length = Batch(torch.zeros(2, 300, dtype=torch.long), mask).filled_length
        assert longest <= length <= 300
        assert length == 300 or (length >= SHORTEST and length & (length - 1) == 0)
        assert length <= max(SHORTEST, 2 * longest)


@pytest.mark.parametrize("longest", [1, 5, 16, 17, 40, 60])
def test_a_ragged_batch_scores_the_same_after_it_is_prepared(longest: int) -> None:
    model = single(seq_len=60)
    lengths = torch.tensor([longest, max(1, longest // 2), 1])
    mask = torch.arange(60) < lengths[:, None]
    batch = Batch(torch.randint(WIDE.vocab_size, (3, 60)), mask)
    z = torch.randn(3, *model.thought_shape)
    prepared = model.prepare(batch)
    assert prepared.mask.shape[1] == batch.filled_length
    with torch.no_grad():
        scores = model.log_likelihood(z, prepared), model.log_likelihood(z, batch)
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
# torch's tracer warns and hides its own warnings, which as errors would end the compilation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_ragged_batches_equal_eager_ones(precision: Any) -> None:
    """Two shapes; in bf16 the compiler keeps more digits between operations."""
    model = single(seq_len=40)
    guide = build_guide("mean_field", model)
    eager = DualRateSVI(model, guide, Fast(steps=2), execution=ltm.Execution(precision=precision))
    batches = []
    for rows, longest in ((3, 9), (17, 40)):
        lengths = torch.randint(1, longest + 1, (rows,))
        lengths[0] = longest
        mask = torch.arange(40) < lengths[:, None]
        batches.append(Batch(torch.randint(WIDE.vocab_size, (rows, 40)), mask))
    expected = [eager.infer(batch) for batch in batches]
    compiled = DualRateSVI(
        model, guide, Fast(steps=2), execution=ltm.Execution(precision=precision, compile=True)
    )
    for batch, plain in zip(batches, expected, strict=True):
        post = compiled.infer(batch)
        assert post.trace is not None
        assert plain.trace is not None
        if precision == "fp32":
            EXACT.assert_close(post.mean, plain.mean)
        torch.testing.assert_close(
            post.trace.elbo, plain.trace.elbo, rtol=1e-5 if precision == "fp32" else 0.01, atol=0.0
        )


def reference_case(window: int) -> tuple[LatentThoughtModel, LocalGuide, Batch]:
    """A ragged batch, and a guide that has left its start."""
    model = single(window, seq_len=72)
    mask = torch.arange(72) < torch.tensor([72, 50, 7])[:, None]
    batch = Batch(torch.randint(WIDE.vocab_size, (3, 72)), mask)
    guide = build_guide("mean_field", model)
    guide.reset(batch)
    with torch.no_grad():
        for value in guide.local_parameters().values():
            value.normal_(std=0.5)
    return model, guide, batch


def assert_same_gradients(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """1e-5 relative in norm, each: single precision, sums of thousands of terms."""
    for value, other in zip(actual, expected, strict=True):
        assert other.norm() > 0
        assert (value - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("window", [1, 8, 64, 70, 72, 100])
def test_the_engine_is_a_plain_trace_elbo_of_the_plain_decoder(window: int) -> None:
    """-ELBO and its gradients at the same draws: by q in the fast path, by all weights in the slow.

    Not the exact KL of the engine's own objective: both sides are Pyro's `Trace_ELBO`.
    """
    model, guide, batch = reference_case(window)
    local, weights = list(guide.local_parameters().values()), list(model.decoder.parameters())

    def loss_and_gradients(program: Any, rows: Batch, by: list[Any]) -> tuple[Tensor, Any]:
        with seeded(7, torch.device("cpu")):
            loss = Trace_ELBO().differentiable_loss(program, guide, rows)
        return loss, torch.autograd.grad(loss, by)

    plain = ReferenceModel(model)
    expected, by_all = loss_and_gradients(plain, batch, [*local, *weights])
    with frozen(model.parameters()):
        fast, by_local = loss_and_gradients(model, model.prepare(batch), local)
    slow, by_weights = loss_and_gradients(model, batch, weights)
    for loss in (fast, slow):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(by_local, by_all[: len(local)])
    assert_same_gradients(by_weights, by_all[len(local) :])
