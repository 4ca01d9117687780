"""The memory that a fit takes at its worst moment: by a formula, or measured in one real step.

The formula errs on the high side, so that a fit stays below it; `benchmarks/memory.py` tells by how
much. It knows the decoder layer by layer, and of guide and prior the numbers that they hold and the
widths of their networks. What a corpus takes while it is read is not in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ltm_pyro.checks import refuse_too_large
from ltm_pyro.config import FitConfig, from_dict, to_dict
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.execution import Execution
from ltm_pyro.engine.kernels.vocabulary import MOST_LOGITS
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.inference.guides.registry import GUIDES
from ltm_pyro.inference.objectives import OBJECTIVES, build_objective
from ltm_pyro.models.decoder import block_shape, fused
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.priors.base import PRIORS
from ltm_pyro.random import seeded
from ltm_pyro.registry import load_plugins

LIBRARY_BYTES = 720_000_000
"""Python, torch and Pyro, and what scores, figures and export load, with their work space."""
COMPILER_BYTES = 260_000_000
"""What torch's compiler adds."""
ALLOCATOR_SHARE = 0.4
"""Of the tensors: what the C library keeps, in pieces, when they are freed; no two runs agree."""
LEAST_SHARE = 0.4
"""Of the decoder's part of the formula: what a step cannot do without."""

_PER_WEIGHT = 24
"""Bytes: weight, gradient and AdamW's two moments, and at the worst moment two more."""
_PER_LOCAL = 48
"""Bytes of a local parameter: the same, noise, a draw, and what densities hold of them."""
_PER_SCORED_DRAW = 24
"""Bytes of a number of z in the draws that are scored and exported."""
_STEPS = 2  # AdamW's moments exist from the second on


