"""Draws from p(z | x) with the checks that they passed or failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ltm_pyro.html import show
from ltm_pyro.inference.mcmc.convergence import mean_error, rhat_and_ess, variance_error

RHAT_LIMIT = 1.05
"""Above it draws are not used as a reference."""

_SHOWN = 8  # sequences in a notebook
BIASED = "biased: unadjusted Langevin draws are not from p(z | x), however long the chains"


@dataclass(frozen=True, repr=False)
class MCMCDraws:
    """Chains for each sequence of a batch.

    `chain` is an independent start, `draw` one step of the sampler after warmup.

    Attributes:
        z: (C, S, B, K, D) draws.
        log_joint: (C, S, B) float64, log p(x, z) in nats at each draw.
        ids: (B,) the sequences' stable ids.
        kernel: `hmc`, `mala` or `ula`.
        start: Name of the family that chains started from, or `prior`.
        accept: (B,) mean acceptance probability after warmup. For `ula`, which refuses nothing,
            what MALA would have accepted.
        step_size: (B,) leapfrog step size in units of the mass's scale.
        gradient_evaluations: Gradients of log p(x, z) taken for each sequence, in all its chains,
            warmup included.
        warmup: Steps of each chain that are not kept.
        seed: Of the chains.
        mass: What the chains were preconditioned with.
        rhat: (B,) largest R-hat of the K * D dimensions and the log joint.
        ess: (B,) smallest effective sample size of those, bulk and tail, over all chains.
    """

    z: Tensor
    log_joint: Tensor
    ids: Tensor
    kernel: str
    start: str
    accept: Tensor
    step_size: Tensor
    gradient_evaluations: int
    warmup: int
    seed: int
    mass: str
    rhat: Tensor = field(init=False)
    ess: Tensor = field(init=False)

    def __post_init__(self) -> None:
        joint = self.log_joint[..., None]
        flat = torch.cat([self.z.flatten(-2).to(joint), joint], -1)
        rhat, ess = (q.view(len(self.ids), -1) for q in rhat_and_ess(flat.flatten(-2)))
        object.__setattr__(self, "rhat", rhat.amax(1))
        object.__setattr__(self, "ess", ess.amin(1))

    def __repr__(self) -> str:
        return f"MCMCDraws({self.summary().splitlines()[0]})"

    def _repr_html_(self) -> str:
        head, *lines = self.summary().splitlines()
        table = self.to_dataset()[["rhat", "ess", "accept", "step_size"]].to_dataframe()
        return show(head, tables=[table.head(_SHOWN)], notes=lines)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def biased(self) -> bool:
        """Whether the chains' limit is something else than p(z | x)."""
        return self.kernel == "ula"

    @property
    def unreliable(self) -> list[int]:
        """Ids of sequences with R-hat above `RHAT_LIMIT`."""
        return self.ids[~(self.rhat <= RHAT_LIMIT)].tolist()

    @property
    def mean(self) -> Tensor:
        """E[z | x], (B, K, D)."""
        return self.z.double().flatten(0, 1).mean(0).to(self.z)

    @property
    def scale(self) -> Tensor:
        """Posterior standard deviations, (B, K, D)."""
        return self.z.double().flatten(0, 1).std(0).to(self.z)

    @property
    def mean_se(self) -> Tensor:
        """Monte Carlo standard error of `mean`, (B, K, D)."""
        return self._per_dimension(mean_error(self.z.flatten(2)))

    @property
    def variance_se(self) -> Tensor:
        """Monte Carlo standard error of `scale` squared, (B, K, D)."""
        return self._per_dimension(variance_error(self.z.flatten(2)))

    @property
    def flags(self) -> list[str]:
        """What speaks against these draws, in plain sentences; empty when nothing does."""
        found = [BIASED] if self.biased else []
        if self.unreliable:
            found.append(
                f"{len(self.unreliable)} of {len(self)} sequences have R-hat above {RHAT_LIMIT} "
                f"(ids {_some(self.unreliable)}): their chains disagree, so do not use them as a "
                "reference; more warmup, or a start from another guide"
            )
        few = self.ids[self.ess < 100 * len(self.z)].tolist()
        if few:
            found.append(
                f"{len(few)} of {len(self)} sequences have fewer than 100 effective draws per "
                f"chain (ids {_some(few)}): R-hat and errors are rough there; more draws"
            )
        return found

    def summary(self) -> str:
        """A few lines: what ran, how well it mixed, and every flag."""
        chains, draws = self.z.shape[:2]
        lines = [
            f"{self.kernel} from {self.start}: {chains} chains x {draws} draws after "
            f"{self.warmup} of warmup, {len(self)} sequences",
            f"R-hat at most {float(self.rhat.max()):.4f}, ESS at least {float(self.ess.min()):.0f},"
            f" acceptance {float(self.accept.min()):.2f} to {float(self.accept.max()):.2f}",
            f"{self.gradient_evaluations} gradients per sequence",
        ]
        return "\n".join([*lines, *(f"! {flag}" for flag in self.flags)])

    def to_dataset(self) -> xr.Dataset:
        """Draws and checks in ArviZ's dimensions.

        Returns:
            `z` (chain, draw, sequence, thought, dim), `log_joint` (chain, draw, sequence), and per
            sequence `rhat`, `ess`, `accept`, `step_size`.
        """
        each = ("chain", "draw", "sequence")
        variables: dict[str, tuple[tuple[str, ...], Tensor, str]] = {
            "z": ((*each, "thought", "dim"), self.z, "1"),
            "log_joint": (each, self.log_joint, "nats"),
            "rhat": (("sequence",), self.rhat, "1"),
            "ess": (("sequence",), self.ess, "draws"),
            "accept": (("sequence",), self.accept, "1"),
            "step_size": (("sequence",), self.step_size, "scales of the mass"),
        }
        coords: dict[str, Any] = {
            name: np.arange(n)
            for name, n in zip(
                ("chain", "draw", "thought", "dim"),
                (*self.z.shape[:2], *self.z.shape[3:]),
                strict=True,
            )
        }
        coords["sequence"] = self.ids.cpu().numpy()
        data = {
            name: (dims, value.cpu().numpy(), {"units": units})
            for name, (dims, value, units) in variables.items()
        }
        attrs = {
            "kernel": self.kernel,
            "start": self.start,
            "mass": self.mass,
            "warmup": self.warmup,
            "seed": self.seed,
            "gradient_evaluations": self.gradient_evaluations,
            "biased": int(self.biased),
            "flags": "; ".join(self.flags),
        }
        return xr.Dataset(data, coords=coords, attrs=attrs)

    def _per_dimension(self, flat: Tensor) -> Tensor:
        return flat.view(self.z.shape[2:]).to(self.z)


def _some(ids: list[int]) -> str:
    return ", ".join(str(i) for i in ids[:8]) + (", ..." if len(ids) > 8 else "")
