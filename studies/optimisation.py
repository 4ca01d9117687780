"""Optimisation in latent space: a decoder of solutions, searched through its thoughts.

    learn:  z ~ N(0, I), y | z ~ N(decoder(z), 0.05^2)      y: a solver's solutions of templates
    solve:  z ~ N(0, I), 0 | z ~ Laplace(residuals(decoder(z)), 0.01)       of a new problem

The second program observes that objective and violations are zero (an exact penalty), and knows no
solution. T_fast steps fit q(z) to it, and decoder(E_q z) is the answer. Every other method may
evaluate the decoder as often: a fast step counts as three evaluations, one forward and two back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

import ltm_pyro as ltm
from ltm_pyro.models.priors import StandardNormal
from ltm_pyro.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, house_figure
from studies.common import over_seeds, seeds_interval
from studies.optimisation_problems import CONSTRAINTS, FACTORS, UNKNOWNS, Family, Problem
from studies.tasks import wilson

PER_STEP, THOUGHT_DIM, SOLVED = 3, 2, 0.05
FLOOR = 5e-3
"""Of gaps in the figure."""
METHODS = {
    "thoughts": ("fast steps on thoughts", BLUE),
    "plain": ("fast steps on y, no decoder", GREEN),
    "best_of_n": ("best of n prior draws", ORANGE),
    "nearest": ("nearest template", GREY),
    "best_templates": ("best of n nearest templates", PURPLE),
    "newton": ("Newton iterations, T of them", RED),
}


class Solutions(ltm.LatentModel):
    """Solutions y in [0, 1]^12 of a family, decoded from thoughts (K, 2)."""

    def __init__(self, thoughts: int) -> None:
        super().__init__()
        self.thought_prior = StandardNormal(thoughts, THOUGHT_DIM)
        self.decoder: nn.Module = nn.Sequential(
            nn.Linear(thoughts * THOUGHT_DIM, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
            nn.Linear(64, UNKNOWNS),
        )  # fmt: skip
        self.x_shape = (UNKNOWNS,)

    def prior(self) -> TorchDistribution:
        """p(z), event shape (K, 2)."""
        return self.thought_prior()

    def decode(self, z: Tensor) -> Tensor:
        """(..., K, 2) to solutions (..., 12)."""
        return torch.sigmoid(self.decoder(z.flatten(-2)))

    def likelihood(self, z: Tensor, batch: ltm.Batch) -> TorchDistribution:
        """p(y | z)."""
        return dist.Normal(self.decode(z), 0.05).mask(batch.mask).to_event(1)


class Optimality(ltm.LatentModel):
    """That the residuals of a problem, in the covariates, are zero at the decoded y."""

    def __init__(self, solutions: Solutions, family: Family) -> None:
        super().__init__()
        self.solutions, self.family = solutions, family

    def prior(self) -> TorchDistribution:
        """p(z), the same as of the solutions."""
        return self.solutions.prior()

    def likelihood(self, z: Tensor, batch: ltm.Batch) -> TorchDistribution:
        """p(residuals | z), (..., B) over (1 + 6,)."""
        residuals = self.family.residuals(self.solutions.decode(z), batch.covariates)
        return dist.Laplace(residuals, 0.01).mask(batch.mask).to_event(1)


class Plain(Solutions):
    """No decoder: z is y itself, before the sigmoid."""

    def __init__(self) -> None:
        super().__init__(UNKNOWNS // THOUGHT_DIM)
        self.decoder = nn.Identity()


def asked(given: Problem) -> ltm.Batch:
    """The problems, as data for `Optimality`: their residuals shall be zero."""
    return ltm.Batch(torch.zeros(len(given["c"]), 1 + CONSTRAINTS), covariates=dict(given))


def features(given: Problem, family: Family) -> Tensor:
    """What tells problems apart, (B, ...)."""
    parts = {"lp": "cb", "milp": "cb", "qp": "tb", "newton": "t"}[family.name]
    return torch.cat([given[name] for name in parts], -1)


def new_problems(
    family: Family, templates: Problem, n: int, spread: float, noise: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """Problems farther from every template than templates are from each other, by the median.

    Returns:
        The problems, and the median distance to the nearest template in units of that median.
    """
    known = features(templates, family)
    between = torch.cdist(known, known).fill_diagonal_(torch.inf).min(1).values.median()
    u = spread * torch.randn(20 * n, FACTORS, generator=noise)
    given = family.problems(u)
    away = torch.cdist(features(given, family), known).min(1).values / between
    kept = torch.nonzero(away > 1)[:n, 0]
    return {name: value[kept] for name, value in given.items()}, float(away[kept].median())


def best(family: Family, candidates: Tensor, given: Problem) -> Tensor:
    """The candidate (n, B, 12) with the least residuals: (B, 12)."""
    cost = family.residuals(family.rounded(candidates), given).sum(-1)
    return candidates.gather(0, cost.argmin(0)[None, :, None].expand(1, -1, UNKNOWNS))[0]


def scored(family: Family, y: Tensor, given: Problem, truth: Tensor) -> dict[str, float]:
    """Gap, constraints and solved problems of one method's answers y (B, 12)."""
    gap = family.gap(y, given, truth)
    held = family.excess(family.rounded(y), given) < 1e-3
    return {
        "gap": float(gap.mean()),
        "gap_error": float(gap.std() / len(gap) ** 0.5),
        "constraints_held": float(held.double().mean()),
        "solved": int((gap < SOLVED).sum()),
        "n": len(gap),
    }


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One family: decoders of every K, then every method on problems inside and outside."""
    family, seed = Family(settings["family"], settings["seed"]), settings["seed"]
    noise = torch.Generator().manual_seed(seed)
    templates = family.problems(torch.randn(settings["templates"], FACTORS, generator=noise))
    solved = family.solve(templates)
    models: dict[int, Solutions] = {0: Plain()}
    for thoughts in settings["thoughts"]:
        models[thoughts] = Solutions(thoughts)
        slow = ltm.Slow(lr=5e-3, kl_start=0.02, kl_hold=0.3, kl_full=0.7)
        svi = ltm.DualRateSVI(
            models[thoughts], "mean_field", ltm.Fast(steps=4), slow, seed=seed, persistent=True
        )
        svi.fit(ltm.Batch(solved), settings["steps"], batch_size=64, progress=False)
    rows = []
    for where, spread in (("inside", 1.0), ("outside", 2.0)):
        given, away = new_problems(family, templates, settings["problems"], spread, noise)
        truth = family.solve(given)
        order = torch.cdist(features(given, family), features(templates, family)).argsort(1)

        for steps in settings["fast_steps"]:
            n = PER_STEP * steps
            answers: dict[tuple[str, int], Tensor] = {}
            for thoughts, model in models.items():
                svi = ltm.DualRateSVI(Optimality(model, family), "mean_field", seed=seed)
                with torch.no_grad():
                    y = model.decode(svi.infer(asked(given), steps).mean)
                    drawn = model.decode(model.prior().sample(torch.Size([n, len(y)])))
                answers["thoughts" if thoughts else "plain", thoughts] = y
                if thoughts:
                    answers["best_of_n", thoughts] = best(family, drawn, given)
            nearest = solved[order[:, :n]].transpose(0, 1)
            answers["nearest", 0] = nearest[0]
            answers["best_templates", 0] = best(family, nearest, given)
            if family.name == "newton":
                answers["newton", 0] = family.newton(given, steps)
            for (method, thoughts), y in answers.items():
                row = {"where": where, "method": method, "thoughts": thoughts, "fast_steps": steps}
                told = scored(family, y, given, truth)
                rows.append({**row, **told, "distance_to_templates": away})
    return rows


def most(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with the most thoughts, or without any."""
    return table[table["thoughts"].isin([0, table["thoughts"].max()])]