@dataclass(frozen=True)
class MemoryReport:
    """The peak memory of a fit on a CPU, in bytes.

    Attributes:
        weights_bytes: Of decoder, prior and guide, with gradients and AdamW's moments.
        activations_bytes: What is held of one micro batch at the worst moment.
        rows_bytes: Local parameters of one batch with their moments, and draws.
        scoring_bytes: Draws of the held-out sequences, when all else is free again.
        process_bytes: Python and the libraries, with the compiler where it is used.
    """

    weights_bytes: int
    activations_bytes: int
    rows_bytes: int
    scoring_bytes: int
    process_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors: what an accelerator holds."""
        return self.weights_bytes + max(
            self.activations_bytes + self.rows_bytes, self.scoring_bytes
        )

    @property
    def allocator_bytes(self) -> int:
        """What the C library keeps of freed tensors."""
        return round(ALLOCATOR_SHARE * self.tensor_bytes)

    @property
    def peak_bytes(self) -> int:
        """The resident memory of the process, which it stays below."""
        return self.process_bytes + self.tensor_bytes + self.allocator_bytes

    def as_dict(self) -> dict[str, int]:
        """Every figure by its name."""
        derived = ("tensor_bytes", "allocator_bytes", "peak_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def memory_report(config: FitConfig) -> MemoryReport:
    """The peak memory of one process that takes the whole batch, by the formula."""
    model, guide = small_fit(config)
    rows, part = rows_at_once(config)
    draws = max(draws_at_once(config))
    shared = [*model.thought_prior.parameters(), *guide.shared_parameters()]
    local = sum(p.numel() for p in guide.local_parameters().values())
    positions = config.model.seq_len if guide.inputs.values() else draws
    networks = positions * _widths(guide) + draws * _widths(model.thought_prior)
    scored = (
        min(config.eval_sequences * config.eval_draws, 10**12) * model.prior().event_shape.numel()
    )
    return MemoryReport(
        weights_bytes=_PER_WEIGHT * (config.model.n_weights + sum(p.numel() for p in shared)),
        activations_bytes=decoder_bytes(config) + 16 * part * networks,
        rows_bytes=_PER_LOCAL * local * (rows + part * draws),
        scoring_bytes=_PER_SCORED_DRAW * scored,
        process_bytes=LIBRARY_BYTES + (COMPILER_BYTES if config.compile else 0),
    )


def rows_at_once(config: FitConfig, processes: int = 1) -> tuple[int, int]:
    """(rows of a process, rows of them that are computed together)."""
    rows = -(-config.batch_size // processes)
    return rows, min(rows, config.micro_batch or rows)


def draws_at_once(config: FitConfig) -> tuple[int, int]:
    """Draws of each sequence that a step of the fast loop, and a slow step, scores together."""
    particles = build_objective(config.objective, **config.objective_options).particles
    fixed = config.fast.fixed_draws if config.fast.noise == "fixed" else 1
    return fixed * particles, particles


def decoder_bytes(config: FitConfig, processes: int = 1) -> int:
    """What one micro batch holds of the decoder, at the worst moment of a fast loop or slow step.

    A layer holds so many times its input, H numbers a position: 14 while weights learn, 6 in the
    fast loop; 5 times the hidden units, and 3 times its scores where attention is not fused. These
    are least upper factors of 90 random shapes; tensors took 0.5 to 1.0 of the sum.
    """
    model = config.model
    _, part = rows_at_once(config, processes)
    fast_draws, slow_draws = (part * draws for draws in draws_at_once(config))
    size = 2 if config.precision == "bf16" else 4
    scores = 0.0
    if model.window > 1 and not fused(model.window, model.seq_len):
        n_blocks, block, span = block_shape(model.window, model.seq_len)
        scores = model.n_heads * n_blocks * block * span / model.seq_len
    met = model.n_heads * model.thoughts_per_layer

    def held(draws: int, layers: int, widths: int, attention: float) -> float:
        layer = widths * model.width + 5 * model.mlp_hidden + attention * scores
        around = 40 * model.width + 32 * layers * met
        return draws * model.seq_len * (layers * size * layer + around)

    learning = 1 if config.checkpointing else model.n_layers
    slow = held(slow_draws, learning, 14, 3)
    if config.checkpointing:
        slow += 40 * slow_draws * model.seq_len * model.n_layers * model.width
    most = max(slow, held(fast_draws, model.n_layers, 6, 1.5))
    draws = max(fast_draws, slow_draws)
    thoughts = 32 * model.n_layers * draws * met * model.width
    logits = draws * model.seq_len * model.vocab_size
    head = 12 * logits if logits <= MOST_LOGITS else 3 * MOST_LOGITS
    return round(most + thoughts + head)


def small_fit(config: FitConfig) -> tuple[LatentThoughtModel, LocalGuide]:
    """Prior and guide as they are, the guide holding one row without values; hardly a decoder."""
    number = config.model.n_thoughts * config.model.thought_dim
    refuse_too_large(
        f"{config.model.n_thoughts} thoughts of {config.model.thought_dim}",
        _PER_LOCAL * number,
        "choose fewer",
    )
    small = replace(config.model, vocab_size=1, seq_len=1, width=2, n_heads=1, mlp_hidden=1)
    with seeded(0, torch.device("cpu")):
        model = LatentThoughtModel(small)
        model.config = config.model  # an encoder is as wide as the decoder
        guide = build_guide(config.guide, model, **config.guide_options)
    shape = (1, config.model.seq_len)
    guide.to("meta").reset(Batch(torch.zeros(shape, dtype=torch.long, device="meta")))
    return model, guide


def _widths(network: nn.Module) -> int:
    """Numbers that the linear maps of a network take and give for one input."""
    maps = [m for m in network.modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features + m.out_features for m in maps)


def measured_bytes(config: FitConfig) -> int:
    """Resident memory of a process that takes one real step, at its worst moment.

    On random tokens, in two fast steps, on the CPU, with the weights of AdamW's moments in place.
    What a fit does beyond training is not in it.

    Raises:
        InputError: if the process was ended, as it is when there is too little memory.
    """
    chosen = (GUIDES, config.guide), (OBJECTIVES, config.objective), (PRIORS, config.model.prior)
    modules = [known[name].__module__ for known, name in chosen]
    command = [sys.executable, "-m", __name__]
    told = json.dumps([to_dict(config), modules])
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it was ended, out of memory as a rule"])[-1]
        raise InputError(f"the measured step failed: {why[:200]}; choose smaller settings")
    return int(done.stdout.split()[-1])


def _step(config: FitConfig) -> None:
    model = LatentThoughtModel(config.model)
    svi = DualRateSVI(
        model,
        build_guide(config.guide, model, **config.guide_options),
        fast=replace(config.fast, steps=min(config.fast.steps, 2)),
        slow=replace(config.slow, thoughts_start=0.0),
        elbo=build_objective(config.objective, **config.objective_options),
        execution=Execution(
            compile=config.compile,
            precision=config.precision,
            micro_batch=config.micro_batch or None,
            checkpointing=config.checkpointing,
        ),
    )
    shape = (config.batch_size, config.model.seq_len)
    for _ in range(_STEPS):
        svi.step(Batch(torch.randint(config.model.vocab_size, shape)))


def _measure() -> None:
    """The child's part: settings from stdin, bytes to stdout."""
    import resource  # Unix

    values, modules = json.load(sys.stdin)
    load_plugins(tuple(modules))
    _step(from_dict(FitConfig, values))
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    _measure()
