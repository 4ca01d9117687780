"""`ltm-pyro compare`: several runs on their held-out text, or guide families on that of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ltm_pyro.checks import one_of
from ltm_pyro.cli import yaml_text
from ltm_pyro.cli.options import add_device, add_scoring, open_run, scoring, writing_to
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import InputError, printable, shown
from ltm_pyro.reading import as_path

if TYPE_CHECKING:
    from ltm_pyro.diagnostics.compare import Comparison

_DESCRIPTION = """\
Two or more run folders, or a folder of them such as fit --sweep leaves: score the
runs on the same held-out text, and tell in one table which settings differ and what
the errors allow: paired differences of bounds with errors clustered by document, and
the error of training where runs differ in their seed alone. Options: --per, --csv,
--figure and those of the scores.

One run folder: fit several guide families to the same held-out sequences of a run, its decoder
fixed, each at the same cost in decoder evaluations, and tell what the errors
allow: which posterior is closer, by how much, and how far to trust it.

That writes comparison.csv (one row per guide), comparison.nc (every sequence) and
comparison.png into the run folder.
"""
LONGEST = 200
"""Characters of an option's value."""
_OF_ONE = ("guides", "reference", "reference_draws", "subset", "budget", "restarts", "no_gaps")
_OF_SEVERAL = ("per", "csv", "figure")

