"""Golden ELBO traces: a change that is not meant to move results must reproduce them.

One per guide and objective, in double precision on the CPU, in `golden_elbos.json`. A change that
is meant to move them writes the file anew and says in the changelog by how much, and why:

    python tests/test_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from known_models import make_language_model, make_tokens

from ltm_pyro.config import Fast
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide, guide_families
from ltm_pyro.inference.objectives import OBJECTIVES, build_objective

FILE = Path(__file__).with_name("golden_elbos.json")
PAIRS = [f"{guide}, {objective}" for guide in guide_families() for objective in OBJECTIVES]
STEPS = 3


def trace(pair: str) -> list[float]:
    """What each of a few slow steps descended, nats per sequence, KL annealing on."""
    family, name = pair.split(", ")
    model = make_language_model(seed=3)
    torch.manual_seed(3)  # of the networks that families share
    guide = build_guide(family, model)
    objective = build_objective(name, particles=2)
    svi = DualRateSVI(model, guide, Fast(steps=3, lr=0.1), seed=3, elbo=objective)
    svi.horizon = 2 * STEPS
    return [svi.step(make_tokens(3, seed=step))["objective"] for step in range(STEPS)]


@pytest.mark.parametrize("pair", PAIRS)
def test_golden_elbo_trace(pair: str) -> None:
    assert trace(pair) == pytest.approx(json.loads(FILE.read_text())[pair], rel=1e-8)


if __name__ == "__main__":
    FILE.write_text(json.dumps({pair: trace(pair) for pair in PAIRS}, indent=1) + "\n")
    sys.stdout.write(f"{FILE}: {len(PAIRS)} traces\n")
