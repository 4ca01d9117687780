"""Fits that one process or several share, for `test_parallel.py`.

As a script it is what `torchrun` starts: `parallel_worker.py FILE SCENARIO...` writes what every
process made of the scenarios, a list by process under each name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from known_models import TINY, LearnedOracle, make_language_model, make_oracle, make_tokens
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.diagnostics.control import control as control_of
from ltm_pyro.engine.processes import Parallel, join, leave
from ltm_pyro.errors import NonFiniteError, ProcessLostError
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.run.checkpoint import take, tensors_of

Answer = dict[str, Any]
ROWS, BATCH = 12, 4


@dataclass(frozen=True)
class Fit:
    """A fit of ten slow steps, or as many as are asked for."""

    guide: str = "mean_field"
    prior: str = "standard_normal"
    prior_options: dict[str, Any] = field(default_factory=dict)
    objective: str = "elbo"
    objective_options: dict[str, Any] = field(default_factory=dict)
    fast: dict[str, Any] = field(default_factory=dict)
    slow: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    steps: int = 10
    persistent: bool = False

    def __call__(self, parallel: Parallel) -> Answer:
        """Weights, moments and metrics after it."""
        config = replace(TINY, prior=self.prior, prior_options=self.prior_options)
        model = make_language_model(config, dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            guide = ltm.build_guide(self.guide, model)
        svi = ltm.DualRateSVI(
            model,
            guide,
            fast=ltm.Fast(**{"steps": 4, "lr": 0.1, **self.fast}),
            slow=ltm.Slow(**self.slow),
            elbo=build_objective(self.objective, **self.objective_options),
            persistent=self.persistent,
            execution=ltm.Execution(parallel=parallel),
        )
        svi.fit(make_tokens(ROWS), self.steps, BATCH, progress=False)
        shared = [p.detach() for p in guide.shared_parameters()]
        return {
            "weights": flat([*model.state_dict().values(), *shared]),
            "moments": take(tensors_of(svi), "adamw."),
            "metrics": metrics(svi.metrics),
            "stored": -1 if svi.store is None else len(svi.store),
        }


def flat(tensors: list[Tensor]) -> Tensor:
    """All numbers one after another."""
    return torch.cat([t.flatten().double() for t in tensors])


def metrics(rows: list[dict[str, float]]) -> Tensor:
    """(steps, metrics), without those of the clock on the wall."""
    return torch.tensor(
        [[v for k, v in row.items() if "second" not in k] for row in rows], dtype=torch.float64
    )


def control(parallel: Parallel) -> Answer:
    """Ten slow steps of the control."""
    model = make_language_model()
    fit = control_of(model, ltm.Slow(), 10, execution=ltm.Execution(parallel=parallel))
    rows = fit.fit(make_tokens(ROWS), 10, BATCH, progress=False)
    return {"weights": flat(list(model.state_dict().values())), "metrics": metrics(rows)}


def scores(parallel: Parallel) -> Answer:
    """Inference and scores of seven sequences, which two processes cannot share equally."""
    model, batch = make_language_model(), make_tokens(7)
    out: Answer = {}
    for name in ("mean_field", "mixture"):
        guide = ltm.build_guide(name, model)
        svi = ltm.DualRateSVI(
            model, guide, fast=ltm.Fast(steps=4), execution=ltm.Execution(parallel=parallel)
        )
        post = svi.infer(batch)
        assert post.trace is not None
        out[f"{name}.mean"], out[f"{name}.trace"] = post.mean, post.trace.elbo
        for mode in ("oracle", "prior"):
            found = ltm.evaluate(model, post, batch, 6, mode=mode, parallel=parallel)
            columns = [torch.as_tensor(found[n].values.copy()).double() for n in found.data_vars]
            out[f"{name}.{mode}"] = torch.stack(columns).nan_to_num(-1.0)
    return out


def nan_in_one(parallel: Parallel) -> Answer:
    """One process's rows of the second batch hold a number whose square overflows."""
    batch = make_oracle().simulate(4, seed=1)
    broken = batch.observed.clone()
    broken[3] = 1e200
    model = LearnedOracle(make_oracle())
    svi = ltm.DualRateSVI(
        model, ltm.build_guide("mean_field", model), execution=ltm.Execution(parallel=parallel)
    )
    mine = parallel.rows(4)
    svi.step(batch.select(mine))
    before = model.bias.detach().clone()
    try:
        svi.step(ltm.Batch(broken, batch.mask, batch.ids).select(mine))
    except NonFiniteError as error:
        changed = not torch.equal(before, model.bias)
        return {"ids": error.ids, "step": error.step, "changed": changed, "kept": svi.slow_step}
    return {}


