"""The mixture of Markov chains: its likelihoods against brute force, its draws against itself."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import EXACT, GOF, MC

from ltm_pyro.data import Batch, MarkovMixture, MixtureCorpus, SymbolTokenizer, load_corpus
from ltm_pyro.errors import InputError


def small(order: int, symbols: int = 3, classes: int = 2, seed: int = 0) -> MarkovMixture:
    process = MarkovMixture.random(classes, symbols, order, concentration=0.5, seed=seed)
    weights = np.arange(1.0, classes + 1)
    return replace(process, weights=weights / weights.sum())


def all_sequences(symbols: int, length: int) -> Batch:
    rows = list(itertools.product(range(symbols), repeat=length))
    return Batch(torch.tensor(rows))


def brute_force(process: MarkovMixture, x: list[int]) -> list[float]:
    """p(c, x) for each class, by the definition and one symbol after another."""
    k, v = process.order, process.symbols
    joint = []
    for c in range(process.classes):
        if len(x) < k:  # the first symbols of all k-tuples that start like x
            tails = itertools.product(range(v), repeat=k - len(x))
            p = sum(process.initial[c, number([*x, *tail], v)] for tail in tails)
        else:
            p = process.initial[c, number(x[:k], v)]
            for t in range(k, len(x)):
                p *= process.transitions[c, number(x[t - k : t], v), x[t]]
        joint.append(float(process.weights[c] * p))
    return joint


def number(digits: list[int], base: int) -> int:
    return sum(d * base**i for i, d in enumerate(reversed(digits)))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_likelihood_and_posterior_are_those_of_the_definition(order: int, length: int) -> None:
    process = small(order)
    batch = all_sequences(3, length)
    exact = [brute_force(process, row) for row in batch.observed.tolist()]
    joint = torch.tensor(exact, dtype=torch.float64)
    EXACT.assert_close(process.log_likelihood(batch), joint.sum(-1).log())
    EXACT.assert_close(process.class_posterior(batch), joint / joint.sum(-1, keepdim=True))
    total = process.log_likelihood(batch).exp().sum()
    EXACT.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2])
def test_the_chain_rule_holds(order: int) -> None:
    # log p(x_1..n) as a mask on the longer sequence equals that of the shorter one, and summing
    # the longer ones over what follows gives the shorter one back.
    process = small(order)
    batch = all_sequences(3, 4)
    for n in (1, 2, 3):
        masked = process.log_likelihood(batch.prefix(n))
        cut = process.log_likelihood(Batch(batch.observed[:, :n]))
        EXACT.assert_close(masked, cut)
        shorter = process.log_likelihood(all_sequences(3, n))
        summed = process.log_likelihood(batch).reshape(3**n, -1).logsumexp(-1)
        EXACT.assert_close(summed, shorter)


def test_an_empty_mask_leaves_the_prior() -> None:
    process = small(1)
    x = torch.zeros(2, 4, dtype=torch.int64)
    batch = Batch(x, torch.zeros(2, 4, dtype=torch.bool))
    EXACT.assert_close(process.log_likelihood(batch), torch.zeros(2, dtype=torch.float64))
    weights = torch.from_numpy(process.weights)
    EXACT.assert_close(process.class_posterior(batch), weights.expand(2, -1))


def brute_force_window(process: MarkovMixture, x: list[int], window: int) -> float:
    """Each symbol from the last `window` by Bayes' rule, the windows taken as fresh sequences."""
    total = 0.0
    for t in range(len(x)):
        seen = x[max(0, t - window) : t]
        p_seen = sum(brute_force(process, seen)) if seen else 1.0
        total += math.log(sum(brute_force(process, [*seen, x[t]])) / p_seen)
    return total


