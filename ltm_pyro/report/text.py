"""Text for a page: tokens with their surprise, samples, and nothing that a browser obeys."""

from __future__ import annotations

import unicodedata
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.data.base import Corpus
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.engine.kernels.cross_entropy import token_log_prob
from ltm_pyro.inference.generation import generate
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.random import Stream, derive_seed
from ltm_pyro.run.folder import Run
from ltm_pyro.run.scoring import HeldOut

PROMPT_SHARE = 4  # a sample's prompt is this part of a held-out sequence
_SEQUENCES = 3
_TOKENS = 400  # of one sequence
_DRAWS = 16
_BYTES = 4  # tokens that one character may need
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_ACTIVE = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
"""Categories of characters that do something instead of being seen; marks of direction too."""
_JOINERS = "\u200c\u200d"  # parts of words and of emoji


def visible(text: str) -> str:
    """`text` with what would act in a browser or terminal shown by its number."""
    return "".join(_visible(c) for c in text)


def _visible(c: str) -> str:
    if c in "\n\t" or c in _JOINERS or unicodedata.category(c) not in _ACTIVE:
        return c
    return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{ord(c):04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"


def surprise(held_out: HeldOut, run: Run, seed: int) -> list[dict[str, Any]]:
    """Surprise of each token of some sequences, with their thoughts and without any.

    Args:
        held_out: Scores of mode `oracle`.
        run: Its run.
        seed: Chooses the sequences.

    Returns:
        By sequence: `sequence` (its id), `without` (what stands for no thoughts), `nats` and
        `nats_without` of all its tokens shown, and `pieces`, each with `text` (one character, or
        one token), `nats` = E_q[-log p(token | tokens before, z)] and `nats_without`.
    """
    if held_out.post is None:
        return []
    batch = held_out.batch
    rng = np.random.default_rng(derive_seed(seed, Stream.SAMPLE))
    rows = np.sort(rng.permutation(len(batch))[:_SEQUENCES])
    some = batch.select(rows.tolist())
    tokens, mask = some.observed[:, :_TOKENS], some.mask[:, :_TOKENS]
    z = held_out.post.sample(_DRAWS, derive_seed(seed, Stream.SCORE))[:, rows]
    nats = torch.stack([_token_nats(run.model, tokens, each) for each in z]).mean(0)
    zero = torch.zeros_like(z[0])
    control = None if held_out.control is None else cast("LatentThoughtModel", run.control().model)
    without = _token_nats(run.model if control is None else control, tokens, zero)
    return [
        {
            "sequence": int(some.ids[i]),
            "without": "z = 0" if control is None else "the control",
            "nats": float(nats[i][mask[i]].sum()),
            "nats_without": float(without[i][mask[i]].sum()),
            "pieces": _pieces(
                run.tokenizer, *(t[i][mask[i]].cpu().numpy() for t in (tokens, nats, without))
            ),
        }
        for i in range(len(rows))
    ]


@torch.no_grad()
def _token_nats(model: LatentThoughtModel, tokens: Tensor, z: Tensor) -> Tensor:
    """-log p of each token (B, T) given those before it and z (B, K, D), float64."""
    decoder = model.decoder
    h = decoder.above(decoder.trunk(tokens), z)
    found = token_log_prob(h.flatten(0, 1), decoder.embedding.weight, tokens.flatten())
    return -found.view(tokens.shape).double()


def _pieces(tokenizer: Tokenizer, ids: Any, nats: Any, without: Any) -> list[dict[str, Any]]:
    """Tokens as text; those that make one character only together are one piece."""
    out: list[dict[str, Any]] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:stop])
        if _UNKNOWN in text and stop - start < _BYTES and stop < len(ids):
            continue
        here = slice(start, stop)
        out.append(
            {
                "text": visible(text),
                "nats": float(nats[here].sum()),
                "nats_without": float(without[here].sum()),
            }
        )
        start = stop
    return out


def samples(run: Run, corpus: Corpus) -> list[dict[str, str]]:
    """Two texts from the prior, and one that goes on from held-out text; by the run's seed.

    Returns:
        Of each `kind` (`prior` or `prompt`), `prompt` and `text`.
    """
    kwargs: dict[str, Any] = {"svi": run.svi, "seed": run.config.seed}
    texts = generate(run.model, corpus.tokenizer, n=2, **kwargs)
    out = [{"kind": "prior", "prompt": "", "text": text} for text in texts]
    batch = getattr(corpus, corpus.held_out()).batch([0])
    given = batch.observed[0, : max(1, corpus.seq_len // PROMPT_SHARE)].tolist()
    prompt = corpus.tokenizer.decode(given).replace(_UNKNOWN, "")
    if prompt:
        [text] = generate(run.model, corpus.tokenizer, prompt=prompt, n=1, **kwargs)
        out.append({"kind": "prompt", "prompt": prompt, "text": text})
    return out
