"""The model card of a run: what it is, how it scores, and when not to use it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import UndefinedError

from ltm_pyro.diagnostics.estimates import BOUNDS
from ltm_pyro.errors import InputError, shown
from ltm_pyro.reading import damaged, read_json
from ltm_pyro.report.building import recorded_comparison
from ltm_pyro.report.checks import Check, checks_made
from ltm_pyro.report.page import templates
from ltm_pyro.run.folder import Run
from ltm_pyro.run.hub import checked_name

_DEFINITIONS = {
    "ppl_elbo": "exp(-total ELBO / total {unit}s): an upper bound on the model's perplexity",
    "ppl_iw": "the same of the importance-weighted bound with S = {draws} draws: tighter",
    "bits_per_byte_elbo": "total bits of the ELBO / total bytes of the raw text: of any tokenizer",
    "ppl_reconstruction": "at q's draws, the KL not charged: no bound, not comparable with others",
    "ppl_z0": "with all thoughts set to 0",
    "ppl_shuffled": "with the thoughts of another document",
}
_OF_A_PAGE = ("scores.json says the same", "The checkpoint and the text are those recorded")
"""Checks that take the text and new scores."""


def model_card(run: Run, repo_id: str = "OWNER/NAME") -> str:
    """The run's model card, as Markdown; from what the run folder holds, without network.

    Args:
        run: The run; its scores are those of `scores.json`, which `fit` leaves.
        repo_id: Where it will lie, for the example.

    Raises:
        InputError: if the folder's files are damaged.
    """
    checked_name(repo_id)
    path = run.folder / "scores.json"
    scores = read_json(path, run.label) if path.exists() else None
    environment = templates(autoescape=False)
    environment.filters |= {"plain": _plain, "plain_rows": _plain_rows, "number": _number}
    thoughts, dim = run.model.thought_shape
    try:
        text = environment.get_template("model_card.md.j2").render(
            name=run.folder.resolve().name,
            repo_id=repo_id,
            weights=sum(p.numel() for p in run.model.parameters()),
            thoughts=thoughts,
            dim=dim,
            version=run.facts["version"],
            settings=_settings(run).items(),
            data=_data(run.facts["corpus"]).items(),
            warnings=(run.facts["corpus"].get("card") or {}).get("warnings", ()),
            scores=scores,
            score_rows=[] if scores is None else _score_rows(scores),
            step=run.svi.slow_step,
            steps=run.last_step,
            checks=[] if scores is None else _checks(run, scores),
        )
    except (LookupError, TypeError, AttributeError, ValueError, UndefinedError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(run.label, f"its scores or facts are incomplete ({shown(error)})") from None
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _settings(run: Run) -> dict[str, object]:
    config, versions = run.config, run.facts["versions"]
    return {
        "prior": config.model.prior,
        "decoder": f"{config.model.n_layers} layers of width {config.model.width}, window "
        f"{config.model.window}",
        "sequence length": f"{config.model.seq_len} {run.tokenizer.unit}s",
        "posterior family": f"{config.guide} {config.guide_options or ''}",
        "objective": f"{config.objective} {config.objective_options or ''}",
        "fast clock": f"{config.fast.steps} steps, rate {config.fast.lr:g}",
        "slow clock": f"{run.svi.slow_step} of {config.steps} steps of {config.batch_size} "
        f"sequences, rate {config.slow.lr:g}",
        "seed": config.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _data(corpus: Mapping[str, Any]) -> dict[str, object]:
    """The data card: what was read, how it was split, and what the splits share."""
    card = corpus.get("card") or {}
    facts: dict[str, object] = {
        "name": corpus["name"],
        "SHA-256 of the text": corpus["sha256"],
        "bytes": f"{corpus['n_bytes']:,}",
        "tokens": f"{corpus['n_tokens']:,}",
        "tokenizer": f"{corpus['tokenizer']}, {corpus['vocab_size']:,} kinds of tokens",
    }
    for name, split in corpus["splits"].items():
        facts[name] = f"{split['documents']:,} documents, {split['sequences']:,} sequences"
    if repeats := card.get("repeats"):
        facts["documents that repeat another"] = (
            f"{repeats['exact']} exactly, {repeats['near']} nearly"
        )
        overlap = card["overlap"]
        for name in ("val_in_train", "test_in_train"):
            if overlap.get(name) is not None:
                what = f"{overlap['n']}-grams of words, {name.replace('_', ' ')}"
                facts[what] = f"{overlap[name]:.2%}"
    return facts


def _score_rows(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Each score with its error, the control's, and its definition."""
    unit, control = _plain(scores["unit"]), scores["control"]
    rows: list[tuple[str, ...]] = []
    for name, what in _DEFINITIONS.items():
        if scores.get(name) is not None:
            mine = f"{_number(scores[name])} ± {_number(scores.get(f'{name}_sampling_se'))}"
            other = "-" if control is None or name not in BOUNDS else _number(control[name])
            per = f" per {unit}" if name.startswith("ppl") else ""
            told = what.format(unit=unit, draws=int(scores["draws"]))
            rows.append((f"`{name}`{per}", mine, other, told))
    return rows


def _checks(run: Run, scores: Mapping[str, Any]) -> list[Check]:
    comparison = recorded_comparison(run.folder)
    found = checks_made(run, dict(scores), recorded=None, comparison=comparison, seeds=1)
    return [check for check in found if check["name"] not in _OF_A_PAGE]


def _plain(text: object, longest: int = 120) -> str:
    """Text of others in Markdown: in one line, short, and nothing that a page would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= longest else f"{line[: longest - 3]}..."
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(line, quote=False))


def _plain_rows(rows: Iterable[Iterable[object]]) -> list[list[str]]:
    return [[_plain(cell) for cell in row] for row in rows]


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{float(value):.4f}"
