"""`ltm-pyro evaluate`: the scores of a run on held-out text."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ltm_pyro.cli.options import add_run, add_scoring, open_run, scoring
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.cli.processes import many
from ltm_pyro.cli.settings import add_group, expand_shortcuts
from ltm_pyro.cli.stopping import StopSignals
from ltm_pyro.config import CorpusConfig, FitConfig
from ltm_pyro.errors import InputError

_DESCRIPTION = """\
Score a run on held-out text, on draws that inference has not seen: bounds on the
log-likelihood with their errors, the control without thoughts, and whether the
thoughts are used.

Modes: oracle, q saw the sequence, so the score is a bound and the KL is charged;
prefix, q saw the first tokens and its prediction of the rest is scored, which is no
bound; prior, no posterior.

Scores are per token of the run's tokenizer; two tokenizers are compared by --per byte
or --per word (of the raw text). With --by, a table for each document, file, group or
field of the records.

With --corpus a text that the run was not fitted to is scored (zero-shot), all of it,
in the tokens of the run and per byte, beside the same control.

Errors are clustered by document: two on either side hold 95 %. A k-hat takes 1,000
draws; with fewer it is not judged.
"""
_EXAMPLES = """\
ltm-pyro evaluate runs/demo
ltm-pyro evaluate runs/demo --split test --draws 1000
ltm-pyro evaluate runs/demo --mode prefix --prefix 32
ltm-pyro evaluate runs/demo --per word
ltm-pyro evaluate runs/demo --by file --sequences 1000
ltm-pyro evaluate runs/demo --by_position
ltm-pyro evaluate runs/demo --corpus other.txt     zero-shot, in the run's tokens
ltm-pyro evaluate runs/demo --checkpoint best --split test
ltm-pyro evaluate runs/demo --json > scores.json
ltm-pyro evaluate runs/demo --as_published
"""


if TYPE_CHECKING:
    from ltm_pyro.data.base import Corpus
    from ltm_pyro.run import Run
    from ltm_pyro.run.scoring import HeldOut


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro evaluate`; returns the exit status."""
    arguments = expand_shortcuts(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    asked = parser.parse_args(arguments, defaults=False).as_dict().get("corpus", {})
    if asked and not asked.get("name"):
        raise InputError("corpus has settings and no name: say which one, as --corpus book.txt")
    if options.as_published and (options.mode != "oracle" or options.prefix is not None or asked):
        raise InputError(
            "as_published scores the run's own text, which q saw: leave out --mode, --prefix and "
            "--corpus, or --as_published"
        )
    options.per = options.per or ("byte" if asked else "token")
    # See `fit`: with many processes, SIGTERM may mean that another one is gone.
    with StopSignals() if many() else contextlib.nullcontext():
        fitted = open_run(options.run, options.device, options.checkpoint)
        if options.as_published:
            _print_published(fitted, options)
            return 0
        held_out = _scored(fitted, _other(fitted, asked) if asked else fitted.corpus(), options)
    if fitted.parallel.is_rank_0:
        _print_scores(fitted, held_out, options)
    return 0


def _scored(fitted: Run, corpus: Corpus, options: Namespace) -> HeldOut:
    """The scores, after what is asked of them is known to be there."""
    from ltm_pyro.data.split import SPLITS
    from ltm_pyro.diagnostics.units import refuse_unknown
    from ltm_pyro.run.scoring import score_run, sequences_of

    own = corpus.sha256 == fitted.facts["corpus"]["sha256"]
    split = options.split or ("val" if own else "all")
    if split in (*SPLITS, "all") and len(sequences_of(corpus, split)):
        refuse_unknown(sequences_of(corpus, split), options.per, options.by)
    asked = {**scoring(options), "split": split, "mode": options.mode, "prefix": options.prefix}
    return score_run(fitted, corpus, **asked, per_token=options.by_position)


def _print_scores(fitted: Run, held_out: HeldOut, options: Namespace) -> None:
    """Scores, then the tables that were asked for and the panel; or all but that as JSON."""
    from ltm_pyro.cli.printing import format_positions, format_scores, format_table
    from ltm_pyro.diagnostics.collapse import format_panel
    from ltm_pyro.diagnostics.units import loss_by_position, score_table
    from ltm_pyro.run.scoring import json_value, summary

    scores, tables = summary(fitted, held_out), []
    if options.by is not None:
        groups = score_table(held_out.scores, options.per, by=options.by)
        scores["by"] = json_value(groups.reset_index().to_dict("records"))
        tables.append(format_table(groups))
    if options.by_position:
        positions = loss_by_position(held_out.scores, doubling=True)
        scores["by_position"] = json_value(positions.reset_index().to_dict("records"))
        tables.append(format_positions(positions))
    if options.json:
        print(json.dumps(scores, allow_nan=False))
        return
    panel = held_out.panel(fitted.config.model.n_layers)
    tables += [] if panel is None else [format_panel(panel)]
    print("\n\n".join([format_scores(scores, options.per), *tables]))


def _parser() -> Parser:
    parser = Parser("evaluate", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.option("mode", str, "oracle, prefix or prior", default="oracle")
    parser.option("prefix", int, "tokens that q sees in mode prefix (default: half)")
    add_scoring(parser, split=None)
    parser.switch(
        "as_published",
        "what the released procedure would print of this model, corrected step by step",
    )
    parser.option(
        "per", str, "unit of the scores: token, byte or word (default: token, of --corpus byte)"
    )
    parser.option("by", str, "also a table by document, file, group or a field")
    parser.switch("by_position", "also the loss by position in the sequence")
    parser.switch("json", "print one JSON object")
    add_group(parser, "corpus", FitConfig(corpus=CorpusConfig(name="")), ["corpus.tokenizer"])
    return parser


def _print_published(fitted: Run, options: Namespace) -> None:
    """What the released procedure would print of the run's own text."""
    from ltm_pyro.cli.printing import format_published
    from ltm_pyro.run.scoring import published_table

    asked = {**scoring(options), "split": options.split or "val"}
    table = published_table(fitted, fitted.corpus(), **asked)
    if fitted.parallel.is_rank_0:
        rows = {"as_published": table.to_dict("records")}
        print(json.dumps(rows) if options.json else format_published(table))


def _other(fitted: Run, asked: dict[str, Any]) -> Corpus:
    """The corpus that was asked for, in the run's tokens."""
    from ltm_pyro.run.scoring import other_corpus

    name, options = asked.pop("name"), asked.pop("options", {})
    return other_corpus(fitted, name, **asked, **options)
