"""What a diagnosis says, and when an estimate is evidence enough to say it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ltm_pyro.diagnostics.estimates import Values, as_array
from ltm_pyro.html import show

COVERAGE = 0.95
"""Of the intervals that flags state, all of one question at once."""


@dataclass(frozen=True)
class Flag:
    """One thing that is wrong, as one diagnostic sees it.

    Attributes:
        diagnostic: `weights`, `score`, `drift`, `annealing`, `rows` or `density`; see `diagnose`.
        problem: `tails`, `gap`, `shift`, `narrow`, `wide`, `frozen`, `correlation`,
            `implausible draws`, `too typical draws`, `missed mass`, `other sequence`,
            `point mass` or `not finite`.
        sequences: Stable ids of the sequences concerned, the worst first.
        sentence: What was seen, how sure that is, and what to do.
    """

    diagnostic: str
    problem: str
    sequences: tuple[int, ...]
    sentence: str


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """The evidence against a posterior.

    Attributes:
        data: Dataset over `sequence`: the numbers behind the flags, each with units.
        flags: What is wrong, empty if nothing was found.
        left_out: Diagnostics that could not be asked, or not of all sequences, with the reason.
    """

    data: xr.Dataset
    flags: list[Flag]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found. It is no proof: `diagnose` lists what it cannot see."""
        return not self.flags

    @property
    def problems(self) -> set[str]:
        """The distinct problems of the flags."""
        return {flag.problem for flag in self.flags}

    def __repr__(self) -> str:
        found = ", ".join(sorted(self.problems)) or "nothing found"
        return f"Diagnosis({self.data.attrs['guide']}: {found})"

    def __str__(self) -> str:
        attrs, n = self.data.attrs, self.data.sizes["sequence"]
        lines = [
            f"Can this {attrs['guide']} posterior be trusted?  "
            f"({n} sequences, {attrs['draws']} draws each)"
        ]
        for flag in self.flags:
            ids = [*map(str, flag.sequences[:4]), *(["..."] if len(flag.sequences) > 4 else [])]
            source = "drift, of moved draws" if flag.diagnostic == "drift" else flag.diagnostic
            lines.append(f"  {flag.problem} [{source}]: {flag.sentence}")
            lines.append(f"    {len(flag.sequences)} of {n} sequences: ids {', '.join(ids)}")
        lines += [f"  not asked [{name}]: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(
            [
                *lines,
                "  nothing found against it; that is not a proof that it is right"
                if self.passed
                else "  intervals allow for the choice of the worst of all sequences and "
                "dimensions (95 %)",
            ]
        )

    def _repr_html_(self) -> str:
        head, *lines = str(self).splitlines()
        rows = [(f.problem, f.diagnostic, len(f.sequences), f.sentence) for f in self.flags]
        columns = ["problem", "seen by", "sequences", "what was seen"]
        tables = [pd.DataFrame(rows, columns=columns)] if rows else []
        notes = [line for line in lines if not rows or line.startswith("  not asked")]
        return show(head, tables=tables, notes=notes)


