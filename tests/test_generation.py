"""Texts: reproducible, true to their prompts, and refused where they cannot be written."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from known_models import TINY, make_language_model, make_tokens
from tolerances import EXACT
from torch import Tensor, nn

import ltm_pyro as ltm
from ltm_pyro.data.tokenizer import ByteTokenizer
from ltm_pyro.engine.kernels import kv_cache
from ltm_pyro.engine.kernels.kv_cache import Norm
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.sampling import SamplingRule, write_tokens
from ltm_pyro.random import Noise, fresh_seed


@pytest.fixture
def model() -> ltm.LatentThoughtModel:
    return ltm.LatentThoughtModel.from_preset(
        "nano", seq_len=24, width=16, n_heads=2, mlp_hidden=24, n_layers=2, thought_dim=4
    )


def test_the_seed_decides_the_text(model: ltm.LatentThoughtModel) -> None:
    first, again, other = (
        ltm.generate(model, ByteTokenizer(), n=3, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 3


def test_prompts_of_unequal_length_are_kept(model: ltm.LatentThoughtModel) -> None:
    prompts = ["The", "In the beginning"]
    texts = ltm.generate(model, ByteTokenizer(), prompt=prompts, n=2, seed=1)
    assert [
        t.startswith(p) for t, p in zip(texts, [p for p in prompts for _ in "ab"], strict=True)
    ] == [True] * 4


def test_thoughts_of_a_prompt_come_from_its_posterior(model: ltm.LatentThoughtModel) -> None:
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.cross_attention.out.weight)  # type: ignore[union-attr,arg-type]
    svi = ltm.DualRateSVI(model, ltm.build_guide("mean_field", model), fast=ltm.Fast(steps=64))
    fitted = ltm.generate(model, ByteTokenizer(), prompt="abc", n=2, seed=1, svi=svi)
    start = ltm.DualRateSVI(model, ltm.build_guide("mean_field", model), fast=ltm.Fast(steps=0))
    prior = ltm.generate(model, ByteTokenizer(), prompt="abc", n=2, seed=1, svi=start)
    assert fitted != prior


def test_given_thoughts_are_used(model: ltm.LatentThoughtModel) -> None:
    z = torch.randn(2, *model.thought_shape)
    greedy = [ltm.generate(model, ByteTokenizer(), z=z, n=2, seed=s, greedy=True) for s in (1, 2)]
    assert greedy[0] == greedy[1]  # nothing is left to chance
    one = [
        ltm.generate(model, ByteTokenizer(), z=each, n=2, length=5, greedy=True)
        for each in (z[0], z[:1])  # as it is, and as the posterior mean of a batch of one
    ]
    assert one[0] == one[1]
    assert one[0][0] == one[0][1]


def test_top_k_one_is_greedy(model: ltm.LatentThoughtModel) -> None:
    z = torch.randn(1, *model.thought_shape)
    greedy = ltm.generate(model, ByteTokenizer(), z=z, greedy=True)
    assert ltm.generate(model, ByteTokenizer(), z=z, top_k=1) == greedy
    assert ltm.generate(model, ByteTokenizer(), z=z, top_p=1e-9) == greedy
    assert ltm.generate(model, ByteTokenizer(), z=z, temperature=1e-6) == greedy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "x" * 24}, "shorten the prompt"),
        ({"length": 25}, "from 1 to 24"),
        ({"length": 0}, "from 1 to 24"),
        ({"n": 0}, "1 or more"),
        ({"temperature": 0.0}, "greedy"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"z": torch.zeros(3, 3)}, "must be"),
    ],
)
def test_bad_options_are_named(
    model: ltm.LatentThoughtModel, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ltm.InputError, match=words):
        ltm.generate(model, ByteTokenizer(), **options)  # type: ignore[arg-type]


def _model(window: int, seq_len: int = 24, dtype: torch.dtype = torch.float64) -> Decoder:
    config = replace(TINY, window=window, seq_len=seq_len)
    decoder = make_language_model(config, dtype=dtype).decoder
    for layer in decoder.layers:
        # Louder layers: greedy text is then not the same token for ever.
        for residual in (layer.self_attention.out, layer.mlp.down):  # type: ignore[union-attr]
            nn.init.normal_(residual.weight, std=1.0)  # type: ignore[union-attr,arg-type]
    return decoder


def _z(decoder: Decoder, rows: int) -> Tensor:
    shape = (rows, decoder.config.n_thoughts, decoder.config.thought_dim)
    return torch.randn(shape, dtype=torch.float64).to(decoder.bos)


def _stepwise(decoder: Decoder, tokens: Tensor, z: Tensor) -> Tensor:
    """Logits (B, T, V) of every token, one position at a time."""
    state = decoder.start(z)
    logits = [decoder.step(None, state)]
    logits += [decoder.step(token, state) for token in tokens[:, :-1].unbind(1)]
    return torch.stack(logits, 1)


@torch.no_grad()
def _recomputed(
    decoder: Decoder, z: Tensor, prompts: list[list[int]], length: int, greedy: bool
) -> Tensor:
    """The text by nothing but `Decoder.logits` of the whole prefix."""
    places = Noise(fresh_seed(), torch.arange(len(z))).uniform(length)[0]
    tokens = torch.zeros(len(z), length, dtype=torch.long)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    for t in range(min(map(len, prompts)), length):
        logits = decoder.logits(tokens[:, : t + 1].clone(), z)[:, t]
        chosen = logits.argmax(-1)
        if not greedy:
            until = logits.softmax(-1).cumsum(-1)
            chosen = (until <= places[:, t, None]).sum(-1)
        free = torch.tensor([len(ids) <= t for ids in prompts])
        tokens[free, t] = chosen[free]
    return tokens


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("window", [1, 3, 24, 64])
@pytest.mark.parametrize(
    "prompts", [[[]], [[], [], []], [[1, 2, 3, 4]], [[5], [1, 2, 3, 0, 6, 2, 1], [4, 4]]]
)
def test_text_is_that_of_recomputing_the_prefix(
    prompts: list[list[int]], window: int, greedy: bool
) -> None:
    decoder = _model(window)
    z = _z(decoder, len(prompts))
    padded = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        padded[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    torch.manual_seed(3)
    text = write_tokens(decoder, z, 24, SamplingRule(greedy=greedy), padded, mask)
    torch.manual_seed(3)
    assert torch.equal(text, _recomputed(decoder, z, prompts, 24, greedy))
    assert window == 1 or len(text.unique()) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [1, 4, 5, 64])
@pytest.mark.parametrize("given", [1, 3, 4, 5, 19])
def test_a_prompt_read_at_once_is_the_prompt_read_step_by_step(
    given: int, window: int, dtype: torch.dtype
) -> None:
    decoder = _model(window, dtype=dtype)
    z, tokens = _z(decoder, 2), torch.randint(TINY.vocab_size, (2, 24))
    state = decoder.start(z)
    decoder.read(tokens[:, :given], state)
    rest = [decoder.step(token, state) for token in tokens[:, given - 1 : -1].unbind(1)]
    EXACT.assert_close(torch.stack(rest, 1), _stepwise(decoder, tokens, z)[:, given:])


def test_long_texts_go_round_the_ring_many_times() -> None:
    decoder = _model(window=5, seq_len=200)
    z, tokens = _z(decoder, 2), torch.randint(TINY.vocab_size, (2, 200))
    with torch.no_grad():
        EXACT.assert_close(_stepwise(decoder, tokens, z), decoder.logits(tokens, z))


@pytest.mark.parametrize("rows", [1, 2])
def test_products_in_halves_are_the_products(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One row of a large decoder; an odd vocabulary (7) cannot be halved and stays whole.
    monkeypatch.setattr(kv_cache, "LARGE", 1)
    decoder = _model(window=4)
    z, tokens = _z(decoder, rows), torch.randint(TINY.vocab_size, (rows, 24))
    with torch.no_grad():
        EXACT.assert_close(_stepwise(decoder, tokens, z), decoder.logits(tokens, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_norm_is_rms_norm_down_to_zero(eps: float | None, dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(16, eps, dtype=dtype)
    nn.init.normal_(norm.weight)
    h = (
        torch.randn(5, 16, dtype=dtype)
        * torch.tensor([0, 1e-6, 1e-3, 1, 1e4], dtype=dtype)[:, None]
    )
    with torch.no_grad():
        EXACT.assert_close(Norm(norm)(h).double().float(), norm(h).float())


def test_half_precision_weights_write_as_well_as_they_score() -> None:
    exact = _model(window=4)
    half = _model(window=4, dtype=torch.bfloat16)
    z, tokens = _z(exact, 3), torch.randint(TINY.vocab_size, (3, 24))
    with torch.no_grad():
        truth = exact.logits(tokens, z)
        stepwise = _stepwise(half, tokens, z.bfloat16())
        assert stepwise.dtype == torch.bfloat16
        cached, whole = (
            (logits - truth).abs().mean()
            for logits in (stepwise, half.logits(tokens, z.bfloat16()))
        )
    assert cached < 1.5 * whole  # rounding, of the same kind
    text = write_tokens(half, z.bfloat16(), 24, prompt=tokens[:, :6])
    assert torch.equal(text[:, :6], tokens[:, :6])


def test_autocast_writes_what_the_prompt_asks() -> None:
    decoder = _model(window=4, dtype=torch.float32)
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.autocast("cpu", torch.bfloat16):
        text = write_tokens(decoder, _z(decoder, 1), 24, prompt=prompt)
    assert torch.equal(text[:, :6], prompt)
    assert text.max() < TINY.vocab_size


def test_written_tokens_can_be_learned_from() -> None:
    model = make_language_model()
    text = write_tokens(model.decoder, _z(model.decoder, 2), TINY.seq_len)
    assert not text.is_inference()
    z = _z(model.decoder, 2)
    model.log_likelihood(z, ltm.Batch(text)).sum().backward()
    assert model.decoder.embedding.weight.grad is not None


def test_writing_leaves_the_weights_alone() -> None:
    decoder = _model(window=4)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    write_tokens(decoder, _z(decoder, 2), 24, prompt=make_tokens(2).observed)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in decoder.parameters())


def test_a_broken_decoder_is_named() -> None:
    decoder = _model(window=4)
    with torch.no_grad():
        decoder.norm.weight[0] = float("nan")
    for greedy in (True, False):
        with pytest.raises(ltm.InputError, match="not finite"):
            write_tokens(decoder, _z(decoder, 1), 24, SamplingRule(greedy=greedy))


@pytest.mark.parametrize("masked", [False, True])
def test_text_is_planned_on_the_meta_device(masked: bool) -> None:
    decoder = _model(window=4).to("meta")
    z = _z(decoder, 2)
    prompt = torch.zeros(2, 6, dtype=torch.long, device="meta")
    mask = torch.ones(2, 6, dtype=torch.bool, device="meta") if masked else None
    text = write_tokens(decoder, z, 24, prompt=prompt, prompt_mask=mask)
    assert text.device.type == "meta"
    assert text.shape == (2, 24)


def _benchmark() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "generation.py"
    spec = importlib.util.spec_from_file_location("generation_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_fills_its_tables() -> None:
    benchmark = _benchmark()
    decoder = _model(
        window=4, seq_len=6 + benchmark.BLOCK * (benchmark.ROUNDS + 1), dtype=torch.float32
    )
    case = {"preset": "small", "rows": 2}
    case |= benchmark.by_position(decoder, 2, (3, 6), repeats=1)
    case |= benchmark.against_recomputing(decoder, 2, 16, repeats=1)
    for table in (benchmark.position_table([case]), benchmark.speedup_table([case], 16)):
        assert len(table) == 3
        assert len({line.count("|") for line in table}) == 1  # as many cells in every line
    assert all(case[f"text_speedup_{way}"] > 0 for way in ("all", "last"))