def figure(table: pd.DataFrame) -> Figure:
    """Gap against fast steps: a panel for each family, inside and outside."""
    families = list(table["family"].unique())
    caption = (
        "Mean optimality gap of the repaired answer (0: the solver's, 1: at y = 0), mean and "
        "standard error over seeds, against T_fast; all methods at equal evaluations, except "
        f"Newton's. K = {table['thoughts'].max()}. Upper row: problems as the templates, but "
        "farther from each than templates are from each other; lower row: factors twice as wide. "
        f"Gaps below {FLOOR:g} are drawn there."
    )
    with house_figure((2.4 * len(families), 5.0), caption) as fig:
        panels = fig.subplots(2, len(families), squeeze=False, sharex=True, sharey=True)
        for row, where in zip(panels, ("inside", "outside"), strict=True):
            for axes, family in zip(row, families, strict=True):
                part = most(table).query("family == @family and where == @where")
                for method, (label, color) in METHODS.items():
                    mean = over_seeds(part[part["method"] == method], ["fast_steps"], "gap")
                    if len(mean):
                        axes.errorbar(
                            mean["fast_steps"], mean["mean"].clip(lower=FLOOR),
                            mean["error"].fillna(0), marker="o", markersize=3, label=label,
                            color=color, linewidth=1.2,
                        )  # fmt: skip
                axes.set(xscale="log", yscale="log", title=f"{family}, {where}")
        for axes in panels[1]:
            axes.set_xlabel("T_fast")
        panels[0, 0].set_ylabel("gap")
        panels[1, 0].set_ylabel("gap")
        handles = {
            t: h for ax in panels.flat for h, t in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        fig.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, fontsize=8)
    return fig


