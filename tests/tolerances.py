"""How close is close enough: every tolerance of the test suite, with its reason.

Three kinds of comparison occur, and each has its own rule:

- `EXACT`: two computations of one deterministic number. Only rounding may separate them, so a
  failure is a bug; the false-alarm rate is nil.
- `MC`: a Monte Carlo estimate against a known value, or a bound. The allowance is counted in the
  estimate's own standard errors.
- `GOF`: p-values of goodness-of-fit tests on draws whose distribution is known.

`MC` and `GOF` wrongly fail with probability `FALSE_ALARM_RATE` per call, however many numbers the
call compares (Bonferroni). Tests are seeded, so on one machine the outcome is settled; the rate is
the chance that a harmless change of seed, library or processor turns a correct test red. With a
thousand such calls in the suite that is once in fifty changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

FALSE_ALARM_RATE = 2e-5


@dataclass(frozen=True)
class Exact:
    """Agreement up to rounding, by the dtype of the actual value."""

    float64: float = 1e-9
    """Sums of up to some 10^4 terms in another order, or a Cholesky of a well-conditioned matrix:
    measured differences are near 1e-12, and a wrong formula is off by far more than 1e-9."""
    float32: float = 1e-4
    """The same in single precision through a few layers of a decoder, where kernels of different
    shapes (cached and uncached, batched and not) round differently at about 1e-6 a layer."""

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        """Compare within the tolerance of `actual.dtype`, relative and absolute."""
        tolerance = {torch.float64: self.float64, torch.float32: self.float32}[actual.dtype]
        torch.testing.assert_close(
            actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance
        )


@dataclass(frozen=True)
class MonteCarlo:
    """Agreement up to Monte Carlo error, in standard errors of the estimate."""

    rate: float = FALSE_ALARM_RATE
    """Chance that a correct estimate fails, per call. 2e-5 is 4.3 standard errors for one number
    and 5.6 for a thousand: loose enough to stay quiet, tight enough that with 10^4 draws a bias of
    a twentieth of the draws' standard deviation shows."""

    def sigmas(self, comparisons: int = 1, draws: int | None = None) -> float:
        """Allowed distance in standard errors, two-sided.

        Args:
            comparisons: numbers compared in the call, each of which may be off by chance.
            draws: draws that each standard error was estimated from; few make it uncertain, and
                Student's t then replaces the normal. `None` for a standard error that is known.
        """
        tail = self.rate / (2 * comparisons)
        return float(stats.norm.isf(tail) if draws is None else stats.t.isf(tail, df=draws - 1))

    def assert_close(
        self,
        estimate: ArrayLike,
        standard_error: ArrayLike,
        expected: ArrayLike,
        draws: int | None = None,
    ) -> None:
        """Assert |estimate - expected| within `sigmas` standard errors, elementwise."""
        self._assert_below(
            np.abs(np.asarray(estimate) - np.asarray(expected)), standard_error, draws
        )

    def assert_at_most(
        self,
        estimate: ArrayLike,
        standard_error: ArrayLike,
        bound: ArrayLike,
        draws: int | None = None,
    ) -> None:
        """Assert that a lower bound's estimate does not exceed the value that it bounds."""
        self._assert_below(np.asarray(estimate) - np.asarray(bound), standard_error, draws)

    def _assert_below(
        self, excess: np.ndarray, standard_error: ArrayLike, draws: int | None
    ) -> None:
        excess, errors = np.broadcast_arrays(excess, np.asarray(standard_error))
        allowed = self.sigmas(excess.size, draws)
        # Written as "not <=", so that a NaN fails.
        wrong = ~(excess <= allowed * errors)
        assert not wrong.any(), (
            f"{wrong.sum()} of {wrong.size} estimates off by more than {allowed:.2f} standard "
            f"errors; the first: off by {excess[wrong][0]:.4g}, standard error "
            f"{errors[wrong][0]:.4g}"
        )


@dataclass(frozen=True)
class GoodnessOfFit:
    """Draws are compatible with their claimed distribution."""

    rate: float = FALSE_ALARM_RATE
    """Smallest p-value allowed, shared among the p-values of one call. A test that must detect a
    wrong distribution needs draws enough for a p-value far below this, and asserts `rejects`."""

    def assert_fits(self, p_values: ArrayLike) -> None:
        """Assert that no p-value is below `rate` divided by their number."""
        p = np.atleast_1d(np.asarray(p_values))
        assert (p >= self.rate / p.size).all(), f"smallest of {p.size} p-values: {p.min():.3g}"

    def rejects(self, p_values: ArrayLike) -> bool:
        """Whether at least one p-value is below `rate` divided by their number."""
        p = np.atleast_1d(np.asarray(p_values))
        return bool((p < self.rate / p.size).any())


EXACT = Exact()
MC = MonteCarlo()
GOF = GoodnessOfFit()
