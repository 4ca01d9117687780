"""The checks of a run: which passed, which failed, and which were not made."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ltm_pyro.diagnostics.compare import Comparison
from ltm_pyro.diagnostics.cost import KL_FLOOR_WARNING, cost_report
from ltm_pyro.diagnostics.estimates import FEW_DOCUMENTS
from ltm_pyro.diagnostics.psis import MIN_DRAWS
from ltm_pyro.run.folder import Run

PASSED, FAILED, NOT_MADE = "passed", "failed", "NOT MADE"
Check = dict[str, str]


def checks_made(
    run: Run,
    scores: dict[str, Any],
    *,
    recorded: dict[str, Any] | None,
    comparison: Comparison | None,
    seeds: int,
) -> list[Check]:
    """Every check that this project knows for a run, with what was found, and how to make it.

    From the `summary` of its held-out scores, what `scores.json` and `ltm-pyro compare` have
    recorded, and how many seeds of these settings are on the page.
    """
    return [
        *_of_the_fit(run, recorded, scores),
        *_of_the_text(run, scores),
        *_of_the_scores(scores),
        *_of_the_posterior(comparison),
        _made(
            "Several seeds",
            None if seeds < 2 else True,
            f"{seeds} seeds are compared on this page",
            "fit again with --seed 1, 2, ... and report with --against",
        ),
    ]


def _made(name: str, passed: bool | None, found: str, remedy: str) -> Check:
    """`remedy` says how to make it, or what to do where it failed."""
    state = NOT_MADE if passed is None else PASSED if passed else FAILED
    return {
        "name": name,
        "state": state,
        "found": "" if passed is None else found,
        "remedy": "" if passed else remedy,
    }


def _of_the_fit(run: Run, recorded: dict[str, Any] | None, scores: dict[str, Any]) -> list[Check]:
    steps, done = run.config.steps, run.svi.slow_step
    rows = run.metrics
    bad = sum(not all(map(math.isfinite, row.values())) for row in rows)
    floor = cost_report(run.config).kl_floor_per_token
    same = None if recorded is None else _agrees(recorded, scores)
    return [
        _made(
            "The fit is finished", done == steps, f"step {done} of {steps}",
            "go on with ltm-pyro fit --resume",
        ),
        _made(
            "The control is trained to the end",
            None if not run.config.control else scores["control"] is not None,
            f"{steps} steps, the same decoder and batches",
            "fit with --control true; go on with ltm-pyro fit --resume",
        ),
        _made(
            "Every step is recorded and finite", len(rows) == done and not bad,
            f"{len(rows)} of {done} steps, {bad} not finite", "restore metrics.csv from a copy",
        ),
        _made(
            "The fast schedule can return to the prior", floor <= KL_FLOOR_WARNING,
            f"KL floor {floor:.4f} nats per token, limit {KL_FLOOR_WARNING}",
            "more fast steps, a higher rate, or a start nearer to the prior",
        ),
        _made("The checkpoint and the text are those recorded", True, "by SHA-256", ""),
        _made(
            "scores.json says the same", same, "the numbers of this page",
            "ltm-pyro fit writes it at its end",
        ),
    ]  # fmt: skip


def _agrees(recorded: dict[str, Any], scores: dict[str, Any]) -> bool | None:
    """Whether the same scores were recorded; `None` where they are of other sequences or draws."""
    if any(recorded.get(n) != scores[n] for n in ("split", "mode", "draws", "seed", "n_sequences")):
        return None
    names = [name for name in ("ppl_elbo", "ppl_iw") if scores.get(name) is not None]
    return all(
        math.isclose(recorded.get(name) or math.nan, scores[name], rel_tol=1e-4) for name in names
    )


def _of_the_text(run: Run, scores: dict[str, Any]) -> list[Check]:
    card = run.facts["corpus"].get("card") or {}
    crossing = card.get("crossing")
    effective = scores["effective_documents"] if scores["n_documents"] else None
    return [
        _made(
            "No held-out document has a twin in another split",
            None if crossing is None else not any(crossing.values()),
            "" if crossing is None else f"{sum(crossing.values())} near copies",
            "split by a field that keeps them together: --corpus.split group; or there is no text",
        ),
        _made(
            "Enough held-out documents",
            None if effective is None else effective >= FEW_DOCUMENTS,
            "" if effective is None else f"{effective:.1f} equal ones, {FEW_DOCUMENTS:g} or more",
            "score more: --sequences; the documents must be known",
        ),
    ]


def _of_the_scores(scores: dict[str, Any]) -> list[Check]:
    khat, panel = scores["khat"], scores["collapse"]
    judged = khat["share_above_limit"] is not None
    loss = None if panel is None else panel["penalty_shuffled"]
    return [
        _made(
            "Importance weights can be relied on",
            not khat["share_above_limit"] if judged else None,
            khat["in_words"], f"score with --draws {MIN_DRAWS} or more, or a richer guide",
        ),
        _made(
            "Another document's thoughts hurt", None if loss is None else panel["uses_thoughts"],
            "" if loss is None else f"by {loss:.2f} ± {panel['penalty_shuffled_se']:.2f} nats",
            "the decoder does not hear its thoughts: anneal the KL, or narrow its window",
        ),
    ]  # fmt: skip


def _of_the_posterior(comparison: Comparison | None) -> list[Check]:
    compare = "ltm-pyro compare RUN --guides mean_field,full_rank"
    gap, scale = "truncation_gap_per_sequence", "reference_scale_ratio_median"
    guides = pd.DataFrame() if comparison is None else comparison.frame
    guides = guides.reindex(columns=[gap, f"{gap}_error", scale]).astype(float)
    # An encoder has no loop to be too short, and not every guide a reference.
    gaps, scales = guides[gap].dropna(), guides[scale].dropna()
    short = gaps > 2 * guides[f"{gap}_error"].fillna(0.0)[gaps.index]
    return [
        _made(
            "The fast loop is long enough", None if gaps.empty else not short.any(),
            f"a loop twice as long gains {gaps.max():.2f} nats at most",
            f"{compare}; or ltm_pyro.fast_convergence" if gaps.empty else "more --eval_fast_steps",
        ),
        _made(
            "q has the scales of a reference posterior (HMC)",
            None if scales.empty else bool(scales.between(0.8, 1.25, inclusive="neither").all()),
            ", ".join(f"{scale:.2f}" for scale in scales) + " times its scales",
            f"{compare} --reference hmc" if scales.empty else "a richer guide",
        ),
        _made("Gaps to the evidence", None, "", "ltm_pyro.gap_decomposition"),
        _made("Simulation-based calibration", None, "", "ltm_pyro.sbc, on data from the model"),
    ]  # fmt: skip
