"""`ltm-pyro cost`: what a preset costs, before it is run."""

from __future__ import annotations

from ltm_pyro.cli.parsing import Parser
from ltm_pyro.config import PRESETS, preset

_DESCRIPTION = f"""\
Count what a preset costs, without running it: weights, FLOPs per token of the
forward pass, the fast loop and a training step, memory, and the KL that its fast
schedule leaves whatever the text. Presets: {", ".join(PRESETS)}.
"""
_EXAMPLES = """\
ltm-pyro cost nano
ltm-pyro cost ltm-large
"""


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro cost`; returns the exit status."""
    parser = Parser("cost", "PRESET", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("preset", type=str, metavar="PRESET", help="its name")
    config = preset(parser.parse_args(arguments).preset)

    from ltm_pyro.diagnostics.cost import cost_report, format_cost

    print(format_cost(cost_report(config)))
    return 0