@dataclass(frozen=True)
class Bonferroni:
    """The rule by which estimates are judged, for all sequences and dimensions at once.

    An estimate counts against q when it differs from what the exact posterior gives by more than
    `tolerance` and its error together. Without the tolerance enough draws would find fault with
    every fit; without the error a few draws would find fault with the exact posterior. Effects and
    their standard errors are (B, M), or (B,); one that is not finite could not be estimated, and is
    passed over.

    Attributes:
        ids: (B,) stable ids.
        level: Chance that one question is wrongly answered against q.
        shape: (K, D) of the dimensions that the M are.
    """

    ids: NDArray[np.int64]
    level: float
    shape: tuple[int, int] = (1, 1)

    def dimension(self, index: int | np.integer[Any]) -> str:
        """`z[k,d]` for the index in row order."""
        row, column = divmod(int(index), self.shape[1])
        return f"z[{row},{column}]"

    def limit(self, tests: int, df: float) -> float:
        """Standard errors allowed, one-sided, for each of `tests` estimates."""
        return float(stats.t.isf(self.level / max(1, tests), df))

    def test(
        self, effect: Values | Tensor, error: Values | Tensor, tolerance: float, df: float
    ) -> Finding | None:
        """Whether an effect that may have either sign is there."""
        effect, error = _matrix(effect), _matrix(error)
        both = np.concatenate([effect, -effect], 1)
        found = self.test_above(both, np.concatenate([error, error], 1), tolerance, df)
        if found is None or found.column < effect.shape[1]:
            return found
        return replace(found, column=found.column - effect.shape[1], effect=-found.effect)

    def test_above(
        self, effect: Values | Tensor, error: Values | Tensor, tolerance: float, df: float
    ) -> Finding | None:
        """Which of the effects lie above `tolerance` beyond their errors; `None` if none do.

        The mean over sequences is judged too: a small error that all sequences share shows there.
        """
        effect, error = _matrix(effect), _matrix(error)
        known = np.isfinite(effect) & np.isfinite(error)
        effect, error = np.where(known, effect, 0.0), np.where(known, error, 0.0)
        evidence = effect - tolerance - self.limit(2 * known.size, df) * error
        evidence = np.where(known, evidence, -np.inf)
        found = (evidence > 0).any(1)
        if found.mean() < 0.5 and (shared := self._shared(known, effect, error, tolerance, df)):
            return shared
        if not found.any():
            return None
        order = np.argsort(-evidence.max(1))[: found.sum()]
        row, column = int(order[0]), int(np.argmax(evidence[order[0]]))
        margin = self._margin(known, df) * float(error[row, column])
        ids = tuple(self.ids[order].tolist())
        return Finding(ids, ids[0], column, float(effect[row, column]), margin)

    def _shared(
        self, known: NDArray[np.bool_], effect: Values, error: Values, tolerance: float, df: float
    ) -> Finding | None:
        """The finding on the means over sequences."""
        n = known.sum(0)
        if len(effect) < 2 or not n.any():
            return None
        mean = effect.sum(0) / np.maximum(n, 1)
        mean_error = np.sqrt((error**2).sum(0)) / np.maximum(n, 1)
        limit = self.limit(2 * mean.size, df)
        evidence = np.where(n < 2, -np.inf, mean - tolerance - limit * mean_error)
        column = int(np.argmax(evidence))
        if evidence[column] <= 0:
            return None
        ids = tuple(self.ids[known[:, column]].tolist())
        margin = self._margin(known, df) * float(mean_error[column])
        return Finding(ids, -1, column, float(mean[column]), margin)

    def _margin(self, known: NDArray[np.bool_], df: float) -> float:
        """Standard errors of intervals that hold for all estimates and their means at once.

        What is stated is the worst of many: an interval for one estimate would miss the truth most
        of the time.
        """
        estimates = known.sum() + known.shape[1]
        return float(stats.t.isf((1 - COVERAGE) / (2 * estimates), df))


@dataclass(frozen=True)
class Finding:
    """Evidence found.

    Attributes:
        sequences: Ids, the worst first.
        worst: The id that the numbers are of; -1 if they are means over the sequences.
        column: Which dimension is worst.
        effect: Its effect.
        margin: Half the width of its interval: those of all estimates hold at once in 95 %.
    """

    sequences: tuple[int, ...]
    worst: int
    column: int
    effect: float
    margin: float

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the effect's interval."""
        return self.effect - self.margin, self.effect + self.margin

    @property
    def size(self) -> tuple[float, float]:
        """The interval of the effect's size, whichever its sign is."""
        return abs(self.effect) - self.margin, abs(self.effect) + self.margin

    @property
    def whose(self) -> str:
        """Whose numbers these are."""
        return f"sequence {self.worst}" if self.worst >= 0 else "the mean over sequences"


def _matrix(values: Values | Tensor) -> Values:
    """(B,) or (B, M) as an array (B, M)."""
    array = as_array(values)
    return array[:, None] if array.ndim == 1 else array
