"""Word dropout hides decoder inputs while the model is trained, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from known_models import TINY, LearnedOracle, make_language_model, make_oracle, make_tokens
from tolerances import EXACT
from torch import Tensor

from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.word_dropout import WordDropout


def thoughts(model: LatentThoughtModel, rows: int) -> Tensor:
    return torch.randn(rows, *model.thought_shape, dtype=torch.float64)


def svi_with(share: float, seed: int = 0, **slow: float) -> DualRateSVI:
    model = make_language_model()
    clock = Slow(lr=0.01, word_dropout=share, **slow)  # type: ignore[arg-type]
    return DualRateSVI(model, build_guide("mean_field", model), Fast(steps=3), clock, seed=seed)


def test_a_hidden_token_is_scored_and_not_read() -> None:
    model, batch = make_language_model(), Batch(make_tokens(4).observed)
    z, x = thoughts(model, 4), batch.observed
    hidden = torch.zeros_like(batch.mask)
    hidden[:, 5] = True
    changed = Batch(torch.where(hidden, (x + 1) % TINY.vocab_size, x))
    with torch.no_grad():
        trunks = [
            model.prepare(model.hide_inputs(b, hidden)).covariates["trunk"]
            for b in (batch, changed)
        ]
        EXACT.assert_close(trunks[0], trunks[1])
        scores = [model.log_likelihood(z, model.hide_inputs(b, hidden)) for b in (batch, changed)]
        assert bool((scores[0] - scores[1]).abs().min() > 1e-3)
        # Prepared or not, with particles or without: one answer.
        prepared = model.prepare(model.hide_inputs(batch, hidden))
        EXACT.assert_close(model.log_likelihood(z, prepared), scores[0])
        particles = model.log_likelihood(z.expand(3, *z.shape), model.hide_inputs(batch, hidden))
        EXACT.assert_close(particles, scores[0].expand(3, 4))
        nothing = model.hide_inputs(batch, torch.zeros_like(hidden))
        EXACT.assert_close(model.log_likelihood(z, nothing), model.log_likelihood(z, batch))


def test_all_inputs_hidden_leave_position_and_thoughts() -> None:
    model = make_language_model()
    x = Batch(make_tokens(2).observed)
    hidden = model.hide_inputs(x, torch.ones_like(x.mask))
    trunk = model.prepare(hidden).covariates["trunk"]
    EXACT.assert_close(trunk[0], trunk[1])


def test_rows_take_their_hidden_tokens_along() -> None:
    model, batch = make_language_model(), make_tokens(4)
    z = thoughts(model, 4)
    whole = WordDropout(model, 0.5, seed=0)(batch, 3)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        straight = model.log_likelihood(z, whole)
        moved = model.log_likelihood(z[order], whole.select(order))
        EXACT.assert_close(moved, straight[order])
        part = model.log_likelihood(z[:2], whole.to("cpu").select(slice(2)))
        EXACT.assert_close(part, straight[:2])


def test_what_is_hidden_is_a_function_of_seed_and_step() -> None:
    model, batch = make_language_model(), make_tokens(64)
    state = torch.get_rng_state()

    def hidden(share: float, seed: int, step: int) -> Tensor:
        out = WordDropout(model, share, seed)(batch, step)
        return out.covariates["hidden"]

    first = hidden(0.3, 0, 5)
    assert torch.equal(first, hidden(0.3, 0, 5))
    assert not torch.equal(first, hidden(0.3, 0, 6))
    assert not torch.equal(first, hidden(0.3, 1, 5))
    # 768 independent tokens: 4 standard errors are 0.066.
    assert first.double().mean().item() == pytest.approx(0.3, abs=0.066)
    assert bool(hidden(1.0, 0, 0).all())
    assert torch.equal(torch.get_rng_state(), state)
    assert WordDropout(model, 0.0, 0)(batch, 5) is batch


def test_training_hides_and_inference_does_not() -> None:
    plain, dropping, batch = svi_with(0.0), svi_with(0.6), make_tokens(3)
    assert torch.equal(plain.infer(batch).mean, dropping.infer(batch).mean)
    rows = [svi.step(batch) for svi in (plain, dropping)]
    assert rows[0]["objective"] != rows[1]["objective"]
    again = svi_with(0.6).step(batch)
    timing = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in again.items() if k not in timing} == {
        k: v for k, v in rows[1].items() if k not in timing
    }


@pytest.mark.parametrize("start", [0.0, 0.5], ids=["thoughts", "no thoughts yet"])
def test_the_elbo_is_that_of_the_undropped_text(start: float) -> None:
    # With no fast step q is the prior, and the slow draws are the same with and without dropout.
    svis = [svi_with(share, thoughts_start=start) for share in (0.0, 0.7)]
    for svi in svis:
        svi.horizon, svi.fast = 4, Fast(steps=0)
    plain, dropped = (svi.step(make_tokens(3)) for svi in svis)
    assert plain["objective"] == pytest.approx(plain["elbo"], rel=1e-9)
    assert dropped["elbo"] == pytest.approx(plain["elbo"], rel=1e-12)
    assert dropped["nll"] == pytest.approx(plain["nll"], rel=1e-12)
    assert abs(dropped["objective"] - dropped["elbo"]) > 0.1


def test_a_guides_shared_parameters_are_fitted_on_the_undropped_text() -> None:
    model = make_language_model()
    guide = build_guide("flow", model)
    svi = DualRateSVI(model, guide, Fast(steps=0), Slow(word_dropout=0.7))
    (row,) = svi.fit_guide(make_tokens(3), 1, progress=False)
    # One draw and no closed form: objective and ELBO are the same number unless tokens are hidden.
    assert row["objective"] == pytest.approx(row["elbo"], rel=1e-9)
    dropped = svi.step(make_tokens(3))
    assert abs(dropped["objective"] - dropped["elbo"]) > 0.1


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="word_dropout"):
        Slow(word_dropout=share)


def test_a_model_without_tokens_is_refused() -> None:
    model = LearnedOracle(make_oracle())
    guide = build_guide("mean_field", model)
    with pytest.raises(InputError, match="LearnedOracle reads no tokens"):
        DualRateSVI(model, guide, slow=Slow(word_dropout=0.2))
