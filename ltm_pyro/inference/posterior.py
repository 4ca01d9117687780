"""The fitted posterior of a batch: what inference hands to scores, export and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pandas as pd
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import refuse_other_batch, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import exclusive
from ltm_pyro.errors import InputError, shown
from ltm_pyro.html import show
from ltm_pyro.models.marginals import quantiles, summary
from ltm_pyro.models.row_selection import rows_of, select_rows
from ltm_pyro.random import Noise, draw, fresh_seed

_SHOWN = 5  # sequences in a notebook
KL_DRAWS = 256
"""Draws for a KL that has no closed form."""


@dataclass(frozen=True)
class FastTrace:
    """What happened in a fast loop, per fast step and sequence.

    Attributes:
        elbo: (T_fast, B) ELBO estimates in nats at the parameters before each step, at the draws
            that the step used, KL weight 1, whatever the objective. Noisy; with `noise="fixed"`
            not a bound. Of a point mass the log joint, which is no bound either.
        nll: (T_fast, B) its reconstruction part, -log p(x | z).
        kl: (T_fast, B) its KL part; of a point mass -log p(z).
        lr: (T_fast,) learning rates.
        grad_norm: (T_fast, B) Euclidean norms of the local gradients.
    """

    elbo: Tensor
    nll: Tensor
    kl: Tensor
    lr: Tensor
    grad_norm: Tensor


TRACED = ("elbo", "nll", "kl", "grad_norm")
"""What `FastTrace` holds of each sequence."""


@dataclass(frozen=True, repr=False)
class Posterior:
    """q(z_i) for each sequence of a batch.

    Attributes:
        distribution: Batch shape (B,), event shape (K, D); carries no gradient.
        prior: p(z), event shape (K, D).
        ids: (B,) the sequences' stable ids.
        mask: (B, T) the positions that q was fitted to.
        family: Name of the guide family.
        has_density: False for a point mass.
        parameters: The local variational parameters by name, each (B, ...).
        trace: The fast loop's course, if it ran.
        closed_form_kl: (B,) KL(q || prior), where the family has a closed form.
        own_draw_elbo: (B,) with `noise="fixed"`: the ELBO on the draws that fitted q. NOT a bound;
            `score_on_own_draws` shows it beside the honest value.
        objective: What q was fitted by, with its options, e.g. `elbo(particles=1)`; empty for a q
            that no objective fitted.
        objective_kl: How the objective got its KL: `analytic`, `monte_carlo`, `none` for a point
            mass, `unknown` for an ELBO object of another's making.
        optimizer: What moved the local parameters: `natural`, `adam`, or both and which.
        corpus: Fingerprint of the corpus that the ids belong to, as in `Batch`.
        x: (B, T) the sequences that q was fitted to, where known.
        covariates: Their covariates by name, each (B, ...).
        kl_estimator: Of `kl`: `analytic`, or `monte_carlo` where the family has no closed form.
    """

    distribution: TorchDistribution
    prior: TorchDistribution
    ids: Tensor
    mask: Tensor
    family: str
    has_density: bool = True
    parameters: dict[str, Tensor] = field(default_factory=dict)
    trace: FastTrace | None = None
    closed_form_kl: Tensor | None = None
    own_draw_elbo: Tensor | None = None
    objective: str = ""
    objective_kl: str = "unknown"
    optimizer: str = ""
    corpus: str | None = None
    x: Tensor | None = None
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    kl_estimator: str = field(init=False)

    def __post_init__(self) -> None:
        estimated = self.closed_form_kl is None and self.has_density
        object.__setattr__(self, "kl_estimator", "monte_carlo" if estimated else "analytic")

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __repr__(self) -> str:
        kl = self.closed_form_kl
        told = "" if kl is None or not len(kl) else f", KL {float(kl.mean()):.4g} nats per sequence"
        fitted = f" by {self.objective}" if self.objective else ""
        return (
            f"Posterior({self.family}{fitted}: {len(self)} sequences, z "
            f"{tuple(self.distribution.event_shape)}{told})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "family": self.family if self.has_density else f"{self.family}, a point mass",
            "fitted by": f"{self.objective or 'nothing'}, its KL {self.objective_kl}",
            "z (K, D)": tuple(self.distribution.event_shape),
            "of corpus": self.corpus or "none: made by hand",
        }
        first = slice(min(len(self), _SHOWN))
        columns = {"mean of |z|": self.mean.abs().mean((1, 2)), "sd": self.sd.mean((1, 2))}
        if self.closed_form_kl is not None:
            columns["KL, nats"] = self.closed_form_kl
        ids = pd.Index(self.ids[first].tolist(), name="id")
        table = pd.DataFrame({k: v[first].tolist() for k, v in columns.items()}, index=ids)
        more = len(self) - len(table)
        return show(repr(self), facts, tables=[table], notes=[f"{more} more"] if more else [])

    @exclusive
    @torch.no_grad()
    def sample(self, draws: int, seed: int | None = None) -> Tensor:
        """Independent draws, (S, B, K, D).

        Noise belongs to a sequence's id: its draws are the same in any batch, and the first ones
        the same however many are asked for.

        Args:
            draws: S.
            seed: Of the noise; from torch's global random generator by default.
        """
        draws = whole_number("draws", draws, at_least=1)
        seed = fresh_seed() if seed is None else whole_number("seed", seed, at_least=0)
        return draw(self.distribution, Noise(seed, self.ids), draws)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z) in nats, z (..., B, K, D) to (..., B).

        Raises:
            InputError: if z is of another shape.
        """
        thoughts = tuple(self.distribution.event_shape)
        if not isinstance(z, Tensor) or z.shape[-2:] != thoughts:
            found = tuple(z.shape) if isinstance(z, Tensor) else shown(z)
            raise InputError(
                f"z is {found}: must be a tensor (..., B, K, D) with (K, D) {thoughts}"
            )
        return self.distribution.log_prob(z)

    @property
    def mean(self) -> Tensor:
        """E_q[z], (B, K, D)."""
        return self.distribution.mean

    @property
    def sd(self) -> Tensor:
        """Standard deviation of z under q, dimension by dimension, (B, K, D); 0 of a point mass."""
        return self.distribution.stddev

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Quantiles of z, dimension by dimension: (B, K, D), or (Q, B, K, D) for a list.

        Exact where each dimension is normal, and of a point mass the point; elsewhere from
        `marginals.DRAWS` draws, always the same.

        Args:
            q: Between 0 and 1.

        Raises:
            InputError: if it is not.
        """
        return quantiles(self.distribution, self.ids, q)

    def summary(self, prob: float = 0.94, kind: str = "eti") -> pd.DataFrame:
        """Mean, standard deviation and interval of each dimension of each thought, as in ArviZ.

        Args:
            prob: What the interval holds.
            kind: `eti`, as much on either side of it; or `hdi`, the shortest.

        Returns:
            A row for each `sequence` (its id), `thought` and `dim`; columns `mean`, `sd`, and the
            interval's ends, named as ArviZ does, e.g. `eti_3%` and `eti_97%`.

        Raises:
            InputError: if `prob` is not between 0 and 1, or `kind` another.
        """
        return summary(self.distribution, self.ids, prob, kind)

    def __getitem__(self, which: Any) -> Posterior:
        """The posterior of some sequences.

        Args:
            which: One place (`post[3]`) or a slice of them; or the stable ids of sequences, as a
                list or an array (`post[batch.ids[:2]]`), in any order.

        Raises:
            InputError: if there is no such place or id.
        """
        rows = rows_of(which, self.ids)
        chosen = {
            f.name: _at(rows, getattr(self, f.name), len(self))
            for f in fields(self)
            if f.init and f.name not in ("distribution", "prior", "trace")
        }
        steps = {n: getattr(self.trace, n)[:, rows] for n in TRACED} if self.trace else {}
        trace = self.trace and replace(self.trace, **steps)
        q = select_rows(self.distribution, rows)
        return replace(self, distribution=q, trace=trace, **chosen)

    def __iter__(self) -> Iterator[Posterior]:
        """The posterior of each sequence in turn."""
        return (self[row] for row in range(len(self)))

    @exclusive
    @torch.no_grad()
    def kl(self) -> Tensor:
        """KL(q || prior) per sequence in nats, (B,); infinite for a point mass.

        Closed form where there is one, else the mean over `KL_DRAWS` fresh draws; `kl_estimator`
        tells which.
        """
        if not self.has_density:
            return torch.full(self.ids.shape, torch.inf, device=self.ids.device)
        if self.closed_form_kl is not None:
            return self.closed_form_kl
        z = self.sample(KL_DRAWS)
        return (self.log_prob(z) - self.prior.log_prob(z)).mean(0)

    def refuse_other_batch(self, batch: Batch, name: str = "the posterior") -> None:
        """Refuses a batch that q is not about; it may score other positions.

        Raises:
            InputError: if the batch holds other sequences, or in another order.
        """
        refuse_other_batch(self, batch, name)


def _at(rows: Tensor, value: Any, size: int) -> Any:
    """The rows of tensors that hold one for each of `size` sequences; all else as it is."""
    if isinstance(value, Mapping):
        return {name: _at(rows, inner, size) for name, inner in value.items()}
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
