"""`ltm-pyro export`: posteriors and scores as ArviZ reads them."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from ltm_pyro.cli.options import add_run, add_scoring, open_run, writing_to
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import InputError
from ltm_pyro.reading import as_path

_DESCRIPTION = """\
Infer the posteriors of held-out sequences, score them, and write both with what
led to them as a NetCDF file in ArviZ's schema.
"""
_EXAMPLES = """\
ltm-pyro export runs/demo                          runs/demo/posterior.nc
ltm-pyro export runs/demo --split test --out test.nc
python -c "import xarray; print(xarray.open_datatree('runs/demo/posterior.nc'))"
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro export`; returns the exit status."""
    parser = Parser("export", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.add_argument("--out", type=str, help="the file (default: RUN/posterior.nc)")
    add_scoring(parser)
    options = parser.parse_args(arguments)
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}: must be 0 or more")

    from ltm_pyro.cli.artefacts import POSTERIOR
    from ltm_pyro.cli.printing import printable
    from ltm_pyro.run.files import refuse_irregular, refuse_protected
    from ltm_pyro.run.lock import sole_writer

    folder = as_path("run folder", options.run)
    target = folder / POSTERIOR if options.out is None else as_path("out", options.out)
    inside = target.parent.resolve() == folder.resolve()
    if not inside:
        refuse_protected(target.parent)
    refuse_irregular(target)
    with writing_to(options.run) if inside else sole_writer(target):
        _export(options, target)
    print(f"wrote {printable(str(target))}")
    return 0


def _export(options: Namespace, target: Path) -> None:
    from ltm_pyro.cli.artefacts import write_posterior
    from ltm_pyro.run.scoring import score_run

    fitted = open_run(options.run, options.device)
    held_out = score_run(
        fitted,
        fitted.corpus(),
        split=options.split,
        sequences=options.sequences,
        draws=options.draws,
        seed=options.seed,
    )
    write_posterior(target, fitted, held_out)
