"""`ltm-pyro report`: a page that says what a run has come to."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from ltm_pyro.cli.options import add_run, add_scoring, open_run, scoring, writing_file
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import InputError, printable
from ltm_pyro.reading import as_path

_DESCRIPTION = """\
Write one self-contained page on a run: do thoughts help, by how much and how sure;
what it is, what it was fitted to, and how; its held-out scores in every mode beside
the control; how far to trust them; pictures, samples, and the checks that were made
and not made. Its numbers are written beside it as JSON.

A k-hat takes 1,000 draws (--draws 1000); with fewer it is not judged.
"""
_EXAMPLES = """\
ltm-pyro report runs/demo                          runs/demo/report.html and .json
ltm-pyro report runs/demo --draws 1000
ltm-pyro report runs/a --against runs/b runs/c --out a.html
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro report`; returns the exit status."""
    parser = Parser("report", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.option(
        "against", str, "other runs to set it against", nargs="+", default=[], metavar="RUN"
    )
    parser.option("out", str, "the page (default: RUN/report.html)")
    add_scoring(parser)
    options = parser.parse_args(arguments)

    from ltm_pyro.report.building import PAGE

    folder = as_path("run folder", options.run)
    target = folder / PAGE if options.out is None else as_path("out", options.out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"out is {printable(str(target))!r}: must end in .html")
    with writing_file(options.run, target):
        _report(options, target)
    print(f"wrote {printable(str(target))} and {printable(target.with_suffix('.json').name)}")
    return 0


def _report(options: Namespace, target: Path) -> None:
    from ltm_pyro.report import make_report, write_report

    fitted = open_run(options.run, options.device, options.checkpoint)
    others = [open_run(each, options.device) for each in options.against]
    report = make_report(fitted, fitted.corpus(), against=others, **scoring(options))
    if fitted.parallel.is_rank_0:
        write_report(report, target)