def _gain(table: pd.DataFrame, one: str, other: str) -> tuple[float, float]:
    """How much smaller the gap is under `other` than under `one`, paired by seed."""
    gaps = [table.query(query).groupby("seed")["gap"].mean() for query in (one, other)]
    return seeds_interval(np.asarray(gaps[0] - gaps[1]))


def paragraph(table: pd.DataFrame) -> str:
    """For each family: steps, thoughts, and what the same compute does elsewhere."""
    steps, thoughts = table["fast_steps"], table["thoughts"]
    few, many, top = steps.min(), steps.max(), thoughts.max()
    least = thoughts[thoughts > 0].min()
    lines: list[str] = []
    found: dict[str, list[str]] = {
        name: [] for name in ("steps", "thoughts", "plain", "all", "templates")
    }
    for family, where in table[["family", "where"]].drop_duplicates().itertuples(index=False):
        part, case = table.query("family == @family and where == @where"), f"`{family}`, {where}"
        here, last = part.query("method == 'thoughts'"), most(part[part["fast_steps"] == many])
        at = f"thoughts == {top} and fast_steps == {many}"
        more_steps = _gain(here, f"thoughts == {top} and fast_steps == {few}", at)
        more_thoughts = _gain(here, f"thoughts == {least} and fast_steps == {many}", at)
        others = ("plain", "best_of_n", "nearest", "best_templates")
        ahead = {o: _gain(last, f"method == '{o}'", "method == 'thoughts'") for o in others}
        clear = {other: gain[0] > gain[1] for other, gain in ahead.items()}
        behind = ahead["best_templates"]
        for name, yes in (
            ("steps", more_steps[0] > more_steps[1]),
            ("thoughts", more_thoughts[0] > more_thoughts[1]),
            ("plain", clear["plain"]),
            ("all", all(clear.values())),
            ("templates", behind[0] < -behind[1]),
        ):
            found[name] += [case] * yes
        final = last.groupby("method")[["gap", "constraints_held"]].mean()
        gaps = ", ".join(
            f"{METHODS[m][0]} {final['gap'][m]:.3f}" for m in METHODS if m in final.index
        )
        ours = last[last["method"] == "thoughts"]
        low, high = wilson(ours["solved"].sum(), int(ours["n"].sum()))
        held, solved = final["constraints_held"], ours["solved"].sum() / ours["n"].sum()
        lines.append(
            f"* {case}: from {few} to {many} fast steps the gap falls by {more_steps[0]:.3f} ± "
            f"{more_steps[1]:.3f}, from {least} to {top} thoughts by {more_thoughts[0]:.3f} ± "
            f"{more_thoughts[1]:.3f}. At T_fast = {many}: {gaps}. Within {SOLVED:.0%} of the "
            f"optimum by thoughts: {solved:.0%} ({low:.0%} to {high:.0%}, Wilson). Constraints "
            f"held before repair: thoughts {held['thoughts']:.1%}, best of n "
            f"{held['best_of_n']:.1%}."
        )
    told = {name: "; ".join(cases) or "no case" for name, cases in found.items()}
    away = table["distance_to_templates"]
    return (
        f"More fast steps clearly close the gap in: {told['steps']}. More thoughts do in: "
        f"{told['thoughts']}. At equal evaluations fast steps on thoughts are clearly better than "
        f"the same steps on y without a decoder in: {told['plain']}; better than every other "
        f"method (but Newton's) in: {told['all']}. Clearly worse than retrieval, the best of n "
        f"nearest templates, in: {told['templates']}.\n\nGaps are means over problems, ± 95 % "
        f"intervals over {table['seed'].nunique()} seeds (families, decoders and problems anew). "
        f"Test problems are {away.min():.1f} to {away.max():.1f} times as far from the nearest "
        "template as templates are from each other.\n\n" + "\n".join(lines) + "\n\nTwelve "
        "unknowns and six constraints; nothing is said about large problems, where a solver "
        "itself is costly."
    )