@pytest.mark.parametrize(("order", "window"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)])
def test_the_best_windowed_predictor(order: int, window: int) -> None:
    process = small(order)
    batch = all_sequences(3, 5)
    exact = [brute_force_window(process, row, window) for row in batch.observed.tolist()]
    actual = process.window_log_likelihood(batch, window)
    EXACT.assert_close(actual, torch.tensor(exact, dtype=torch.float64))
    # It predicts, so it too is a distribution over sequences.
    EXACT.assert_close(actual.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    masked = process.window_log_likelihood(batch.prefix(4), window)
    EXACT.assert_close(masked, process.window_log_likelihood(Batch(batch.observed[:, :4]), window))


def test_no_other_windowed_predictor_is_better() -> None:
    # Averaged over all sequences: perturbed conditional tables lose, at every position.
    process = small(1)
    batch = all_sequences(3, 4)
    p = process.log_likelihood(batch).exp()
    best = float(p @ process.window_log_likelihood(batch, 1))
    rng = np.random.default_rng(0)
    pair = np.einsum("c,cs,csv->sv", process.weights, process.initial, process.transitions)
    x = batch.observed.numpy()

    def score(table: np.ndarray) -> float:
        first = np.log(pair.sum(1))[x[:, 0]]
        rest = np.log(table / table.sum(1, keepdims=True))[x[:, :-1], x[:, 1:]].sum(1)
        return float(p.numpy() @ (first + rest))

    assert score(pair) == pytest.approx(best, abs=1e-9)
    for _ in range(20):
        assert score(pair * rng.uniform(0.7, 1.3, pair.shape)) < best


def test_a_full_window_is_the_exact_likelihood() -> None:
    process = small(2)
    batch = all_sequences(3, 5)
    exact = process.log_likelihood(batch)
    for window in (5, 100):
        EXACT.assert_close(process.window_log_likelihood(batch, window), exact)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_chains_start_in_their_stationary_law(order: int) -> None:
    process = MarkovMixture.random(4, 4, order, concentration=0.05, seed=3)
    for c in range(4):
        matrix = np.zeros((4**order, 4**order))
        for s, state in enumerate(itertools.product(range(4), repeat=order)):
            for b in range(4):
                matrix[s, number([*state[1:], b], 4)] += process.transitions[c, s, b]
        np.testing.assert_allclose(process.initial[c] @ matrix, process.initial[c], atol=1e-12)
    assert process.order == order


def test_draws_follow_the_process() -> None:
    process = small(2, symbols=2)
    x, labels = process.simulate(40_000, 4, seed=0)
    batch = all_sequences(2, 4)
    expected = process.log_likelihood(batch).exp().numpy()
    counts = np.bincount(x @ [8, 4, 2, 1], minlength=16)
    GOF.assert_fits(stats.chisquare(counts, expected * len(x)).pvalue)
    share = float((labels == 1).mean())
    MC.assert_close(share, math.sqrt(2 / 9 / len(x)), process.weights[1])
    short, _ = process.simulate(5, 1, seed=0)
    assert short.shape == (5, 1)


def test_the_posterior_is_calibrated() -> None:
    corpus = load_corpus("mixture", seq_len=8, classes=3, concentration=1.0, n_sequences=20_000)
    assert isinstance(corpus, MixtureCorpus)
    batch = corpus.train.batch(slice(None))
    posterior = corpus.class_posterior(batch)
    right = (posterior.argmax(-1) == corpus.classes_of(batch)).double()
    confidence = posterior.max(-1).values
    error = float((confidence * (1 - confidence)).sum().sqrt()) / len(batch)
    MC.assert_close(float(right.mean()), error, float(confidence.mean()))


@pytest.mark.parametrize("seed", range(3))
def test_the_default_leaves_room_for_a_latent(seed: int) -> None:
    corpus = load_corpus("mixture", seq_len=64, seed=seed)
    batch = corpus.val.batch(slice(None))
    gap = corpus.log_likelihood(batch) - corpus.window_log_likelihood(batch, window=1)
    assert gap.dtype == torch.float64
    assert float(gap.mean()) == pytest.approx(45, abs=4)
    assert corpus.classes_of(batch).unique().tolist() == list(range(8))


def test_the_corpus_is_an_ordinary_one() -> None:
    corpus = load_corpus("mixture", seq_len=10, n_sequences=500, symbols=5, seed=2, classes=3)
    assert isinstance(corpus.tokenizer, SymbolTokenizer)
    assert corpus.vocab_size == 5
    assert corpus.n_tokens == 5_000
    assert [len(part) for part in (corpus.train, corpus.val, corpus.test)] == [450, 25, 25]
    assert corpus.weights.shape == (3,)
    assert corpus.initial.shape == (3, 5)
    assert corpus.transitions.shape == (3, 5, 5)
    facts = json.loads(json.dumps(corpus.describe()))
    assert facts["settings"]["classes"] == 3
    assert facts["unit"] == "token"
    assert repr(corpus).startswith("MixtureCorpus(mixture: 5000 tokens by symbols-5")
    same = load_corpus("mixture", seq_len=10, **{**facts["settings"]})
    assert same.sha256 == corpus.sha256
    assert same.val.ids.tolist() == corpus.val.ids.tolist()
    other = load_corpus("mixture", seq_len=10, **{**facts["settings"], "seed": 3})
    assert other.sha256 != corpus.sha256
    assert load_corpus("mixture", tokenizer=SymbolTokenizer(16)).vocab_size == 16


def test_labels_belong_to_ids() -> None:
    corpus = load_corpus("mixture", seq_len=10, n_sequences=100)
    batch = corpus.train.batch([3, 0])
    assert corpus.classes_of(batch).tolist() == corpus.labels[batch.ids.numpy()].tolist()
    assert batch.metadata["class"].tolist() == corpus.classes_of(batch).tolist()
    for wrong in (-1, 100):
        with pytest.raises(InputError, match=r"ids outside 0 \.\. 99"):
            corpus.classes_of(Batch(batch.observed, ids=torch.tensor([0, wrong])))


def test_batches_that_cannot_be_scored() -> None:
    process = small(2)
    x = torch.tensor([[0, 1, 2, 0]])
    with pytest.raises(InputError, match="mask has gaps"):
        process.log_likelihood(Batch(x, torch.tensor([[True, False, True, True]])))
    with pytest.raises(InputError, match=r"outside 0 \.\. 2"):
        process.log_likelihood(Batch(x + 1))
    with pytest.raises(InputError, match="whole numbers"):
        process.log_likelihood(Batch(x.float()))
    with pytest.raises(InputError, match="no x"):
        process.log_likelihood(Batch(x).unobserved())
    for window in (1, 0, 2.5):
        with pytest.raises(InputError, match="window is"):
            process.window_log_likelihood(Batch(x), window)  # type: ignore[arg-type]
    # What is masked may be anything.
    masked = Batch(torch.tensor([[0, 1, 99, 99]]), torch.tensor([[True, True, False, False]]))
    EXACT.assert_close(process.log_likelihood(masked), process.log_likelihood(Batch(x[:, :2])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"symbols": 1}, "symbols is 1"),
        ({"order": 0}, "order is 0"),
        ({"order": 10**9}, "more than 4096 states"),
        ({"symbols": 17, "order": 3}, "more than 4096 states"),
        ({"n_sequences": 2}, "n_sequences is 2"),
        ({"concentration": 0}, "concentration is 0"),
        ({"concentration": "high"}, "concentration is 'high'"),
        ({"fractions": (1, 0, 0)}, "fractions are"),
        ({"class": 3}, "did you mean 'classes'"),
        ({"vocab_size": 3}, "unknown option of corpus 'mixture'"),
        ({"tokenizer": "bpe"}, "leave the tokenizer out"),
        ({"tokenizer": SymbolTokenizer(3)}, "leave the tokenizer out"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_corpus("mixture", **{"n_sequences": 10, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones(3) / 3}, "one per chain"),
        ({"weights": np.array([1.0, 0.0])}, "weights must be positive"),
        ({"initial": np.full((2, 9), 1 / 9)}, "stationary"),
        ({"initial": np.full((2, 8), 1 / 8)}, "must be"),
        ({"transitions": np.full((2, 9, 4), 1 / 4)}, "all k-tuples"),
    ],
)
def test_arrays_that_are_no_process(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(small(2), **change)


def test_probability_zero_symbols_do_not_occur() -> None:
    process = MarkovMixture.random(2, 16, 1, concentration=1e-3, seed=0)
    assert process.transitions.min() > 0
    x, _ = process.simulate(100, 20, seed=1)
    assert torch.isfinite(process.log_likelihood(Batch(torch.from_numpy(x)))).all()
