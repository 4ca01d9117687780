"""A mixture of Markov chains, with every probability exact.

    class c ~ Categorical(weights)                          one per sequence
    x_1 .. x_k | c ~ initial[c]                             k-tuples; the chain's stationary law
    x_t | x_(t-k) .. x_(t-1), c ~ transitions[c]            t > k

The class is what a latent thought can carry: a reader of the whole sequence finds it out, a
predictor that sees the last few tokens only cannot. Both likelihoods are sums over C classes, so
the room that a latent-variable model has above a windowed autoregressive one is known exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError

Array = NDArray[np.float64]

MOST_STATES = 4096
_FLOOR = 1e-3  # share of the uniform in every row: no transition is impossible
_STATIONARY_TOLERANCE = 5e-14  # rounding alone moves slow chains by about 1e-14 a step
_STATIONARY_STEPS = 100_000  # enough for any chain with that floor at order 1


@dataclass(frozen=True, eq=False)
class MarkovMixture:
    """C stationary Markov chains of order k over V symbols.

    The state (a_1, .., a_k), a_k the latest, has the index sum_i a_i V^(k-i).

    Attributes:
        weights: (C,) probability of each class.
        initial: (C, V^k) probability that a sequence of the class starts with each k-tuple; must be
            stationary under `transitions`.
        transitions: (C, V^k, V) probability of the next symbol after each k-tuple.

    Raises:
        InputError: if the shapes disagree, a probability is not positive, a distribution does not
            sum to 1, or `initial` is not stationary.
    """

    weights: Array
    initial: Array
    transitions: Array

    def __post_init__(self) -> None:
        if self.transitions.ndim != 3 or self.initial.shape != self.transitions.shape[:2]:
            raise InputError("transitions must be (C, V^k, V) and initial (C, V^k)")
        if self.weights.shape != self.initial.shape[:1]:
            raise InputError("weights must be (C,), one per chain")
        if self.symbols**self.order != self.initial.shape[1]:
            raise InputError("the states of a chain must be all k-tuples of its symbols")
        for name in ("weights", "initial", "transitions"):
            value: Array = getattr(self, name)
            if not (value > 0).all() or not np.allclose(value.sum(-1), 1, rtol=0, atol=1e-9):
                raise InputError(f"{name} must be positive and sum to 1 over the last axis")
        if not np.allclose(_advance(self.initial, self.transitions), self.initial, atol=1e-9):
            raise InputError("initial must be the stationary distribution of transitions")

    @classmethod
    def random(
        cls, classes: int, symbols: int, order: int, concentration: float, seed: int
    ) -> MarkovMixture:
        """Chains with independent Dirichlet rows and equal weights.

        Args:
            classes: C, 1 or more.
            symbols: V, 2 or more; V^k is at most 4096.
            order: k, 1 or more.
            concentration: Of the symmetric Dirichlet; small values make chains that differ more.
            seed: 0 or more.
        """
        whole_number("classes", classes, at_least=1)
        whole_number("symbols", symbols, at_least=2)
        whole_number("order", order, at_least=1)
        whole_number("seed", seed, at_least=0)
        # Compared as logarithms: the power itself could be astronomically large.
        if order * math.log(symbols) > math.log(MOST_STATES) + 1e-9:
            raise InputError(
                f"{symbols} symbols at order {order} make more than {MOST_STATES} states: lower "
                "symbols or order"
            )
        if not (isinstance(concentration, int | float) and 0 < concentration < math.inf):
            raise InputError(f"concentration is {concentration!r}: must be a number above 0")
        rng = np.random.default_rng([seed, 0])
        rows = rng.dirichlet(np.full(symbols, concentration), size=(classes, symbols**order))
        transitions = (1 - _FLOOR) * rows + _FLOOR / symbols
        weights = np.full(classes, 1 / classes)
        return cls(weights, _stationary(transitions), transitions)

    @property
    def classes(self) -> int:
        """C."""
        return len(self.weights)

    @property
    def symbols(self) -> int:
        """V."""
        return int(self.transitions.shape[2])

    @property
    def order(self) -> int:
        """The order k."""
        return round(math.log(self.initial.shape[1]) / math.log(self.symbols))

    def simulate(
        self, n: int, length: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draws `n` sequences of T = `length` symbols: symbols (n, T), and classes (n,)."""
        rng = np.random.default_rng([seed, 1])  # a stream apart from that of the chains
        labels = _draw(np.broadcast_to(np.cumsum(self.weights), (n, self.classes)), rng)
        state = np.empty(n, dtype=np.int64)
        uniforms = rng.random(n)
        for c, cumulative in enumerate(np.cumsum(self.initial, -1)):
            rows = labels == c
            state[rows] = np.searchsorted(cumulative, uniforms[rows], side="right")
        state = np.minimum(state, self.initial.shape[1] - 1)  # the sum may round to below 1
        powers = self.symbols ** np.arange(self.order - 1, -1, -1)
        columns = list((state[:, None] // powers % self.symbols).T)
        cumulative = np.cumsum(self.transitions, -1)
        while len(columns) < length:
            symbol = _draw(cumulative[labels, state], rng)
            state = (state * self.symbols + symbol) % self.initial.shape[1]
            columns.append(symbol)
        return np.stack(columns[:length], axis=1), labels

    def log_likelihood(self, batch: Batch) -> Tensor:
        """Exact log p(x), (B,) float64, nats per sequence: a sum over the classes.

        Where the mask covers only the start of a sequence, the likelihood of that start; a mask
        with gaps is refused, and so are another corpus's symbols.
        """
        return _like(_log_sum_exp(self._joint(batch)), batch)

    def class_posterior(self, batch: Batch) -> Tensor:
        """Exact p(c | x), (B, C) float64; of the start where the mask covers only that."""
        joint = self._joint(batch)
        return _like(np.exp(joint - _log_sum_exp(joint)).T, batch)

    def window_log_likelihood(self, batch: Batch, window: int = 1) -> Tensor:
        """Log-likelihood (B,), float64, nats per sequence, of the best predictor with a window.

        It knows the process, and predicts each symbol from the last `window` ones alone. Since the
        chains are stationary, its place in the sequence tells it nothing more.

        Args:
            batch: B sequences; as in `log_likelihood`.
            window: Symbols that it sees, at least k.
        """
        whole_number("window", window, at_least=self.order)
        x, mask = self._checked(batch)
        # upto[..., t] is log p(x_1 .. x_t | c), (C, B, T + 1).
        upto = np.pad(np.cumsum(self._token_log_probs(x), -1), ((0, 0), (0, 0), (1, 0)))
        seen, with_next = upto[..., :-1].copy(), upto[..., 1:].copy()
        late = np.arange(window + 1, x.shape[1])  # positions whose window leaves symbols out
        if late.size:
            start = late - window
            first = np.log(self.initial)[:, self._states(x)[:, start]]
            dropped = upto[..., start + self.order] - first
            seen[..., late] -= dropped
            with_next[..., late] -= dropped
        prior = np.log(self.weights)[:, None, None]
        conditional = _log_sum_exp(prior + with_next) - _log_sum_exp(prior + seen)
        return _like(np.where(mask, conditional, 0).sum(-1), batch)

    def _joint(self, batch: Batch) -> Array:
        """The log of p(c, x), (C, B)."""
        x, mask = self._checked(batch)
        by_class = np.where(mask, self._token_log_probs(x), 0).sum(-1)
        return np.log(self.weights)[:, None] + by_class

    def _token_log_probs(self, x: NDArray[np.int64]) -> Array:
        """The log of p(x_t | x_1 .. x_(t-1), c), (C, B, T)."""
        length, k = x.shape[1], self.order
        columns = []
        context = np.zeros(len(x), dtype=np.int64)
        before = np.ones((self.classes, 1))
        for t in range(min(k, length)):
            after = self.initial.reshape(self.classes, self.symbols ** (t + 1), -1).sum(-1)
            conditional = after.reshape(self.classes, -1, self.symbols) / before[..., None]
            columns.append(np.log(conditional)[:, context, x[:, t]])
            context, before = context * self.symbols + x[:, t], after
        start = np.stack(columns, axis=-1)
        if length <= k:
            return start
        rest = np.log(self.transitions)[:, self._states(x)[:, : length - k], x[:, k:]]
        return np.concatenate([start, rest], axis=-1)

    def _states(self, x: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the k-tuple that starts at each position, (B, T - k + 1)."""
        tuples = np.lib.stride_tricks.sliding_window_view(x, self.order, axis=1)
        return tuples @ (self.symbols ** np.arange(self.order - 1, -1, -1))

    def _checked(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Symbols (B, T), 0 where masked, and mask (B, T)."""
        x, mask = batch.observed.cpu().numpy(), batch.mask.cpu().numpy()
        if x.dtype.kind != "i":
            raise InputError(f"x of this batch is {x.dtype}: the chains emit whole numbers")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise InputError(
                "the mask has gaps: the exact likelihood is that of the start of a sequence; take "
                "the difference of two for what follows"
            )
        x = np.where(mask, x, 0)
        if x.size and (x.min() < 0 or x.max() >= self.symbols):
            raise InputError(f"x has symbols outside 0 .. {self.symbols - 1}: another corpus's?")
        return x, mask


def _stationary(transitions: Array) -> Array:
    """Stationary distribution (C, V^k) of chains (C, V^k, V), by power iteration."""
    law = np.full(transitions.shape[:2], 1 / transitions.shape[1])
    for _ in range(_STATIONARY_STEPS):
        following = _advance(law, transitions)
        change = np.abs(following - law).max()
        law = following / following.sum(-1, keepdims=True)
        if change <= _STATIONARY_TOLERANCE:
            break
    return law


def _advance(law: Array, transitions: Array) -> Array:
    """The law (C, V^k) of the k-tuple one symbol later: the oldest symbol is summed out."""
    classes, states, symbols = transitions.shape
    by_oldest = (classes, symbols, states // symbols)
    moved = (law.reshape(by_oldest)[..., None] * transitions.reshape(*by_oldest, -1)).sum(1)
    return moved.reshape(classes, states)


def _draw(cumulative: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """One index (n,) per row of cumulative probabilities (n, V)."""
    index = (cumulative <= rng.random((len(cumulative), 1))).sum(-1)
    # The sum may round to below 1.
    return np.minimum(index, cumulative.shape[1] - 1)


def _log_sum_exp(values: Array) -> Array:
    """Over the first axis, the classes."""
    return np.logaddexp.reduce(values, axis=0)


def _like(values: Array, batch: Batch) -> Tensor:
    return torch.from_numpy(values).to(batch.device)
