"""What the commands print about a run."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltm_pyro.config import FitConfig
from ltm_pyro.diagnostics.estimates import PERPLEXITIES
from ltm_pyro.diagnostics.held_out import best_step
from ltm_pyro.errors import InputError, printable, shown
from ltm_pyro.run import Run

if TYPE_CHECKING:
    import pandas as pd

_MEANINGS = {
    "ppl_elbo": "ELBO",
    "ppl_iw": "importance-weighted bound",
    "ppl_predictive": "q's prediction of the rest, no bound",
}
_LONG = 1e7  # from here on by its power of ten, as a perplexity of a word may be


def describe_fit(run: Run) -> str:
    """What is fitted to what, in a few lines."""
    config, corpus = run.config, run.facts["corpus"]
    weights = sum(p.numel() for p in run.model.parameters())
    thoughts, dim = run.model.thought_shape
    train = corpus["splits"]["train"]
    return "\n".join(
        [
            f"Model    {config.preset}: {weights / 1e6:.2f} M weights, {thoughts} thoughts of "
            f"{dim} dimensions per sequence, {config.guide} posterior",
            f"Corpus   {printable(corpus['name'])}: {corpus['n_bytes'] / 1e6:.2f} MB, "
            f"{train['sequences']} training sequences of {corpus['seq_len']} "
            f"{corpus['unit']}s (SHA-256 {corpus['sha256'][:12]})",
            f"Fit      {config.steps} slow steps of {config.batch_size} sequences, "
            f"{config.fast.steps} fast steps each, seed {config.seed}",
        ]
    )


def format_published(table: pd.DataFrame) -> str:
    """The table of `diagnostics.published.as_published` as text."""
    lines = [
        "What the published procedure would print of these tokens, each line correcting one thing",
        "on top of those above it; on the right the same q on fresh draws, a valid bound.",
        "",
        f"{'':58}{'printed':>9}  a bound?  {'fresh draws':>17}  KL/sequence",
    ]
    for row in table.itertuples():
        printed = f"{row.ppl_per_token:.3f}".rjust(9)
        fresh = f"{row.ppl_fresh_per_token:.3f} +- {row.ppl_fresh_per_token_se:.3f}".rjust(17)
        bound = "yes" if row.is_bound else "NO"
        lines.append(f"{row.change:58}{printed}  {bound:8}  {fresh}  {row.kl_per_sequence:11.2f}")
    lines += ["", "Perplexities per token; +- is the Monte Carlo error given these sequences."]
    return "\n".join(lines)


def format_scores(scores: Mapping[str, Any], per: str = "token") -> str:
    """The scores of `run.scoring.summary` as text, each with its errors and meaning.

    `per` is `token`, `byte` or `word`; `InputError` where the text, and so its bytes, is not known.
    """
    found = scores["per_unit"].get(per)
    if found is None:
        raise InputError(f"this corpus is no text, so that it has no {per}s: leave --per out")
    unit = scores["unit"] if per == "token" else per
    where = scores["split"]
    if scores["zero_shot"] is not None:
        where = f"zero-shot ({printable(scores['zero_shot'])}, {where})"
    lines = [
        f"Scores of {scores['n_sequences']} {where} sequences {_documents(scores)}, "
        f"{_sizes(scores)}, mode {scores['mode']}",
        f"  ({scores['mode_meaning']}; {scores['draws']} fresh draws per sequence)",
    ]
    names = [name for name in _MEANINGS if name in scores]
    for name in names:
        meaning = f"{_MEANINGS[name]}, S = {scores['draws']}"
        row = found["scores"][PERPLEXITIES[name][0]]
        lines.append(_score_line("model", name, row, row[f"{name}_per_{per}"], meaning, per, unit))
    if "control" in found:
        what = "same decoder, no z, trained apart: exact"
        row = found["control"]
        exact = row[f"ppl_z0_per_{per}"]
        lines += [_score_line("control", n, row, exact, what, per, unit) for n in names]
        lines += _against_control(found["against_control"])
    if scores["mode"] == "oracle":
        reconstruction = found["scores"]["nll_given_z"][f"ppl_reconstruction_per_{per}"]
        lines.append(
            f"  model    ppl_reconstruction per {unit} {_number(reconstruction)}: "
            "not a bound, the KL is not charged"
        )
    lines.append(f"  k-hat    {scores['khat']['in_words']}{_khat_verdict(scores['khat'])}")
    lines.append(
        "  +- sampling: of these documents for all text, two on either side hold 95 %; "
        "+- MC: of the draws"
    )
    if scores.get("note"):
        lines.append(f"  note: {scores['note']}")
    return "\n".join(lines)


def _sizes(scores: Mapping[str, Any]) -> str:
    """How much text was scored, in every unit that is known."""
    sizes = [f"{scores['n_tokens']} {scores['unit']}s"]
    if "n_bytes" in scores:
        sizes += [] if scores["unit"] == "byte" else [f"{scores['n_bytes']} bytes"]
        sizes.append(f"{scores['n_words']} words")
    return ", ".join(sizes)


def format_table(table: pd.DataFrame) -> str:
    """The bounds by group, of `score_table(..., by=...)`."""
    by, per = str(table.index.names[0]), _unit_of(table)
    nats, ppl = f"nats_per_{per}", f"ppl_per_{per}"
    lines = [f"By {printable(by)}, per {per}:"]
    for (_, row), (group, score) in zip(table.iterrows(), table.index, strict=True):
        if score in (PERPLEXITIES[name][0] for name in _MEANINGS):
            name = shown(group, 32).strip("'\"")
            lines.append(
                f"  {name:<32} {score:<14} {_number(row[nats])} nats +- "
                f"{_number(row[f'{nats}_sampling_se'])} sampling +- {_number(row[f'{nats}_se'])} "
                f"MC  = {_number(row[f'bits_per_{per}'])} bits, ppl {_number(row[ppl])}  "
                f"({int(row['n_sequences'])} sequences of {int(row['n_clusters'])} documents)"
            )
    return "\n".join(lines)


def format_positions(table: pd.DataFrame) -> str:
    """The losses of `loss_by_position`."""
    lines = ["Nats per token by position; given z (no bound), and importance-weighted:"]
    for start, row in zip(table.index, table.to_dict("records"), strict=True):
        where = f"{start}" if start == row["until"] else f"{start} to {row['until']}"
        losses = "  ".join(
            f"{_number(row[n])} +- {_number(row[f'{n}_sampling_se'])}"
            for n in ("nats_per_token", "nats_per_token_iw")
        )
        lines.append(f"  {where:<14} {losses}  ({row['n_tokens']} tokens)")
    return "\n".join(lines)


def _unit_of(table: pd.DataFrame) -> str:
    return next(str(name).removeprefix("ppl_per_") for name in table if "ppl_per_" in str(name))


def _documents(scores: Mapping[str, Any]) -> str:
    """From how many documents; pieces of one are no independent evidence."""
    documents = scores["n_documents"]
    if not documents:
        return "(their documents are not known: each is taken for one)"
    return f"of {documents} documents (which count as {scores['effective_documents']:.0f} equal)"


def _against_control(pairs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The paired ratios, each with the verdict that its error allows."""
    lines = []
    for name, pair in pairs.items():
        lines.append(
            f"  model / control, paired: {name:<8} {_number(pair['ratio'], 4)} "
            f"+- {_number(pair['ratio_error'], 4)}: {pair['verdict']}"
        )
    return [*lines, "    (one fit of each; that thoughts pay in training takes several seeds)"]


