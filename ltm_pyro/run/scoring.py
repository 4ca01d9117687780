"""Scores of a run on held-out text, beside those of its control."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from ltm_pyro.checks import one_of, whole_number
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.corpus import load_corpus
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.data.split import SPLITS
from ltm_pyro.diagnostics.bounds import Mode, evaluate
from ltm_pyro.diagnostics.collapse import CollapsePanel, collapse_panel
from ltm_pyro.diagnostics.control import against_control
from ltm_pyro.diagnostics.estimates import COMPARED, PERPLEXITIES
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.diagnostics.psis import judged_in_words
from ltm_pyro.diagnostics.published import as_published
from ltm_pyro.diagnostics.units import UNITS, score_table
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.run.folder import Run

_CONTROL_DRAWS = 2
"""The control ignores z, so every draw gives its exact log-likelihood."""


@dataclass(frozen=True)
class HeldOut:
    """Scores of the same held-out sequences by a run's model and by its control.

    Attributes:
        split: `val` or `test`.
        batch: The sequences.
        post: q, fitted to them (mode `oracle`) or to their first part (`prefix`).
        again: In mode `oracle`, the same with other noise: what both tell apart is no accident of
            the fast loop.
        scores: From `evaluate`.
        control: From `evaluate`, exact; `None` where the run has no finished control.
        corpus: Name of another corpus than the run's, which no step of the fit has seen.
    """

    split: str
    batch: Batch
    post: Posterior | None
    again: Posterior | None
    scores: xr.Dataset
    control: xr.Dataset | None
    corpus: str | None = None

    def panel(self, n_layers: int) -> CollapsePanel | None:
        """The collapse panel; `None` in other modes than `oracle`, and for one sequence."""
        if self.post is None or self.scores.attrs["mode"] != "oracle" or len(self.batch) < 2:
            return None
        return collapse_panel(self.post, self.scores, n_layers=n_layers, again=self.again)


@door
def score_run(
    run: Run,
    corpus: Corpus | str,
    *,
    split: str | None = None,
    mode: Mode = "oracle",
    prefix: int | None = None,
    sequences: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    per_token: bool = False,
) -> HeldOut:
    """Infers q for held-out sequences, in `eval_fast_steps` steps, and scores it on fresh draws.

    Args:
        run: The run.
        corpus: Its corpus; or another one, which is scored as it comes (zero-shot): loaded with
            `tokenizer=run.tokenizer`, or what `load_corpus` takes by name.
        split: `val` or `test`; `train` shows the fit, not the generalisation. Of another corpus
            also `all`, its default.
        mode: As in `evaluate`.
        prefix: In mode `prefix`, the tokens that q sees; half a sequence by default. Sequences that
            are no longer than that are left out, as in `evaluate`.
        sequences: How many, drawn over the split's documents; by default the run's
            `eval_sequences`.
        draws: S; the run's `eval_draws` by default.
        seed: Of the draws.
        per_token: As in `evaluate`.

    Raises:
        InputError: if an argument is out of range.
    """
    corpus = other_corpus(run, corpus) if isinstance(corpus, str) else corpus
    foreign = corpus.sha256 != run.facts["corpus"]["sha256"]
    split = split or ("all" if foreign else "val")
    if not (foreign and split == "all"):
        one_of("split", split, SPLITS)
    if prefix is not None and mode != "prefix":
        raise InputError(f"a prefix is for mode 'prefix', not {mode!r}: leave one of the two out")
    sequences = run.config.eval_sequences if sequences is None else sequences
    draws = run.config.eval_draws if draws is None else draws
    batch = spread(sequences_of(corpus, split), sequences).to(run.model.device)
    fast_steps = run.config.eval_fast_steps
    post = again = None
    if mode == "prefix":
        prefix = corpus.seq_len // 2 if prefix is None else prefix
        whole_number("prefix", prefix, 1, corpus.seq_len - 1)
        longest = int(batch.n_tokens.max())
        if prefix >= longest:
            raise InputError(
                f"prefix of {prefix} tokens: the longest held-out sequence has {longest}; choose "
                "fewer"
            )
        post = run.svi.infer(batch.prefix(prefix), fast_steps)
    elif mode == "oracle":
        post = run.svi.infer(batch, fast_steps)
        again = run.svi.infer(batch, fast_steps, seed=run.svi.seed + 1)
    scores = evaluate(
        run.model, post, batch, draws, mode=mode, seed=seed, per_token=per_token,
        parallel=run.parallel,
    )  # fmt: skip
    scored = batch
    if mode == "prefix" and prefix is not None:
        scored = batch.suffix(prefix)
        scored = scored.select(torch.nonzero(scored.mask.any(1))[:, 0])
    name = corpus.name if foreign else None
    return HeldOut(split, batch, post, again, scores, control_scores(run, scored), name)


def other_corpus(run: Run, name: str, **options: Any) -> Corpus:
    """Another corpus, as `load_corpus` takes it, in the run's tokens and sequence length."""
    length = run.config.model.seq_len
    return load_corpus(name, seq_len=length, tokenizer=run.tokenizer, **options)


def sequences_of(corpus: Corpus, split: str) -> SequenceSet:
    """A split of a corpus, or `all` of it."""
    if split == "all":
        return corpus.train.with_others(corpus.val, corpus.test)
    return getattr(corpus, split)


