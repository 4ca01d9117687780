"""What several studies do: fit a model and its control, and hold one against the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ltm_pyro.cli.settings import build_config
from ltm_pyro.config import FitConfig
from ltm_pyro.diagnostics.perplexity import losses
from ltm_pyro.diagnostics.sampling_error import clustered_mean, documents_of
from ltm_pyro.run import Run, create_run, train, train_control
from ltm_pyro.run.scoring import HeldOut, score_run


def config_of(settings: Mapping[str, Any], data: Path | None = None) -> FitConfig:
    """The settings of a fit among those of a cell: `preset`, `seed`, `fast.steps`, and so on.

    What stands under `study` in a cell is the study's own.
    """
    given: dict[str, Any] = {} if data is None else {"corpus": {"name": str(data)}}
    for name, value in settings.items():
        if name.startswith("study."):
            continue
        *groups, last = name.split(".")
        place = given
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return build_config(given)


@contextmanager
def fitted(config: FitConfig) -> Iterator[Run]:
    """A run fitted to the end, its control too if the settings ask for one; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ltm-pyro-study-") as folder:
        run = create_run(Path(folder) / "run", config)
        corpus = run.corpus()
        train(run, corpus, progress=False)
        if config.control:
            train_control(run, corpus, progress=False)
        yield run


def scored(run: Run, **options: Any) -> HeldOut:
    """Held-out scores of a run on its own corpus."""
    return score_run(run, run.corpus(), **options)


def against_control(held_out: HeldOut) -> dict[str, float]:
    """Gain over the control in nats per sequence, by bound, with errors clustered by document."""
    scores, control = held_out.scores, held_out.control
    assert control is not None
    out: dict[str, float] = {}
    for name in ("ppl_elbo", "ppl_iw"):
        gain = clustered_mean(
            losses(control, "ppl_z0") - losses(scores, name), documents_of(scores)
        )
        short = name.removeprefix("ppl_")
        out |= {f"{short}_gain_per_sequence": gain.value, f"{short}_gain_error": gain.error}
    return {
        **out,
        "kl_per_sequence": float(scores["kl"].mean()),
        "nats_of_shuffled_z": float((scores["nll_shuffled"] - scores["nll_given_z"]).mean()),
        "control_nats_per_token": float(control["nll_z0"].sum() / control["n_tokens"].sum()),
    }


def over_seeds(table: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean over seeds of a column, with the standard error of that mean (`nan` for one seed)."""
    groups = table.groupby(by, sort=False)[column]
    out = groups.agg(["mean", "std", "count"]).reset_index()
    out["error"] = out["std"] / np.sqrt(out["count"])
    return out


def clear(value: float, error: float) -> bool:
    """Whether a difference is more than two of its errors from 0."""
    return bool(np.isfinite(error)) and abs(value) > 2 * error
