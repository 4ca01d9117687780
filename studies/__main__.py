"""`python -m studies NAME`: run a study, or go on with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ltm_pyro.errors import InputError
from studies.harness import Study, names


def main(arguments: list[str] | None = None) -> int:
    """Runs one study; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m studies", description="Run a study, or go on with it where it was stopped."
    )
    parser.add_argument("name", help=", ".join(names()))
    parser.add_argument("--smoke", action="store_true", help="a few minutes, to see that it runs")
    parser.add_argument("--data", type=Path, help="folder of the corpora that the study asks for")
    parser.add_argument("--out", type=Path, help="where to write (default: studies/results)")
    parser.add_argument("--row", type=int, help="compute only this row of the table, anew")
    options = parser.parse_args(arguments)
    try:
        study = Study.load(options.name, smoke=options.smoke, data=options.data, out=options.out)
        if options.row is None:
            study.run()
        else:
            print(study.anew(options.row).T.to_string(header=False))
    except InputError as error:
        print(f"studies: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what was computed is kept; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