def stop_in_one(parallel: Parallel) -> Answer:
    """The last process asks to stop at its third step; the others are not asked."""
    model = make_language_model()
    svi = ltm.DualRateSVI(
        model, ltm.build_guide("mean_field", model), execution=ltm.Execution(parallel=parallel)
    )
    last = parallel.rank == parallel.size - 1
    parallel.asks_to_stop = lambda: last and svi.slow_step == 2
    stopped = []
    for step in range(4):
        svi.step(make_tokens(ROWS).training_batch(step, BATCH, rows=parallel.rows(BATCH)))
        stopped.append(parallel.stopping)
    parallel.asks_to_stop = bool
    return {"stopped": stopped}


def messages(parallel: Parallel) -> Answer:
    """What the processes can say to each other."""
    rank = parallel.rank
    uneven = torch.arange(3 * (rank + 1)).view(rank + 1, 3)
    weights = {"a": torch.full((2,), float(rank)), "b": torch.tensor(rank)}
    flags = torch.tensor([rank == 0, True])
    return {
        "broadcast": parallel.broadcast(f"from {rank}"),
        "rows": parallel.gather_rows(uneven),
        "flags": parallel.gather_rows(flags).tolist(),
        "columns": tuple(parallel.gather_rows(uneven.T, dim=1).shape),
        "broadcast_tensors": {
            k: v.tolist() for k, v in parallel.broadcast_tensors(weights).items()
        },
        "on_rank_0": parallel.on_rank_0(lambda: rank),
        "sum": float(parallel.sum(torch.tensor(float(rank + 1)))),
        "reports": [parallel.reports([]), parallel.reports([0])],
    }


def lost(parallel: Parallel) -> Answer:
    """The last process leaves without a word; must come last."""
    if parallel.rank == parallel.size - 1:
        sys.exit(0)
    try:
        parallel.sum(torch.zeros(3))
    except ProcessLostError as error:
        return {"lost": error.lost, "message": str(error)}
    return {}


SCENARIOS: dict[str, Callable[[Parallel], Answer]] = {
    "replicated": Fit(),
    "single precision": Fit(dtype=torch.float32),
    "control": control,
    "scores": scores,
    "nan": nan_in_one,
    "stop": stop_in_one,
    "messages": messages,
    "persistent": Fit(persistent=True),
    "mixture prior": Fit(prior="mixture", prior_options={"components": 1}, steps=20),
    "word dropout": Fit(slow={"word_dropout": 0.3}),
    "late thoughts": Fit(prior="autoregressive", slow={"thoughts_start": 0.5}),
    "fixed draws": Fit(
        "low_rank", objective="iwae", objective_options={"particles": 3},
        fast={"noise": "fixed", "fixed_draws": 2},
    ),
    **{
        f"guide {n}": Fit(n)
        for n in ("full_rank", "mixture", "flow", "delta", "amortized", "semi_amortized")
    },
    "flow prior": Fit(prior="flow"),
    "stl": Fit("mixture", objective="stl", objective_options={"particles": 2}),
}  # fmt: skip


def main() -> None:
    """Runs scenarios in this process and writes what all have found."""
    file, *names = sys.argv[1:]
    parallel = join("cpu")
    found = {name: parallel.gather(SCENARIOS[name](parallel)) for name in names}
    if parallel.is_rank_0:
        torch.save(found, file)
    leave()


if __name__ == "__main__":
    main()
