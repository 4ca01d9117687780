"""What the commands print about a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltm_pyro.config import FitConfig
from ltm_pyro.run import Run

_BOUNDS = (("ppl_elbo", "ELBO"), ("ppl_iw", "importance-weighted bound"))


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


def format_scores(scores: Mapping[str, Any]) -> str:
    """The scores of `ltm_pyro.run.scoring.summary` as text, each with its errors and meaning."""
    unit, control = scores["unit"], scores["control"]
    lines = [
        f"Scores of {scores['n_sequences']} {scores['split']} sequences, {scores['n_tokens']} "
        f"{unit}s, mode {scores['mode']}",
        f"  ({scores['mode_meaning']}; {scores['draws']} fresh draws per sequence)",
    ]
    for name, meaning in _BOUNDS:
        lines.append(_score_line("model", name, scores, f"{meaning}, S = {scores['draws']}", unit))
    if control is not None:
        for name, _ in _BOUNDS:
            what = "same decoder, no z: exact, a bound of itself"
            lines.append(_score_line("control", name, control, what, unit))
        ratios = [f"{name} {_ratio(scores[name], control[name])}" for name, _ in _BOUNDS]
        lines.append(f"  model / control: {', '.join(ratios)} (below 1: the thoughts pay)")
    if scores["mode"] == "oracle":
        lines.append(
            f"  model    ppl_reconstruction per {unit} {_number(scores['ppl_reconstruction'])}: "
            "not a bound, the KL is not charged"
        )
        lines.append(_khat_line(scores["khat"]))
    lines.append("  +- sampling: of these sequences for all text; +- MC: of the draws")
    return "\n".join(lines)


def _score_line(who: str, name: str, scores: Mapping[str, Any], what: str, unit: str) -> str:
    return (
        f"  {who:<8} {name:<8} per {unit} {_number(scores[name])}  "
        f"+- {_number(scores[f'{name}_sampling_se'])} sampling  "
        f"+- {_number(scores[f'{name}_se'])} MC  ({what})"
    )


def _khat_line(khat: Mapping[str, Any]) -> str:
    share = khat["share_above_limit"]
    if share is None:
        return "  k-hat    unknown: too few draws to judge the IW bound by"
    verdict = "the IW bound is loose and noisy there" if share else "the IW bound can be relied on"
    return (
        f"  k-hat    median {_number(khat['median'])}, above {khat['limit']} in "
        f"{100 * share:.0f} % of sequences: {verdict}"
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _ratio(value: float | None, other: float | None) -> str:
    return "none" if value is None or other is None else f"{value / other:.3f}"


def format_text(text: str) -> str:
    """A generated text behind a margin, with control characters made visible."""
    return "\n".join(f"  | {line}" for line in printable(text).split("\n"))


def printable(text: str) -> str:
    """`text` without characters that a terminal would act upon: a model may write any byte."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
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
    corpus = config.corpus.name.rstrip("/").rpartition("/")[2].partition(".")[0] or "corpus"
    return f"runs/{config.preset}-{corpus}"
