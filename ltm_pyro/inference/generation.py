"""Text from a fitted model: thoughts first, then tokens guided by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltm_pyro.capacity import count
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.doors import door
from ltm_pyro.models.drawing import draw
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.sampling import SamplingRule, write_tokens
from ltm_pyro.random import Noise, Stream, derive_seed

_TEXTS = 2**32  # no prompt has as many

_MOST_TEXTS = 10_000  # at once: another seed gives others


@door
def generate(
    model: LatentThoughtModel,
    tokenizer: Tokenizer,
    *,
    prompt: str | Sequence[str] | None = None,
    z: Tensor | None = None,
    n: int = 1,
    seed: int = 0,
    length: int | None = None,
    svi: DualRateSVI | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[str]:
    """Writes `n` texts (per prompt).

    Where thoughts come from: `z` if given; else, with a prompt, a draw from q(z | prompt), fitted
    by the fast loop; else a draw from the prior. Each text has a draw of its own.

    Args:
        model: The model.
        tokenizer: Turns text into tokens and back.
        prompt: One or several texts to go on from; they may differ in length.
        z: Thoughts (K, D), or (n, K, D), used as they are.
        n: Texts per prompt.
        seed: The same seed gives the same texts.
        length: Tokens per text, the prompt included; the model's `seq_len` by default.
        svi: Whose guide and fast clock fit q to a prompt; mean field by default.
        greedy: Always the likeliest token.
        temperature: Divides the logits.
        top_k: Keep this many likeliest tokens.
        top_p: Nucleus: keep the likeliest tokens up to this probability.

    Returns:
        `n` texts for each prompt in turn, prompts included.

    Raises:
        InputError: if a prompt is longer than the sequence, or an option is out of range.
    """
    rule = SamplingRule(greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p)
    length = model.config.seq_len if length is None else length
    shape = model.config
    each = 8 * shape.n_layers * shape.width * min(shape.window, shape.seq_len)  # keys and values
    count("n", n, at_most=_MOST_TEXTS, bytes_each=each)
    if not 1 <= length <= model.config.seq_len:
        raise InputError(f"length is {length}: must be from 1 to {model.config.seq_len}")
    for method in ("encode", "decode"):
        if not callable(getattr(tokenizer, method, None)):
            raise InputError(f"tokenizer is {shown(tokenizer)}: must be one, e.g. corpus.tokenizer")
    prompts: list[str] = [prompt] if isinstance(prompt, str) else list(_listed(prompt))
    given = _prompt_batch(
        [tokenizer.encode(text).tolist() for text in prompts], length, model.device
    )
    thoughts = _thoughts(model, z, given, n, svi, derive_seed(seed, Stream.SAMPLE))
    # One number a text: prompt p's text j is the same however many are asked for.
    place = torch.arange(len(thoughts), device=model.device)
    prompt_of, text = place // n, place % n
    noise = Noise(derive_seed(seed, Stream.TOKENS), prompt_of * _TEXTS + text)
    if given is None:
        tokens = write_tokens(model.decoder, thoughts, length, rule, noise=noise)
    else:
        rows = given.select(prompt_of)
        tokens = write_tokens(
            model.decoder, thoughts, length, rule, rows.observed, rows.mask, noise
        )
    return [tokenizer.decode(row) for row in tokens.tolist()]


def _prompt_batch(encoded: list[list[int]], length: int, device: torch.device) -> Batch | None:
    """Prompts (P, longest) padded and masked; `None` where nothing is given."""
    sizes = [len(ids) for ids in encoded]
    if not any(sizes):
        return None
    if max(sizes) >= length:
        raise InputError(
            f"the prompt has {max(sizes)} tokens and the text {length}: "
            f"shorten the prompt to at most {length - 1} tokens"
        )
    x = torch.zeros(len(encoded), max(sizes), dtype=torch.long)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for row, ids in enumerate(encoded):
        x[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[row, : len(ids)] = True
    return Batch(x, mask).to(device)


def _thoughts(
    model: LatentThoughtModel,
    z: Tensor | None,
    given: Batch | None,
    n: int,
    svi: DualRateSVI | None,
    seed: int,
) -> Tensor:
    """(P * n, K, D), prompt by prompt."""
    rows = n * (1 if given is None else len(given))
    if z is not None:
        if z.is_meta:
            raise InputError("z lies on the meta device, without numbers: give thoughts")
        z = z.to(model.decoder.bos)
        shape = (rows, *model.thought_shape)
        if z.shape not in (shape, shape[1:]):
            raise InputError(f"z is {tuple(z.shape)}: must be {shape[1:]} or {shape}")
        return z.expand(shape)
    if given is None:
        texts = Noise(seed, torch.arange(rows, device=model.device))
        with torch.no_grad():
            return draw(model.prior().expand(torch.Size([rows])), texts, 1)[0]
    svi = svi or DualRateSVI(model, build_guide("mean_field", model))
    draws = svi.infer(given).sample(n, seed)
    return draws.transpose(0, 1).flatten(0, 1)


def _listed(prompt: Sequence[str] | None) -> Sequence[str]:
    """Several prompts, or none."""
    prompts = () if prompt is None else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompt is {shown(prompt)}: must be a text or a list of texts")
    return prompts