@door
def published_table(
    run: Run,
    corpus: Corpus,
    *,
    split: str = "val",
    sequences: int | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What the published procedure would print of held-out text; arguments as in `score_run`.

    Returns:
        The table of `diagnostics.published.as_published`: the published loop takes the run's own
        T_fast, the last row its `eval_fast_steps`.
    """
    one_of("split", split, SPLITS)
    sequences = run.config.eval_sequences if sequences is None else sequences
    draws = run.config.eval_draws if draws is None else draws
    batch = spread(getattr(corpus, split), sequences)
    return as_published(run.svi, batch, steps=run.config.eval_fast_steps, draws=draws, seed=seed)


def control_scores(run: Run, batch: Batch) -> xr.Dataset | None:
    """The control's exact scores, `None` where it was not trained to the end."""
    if not run.config.control:
        return None
    fit = run.control()
    if fit.slow_step < run.last_step:
        return None
    return evaluate(fit.model, None, batch, _CONTROL_DRAWS, mode="prior", parallel=run.parallel)


def summary(run: Run, held_out: HeldOut) -> dict[str, Any]:
    """The scores of all sequences together, as JSON types.

    Returns:
        `run`, `step`, `split`, `zero_shot` (the name of a corpus that the run was not fitted to;
        `None` of its own) and the attributes of `evaluate`; `unit` of the tokens; means over
        sequences of its columns under `nats_per_sequence`; `khat`; under `control` the
        perplexities of the decoder without thoughts, whose likelihood is exact, so that by every
        name they are that same number; under `against_control` the paired comparison of
        `control.against_control`; under `per_unit` the rows of `score_table` per token and,
        where the text is known, per byte and per word, with the control's and the paired
        comparison; and under `collapse` the panel (mode `oracle`).
        What is not finite is `None`.
    """
    scores, control = held_out.scores, held_out.control
    columns = [
        name
        for name, values in scores.data_vars.items()
        if name not in ("khat", "price") and not str(name).startswith("n_") and values.ndim == 1
    ]
    panel = held_out.panel(run.config.model.n_layers)
    out = {
        "run": str(run.folder),
        "step": run.svi.slow_step,
        "split": held_out.split,
        "zero_shot": held_out.corpus,
        "unit": run.tokenizer.unit,
        **scores.attrs,
        "nats_per_sequence": {str(n): float(scores[n].mean()) for n in columns},
        "khat": _khat_summary(scores),
        "control": None if control is None else _control_summary(scores, control),
        "against_control": None if control is None else against_control(scores, control),
        "per_unit": _per_unit(scores, control),
        "collapse": None if panel is None else panel.as_dict(),
    }
    return {name: json_value(value) for name, value in out.items()}


def _per_unit(scores: xr.Dataset, control: xr.Dataset | None) -> dict[str, dict[str, Any]]:
    """Scores, control and their comparison by each unit that the sequences are counted in."""
    out: dict[str, dict[str, Any]] = {}
    for unit in (unit for unit in UNITS if f"n_{unit}s" in scores):
        out[unit] = {"scores": _named(score_table(scores, unit), unit)}
        if control is not None:
            out[unit] |= {
                "control": _named(score_table(control, unit), unit)["nll_z0"],
                "against_control": against_control(scores, control, unit),
            }
    return out


def _named(table: pd.DataFrame, unit: str) -> dict[str, dict[str, Any]]:
    """The rows of `score_table`, each perplexity under the name of what it is of."""
    names = {column: name for name, (column, _) in PERPLEXITIES.items()}
    plain = f"ppl_per_{unit}"
    return {
        str(score): {
            str(k) if k != plain else f"{names[str(score)]}_per_{unit}": v for k, v in row.items()
        }
        for score, row in table.to_dict("index").items()
    }


def _khat_summary(scores: xr.Dataset) -> dict[str, Any]:
    """How far the weights can be trusted, at the limit that S draws set; `nan` if not judged."""
    khat, limit = scores["khat"].values, scores.attrs["khat_limit"]
    known = khat[~np.isnan(khat)]
    return {
        "median": float(np.median(known)) if known.size else math.nan,
        "largest": float(np.max(known)) if known.size else math.nan,
        "share_above_limit": float(np.mean(known > limit)) if known.size else math.nan,
        "limit": limit,
        "draws": scores.attrs["draws"],
        "in_words": judged_in_words(khat, scores.attrs["draws"]),
    }


def _control_summary(scores: xr.Dataset, control: xr.Dataset) -> dict[str, Any]:
    exact = {
        f"{name}{ending}": control.attrs[f"ppl_z0{ending}"]
        for name in COMPARED
        if name in scores.attrs
        for ending in ("", "_se", "_sampling_se")
    }
    return {**exact, "nll_per_sequence": float(control["nll_z0"].mean())}


def json_value(value: Any) -> Any:
    """`value` in plain JSON types, with `None` for what is not finite."""
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [json_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def per_sequence_csv(held_out: HeldOut) -> str:
    """The scores per sequence as CSV, with the control's exact `control_nll` where there is one."""
    data = held_out.scores
    if held_out.control is not None:
        data = data.assign(control_nll=held_out.control["nll_z0"])
    named = [name for name in ("sequence", "document") if name in data.coords]
    columns = {str(name): data[name].values.tolist() for name in (*named, *data.data_vars)}
    return pd.DataFrame(columns).to_csv(index=False, na_rep="nan", lineterminator="\n")