def _score_line(
    who: str, name: str, row: Mapping[str, Any], ppl: float | None, what: str, per: str, unit: str
) -> str:
    """A perplexity and the row of `score_table` that it is of."""
    errors = [row[f"nats_per_{per}_sampling_se"], row[f"nats_per_{per}_se"]]
    sampling, draws = (None if None in (ppl, error) else ppl * error for error in errors)
    return (
        f"  {who:<8} {name:<8} per {unit} {_number(ppl)}  +- {_number(sampling)} sampling  "
        f"+- {_number(draws)} MC  = {_number(row[f'bits_per_{per}'])} bits  ({what})"
    )


def _khat_verdict(khat: Mapping[str, Any]) -> str:
    share = khat["share_above_limit"]
    if share is None:
        return "; take the MC error of an average over draws for a lower limit"
    return ": loose and noisy there" if share else ": the average over draws can be relied on"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "none"
    return f"{value:.{digits}f}" if abs(value) < _LONG else f"{value:.{digits}e}"


def format_text(text: str) -> str:
    """A generated text behind a margin, with control characters made visible."""
    return "\n".join(f"  | {line}" for line in printable(text).split("\n"))


def stopped_early(run: Run) -> str:
    """That a fit ended before its last step, and how to go on."""
    return (
        f"Stopped early at slow step {run.svi.slow_step}: the held-out bound was highest at step "
        f"{best_step(run.metrics)} (go on with --resume --held_out.patience 0)"
    )


def resume_line(run: Run) -> str:
    """How to go on with a run that has stopped."""
    return f"go on with: ltm-pyro fit --resume --out {shell_quoted(run.folder)}"


def shell_quoted(path: Path) -> str:
    """`path` as a shell takes it, whatever its name holds, without characters that act."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    plain = set(range(32, 127)) - set(b"'\\")
    escaped = (chr(b) if b in plain else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(escaped)}'"


def default_folder(config: FitConfig) -> str:
    """Where a run goes when nothing else is said."""
    corpus = config.corpus.name.rstrip("/").rpartition("/")[2].partition(".")[0]
    corpus = re.sub(r"[*?\[\]]", "", corpus)  # of a pattern, which a shell would take for one again
    return f"runs/{config.preset}-{corpus or 'corpus'}"
