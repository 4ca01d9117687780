"""The models that only a study needs keep the contract, and their truths are truths."""

import pandas as pd
import pyro
import pytest
import torch

import ltm_pyro as ltm
from studies.budgets import effects, few_shot
from studies.depth_width import build
from studies.emulated import Emulated, config_of
from studies.flat_sessions import build as session
from studies.memory import FIRST_KEY, FIRST_VALUE, KEYS, facts
from studies.memory_decoder import ARMS, TAPS, MemoryDecoder, SurpriseMemory, remember
from studies.memory_decoder import _unit as unit
from studies.optimisation import Optimality, Solutions, asked
from studies.optimisation_problems import UNKNOWNS, Family
from studies.recurrent_depth import LoopedSums, sums
from studies.utterances import bags, pairs, until_end
from tests.tolerances import EXACT


def heard(model: ltm.LatentThoughtModel) -> ltm.LatentThoughtModel:
    """The model with thoughts that matter: their last projection starts at zero."""
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.cross_attention.out.weight)
    return model


@pytest.fixture
def readers() -> list[ltm.LatentThoughtModel]:
    pyro.set_rng_seed(0)
    settings = {"layers": 2, "seq_len": 6, "window": {"mixture": 1}, "corpus": "mixture"}
    return [heard(ltm.LatentThoughtModel(config_of(w, 9, settings))) for w in (16, 8, 8)]


def test_emulated_fine_tuning_is_a_model(readers: list[ltm.LatentThoughtModel]) -> None:
    batch = ltm.Batch(torch.randint(0, 9, (4, 6)))
    ltm.check_model(Emulated(readers, (1.0, 1.0, -1.0)), batch)


def test_emulation_of_nothing_is_the_large_model(readers: list[ltm.LatentThoughtModel]) -> None:
    large, small, _ = readers
    batch, z = ltm.Batch(torch.randint(0, 9, (4, 6))), torch.randn(3, 4, *large.thought_shape)
    same = Emulated([large, small, small], (1.0, 1.0, -1.0))
    expected = large.log_likelihood(z, batch)
    torch.testing.assert_close(
        same.log_likelihood(z, batch), expected, rtol=EXACT.float32, atol=EXACT.float32
    )


@pytest.mark.parametrize("arm", ["own", "all"])
def test_decoders_of_all_shapes_have_as_many_weights(arm: str) -> None:
    settings = {"seed": 0, "seq_len": 6, "window": 2, "thoughts": 4, "thought_dim": 4}
    settings["weights"] = 6000
    batch = ltm.Batch(torch.randint(0, 9, (4, 6)))
    for shape, layers in (("1", 1), ("4", 4), ("2x2", 4)):
        model = heard(build(shape, arm, settings, vocab=9))
        ltm.check_model(model, batch)
        assert model.n_layers == layers
        assert model.thought_shape == (4, 4)
        learned = sum(p.numel() for p in model.parameters())
        assert learned == pytest.approx(6000, rel=0.02)  # a hidden unit more or less a layer


def test_a_looped_block_is_a_model_and_reaches_as_far_as_it_is_used() -> None:
    pyro.set_rng_seed(0)
    model = LoopedSums(3, 8)
    model.recurrences = 2
    batch = sums({"modulus": 3, "length": 6, "seed": 0}, [True, False] * 3, seed=0)
    ltm.check_model(model, batch)
    first = batch.covariates["terms"].clone()
    first[:, 0] = 3 + 4 - first[:, 0]  # the other kind of start
    z = torch.zeros(6, *model.thought_shape)
    changed = (model.logits(z, batch.covariates["terms"]) - model.logits(z, first)).abs().sum(-1)
    assert (changed[:, :2] > 0).all()
    assert (changed[:, 2:] == 0).all()


def test_running_sums_are_true() -> None:
    batch = sums({"modulus": 3, "length": 6, "seed": 0}, [True, False] * 50, seed=0)
    terms = batch.covariates["terms"].long()
    assert ((batch.observed.diff(dim=1) - terms[:, 1:]) % 3 == 0).all()
    assert (batch.observed[1::2, 0] == 0).all()
    assert len(batch.observed[::2, 0].unique()) == 3


