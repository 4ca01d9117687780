"""The controls of sessions with two levels: all turns share one z, or no turn knows another."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.models.priors import StandardNormal

ARMS = ("nested", "flat", "turns_only")


class FlatSession(ltm.SessionThoughtModel):
    """One z (K, D) of the whole session, read by all its turns."""

    def __init__(self, emission: ltm.LatentModel, turns: int) -> None:
        super().__init__(emission, turns)
        flat = StandardNormal(*emission.thought_shape).to(emission.prior().sample())
        self.thought_prior = flat  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        """Where the emission lives."""
        return self.emission.device

    def prior(self) -> TorchDistribution:
        """p(z): event shape (K, D)."""
        prior: TorchDistribution = self.thought_prior()
        return prior

    def segment_thoughts(self, z: Tensor) -> Tensor:
        """The same for all turns."""
        return z.unsqueeze(-3).expand(*z.shape[:-2], self.segments, *z.shape[-2:])


def build(arm: str, emission: ltm.LatentModel, turns: int) -> ltm.SessionThoughtModel:
    """One of the arms, around a decoder of its own."""
    if arm == "flat":
        return FlatSession(emission, turns)
    model = ltm.SessionThoughtModel(emission, turns)
    if arm == "turns_only":
        prior = model.thought_prior
        with torch.no_grad():
            prior.transition.requires_grad_(False).zero_()  # it stays 0
            prior.log_scale.zero_()
    return model


def session_code(model: ltm.SessionThoughtModel, mean: Tensor) -> Tensor:
    """What an arm knows of a session as a whole, (B, K * D), of posterior means (B, ..., D).

    Where turns stand alone that is the mean over them.
    """
    if isinstance(model, FlatSession) or model.thought_prior.transition.requires_grad:
        return model.session_thoughts(mean).flatten(1)
    return model.segment_thoughts(mean).mean(-3).flatten(1)
