"""Clustered errors against brute force, textbook special cases, and coverage that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ltm_pyro.diagnostics.estimates import (
    clustered_mean,
    clustered_ratio,
    few_documents_note,
)


def documents_of_unlike_length(
    rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats and tokens of the pieces of n documents, each with an effect of its own; truth 2.0."""
    pieces = rng.geometric(0.15, size=n)
    document = np.repeat(np.arange(n), pieces)
    tokens = rng.integers(100, 200, size=len(document))
    effect = np.repeat(rng.normal(0, 0.3, size=n), pieces)
    return (2.0 + effect + rng.normal(0, 0.2, len(document))) * tokens, tokens, document


def test_of_independent_sequences_it_is_the_textbook_error() -> None:
    values = np.random.default_rng(0).normal(size=40)
    got = clustered_mean(values)
    assert got.value == pytest.approx(values.mean())
    assert got.se == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert (got.documents, got.effective) == (40, pytest.approx(40))
    assert got.margin(0.05) == pytest.approx(stats.t.isf(0.025, 39) * got.se)


def test_it_is_the_jackknife_over_documents() -> None:
    nats, tokens, document = documents_of_unlike_length(np.random.default_rng(1), 12)
    without = [nats[document != g].sum() / tokens[document != g].sum() for g in np.unique(document)]
    whole = nats.sum() / tokens.sum()
    brute = math.sqrt(11 / 12 * np.square(np.array(without) - whole).sum())
    assert clustered_ratio(nats, tokens, document).se == pytest.approx(brute)


def test_copies_of_sequences_add_nothing() -> None:
    # Ten copies of a document are one document ten times as long: the same error, not a third.
    values = np.random.default_rng(2).normal(size=30)
    once = clustered_mean(values)
    copied = clustered_mean(np.repeat(values, 10), np.repeat(np.arange(30), 10))
    assert copied.se == pytest.approx(once.se)
    assert copied.error == pytest.approx(once.error)
    assert clustered_mean(np.repeat(values, 10)).se < 0.4 * once.se


@pytest.mark.parametrize("n", [6, 12, 40])
def test_two_errors_cover_what_they_promise(n: int) -> None:
    # 1,500 samples of n documents, 95.4 % promised; the standard error of a share is 0.6 %. Ratio
    # estimates of few unlike documents are a little skewed: 2.5 % are allowed for that.
    rng, hits, alone = np.random.default_rng(n), 0, 0
    for _ in range(1500):
        nats, tokens, document = documents_of_unlike_length(rng, n)
        clustered = clustered_ratio(nats, tokens, document)
        hits += abs(clustered.value - 2.0) <= 2 * clustered.error
        alone += abs(clustered.value - 2.0) <= 2 * clustered_ratio(nats, tokens).error
    assert hits / 1500 > 0.93
    assert alone / 1500 < 0.75  # what taking the pieces for independent would have covered


def test_few_documents_are_said_to_be_few() -> None:
    one = clustered_mean([1.0, 2.0, 3.0], [7, 7, 7])
    assert math.isnan(one.se)
    assert one.documents == 1
    assert "one document:" in str(few_documents_note(one))
    assert not one.differs()
    # A hundred pieces, but nearly all of one document.
    lopsided = clustered_mean(np.arange(100.0), [0] * 90 + list(range(1, 11)))
    assert lopsided.documents == 11
    note = few_documents_note(lopsided)
    assert note is not None
    assert "11 documents" in note
    assert few_documents_note(clustered_mean(np.arange(30.0))) is None


def test_what_is_not_finite_has_no_error_and_differs_from_nothing() -> None:
    got = clustered_ratio([np.inf, 1.0, 2.0], [1, 1, 1])
    assert got.value == math.inf
    assert math.isnan(got.error)
    assert not got.differs()
