"""`ltm-pyro watch`: a fit's course in the terminal, whichever process it runs in."""

from __future__ import annotations

from ltm_pyro.cli.parsing import Parser

_DESCRIPTION = """\
Follow a fit in the terminal: its bound on training and on held-out text, KL, slow
steps per second and the time that is left at this pace. Reads the run folder alone,
so it can run beside the fit, in another terminal or on another machine; ends when
nobody writes to the run any more.
"""
_EXAMPLES = """\
ltm-pyro watch runs/demo
ltm-pyro watch runs/demo --once
ltm-pyro watch runs/demo --every 10
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro watch`; returns the exit status."""
    parser = Parser("watch", "RUN [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", type=str, metavar="RUN", help="a run folder, as fit makes it")
    parser.switch("once", "print once and end")
    parser.option("every", float, "seconds between looks", default=2.0)
    options = parser.parse_args(arguments)

    from ltm_pyro.run.watching import watch

    watch(options.run, every=options.every, once=options.once)
    return 0
