"""Texts: reproducible, true to their prompts, and refused where they cannot be written."""

from __future__ import annotations

import pytest
import torch

import ltm_pyro as ltm
from ltm_pyro.data.tokenizer import ByteTokenizer


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
    assert ltm.generate(model, ByteTokenizer(), z=z[0], n=2, length=5, greedy=True)


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
