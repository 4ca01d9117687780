"""Text for a page: tokens with their surprise, samples, and nothing that a browser obeys."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import xarray as xr

from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.diagnostics.decomposition import token_surprise
from ltm_pyro.random import Stream, derive_seed
from ltm_pyro.run.folder import Run
from ltm_pyro.run.scoring import HeldOut
from ltm_pyro.tasks.generation import generate

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
    control = None if held_out.control is None else run.control().model
    found = token_surprise(
        run.model, held_out.post[some.ids.tolist()], some, control=control, draws=_DRAWS, seed=seed
    )
    return [_one(run.tokenizer, some, found, row) for row in range(len(rows))]


def _one(tokenizer: Tokenizer, batch: Batch, found: xr.Dataset, row: int) -> dict[str, Any]:
    """The first tokens of one sequence."""
    ids = batch.observed[row][batch.mask[row]][:_TOKENS].cpu().numpy()
    nats, without = (
        found[name].values[row][batch.mask[row].cpu()][:_TOKENS] for name in ("nll", "nll_without")
    )
    return {
        "sequence": int(batch.ids[row]),
        "without": found.attrs["without"],
        "nats": float(nats.sum()),
        "nats_without": float(without.sum()),
        "pieces": _pieces(tokenizer, ids, nats, without),
    }


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
