"""`ltm-pyro export`: posteriors and scores as ArviZ reads them."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from ltm_pyro.checks import one_of
from ltm_pyro.cli.options import add_run, add_scoring, open_run, scoring, writing_file
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.errors import printable
from ltm_pyro.reading import as_path

_DESCRIPTION = """\
Infer the posteriors of held-out sequences, score them, and write both with what
led to them in ArviZ's schema: NetCDF, or a zarr store where the name ends so. With
--embed instead their posterior means and standard deviations as a table, for other
people's classifiers.
"""
_EXAMPLES = """\
ltm-pyro export runs/demo                          runs/demo/posterior.nc
ltm-pyro export runs/demo --split test --out test.nc
ltm-pyro export runs/demo --out posterior.zarr
ltm-pyro export runs/demo --embed                  runs/demo/embedding.csv
python -c "import xarray; print(xarray.open_datatree('runs/demo/posterior.nc'))"
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro export`; returns the exit status."""
    parser = Parser("export", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    add_run(parser)
    parser.option("out", str, "the file (default: RUN/posterior.nc, or RUN/embedding.csv)")
    parser.switch("embed", "means, sds and metadata of each sequence as CSV")
    add_scoring(parser)
    options = parser.parse_args(arguments)

    from ltm_pyro.cli.artefacts import EMBEDDING, POSTERIOR

    folder = as_path("run folder", options.run)
    name = EMBEDDING if options.embed else POSTERIOR
    target = folder / name if options.out is None else as_path("out", options.out)
    with writing_file(options.run, target):
        (_embed if options.embed else _export)(options, target)
    print(f"wrote {printable(str(target))}")
    return 0


def _export(options: Namespace, target: Path) -> None:
    from ltm_pyro.cli.artefacts import write_posterior
    from ltm_pyro.run.scoring import score_run

    fitted = open_run(options.run, options.device, options.checkpoint)
    write_posterior(target, fitted, score_run(fitted, fitted.corpus(), **scoring(options)))


def _embed(options: Namespace, target: Path) -> None:
    from ltm_pyro.data.split import SPLITS
    from ltm_pyro.diagnostics.held_out import spread
    from ltm_pyro.run.files import write_atomic
    from ltm_pyro.tasks.embedding import embed

    one_of("split", options.split, SPLITS)
    fitted = open_run(options.run, options.device, options.checkpoint)
    split = getattr(fitted.corpus(), options.split)
    batch = spread(split, len(split) if options.sequences is None else options.sequences)
    frame = batch.metadata.join(embed(fitted, batch, fitted.config.eval_fast_steps))
    write_atomic(target, frame.to_csv().encode())