def one_by_one(layer: SurpriseMemory, x: torch.Tensor) -> torch.Tensor:
    """What a memory reads, by the recurrence itself and torch's own gradient of its loss."""
    state, length, x = layer.empty(x), x.shape[1], layer.norm(x)
    flat = torch.cat([state.before, layer.project(x)], 1)
    shifted = [layer.taps[i] * flat[:, TAPS - 1 - i :][:, :length] for i in range(TAPS)]
    mixed = torch.stack(shifted).sum(0)
    key, value, query = mixed.chunk(3, -1)
    theta, eta, alpha = layer.gates(x).sigmoid().unbind(-1)
    eta = eta * (layer.arm != "no momentum")
    alpha = alpha * (layer.arm != "no forgetting")
    memory, momentum, reads = state.memory, state.momentum, []
    for t in range(length):
        at = memory.detach().requires_grad_()
        held = (at @ unit(key[:, t])[..., None]).squeeze(-1)
        fit = held * value[:, t] if layer.arm == "no surprise" else -((held - value[:, t]) ** 2) / 2
        (surprise,) = torch.autograd.grad(-fit.sum(), at)
        momentum = eta[:, t, None, None] * momentum - theta[:, t, None, None] * surprise
        memory = (1 - alpha[:, t, None, None]) * memory + momentum
        reads.append((memory @ unit(query[:, t])[..., None]).squeeze(-1))
    return layer.out(torch.stack(reads, 1))


@pytest.mark.parametrize("arm", ARMS)
def test_a_memory_is_its_recurrence_in_any_pieces(arm: str) -> None:
    pyro.set_rng_seed(0)
    layer = SurpriseMemory(6, 5, arm).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    x = torch.randn(2, 45, 6, dtype=torch.float64)
    read, _ = layer(x)
    torch.testing.assert_close(read, one_by_one(layer, x), rtol=EXACT.float64, atol=EXACT.float64)
    first, state = layer(x[:, :29])
    rest, _ = layer(x[:, 29:], state)
    torch.testing.assert_close(
        torch.cat([first, rest], 1), read, rtol=EXACT.float64, atol=EXACT.float64
    )


def test_a_decoder_with_a_memory_is_a_model_in_one_pass_or_in_segments() -> None:
    pyro.set_rng_seed(0)
    config = ltm.ModelConfig(
        vocab_size=9, seq_len=70, n_layers=2, width=8, n_heads=2, mlp_hidden=8, window=3,
        thoughts_per_layer=1, thought_dim=2,
    )  # fmt: skip
    model = heard(remember(ltm.LatentThoughtModel(config), 4, "memory"))
    x = torch.randint(0, 9, (3, 70))
    ltm.check_model(model, ltm.Batch(x[:, :20]))
    decoder, z = model.decoder, torch.zeros(3, *model.thought_shape)
    assert isinstance(decoder, MemoryDecoder)
    with torch.no_grad():
        whole = model.token_log_likelihood(z, ltm.Batch(x))
        read = decoder.logits(x[:, :12], z)
    pieces = torch.cat(list(decoder.stream(x.split(23, 1))), 1)
    torch.testing.assert_close(pieces, whole, rtol=EXACT.float32, atol=EXACT.float32)
    state = decoder.start(z)
    decoder.read(x[:, :4], state)
    written = torch.stack([decoder.step(x[:, t - 1], state) for t in range(4, 12)], 1)
    torch.testing.assert_close(written, read[:, 4:], rtol=EXACT.float32, atol=EXACT.float32)


