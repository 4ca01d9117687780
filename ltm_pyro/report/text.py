"""Text for a page: tokens with their surprise, samples, and nothing that a browser obeys."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np

from ltm_pyro.data.base import Corpus
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
_HARMLESS = "\n\t\u200c\u200d"  # the last two join parts of words and of emoji


def visible(text: str) -> str:
    """`text` with what would act in a browser or terminal shown by its number."""
    left, right = "\N{MATHEMATICAL LEFT ANGLE BRACKET}", "\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    return "".join(
        f"{left}U+{ord(c):04X}{right}"
        if unicodedata.category(c) in _ACTIVE and c not in _HARMLESS
        else c
        for c in text
    )


def surprise(held_out: HeldOut, run: Run, seed: int) -> list[dict[str, Any]]:
    """Surprise of each token of some sequences of mode `oracle`, with thoughts and without any.

    By sequence, which the seed chooses: `sequence` (its id), `without` (what stands for no
    thoughts), `nats` and `nats_without` of all its tokens shown, and `pieces`, each with `text`
    (one character, or one token), `nats` = E_q[-log p(token | before, z)] and `nats_without`.
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
    out = []
    for row, mask in enumerate(some.mask.cpu()):
        ids = some.observed[row].cpu()[mask][:_TOKENS].numpy()
        nats, without = (found[n].values[row][mask][:_TOKENS] for n in ("nll", "nll_without"))
        out.append(
            {
                "sequence": int(some.ids[row]),
                "without": found.attrs["without"],
                "nats": float(nats.sum()),
                "nats_without": float(without.sum()),
                "pieces": _pieces(run.tokenizer, ids, nats, without),
            }
        )
    return out


def _pieces(tokenizer: Tokenizer, ids: Any, nats: Any, without: Any) -> list[dict[str, Any]]:
    """Tokens as text; those that make one character only together are one piece."""
    out: list[dict[str, Any]] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:stop])
        if _UNKNOWN in text and stop - start < _BYTES and stop < len(ids):
            continue
        told = {"nats": nats, "nats_without": without}
        sums = {name: float(values[start:stop].sum()) for name, values in told.items()}
        out.append({"text": visible(text), **sums})
        start = stop
    return out


def samples(run: Run, corpus: Corpus) -> list[dict[str, str]]:
    """Two texts of `kind` `prior`, and one that goes on from a held-out `prompt`, by the seed."""
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
