"""Does the model use its thoughts? The collapse panel.

A latent is collapsed where q(z_i) no longer depends on the sequence. No single number shows that:
a high KL does not prove use, so the panel puts beside it how much the text suffers when each
sequence is given another's thoughts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from ltm_pyro.checks import refuse_other_sequences
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of, few_documents_note
from ltm_pyro.diagnostics.information import TIGHT, measured
from ltm_pyro.diagnostics.marginals import moments
from ltm_pyro.errors import InputError
from ltm_pyro.html import show
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.random import Stream, derive_seed, seeded

ACTIVE_VARIANCE = 0.01
"""A dimension of z is active if its posterior mean varies over sequences by at least this
(Burda, Grosse & Salakhutdinov 2016, section 5.2)."""


@dataclass(frozen=True, eq=False, repr=False)
class CollapsePanel:
    """How much q(z_i) says, and how much of it the decoder hears. Nats per sequence.

    Attributes:
        n_sequences: N, sequences that the panel is about.
        n_documents: That they are pieces of; `None` where documents are not known.
        draws: S, draws per sequence for the mutual information.
        kl: Mean KL(q(z_i) || prior).
        kl_se: Its error over documents: two on either side hold 95 %.
        kl_estimator: `analytic` or `monte_carlo`.
        kl_per_thought: (K,) mean KL of each thought vector by itself; `nan` where unknown. Against
            a prior of independent thoughts their sum is at most `kl`, and less where thoughts lean
            on each other under q.
        kl_per_layer: (L,) the same of each layer's thoughts together; empty without layers.
        kl_per_block_kind: Of these two: `exact`, `monte carlo`, `at least` or `unknown`; see
            `information`.
        active_units: Dimensions of z whose posterior mean has a variance over sequences of at least
            `ACTIVE_VARIANCE`.
        n_units: K D.
        mutual_information: Between text and z under q, from below; see `information`. With its
            Monte Carlo standard error given these sequences, `_se`, and the bound from above,
            `_upper`, `nan` where that is not known; and `_per_thought` (K,) and `_per_layer` (L,),
            the same of each by itself.
        mutual_information_is: `estimate`; `at least` where the bound from above is not near: N
            sequences then show no more than that.
        mutual_information_cap: Which no value can exceed; log N for N texts.
        mutual_information_counts: Whether the noise of the fast loop counts as information.
        mutual_information_per_block_kind: `monte carlo`, `at least` or `unknown`.
        kl_aggregate: KL(q_agg || prior), q_agg the mixture of all q: `kl` less what z tells apart
            under these fits. A decoder can exploit it without telling sequences apart.
        kl_aggregate_is: `estimate`, or `at most` where the mutual information is `at least`.
        penalty_z0: Mean of -log p(x | z = 0) minus that at the sequence's own draws.
        penalty_shuffled: The same with the thoughts of a sequence of another document; `nan` where
            there is no other. Both with their paired error over documents, `_se`.
        note: What to know before trusting these errors; empty where there is nothing.
    """

    n_sequences: int
    n_documents: int | None
    draws: int
    kl: float
    kl_se: float
    kl_estimator: str
    kl_per_thought: NDArray[np.float64]
    kl_per_layer: NDArray[np.float64]
    kl_per_block_kind: str
    active_units: int
    n_units: int
    mutual_information: float
    mutual_information_se: float
    mutual_information_upper: float
    mutual_information_is: str
    mutual_information_cap: float
    mutual_information_counts: str
    mutual_information_per_thought: NDArray[np.float64]
    mutual_information_per_thought_se: NDArray[np.float64]
    mutual_information_per_layer: NDArray[np.float64]
    mutual_information_per_layer_se: NDArray[np.float64]
    mutual_information_per_thought_upper: NDArray[np.float64]
    mutual_information_per_layer_upper: NDArray[np.float64]
    mutual_information_per_block_kind: str
    kl_aggregate: float
    kl_aggregate_is: str
    penalty_z0: float
    penalty_z0_se: float
    penalty_shuffled: float
    penalty_shuffled_se: float
    note: str

    @property
    def uses_thoughts(self) -> bool:
        """Whether another document's thoughts hurt by more than two errors."""
        return self.penalty_shuffled > 2 * self.penalty_shuffled_se

    def __repr__(self) -> str:
        use = "used" if self.uses_thoughts else "not seen to be used"
        return f"CollapsePanel({self.n_sequences} sequences: thoughts are {use})"

    def __str__(self) -> str:
        return format_panel(self)

    def _repr_html_(self) -> str:
        numbers = {
            "KL(q || prior)": (self.kl, self.kl_se),
            f"mutual information ({self.mutual_information_is})": (
                self.mutual_information, self.mutual_information_se,
            ),
            "z = 0 penalty": (self.penalty_z0, self.penalty_z0_se),
            "shuffled-z penalty": (self.penalty_shuffled, self.penalty_shuffled_se),
        }  # fmt: skip
        facts = {
            name: f"{value:.2f} ± {error:.2f} nats" for name, (value, error) in numbers.items()
        }
        facts["active units"] = f"{self.active_units} of {self.n_units}"
        return show(repr(self), facts, notes=[self.note] if self.note else [], details=str(self))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, `uses_thoughts` included."""
        known = {**asdict(self), "uses_thoughts": self.uses_thoughts}
        return {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in known.items()}


def collapse_panel(
    post: Posterior,
    scores: xr.Dataset,
    *,
    n_layers: int | None = None,
    draws: int = 16,
    seed: int = 0,
    again: Posterior | None = None,
) -> CollapsePanel:
    """The collapse panel of a batch.

    Args:
        post: q for N sequences, at least 2.
        scores: Of `evaluate(model, post, batch)`, mode `oracle`, for the same sequences.
        n_layers: L, for the KL by layer: thoughts belong to layers in equal blocks.
        draws: S, draws per sequence for the mutual information. Its cost is S N N densities of z;
            for families with correlated thoughts as many again of every thought and layer.
        seed: Of these draws.
        again: A second inference of the same sequences, `svi.infer(batch, seed=...)`, so that the
            noise of the fast loop does not count as information about the text.

    Raises:
        InputError: if scores and posteriors do not belong together, or there is one sequence only.
    """
    _check(post, scores)
    parts, as_fitted = measured(post, n_layers, draws, seed, again)
    with torch.no_grad(), seeded(derive_seed(seed, Stream.SAMPLE), post.ids.device):
        mean = moments(post)[0]
    strength = parts.attrs["mutual_information_is"]
    documents, own = documents_of(scores), scores["nll_given_z"]
    told = (scores["kl"], scores["nll_z0"] - own, scores["nll_shuffled"] - own)
    kl, z0, shuffled = (clustered_mean(values, documents) for values in told)
    return CollapsePanel(
        n_sequences=len(post),
        n_documents=None if documents is None else kl.documents,
        draws=draws,
        kl=kl.value,
        kl_se=kl.error,
        kl_estimator=post.kl_estimator,
        kl_per_thought=parts["kl_thought"].values.mean(0),
        kl_per_layer=parts["kl_layer"].values.mean(0),
        kl_per_block_kind=parts.attrs["kl_kind"],
        active_units=int((mean.double().var(0) >= ACTIVE_VARIANCE).sum()),
        n_units=mean[0].numel(),
        mutual_information_is=strength,
        mutual_information_cap=parts.attrs["mutual_information_cap"],
        mutual_information_counts=parts.attrs["mutual_information_counts"],
        mutual_information_per_block_kind=parts.attrs["mutual_information_kind"],
        kl_aggregate=kl.value - as_fitted,
        kl_aggregate_is="at most" if strength == "at least" else "estimate",
        penalty_z0=z0.value,
        penalty_z0_se=z0.error,
        penalty_shuffled=shuffled.value,
        penalty_shuffled_se=shuffled.error,
        note=few_documents_note(kl) or "",
        **_bounds(parts),
    )


def _bounds(parts: xr.Dataset) -> dict[str, Any]:
    """The mutual information of all thoughts, each thought and each layer, as fields."""
    names = {"": "", "_per_thought": "_thought", "_per_layer": "_layer"}
    out = {}
    for field, name in names.items():
        for ending in ("", "_se", "_upper"):
            values = parts[f"mutual_information{name}{ending}"].values
            out[f"mutual_information{field}{ending}"] = values if values.ndim else values.item()
    return out


def _check(post: Posterior, scores: xr.Dataset) -> None:
    if scores.attrs.get("mode", "oracle") != "oracle":
        raise InputError(
            f"collapse_panel needs scores of mode 'oracle', not {scores.attrs['mode']!r}: "
            "in the other modes no KL is charged"
        )
    refuse_other_sequences(scores, post, ("scores", "the posterior"))
    if len(post) < 2:
        raise InputError("collapse_panel needs at least 2 sequences: it asks what tells them apart")


def format_panel(panel: CollapsePanel) -> str:
    """The panel as text for the terminal, every number with its unit, error and meaning."""
    how = {"analytic": "closed form", "monte_carlo": "Monte Carlo"}[panel.kl_estimator]
    rows = [
        ("KL(q || prior)", panel.kl, panel.kl_se, f"what q says about the text ({how})"),
        (
            "mutual information", panel.mutual_information, panel.mutual_information_se,
            _about_information(panel),
        ),
        ("z = 0 penalty", panel.penalty_z0, panel.penalty_z0_se, "loss with thoughts set to 0"),
        (
            "shuffled-z penalty", panel.penalty_shuffled, panel.penalty_shuffled_se,
            "loss with another document's thoughts",
        ),
    ]  # fmt: skip
    documents = "" if panel.n_documents is None else f" of {panel.n_documents} documents"
    lines = [
        f"Does the model use its thoughts?  ({panel.n_sequences} sequences{documents}, "
        "nats per sequence)",
        *(
            f"  {name:<19} {value:>8.2f} +- {error:<6.2f} {what}"
            for name, value, error, what in rows
        ),
        f"  {'active units':<19} {panel.active_units:>8} of {panel.n_units:<6} "
        f"dimensions whose mean varies by {ACTIVE_VARIANCE} or more",
        *_by_block(panel),
    ]
    if math.isnan(panel.penalty_shuffled):
        verdict = "not judged: all sequences are of one document, which has no other's thoughts"
    elif panel.uses_thoughts:
        verdict = "yes: another document's thoughts hurt by more than two errors"
    else:
        verdict = "not shown: another document's thoughts hurt by less than two errors"
    return "\n".join([*lines, f"  {verdict}", *([f"  {panel.note}"] if panel.note else [])])


def _about_information(panel: CollapsePanel) -> str:
    """What the mutual information is, and how far it can be trusted."""
    cap = f"{panel.n_sequences} sequences cap it at {panel.mutual_information_cap:.2f}"
    if math.isnan(panel.mutual_information):
        return "not known: q has no density"
    if panel.mutual_information_is != "at least":
        return f"its part that tells texts apart; {cap}"
    upper = panel.mutual_information_upper
    return f"at least{f', at most {upper:.1f}' if math.isfinite(upper) else ''}; {cap}"


def _by_block(panel: CollapsePanel) -> list[str]:
    """KL and mutual information of layers and thoughts, with what kind of numbers they are."""
    lines = []
    least = "at least " if panel.kl_per_block_kind == "at least" else ""
    # Parts by themselves miss what they say together.
    lean = panel.kl_per_thought.sum() < 0.999 * panel.kl and math.isfinite(panel.kl)
    note = "  (each alone; together at least their sum)" if lean and not least else ""
    for name, values in (("layer", panel.kl_per_layer), ("thought", panel.kl_per_thought)):
        if values.size:
            lines.append(f"  {f'KL by {name}':<19} {least}{_numbers(values)}{note}")
            note = ""
    for name in ("layer", "thought"):
        values, errors, uppers = (
            getattr(panel, f"mutual_information_per_{name}{ending}")
            for ending in ("", "_se", "_upper")
        )
        if values.size and np.isfinite(values).all():
            least = "" if (uppers - values <= TIGHT).all() else "at least "
            worst = f"  (+- {errors.max():.2f} or less)"
            lines.append(f"  {f'MI by {name}':<19} {least}{_numbers(values)}{worst}")
    return lines


def _numbers(values: NDArray[np.float64], most: int = 12) -> str:
    shown = "  ".join(f"{value:.2f}" for value in values[:most])
    return shown if len(values) <= most else f"{shown}  ... ({len(values)} in all)"
