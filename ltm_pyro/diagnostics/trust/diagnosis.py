"""What a diagnosis says, and when an estimate is evidence enough to say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from ltm_pyro.html import show

Floats = NDArray[np.float64]

COVERAGE = 0.95
"""Of the intervals that flags tell, all of one question at once."""


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
        return format_diagnosis(self)

    def _repr_html_(self) -> str:
        head, *lines = str(self).splitlines()
        rows = [(f.problem, f.diagnostic, len(f.sequences), f.sentence) for f in self.flags]
        columns = ["problem", "seen by", "sequences", "what was seen"]
        tables = [pd.DataFrame(rows, columns=columns)] if rows else []
        notes = [line for line in lines if not rows or line.startswith("  not asked")]
        return show(head, tables=tables, notes=notes)


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for the terminal."""
    attrs = diagnosis.data.attrs
    n = diagnosis.data.sizes["sequence"]
    lines = [
        f"Can this {attrs['guide']} posterior be trusted?  "
        f"({n} sequences, {attrs['draws']} draws each)"
    ]
    for flag in diagnosis.flags:
        few = ", ".join(map(str, flag.sequences[:4])) + (", ..." if len(flag.sequences) > 4 else "")
        source = "drift, of moved draws" if flag.diagnostic == "drift" else flag.diagnostic
        lines.append(f"  {flag.problem} [{source}]: {flag.sentence}")
        lines.append(f"    {len(flag.sequences)} of {n} sequences: ids {few}")
    for name, reason in diagnosis.left_out.items():
        lines.append(f"  not asked [{name}]: {reason}")
    if diagnosis.flags:
        lines.append(
            "  intervals allow for the choice of the worst of all sequences and dimensions (95 %)"
        )
    if diagnosis.passed:
        lines.append("  nothing found against it; that is not a proof that it is right")
    return "\n".join(lines)


@dataclass(frozen=True)
class Court:
    """The rules by which estimates are judged.

    An estimate counts against q when it differs from what the exact posterior gives by more than
    `tolerance` and its error together. Without the tolerance enough draws would find fault with
    every fit; without the error a few draws would find fault with the exact posterior.

    Attributes:
        ids: (B,) stable ids.
        level: Chance that one question, over all its sequences and dimensions, is wrongly answered
            against q.
    """

    ids: NDArray[np.int64]
    level: float

    def limit(self, tests: int, df: float) -> float:
        """Standard errors allowed, one-sided, for each of `tests` estimates (Bonferroni)."""
        return float(stats.t.isf(self.level / max(1, tests), df))

    def judge(self, effect: Floats, error: Floats, tolerance: float, df: float) -> Verdict | None:
        """Whether an effect (B, M) that may have either sign is there; as `judge_above`."""
        found = self.judge_above(
            np.concatenate([effect, -effect], 1), np.concatenate([error, error], 1), tolerance, df
        )
        if found is None or found.column < effect.shape[1]:
            return found
        return replace(found, column=found.column - effect.shape[1], effect=-found.effect)

    def judge_above(
        self, effect: Floats, error: Floats, tolerance: float, df: float
    ) -> Verdict | None:
        """Which of the effects (B, M) lie above `tolerance` beyond their errors; `None` if none do.

        The mean over sequences is judged too: a small error that all sequences share shows there.
        An effect that is not a number is one that could not be estimated, and is passed over.
        """
        known = np.isfinite(effect) & np.isfinite(error)
        effect, error = np.where(known, effect, 0.0), np.where(known, error, 0.0)
        limit = self.limit(2 * known.size, df)
        evidence = np.where(known, effect - tolerance - limit * error, -np.inf)
        guilty = (evidence > 0).any(1)
        if guilty.mean() < 0.5 and (shared := self._shared(known, effect, error, tolerance, df)):
            return shared
        if not guilty.any():
            return None
        worst = evidence.max(1)
        order = np.argsort(-worst)[: guilty.sum()]
        row, column = int(order[0]), int(np.argmax(evidence[order[0]]))
        return Verdict(
            tuple(self.ids[order].tolist()),
            int(self.ids[row]), column, float(effect[row, column]),
            self._margin(known, df) * float(error[row, column]),
        )  # fmt: skip

    def _shared(
        self, known: NDArray[np.bool_], effect: Floats, error: Floats, tolerance: float, df: float
    ) -> Verdict | None:
        """The verdict on the means over sequences."""
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
        return Verdict(ids, -1, column, float(mean[column]), margin)

    def _margin(self, known: NDArray[np.bool_], df: float) -> float:
        """Standard errors of intervals that hold for all estimates and their means at once.

        What is told is the worst of many: an interval for one estimate would miss the truth most
        of the time.
        """
        estimates = known.sum() + known.shape[1]
        return float(stats.t.isf((1 - COVERAGE) / (2 * estimates), df))


@dataclass(frozen=True)
class Verdict:
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
    def low(self) -> float:
        """The interval's lower end."""
        return self.effect - self.margin

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.effect + self.margin

    @property
    def size(self) -> tuple[float, float]:
        """The interval of the effect's size, whichever its sign is."""
        return abs(self.effect) - self.margin, abs(self.effect) + self.margin

    @property
    def whose(self) -> str:
        """Whose numbers these are."""
        return f"sequence {self.worst}" if self.worst >= 0 else "the mean over sequences"


def column(values: Any, units: str) -> tuple[str, Floats, dict[str, str]]:
    """A variable over `sequence` for the dataset."""
    return "sequence", np.asarray(values, dtype=np.float64), {"units": units}


def dimension_name(index: int, shape: Sequence[int]) -> str:
    """`z[k,d]` for the index in row order."""
    return f"z[{index // shape[1]},{index % shape[1]}]"
