"""`ltm-pyro cost`: what a fit costs, before it is run."""

from __future__ import annotations

import json
from dataclasses import asdict

from ltm_pyro.checks import memory_bytes
from ltm_pyro.cli.parsing import Parser
from ltm_pyro.cli.settings import Settings, add_settings, build_config, expand_shortcuts
from ltm_pyro.config import PRESETS, preset

_DESCRIPTION = f"""\
Count what a fit costs, without running it: weights, FLOPs per token of the
forward pass, the fast loop and a training step, peak memory, and the KL that
its fast schedule leaves whatever the text. Presets: {", ".join(PRESETS)}.

Further settings are given as to `ltm-pyro fit`. Memory is that of one process
that takes the whole batch on a CPU, by a formula that errs on the high side;
--measure takes a real training step beside it (compilation and all).
"""
_EXAMPLES = """\
ltm-pyro cost nano
ltm-pyro cost tiny --measure
ltm-pyro cost ltm-large --batch_size 4 --micro_batch 1 --checkpointing
ltm-pyro cost ltm-small --model.seq_len 512 --precision bf16 --json
"""
_LARGEST_MACHINE = 200e9  # bytes


def run(arguments: list[str]) -> int:
    """Runs `ltm-pyro cost`; returns the exit status."""
    arguments = expand_shortcuts(arguments)
    shown = next((a for a in arguments if a in PRESETS), "nano")
    parser = Parser("cost", "PRESET [OPTIONS]", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("PRESET", type=str, help="its name")
    parser.switch("measure", "take a real training step, for its peak memory")
    parser.switch("json", "print one JSON object")
    add_settings(parser, PRESETS[shown])
    given: Settings = parser.parse_args(arguments, defaults=False).as_dict()
    name, as_json = given.pop("PRESET"), given.pop("json", False)
    measure = given.pop("measure", False)
    config = build_config({**given, "preset": preset(name).preset})

    from ltm_pyro.diagnostics.cost import cost_report, format_cost
    from ltm_pyro.diagnostics.memory import measured_bytes, memory_report
    from ltm_pyro.run.building import check_corpus_options
    from ltm_pyro.run.limits import refuse_oversize

    check_corpus_options(config.corpus)

    # For other machines too, but not for those that there are not.
    most = memory_bytes() if measure else max(memory_bytes(), _LARGEST_MACHINE)
    refuse_oversize(config, most=most)
    report, memory = cost_report(config), memory_report(config)
    measured = measured_bytes(config) if measure else None
    if as_json:
        told = {**memory.as_dict(), **({} if measured is None else {"measured_bytes": measured})}
        print(json.dumps({**asdict(report), "memory": told}, indent=2))
    else:
        print(format_cost(report, memory, measured))
    return 0
