"""The model card of a run: what it is, how it scores, and when not to use it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ltm_pyro.diagnostics.estimates import BOUNDS
from ltm_pyro.errors import InputError, shown
from ltm_pyro.reading import damaged, read_json
from ltm_pyro.report.building import recorded_comparison
from ltm_pyro.report.checks import NOT_MADE, checks_made
from ltm_pyro.run.folder import Run
from ltm_pyro.run.hub import checked_name

_HEAD = """\
---
library_name: ltm-pyro
pipeline_tag: text-generation
tags:
- latent-variable-model
- variational-inference
- bayesian
- pyro
---
"""
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
_USE = """\
```python
import ltm_pyro as ltm

run = ltm.from_pretrained("OWNER/NAME")
print(ltm.generate(run.model, run.tokenizer, n=2, svi=run.svi))
post = run.svi.infer(["a text of your own"])
```

Loading reads JSON and safetensors, whose checksums are compared; nothing is executed."""
_ALWAYS_NOT = (
    "For facts, advice or conversation: it writes text that looks like its corpus.",
    "To compare perplexities across corpora or units: every score here is of this corpus's "
    "held-out documents, per unit of the text as stated.",
    "As evidence on training recipes: one fit shows what one training came to.",
    "Thoughts of text unlike the corpus are extrapolations, and q's intervals do not say so.",
)


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
    try:
        parts = [
            _HEAD + f"\n# {_plain(run.folder.resolve().name)}",
            _about(run),
            "## Use\n\n" + _USE.replace("OWNER/NAME", repo_id),
            "## Model and fit\n\n" + _table(("setting", "value"), _settings(run).items()),
            "## Data\n\n" + _data(run.facts["corpus"]),
            "## Scores\n\n" + _scores(scores, run),
            "## Checks\n\n" + _checks(run, scores),
            "## When not to use it\n\n" + _bullets(_not_for(run, scores)),
        ]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(run.label, f"its scores or facts are incomplete ({shown(error)})") from None
    return "\n\n".join(parts) + "\n"


def _about(run: Run) -> str:
    weights = sum(p.numel() for p in run.model.parameters())
    thoughts, dim = run.model.thought_shape
    return (
        "A latent-thought language model ([Kong et al., 2025](https://arxiv.org/abs/2502.01567)) "
        f"of {weights / 1e6:.2f} M weights, with {thoughts} thought vectors of {dim} dimensions "
        "per sequence, fitted by dual-rate variational Bayes with "
        f"ltm_pyro {_plain(run.facts['version'])}."
    )


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


def _data(corpus: Mapping[str, Any]) -> str:
    """The data card: what was read, how it was split, and what the splits share."""
    card = corpus.get("card") or {}
    facts = {
        "name": corpus["name"],
        "SHA-256 of the text": corpus["sha256"],
        "bytes": f"{corpus['n_bytes']:,}",
        "tokens": f"{corpus['n_tokens']:,}",
        "tokenizer": f"{corpus['tokenizer']}, {corpus['vocab_size']:,} kinds of tokens",
    }
    for name, split in corpus["splits"].items():
        facts[name] = f"{split['documents']:,} documents, {split['sequences']:,} sequences"
    if card.get("repeats"):
        facts["documents that repeat another"] = (
            f"{card['repeats']['exact']} exactly, {card['repeats']['near']} nearly"
        )
        overlap = card["overlap"]
        for name in ("val_in_train", "test_in_train"):
            if overlap.get(name) is not None:
                what = f"{overlap['n']}-grams of words, {name.replace('_', ' ')}"
                facts[what] = f"{overlap[name]:.2%}"
    return "\n\n".join(
        [_table(("fact", "value"), facts.items()), *map(_plain, card.get("warnings", ()))]
    )


def _scores(scores: Mapping[str, Any] | None, run: Run) -> str:
    if scores is None:
        return "The run has not been scored on held-out text."
    unit, control = scores["unit"], scores["control"]
    rows = []
    for name, what in _DEFINITIONS.items():
        if scores.get(name) is not None:
            mine = f"{_number(scores[name])} ± {_number(scores.get(f'{name}_sampling_se'))}"
            other = "-" if control is None or name not in BOUNDS else _number(control[name])
            told = what.format(unit=_plain(unit), draws=int(scores["draws"]))
            per = f" per {_plain(unit)}" if name.startswith("ppl") else ""
            rows.append((f"`{name}`{per}", mine, other, told))
    head = ("score", "model", "control", "definition")
    lines = [
        f"{int(scores['n_sequences'])} {_plain(scores['split'])} sequences of "
        f"{int(scores['n_documents'])} documents, after step {int(scores['step'])}. The error is "
        "of having sampled these documents: "
        "two on either side hold 95 %. Control: the same decoder without thoughts, trained apart, "
        f"whose perplexity is exact. Mode {_plain(scores['mode'])}: "
        f"{_plain(scores['mode_meaning'])}.",
        _rows(head, rows),
    ]
    for name, pair in (scores["against_control"] or {}).items():
        lines.append(
            f"Model / control, paired, {_plain(name)}: {_number(pair['ratio'])} ± "
            f"{_number(pair['ratio_error'])}: {_plain(pair['verdict'])}."
        )
    if scores["step"] != run.svi.slow_step:
        lines.append(f"These scores are of step {int(scores['step'])}, not of these weights.")
    return "\n\n".join(lines)


def _checks(run: Run, scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "None were made: the run has not been scored."
    comparison = recorded_comparison(run.folder)
    found = checks_made(run, dict(scores), recorded=None, comparison=comparison, seeds=1)
    known = [c for c in found if c["name"] not in _OF_A_PAGE]
    made = [c for c in known if c["state"] != NOT_MADE]
    left = [c for c in known if c["state"] == NOT_MADE]
    return "\n\n".join(
        [
            "Made:\n\n"
            + _bullets(f"{c['name']}: **{c['state']}**, {_plain(c['found'])}" for c in made),
            "Not made:\n\n" + _bullets(f"{c['name']} ({_plain(c['remedy'])})" for c in left),
        ]
    )


def _not_for(run: Run, scores: Mapping[str, Any] | None) -> list[str]:
    out = list(_ALWAYS_NOT)
    done, steps = run.svi.slow_step, run.last_step
    if done < steps:
        out.append(f"For anything: the fit stands at step {done} of {steps}.")
    if scores is None:
        out.append("Where quality matters: nothing is known of its scores.")
        return out
    panel = scores["collapse"] or {}
    if panel.get("penalty_shuffled") is not None and not panel["uses_thoughts"]:
        out.append("For its thoughts: another document's serve the decoder as well.")
    if scores["khat"]["share_above_limit"] is None:
        out.append(
            "As an estimate of the evidence: importance weights were not judged, take bounds as "
            "bounds."
        )
    return out


def _plain(text: object, longest: int = 120) -> str:
    """Text of others in Markdown: in one line, short, and nothing that a page would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= longest else f"{line[: longest - 3]}..."
    return re.sub(r"([\\`*_{}\[\]()#|!~])", r"\\\1", html.escape(line, quote=False))


def _table(head: Sequence[str], rows: Iterable[tuple[str, object]]) -> str:
    return _rows(head, [(_plain(name), _plain(value)) for name, value in rows])


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{float(value):.4f}"
