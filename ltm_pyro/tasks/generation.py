"""Text from a fitted model: thoughts first, then tokens guided by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch, as_tensor
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.sampling import SamplingRule, write_tokens
from ltm_pyro.random import Noise, Stream, derive_seed, draw

_TEXTS = 2**32  # no prompt has as many

_MOST_TEXTS = 10_000  # at once: another seed gives others


@door
def generate(
    model: LatentThoughtModel,
    tokenizer: Tokenizer,
    *,
    prompt: str | Sequence[str] | None = None,
    z: Tensor | NDArray[Any] | None = None,
    n: int | None = None,
    seed: int = 0,
    length: int | None = None,
    max_new_tokens: int | None = None,
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
        z: Thoughts (K, D), or (n, K, D), used as they are, e.g. `svi.infer(text).mean`.
        n: Texts per prompt; by default one for each of `z`, or one.
        seed: The same seed gives the same texts.
        length: Tokens per text, the prompt included; the model's `seq_len` by default.
        max_new_tokens: Instead of `length`: tokens after the prompt.
        svi: Whose guide and fast clock fit q to a prompt; mean field by default.
        greedy: Always the likeliest token.
        temperature: Divides the logits.
        top_k: Keep this many likeliest tokens.
        top_p: Nucleus: keep the likeliest tokens up to this probability.

    Returns:
        `n` texts for each prompt in turn, prompts included. The j-th texts of two calls with the
        same seed share their random numbers, so that they differ by `z` and prompt alone.

    Raises:
        InputError: if a prompt is longer than the sequence, or an option is out of range.
    """
    rule = SamplingRule(greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p)
    z = None if z is None else _given_thoughts(z)
    n = (len(z) if z is not None and z.dim() == 3 else 1) if n is None else n
    shape = model.config
    each = 8 * shape.n_layers * shape.width * min(shape.window, shape.seq_len)  # keys and values
    whole_number("n", n, 1, _MOST_TEXTS, bytes_each=each)
    for method in ("encode", "decode"):
        if not callable(getattr(tokenizer, method, None)):
            raise InputError(f"tokenizer is {shown(tokenizer)}: must be one, e.g. corpus.tokenizer")
    prompts: list[str] = [prompt] if isinstance(prompt, str) else list(_listed(prompt))
    encoded = [tokenizer.encode(text).tolist() for text in prompts]
    length = _length(model.config.seq_len, encoded, length, max_new_tokens)
    given = _prompt_batch(encoded, length, model.device)
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
    ends = [length] * len(thoughts)
    if given is not None and max_new_tokens is not None:
        ends = (rows.n_tokens + max_new_tokens).tolist()
    return [tokenizer.decode(row[:end]) for row, end in zip(tokens.tolist(), ends, strict=True)]


def _length(
    most: int, encoded: list[list[int]], length: int | None, max_new_tokens: int | None
) -> int:
    """Tokens to write, prompts included."""
    if max_new_tokens is not None:
        if length is not None:
            raise InputError("length counts the prompt and max_new_tokens does not: give one")
        whole_number("max_new_tokens", max_new_tokens, at_least=1)
        longest = max(map(len, encoded), default=0)
        if longest + max_new_tokens > most:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}: after {longest} tokens of the prompt the "
                f"model writes {max(most - longest, 0)} at most"
            )
        return longest + max_new_tokens
    length = most if length is None else length
    if not 1 <= length <= most:
        raise InputError(f"length is {length}: must be from 1 to {most}")
    return length


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
    x = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in encoded], batch_first=True)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
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
        z = z.to(model.decoder.bos)
        shape = (rows, *model.thought_shape)
        if z.shape not in (shape, shape[1:], (1, *shape[1:])):
            raise InputError(f"z is {tuple(z.shape)}: must be {shape[1:]} or {shape}")
        return z.expand(shape)
    if given is None:
        texts = Noise(seed, torch.arange(rows, device=model.device))
        with torch.no_grad():
            return draw(model.prior().expand(torch.Size([rows])), texts, 1)[0]
    svi = svi or DualRateSVI(model, build_guide("mean_field", model))
    draws = svi.infer(given).sample(n, seed)
    return draws.transpose(0, 1).flatten(0, 1)


def _given_thoughts(z: object) -> Tensor:
    """Thoughts as a tensor of real numbers; `InputError` if they are none."""
    # torch warns of arrays that it could not write into, such as those of a pandas frame.
    thoughts = as_tensor("z", z.copy() if isinstance(z, np.ndarray) else z)
    if thoughts.is_meta:
        raise InputError("z lies on the meta device, without numbers: give thoughts")
    if not bool(thoughts.isfinite().all()):
        raise InputError("z holds NaN or infinity: every number must be finite")
    return thoughts


def _listed(prompt: Sequence[str] | None) -> Sequence[str]:
    """Several prompts, or none."""
    prompts = () if prompt is None else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompt is {shown(prompt)}: must be a text or a list of texts")
    return prompts
