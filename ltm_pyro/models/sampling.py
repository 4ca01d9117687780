"""Writing text token by token: the one code path of generation and of predictive checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.errors import InputError
from ltm_pyro.models.decoder import Decoder


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

    def choose(self, logits: Tensor) -> Tensor:
        """The next token, (B, V) logits to (B,)."""
        if self.greedy:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits outside the nucleus (Holtzman et al. 2020) set to minus infinity."""
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    # A token stays while the mass before it is below top_p: so at least one always stays.
    outside = probability.cumsum(-1) - probability >= top_p
    return torch.full_like(logits, -torch.inf).scatter(
        -1, index, ordered.masked_fill(outside, -torch.inf)
    )


@torch.no_grad()
def write_tokens(
    decoder: Decoder,
    z: Tensor,
    length: int,
    rule: SamplingRule | None = None,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
) -> Tensor:
    """Generates B sequences, with a key/value cache, from torch's global random generator.

    Args:
        decoder: The decoder.
        z: (B, K, D) thoughts.
        length: T, tokens to write, prompts included.
        rule: How to choose tokens; the model's own distribution by default.
        prompt: (B, P) tokens that are given, P at most T.
        prompt_mask: (B, P) bool, false after the end of a shorter prompt.

    Returns:
        (B, T) int64.
    """
    rule = rule or SamplingRule()
    state = decoder.start(z)
    tokens = torch.zeros(len(z), length, dtype=torch.long, device=z.device)
    given = 0 if prompt is None else prompt.shape[1]
    previous: Tensor | None = None
    for t in range(length):
        chosen = rule.choose(decoder.step(previous, state))
        if prompt is not None and t < given:
            fixed = prompt[:, t]
            chosen = fixed if prompt_mask is None else torch.where(prompt_mask[:, t], fixed, chosen)
        tokens[:, t] = previous = chosen
    return tokens
