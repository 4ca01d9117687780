"""`DualRateSVI` is Algorithm 1: it gives the numbers of the plain Pyro program."""

from __future__ import annotations

import pytest
import torch
from known_models import make_language_model, make_tokens
from tolerances import EXACT

from ltm_pyro.config import Fast, Slow
from ltm_pyro.inference.clocks.reference import fit_reference
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel

# With fixed noise the fast clock is Adam itself, as in the published loop.
FAST = Fast(steps=5, optimizer="adam", lr=0.1, noise="fixed")
SLOW = Slow(lr=0.01, kl_start=0.2)
STEPS = 4


def start(family: str) -> tuple[LatentThoughtModel, LocalGuide]:
    model = make_language_model()
    torch.manual_seed(0)  # of the networks that families share
    return model, build_guide(family, model)


@pytest.mark.parametrize(
    "family", ["mean_field", "full_rank", "low_rank", "mixture", "flow", "amortized"]
)
def test_dual_rate_svi_gives_the_numbers_of_the_plain_program(family: str) -> None:
    batches = [make_tokens(4, seed=step) for step in range(STEPS)]
    model, guide = start(family)
    losses = fit_reference(model, guide, batches, FAST, SLOW, seed=7)

    other, other_guide = start(family)
    svi = DualRateSVI(other, other_guide, FAST, SLOW, seed=7)
    svi.horizon = STEPS
    rows = [svi.step(batch) for batch in batches]

    per_sequence = [float(batch.n_tokens.double().mean()) for batch in batches]
    descended = [-row["objective"] / n for row, n in zip(rows, per_sequence, strict=True)]
    assert descended == pytest.approx(losses, rel=1e-9)
    for name, value in model.state_dict().items():
        EXACT.assert_close(other.state_dict()[name], value)
    for p, q in zip(other_guide.parameters(), guide.parameters(), strict=True):
        EXACT.assert_close(p.detach(), q.detach())
