"""Writing text token by token: the one code path of generation and of predictive checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.errors import InputError
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.random import Noise, fresh_seed


@dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """How the next token is chosen from the decoder's distribution.

    The default samples from the model itself; the others trade its distribution for likelier text.
    """

    greedy: bool = False
    """Take the likeliest token."""
    temperature: float = 1.0
    """Divides the logits; below 1 sharpens."""
    top_k: int | None = None
    """Keep only this many likeliest tokens."""
    top_p: float | None = None
    """Nucleus: keep the smallest set of likeliest tokens with at least this probability."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}: must be above 0 (or use greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}: must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: must be above 0 and at most 1")

    def choose(self, logits: Tensor, place: Tensor) -> Tensor:
        """The next token, (B, V) logits to (B,).

        It is the one in whose part of the distribution `place` (B,), between 0 and 1, falls.
        """
        if self.greedy:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        until = logits.softmax(-1).cumsum(-1)
        # Relative to what the sum has come to, and below it: a token of no mass is never met.
        total = until[:, -1:]
        target = torch.minimum(place[:, None].to(until) * total, total.nextafter(total * 0))
        # Of logits that are no numbers any token will do: they are refused at the end.
        last = logits.shape[-1] - 1
        return torch.searchsorted(until, target, right=True).squeeze(-1).clamp(max=last)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits outside the nucleus (Holtzman et al. 2020) set to minus infinity."""
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    # A token stays while the mass before it is below top_p: so at least one always stays.
    outside = probability.cumsum(-1) - probability >= top_p
    return torch.full_like(logits, -torch.inf).scatter(
        -1, index, ordered.masked_fill(outside, -torch.inf)
    )


def write_tokens(
    decoder: Decoder,
    z: Tensor,
    length: int,
    rule: SamplingRule | None = None,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Generates B sequences, with a key/value cache.

    The positions that every row has a prompt for are read in one pass.

    Args:
        decoder: The decoder.
        z: (B, K, D) thoughts.
        length: T, tokens to write, prompts included.
        rule: How to choose tokens; the model's own distribution by default.
        prompt: (B, P) tokens that are given, P at most T.
        prompt_mask: (B, P) bool, false after the end of a shorter prompt.
        noise: That of the B sequences; from torch's global random generator by default.

    Returns:
        (B, T) int64; `InputError` if the decoder's logits are not finite.
    """
    # Made outside inference mode: the caller may train on these tokens.
    tokens = torch.zeros(len(z), length, dtype=torch.long, device=z.device)
    if noise is None:
        noise = Noise(fresh_seed(), torch.arange(len(z), device=z.device))
    places = noise.uniform(length)[0]
    with torch.inference_mode():
        _write(tokens, decoder, z, rule or SamplingRule(), places, prompt, prompt_mask)
    return tokens


def _write(
    tokens: Tensor,
    decoder: Decoder,
    z: Tensor,
    rule: SamplingRule,
    places: Tensor,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
) -> None:
    """Fills `tokens` (B, T), from random numbers (B, T)."""
    state = decoder.start(z)
    previous: Tensor | None = None
    shared = 0
    if prompt is not None:
        shared = _shared_length(prompt, prompt_mask)
        tokens[:, :shared] = prompt[:, :shared]
    if shared:
        decoder.read(tokens[:, :shared], state)
        previous = tokens[:, shared - 1]
    logits = z.new_zeros(())
    for t in range(shared, tokens.shape[1]):
        logits = decoder.step(previous, state)
        previous = rule.choose(logits, places[:, t])
        if prompt is not None and prompt_mask is not None and t < prompt.shape[1]:
            previous = torch.where(prompt_mask[:, t], prompt[:, t], previous)
        tokens[:, t] = previous
    if not (logits.is_meta or logits.isfinite().all()):
        raise InputError("the decoder's logits are not finite: check its weights and z")


def _shared_length(prompt: Tensor, prompt_mask: Tensor | None) -> int:
    """How many positions from the start are given in every row."""
    if prompt_mask is None:
        return prompt.shape[1]
    if prompt_mask.is_meta:
        return 0  # the meta device has no values: position by position is always right
    return int(prompt_mask.all(0).long().cumprod(0).sum())
