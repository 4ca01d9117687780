"""Families of small optimisation problems with a solver's truth, for the study `optimisation`.

    lp      max c.y,  A y <= b, 0 <= y <= 1                     scipy.optimize.linprog
    milp    the same with y in {0, 1}                           scipy.optimize.milp
    qp      min |M y - t|^2 / 2,  A y <= b, 0 <= y <= 1         scipy.optimize.minimize, SLSQP
    newton  y + M' tanh(2 M y) / 2 = t, which has one root      Newton's iterations

A and M belong to the family; c, b and t to a problem, and follow smoothly from four numbers u.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, minimize
from torch import Tensor

FACTORS, UNKNOWNS, CONSTRAINTS = 4, 12, 6
PENALTY = 3.0
"""Of a constraint that is violated by its whole right side, in units of the whole objective."""
Problem = Mapping[str, Tensor]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """One family; everything in it is drawn from its seed."""

    name: str
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 5])
        scaled = UNKNOWNS**-0.5
        for name, value in (
            ("load", rng.uniform(0.2, 1.0, (CONSTRAINTS, UNKNOWNS))),
            ("mix", rng.normal(size=(UNKNOWNS, UNKNOWNS)) * scaled + np.eye(UNKNOWNS)),
            ("by_unknown", rng.normal(size=(FACTORS, UNKNOWNS)) * FACTORS**-0.5),
            ("by_constraint", rng.normal(size=(FACTORS, CONSTRAINTS)) * FACTORS**-0.5),
        ):
            object.__setattr__(self, name, torch.tensor(value, dtype=torch.float32))

    load: Any = None
    mix: Any = None
    by_unknown: Any = None
    by_constraint: Any = None

    def problems(self, u: Tensor) -> dict[str, Tensor]:
        """Problems of factors u (B, 4)."""
        pull = u @ self.by_unknown
        room = 0.4 * self.load.sum(-1) * (1 + 0.3 * torch.tanh(u @ self.by_constraint))
        root = torch.sigmoid(1.5 * pull)
        target = root @ self.mix.T if self.name == "qp" else self._left(root)
        return {"c": torch.exp(0.8 * pull), "b": room, "t": target}

    def _left(self, y: Tensor) -> Tensor:
        return y + 0.5 * torch.tanh(2.0 * y @ self.mix.T.to(y)) @ self.mix.to(y)

    def objective(self, y: Tensor, given: Problem) -> Tensor:
        """What is minimised, 0 at best or below what can be reached, of order 1: (..., B)."""
        if self.name in ("lp", "milp"):
            return 1 - (given["c"] * y).sum(-1) / given["c"].sum(-1)
        left = y @ self.mix.T if self.name == "qp" else self._left(y)
        return (left - given["t"]).square().mean(-1) / given["t"].square().mean(-1)

    def excess(self, y: Tensor, given: Problem) -> Tensor:
        """By what share each constraint is violated, (..., B, 6); none in `newton`."""
        over = torch.relu(y @ self.load.T / given["b"] - 1)
        return over * 0 if self.name == "newton" else over

    def residuals(self, y: Tensor, given: Problem) -> Tensor:
        """Objective and penalised violations, 0 at best: (..., B, 1 + 6)."""
        objective = self.objective(y, given)
        if self.name == "newton":  # a root is sharp: its distance, not the square of it
            objective = (objective + 1e-8).sqrt()
        return torch.cat([objective[..., None], PENALTY * self.excess(y, given)], -1)

    def rounded(self, y: Tensor) -> Tensor:
        """Whole numbers, where the family asks for them."""
        return (y > 0.5).to(y) if self.name == "milp" else y

    def repaired(self, y: Tensor, given: Problem) -> Tensor:
        """A feasible point near y, the same way for every method: scaled down, or items dropped."""
        y = self.rounded(y)
        if self.name in ("lp", "qp"):
            return y / (1 + self.excess(y, given).max(-1, keepdim=True).values)
        if self.name == "milp":
            worth = given["c"] / (self.load / given["b"][..., None]).sum(-2)
            for _ in range(UNKNOWNS):
                bad = (self.excess(y, given) > 1e-5).any(-1)
                least = torch.where(y > 0, worth, torch.inf).argmin(-1, keepdim=True)
                dropped = y.scatter(-1, least, 0.0)
                y = torch.where(bad[..., None], dropped, y)
        return y

    def gap(self, y: Tensor, given: Problem, best: Tensor) -> Tensor:
        """Optimality gap of the repaired y, (B,): 0 at the solver's, 1 at y = 0."""
        if self.name == "newton":
            return (y - best).norm(dim=-1) / best.norm(dim=-1)
        reached, least = (self.objective(a, given) for a in (self.repaired(y, given), best))
        nothing = self.objective(torch.zeros_like(best), given)
        return (reached - least) / (nothing - least)

    def solve(self, given: Problem) -> Tensor:
        """The solver's solutions, (B, 12)."""
        if self.name == "newton":
            return self.newton(given, 30)
        rows = zip(*(given[k].double().numpy() for k in ("c", "b", "t")), strict=True)
        return torch.tensor(np.array([self._solved(*row) for row in rows]), dtype=torch.float32)

    def _solved(self, c: Array, b: Array, t: Array) -> Array:
        load, mix = self.load.double().numpy(), self.mix.double().numpy()
        if self.name == "lp":
            return _found(linprog(-c, A_ub=load, b_ub=b, bounds=(0, 1)).x)
        if self.name == "milp":
            room = LinearConstraint(load, ub=b)
            whole = np.ones(len(c), dtype=int)
            return _found(milp(-c, constraints=room, bounds=Bounds(0, 1), integrality=whole).x)

        def objective(y: Array) -> float:
            return float(0.5 * np.square(mix @ y - t).sum())

        def slope(y: Array) -> Array:
            return mix.T @ (mix @ y - t)

        found = minimize(
            objective,
            np.full(len(c), 0.1),
            jac=slope,
            bounds=[(0, 1)] * len(c),
            constraints=LinearConstraint(load, ub=b),
            method="SLSQP",
            options={"ftol": 1e-10, "maxiter": 200},
        )
        return found.x

    def newton(self, given: Problem, iterations: int) -> Tensor:
        """Damped Newton iterations from y = 1/2, (B, 12)."""
        y = torch.full_like(given["t"], 0.5, dtype=torch.float64)
        mix, target = self.mix.double(), given["t"].double()

        def distance(at: Tensor) -> Tensor:
            return (self._left(at) - target).norm(dim=-1, keepdim=True)

        for _ in range(iterations):
            slope = 1 - torch.tanh(2.0 * y @ mix.T).square()
            jacobian = torch.eye(UNKNOWNS).double() + mix.T @ (slope[..., None] * mix)
            step = torch.linalg.solve(jacobian, self._left(y) - target)
            for halved in (1.0, 0.5, 0.25, 0.125):
                better = distance(y - halved * step) < distance(y)
                y = torch.where(better, y - halved * step, y)
                step = torch.where(better, torch.zeros_like(step), step)
        return y.float()


def _found(x: Array | None) -> Array:
    """A solver's solution; every problem of a family has one, y = 0 being feasible."""
    assert x is not None
    return x