def test_facts_are_what_was_said_last_and_their_probabilities_are_true() -> None:
    made = facts(rows=200, length=120, process=0, seed=3)
    last: dict[int, tuple[int, int]] = {}
    for t, token in enumerate(made.x[0].tolist()):
        before = int(made.x[0, t - 1]) if t else 0
        if FIRST_KEY <= before < FIRST_KEY + KEYS and t:
            value, when = last.get(before, (-1, 0))
            assert made.known[0, t] == value
            assert made.lag[0, t] == (t - when if value >= 0 else 0)
            last[before] = token - FIRST_VALUE, t
        else:
            assert made.known[0, t] == -1
    # E[q(x) / p(x)] = 1 for any other distribution q over the same tokens; here a uniform one.
    asked = made.known >= 0
    ratio = (-made.truth[asked].exp().log() - torch.log(torch.tensor(8.0))).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * float(ratio.std()) / len(ratio) ** 0.5)


@pytest.mark.parametrize("name", ["lp", "milp", "qp", "newton"])
def test_the_solver_is_right_and_nothing_repaired_is_better(name: str) -> None:
    family, noise = Family(name, seed=1), torch.Generator().manual_seed(0)
    given = family.problems(torch.randn(8, 4, generator=noise))
    best = family.solve(given)
    assert (family.excess(best, given) < 1e-4).all()  # solvers' own tolerance
    torch.testing.assert_close(family.gap(best, given, best), torch.zeros(8), atol=2e-4, rtol=0)
    others = torch.rand(200, 8, UNKNOWNS, generator=noise)
    near = (best + 0.05 * torch.randn(200, 8, UNKNOWNS, generator=noise)).clamp(0, 1)
    for y in (others, near):
        assert (family.excess(family.repaired(y, given), given) < 1e-4).all()
        gaps = torch.stack([family.gap(one, given, best) for one in y])
        assert (gaps > -2e-3).all()


def test_solutions_and_their_optimality_are_models() -> None:
    pyro.set_rng_seed(0)
    family = Family("qp", seed=0)
    given = family.problems(torch.randn(4, 4))
    model = Solutions(thoughts=2)
    ltm.check_model(model, ltm.Batch(family.solve(given)))
    ltm.check_model(Optimality(model, family), asked(given))


def test_effects_of_a_known_plane_with_one_interaction() -> None:
    rows = [
        {"weights": w, "latents": z, "fast_steps": t, "seed": s,
         "y": 3 * i - 2 * j + 0.5 * i * j + 10 * s}
        for i, w in ((-1, 2), (1, 8)) for j, z in ((-1, 2), (1, 8)) for t in (1, 4) for s in (0, 1)
    ]  # fmt: skip
    found = effects(pd.DataFrame(rows), "y")["effect"]
    assert found["weights"] == pytest.approx(3, rel=EXACT.float64)
    assert found["latent dimensions"] == pytest.approx(-2, rel=EXACT.float64)
    assert found["weights x latent dimensions"] == pytest.approx(0.5, rel=EXACT.float64)
    assert found["fast steps"] == pytest.approx(0, abs=EXACT.float64)


def test_few_shots_find_what_is_apart() -> None:
    classes = torch.arange(3).repeat(10)
    points = 5.0 * torch.nn.functional.one_hot(classes, 3) + 0.1 * torch.randn(30, 3)
    assert few_shot(points, classes, shots=2) == (24, 24)


def test_turns_are_read_up_to_their_end() -> None:
    x = torch.tensor([[[3, 2, 0, 3], [2, 2, 3, 3], [0, 3, 3, 0]]])
    assert until_end(x).long().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]]
    assert bags(x, 4).tolist() == [[[0, 1, 1], [0, 1, 1], [0, 0, 0]]]
    assert int(pairs(x).sum()) == 5  # "3 2", "2 END", "2 2", "2 3", "3 3"


@pytest.mark.parametrize("arm", ["nested", "flat", "turns_only"])
def test_sessions_of_text_are_models(arm: str) -> None:
    pyro.set_rng_seed(0)
    config = ltm.ModelConfig(
        vocab_size=9, seq_len=4, n_layers=1, width=8, n_heads=2, mlp_hidden=8, window=2,
        thoughts_per_layer=1, thought_dim=2,
    )  # fmt: skip
    model = session(arm, heard(ltm.LatentThoughtModel(config)), 3)
    x = torch.randint(0, 9, (4, 3, 4))
    ltm.check_model(model, ltm.Batch(x.flatten(1), until_end(x).flatten(1)))