_EXAMPLES = """\
ltm-pyro compare runs/first runs/second --csv table.csv --figure table.png
ltm-pyro compare runs/sweep --per byte
ltm-pyro compare runs/demo --guides mean_field,low_rank,full_rank
ltm-pyro compare runs/demo --guides mean_field,low_rank:rank=4,flow --reference hmc
ltm-pyro compare runs/demo --guides amortized,semi_amortized --budget 256 --restarts 5
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro compare`; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    several = len(options.run) > 1 or _holds_runs(options.run[0])
    for name in _OF_ONE if several else _OF_SEVERAL:
        if options[name] != parser.get_default(name):
            whose = "one run, and several are" if several else "several runs, and one is"
            raise InputError(f"--{name} is for {whose} given: leave it out")
    if several:
        return _compare_runs(options)
    [options.run] = options.run
    options.split = options.split or "val"
    guides = parse_guides(options.guides)

    from ltm_pyro.data.split import SPLITS
    from ltm_pyro.run.scoring import json_value

    one_of("split", options.split, SPLITS)
    with writing_to(options.run):
        comparison, files = _compare(options, guides)
    if options.json:
        print(json.dumps(json_value(comparison.as_dict()), allow_nan=False))
    else:
        print(f"{comparison}\n\n{files}")
    return 130 if comparison.interrupted else 0


def _holds_runs(folder: str) -> bool:
    """Whether `folder` is none of a run, but of several."""
    place = as_path("run folder", folder)
    return not (place / "config.json").exists() and any(place.glob("*/config.json"))


def _compare_runs(options: Namespace) -> int:
    """Several runs: one table, and the files that were asked for."""
    from ltm_pyro import plots
    from ltm_pyro.run import compare_runs
    from ltm_pyro.run.files import refuse_irregular, write_atomic
    from ltm_pyro.run.scoring import json_value

    for name in ("csv", "figure"):  # before the work
        if options[name] is not None:
            refuse_irregular(as_path(name, options[name]))
    asked = {**scoring(options), "per": options.per, "device": options.device}
    found = compare_runs(options.run, **asked, progress=sys.stderr.isatty())
    if options.csv is not None:
        write_atomic(Path(options.csv), found.frame().to_csv().encode())
    if options.figure is not None:
        plots.save_figure(found.plot(), options.figure)
    print(json.dumps(json_value(found.as_dict()), allow_nan=False) if options.json else found)
    return 0


def _compare(options: Namespace, guides: Mapping[str, dict[str, Any]]) -> tuple[Comparison, str]:
    """The comparison, and a line on each file that it was written to."""
    from ltm_pyro.diagnostics.compare import compare
    from ltm_pyro.diagnostics.held_out import spread
    from ltm_pyro.inference.objectives import build_objective

    fitted = open_run(options.run, options.device)
    corpus, config = fitted.corpus(), fitted.config
    count = config.eval_sequences if options.sequences is None else options.sequences
    # The run's own encoder or flow has been trained; another of its family would start anew.
    own = fitted.guide if fitted.guide.shared_parameters() else None
    batch = spread(getattr(corpus, options.split), count)
    comparison = compare(
        fitted.model,
        batch,
        [own if own is not None and name == own.family else name for name in guides],
        options={name: given for name, given in guides.items() if given},
        budget=config.eval_fast_steps if options.budget is None else options.budget,
        draws=config.eval_draws if options.draws is None else options.draws,
        fast=config.fast,
        elbo=build_objective(config.objective, **config.objective_options),
        train=corpus.train,
        restarts=options.restarts,
        reference=options.reference,
        subset=min(options.subset, len(batch)),
        reference_options={"warmup": options.reference_draws, "draws": options.reference_draws},
        compile_reference=config.compile,
        gaps=not options.no_gaps,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    return comparison, _write(fitted.folder, comparison)


def parse_guides(text: str) -> dict[str, dict[str, Any]]:
    """Families with their options: `low_rank:rank=4:init_log_variance=-1,flow` by family."""
    out: dict[str, dict[str, Any]] = {}
    for part in text.split(","):
        name, *options = (piece.strip() for piece in part.split(":"))
        if not name:
            raise InputError(
                f"guides is {shown(text)}: write families like mean_field,low_rank:rank=4"
            )
        if name in out:
            raise InputError(f"guide {shown(name)} is named twice: give each once")
        out[name] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not (key and equals and value):
                raise InputError(
                    f"guides has {shown(option)}, no option of {shown(name)}: write it as rank=4"
                )
            if key in out[name]:
                raise InputError(f"guides gives {shown(key)} of {shown(name)} twice: give it once")
            out[name][key] = _scalar(key, value)
    return out


def _scalar(key: str, text: str) -> str | int | float | bool | None:
    """One YAML scalar: options of families are numbers, words and truth values.

    Anything else is refused, e.g. `[`, `{a: b}`, `&x`, `!!python/name:os`, a date.
    """
    # An anchor, a tag or a remark would be lost, and the parser takes minutes for many brackets.
    plain = len(text) <= LONGEST and not text.lstrip().startswith(("&", "!", "#"))
    with suppress(InputError):
        value = yaml_text.load(text, key) if plain else []
        if value is None or isinstance(value, str | int | float):
            return value
    raise InputError(
        f"guides gives {shown(key)} as {shown(text)}: must be a number, a word, true or false"
    )


def _parser() -> Parser:
    parser = Parser("compare", "RUN [RUN ...] [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", type=str, nargs="+", metavar="RUN", help="run folders")
    add_device(parser)
    parser.option("per", str, "token, byte or word, for several runs")
    parser.option("csv", str, "where to write the table of several runs")
    parser.option("figure", str, "where to draw several runs, as a PNG")
    parser.option(
        "guides",
        str,
        "families, the first is the baseline; options as low_rank:rank=4",
        default="mean_field,low_rank,full_rank",
    )
    parser.option("reference", str, "hmc or mala: posterior draws to hold q against")
    parser.option("reference_draws", int, "draws per chain, after as many of warmup", default=100)
    parser.option(
        "subset",
        int,
        "sequences for the costly parts: the reference, and the fits of twice the length",
        default=4,
    )
    parser.option(
        "budget",
        int,
        "decoder evaluations per sequence for each guide (default: the run's eval_fast_steps)",
    )
    parser.option(
        "restarts",
        int,
        "independent fits of each family with shared parameters, to judge the family",
        default=1,
    )
    parser.switch(
        "no-gaps", "leave out the second fits, twice as long, that tell the truncation gap"
    )
    add_scoring(parser, split=None)
    parser.switch("json", "print one JSON object")
    return parser


def _write(folder: Path, comparison: Comparison) -> str:
    """Writes table, Dataset and figure; returns a line on each."""
    import xarray as xr

    from ltm_pyro import plots
    from ltm_pyro.export import save_datatree
    from ltm_pyro.run.files import write_atomic

    # The largest first: a disk that is full refuses it before anything has changed.
    figure = plots.guide_comparison(comparison)
    save_datatree(xr.DataTree(dataset=comparison.dataset), folder / "comparison.nc")
    plots.save_figure(figure, folder / "comparison.png")
    write_atomic(folder / "comparison.csv", comparison.frame.to_csv().encode())
    place = printable(str(folder))
    return "\n".join(f"wrote {place}/comparison.{kind}" for kind in ("csv", "nc", "png"))
