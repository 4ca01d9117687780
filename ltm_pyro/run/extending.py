"""A run that takes over other settings: scored otherwise, or extended to more slow steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ltm_pyro.config import FitConfig, Slow, from_dict, merged, to_dict
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.schedules import learning_rate
from ltm_pyro.run.folder import Run
from ltm_pyro.run.limits import refuse_oversize


def extend(run: Run, changes: Mapping[str, Any]) -> list[str]:
    """Takes over settings that no step done depends on; more `steps` extend the fit.

    An extended fit goes on with schedules over all of its steps: see `restated`. `changes` are of
    `changes.CHANGEABLE`, nested as in a configuration; the answer is what an extension restates, in
    lines.
    """
    before = run.config
    config = from_dict(FitConfig, merged(to_dict(before), changes))
    if config.steps < before.steps:
        raise InputError(
            f"steps is {config.steps} and {run.label} is a fit of {before.steps}: it can be "
            "extended, not shortened; give more, or leave it out"
        )
    refuse_oversize(config, run.parallel.size)
    longer = config.steps > before.steps
    if longer:
        config = replace(config, slow=restated(before.slow, before.steps, config.steps))
    if config != before:
        run.adopt(config)
        run.svi.slow, run.svi.horizon = config.slow, config.steps
    return _in_words(before, config, run.svi.slow_step) if longer else []


def _in_words(before: FitConfig, config: FitConfig, step: int) -> list[str]:
    """What the extension of a fit restates."""
    rates = [learning_rate(c.slow, step, c.steps) for c in (before, config)]
    shares = [
        f"slow.{name} {old:.4g} -> {new:.4g}"
        for name, old, new in (
            (f.name, getattr(before.slow, f.name), getattr(config.slow, f.name))
            for f in fields(Slow)
        )
        if old != new
    ]
    lines = [
        f"Extended from {before.steps} to {config.steps} slow steps; schedules are restated:",
        f"  the {config.slow.schedule} learning rate now runs to step {config.steps}: at step "
        f"{step + 1} it is {rates[1]:.3g} (over {before.steps} steps {rates[0]:.3g})",
    ]
    if shares:
        kept = "shares of the fit, so that each keeps its step"
        lines.append(f"  {', '.join(shares)} ({kept})")
    return lines


def restated(slow: Slow, before: int, after: int) -> Slow:
    """`slow` for a fit that is extended from `before` to `after` steps.

    What is given as a share of the fit keeps its step: what a fit has passed (its warm-up, thoughts
    that joined, a KL weight that has reached 1) it does not pass again. The cosine alone is
    stretched to the new end.
    """
    return replace(
        slow,
        warmup=round(slow.warmup * before) / after,
        thoughts_start=round(slow.thoughts_start * before) / after,
        kl_hold=slow.kl_hold * before / after,
        kl_full=slow.kl_full * before / after,
    )
