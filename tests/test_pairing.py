"""A posterior is about its own sequences: of another corpus, order or content it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import ltm_pyro as ltm
from ltm_pyro.diagnostics.collapse import collapse_panel
from ltm_pyro.plots import score_panel

ORACLE = ltm.LinearGaussian(torch.eye(4, dtype=torch.float64), 0.5, shape=(2, 2))


def batch_of(corpus: str | None, seed: int) -> ltm.Batch:
    return replace(ORACLE.simulate(6, seed=seed), corpus=corpus)


def infer(batch: ltm.Batch) -> ltm.Posterior:
    return ltm.DualRateSVI(ORACLE, ltm.build_guide("mean_field", ORACLE)).infer(batch, steps=4)


PAIRS: dict[str, Callable[[ltm.Posterior, ltm.Batch], object]] = {
    "evaluate": lambda post, batch: ltm.evaluate(ORACLE, post, batch, draws=4),
    "importance_bound": lambda post, batch: ltm.importance_bound(ORACLE, post, batch),
    "diagnose": lambda post, batch: ltm.diagnose(ORACLE, post, batch, draws=100, chains=0),
    "annealed_bound": lambda post, batch: ltm.annealed_bound(ORACLE, batch, start=post),
    "export": lambda post, batch: ltm.to_datatree(post, batch),
}


@pytest.mark.parametrize("name", PAIRS)
def test_ids_that_coincide_are_not_enough(name: str) -> None:
    post = infer(batch_of("one", seed=0))
    with pytest.raises(ltm.InputError, match=r"other sequences.*corpora"):
        PAIRS[name](post, batch_of("two", seed=1))
    # Made by hand, without a fingerprint: the sequences themselves are compared.
    with pytest.raises(ltm.InputError, match="other sequences"):
        PAIRS[name](infer(batch_of(None, seed=0)), batch_of(None, seed=1))


def test_a_prefix_is_of_the_same_sequences() -> None:
    batch = batch_of("one", seed=0)
    assert ltm.evaluate(ORACLE, infer(batch), batch, draws=4).attrs["corpus"] == "one"
    infer(batch.prefix(2)).refuse_other_batch(batch)


def test_scores_of_another_corpus_are_refused() -> None:
    one, two = batch_of("one", seed=0), batch_of("two", seed=1)
    post, other = infer(one), infer(two)
    scores, others = (ltm.evaluate(ORACLE, q, b, draws=4) for q, b in ((post, one), (other, two)))
    for pair in (
        lambda: collapse_panel(post, others),
        lambda: score_panel(scores, others),
        lambda: ltm.to_datatree(post, one, scores=others),
    ):
        with pytest.raises(ltm.InputError, match="corpora"):
            pair()
