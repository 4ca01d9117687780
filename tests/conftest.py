"""Ground rules of the suite: seeded, side by side without traces, and nothing skipped silently."""

from __future__ import annotations

import os
import sys
import tempfile
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import matplotlib
import pyro
import pytest
from guards import GlobalState, lacks_reason

_cache = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Draw off screen, and keep the user's corpus cache out of the tests and the notebooks.

    The environment variable reaches the processes that the tests start; set here rather than in a
    fixture, it reaches the notebooks' kernels too.
    """
    matplotlib.use("Agg")
    config.stash[_cache] = tempfile.TemporaryDirectory(prefix="ltm-pyro-tests-")
    os.environ["LTM_PYRO_CACHE"] = config.stash[_cache].name


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's cache."""
    config.stash[_cache].cleanup()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Give each test random numbers of its own, whichever tests ran before it."""
    pyro.set_rng_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    """Fail a test that leaves process-wide state changed, and close the figures it drew."""
    before = GlobalState.capture()
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    changed = before.differences(GlobalState.capture())
    if changed:
        before.restore()
        pytest.fail("the test left behind: " + "; ".join(changed), pytrace=False)


def _refuse_bare_skip(report: Any) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and lacks_reason(report.longrepr):
        report.outcome = "failed"
        report.longrepr = "skipped without a reason"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a test's skip without a reason into a failure."""
    report = yield
    _refuse_bare_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a module's skip without a reason into a failure."""
    report = yield
    _refuse_bare_skip(report)
    return report
