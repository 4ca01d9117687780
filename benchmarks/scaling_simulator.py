"""The simulator of `scaling.py`: FLOPs, bytes, messages and seconds of one slow step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltm_pyro.config import Fast, FitConfig, ModelConfig, preset
from ltm_pyro.diagnostics.cost import cost_report

PER_WEIGHT_ADAMW = 28  # bytes: weight, gradient and two moments read, all but the gradient written
BESIDE = 72  # bytes of the numbers beside the gradient

BILLION = replace(
    preset("ltm-large"),
    preset="1B",
    model=ModelConfig(
        vocab_size=50257, seq_len=1024, n_layers=15, width=2048, n_heads=16, mlp_hidden=5504,
        window=256, thoughts_per_layer=8, thought_dim=512,
    ),
    fast=Fast(steps=16, lr=0.3),
)  # fmt: skip
MODELS = (preset("ltm-small"), preset("ltm-medium"), preset("ltm-large"), BILLION)


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, each of one GPU (or process), in SI units."""

    flops: float
    normals: float
    memory: float
    gpus_per_node: int
    inside: float
    between: float
    inside_latency: float
    between_latency: float
    overhead: float = 0.0
    """Whether a reduce-scatter sends half of an all-reduce; gloo makes it from a whole one."""

    def link(self, gpus: int) -> tuple[float, float]:
        """(bytes per second, seconds per message) of the slowest link of a ring.

        All GPUs of a node share its way out, each with an adapter of its own, in as many rings.
        """
        if gpus <= self.gpus_per_node:
            return self.inside, self.inside_latency
        return min(self.inside, self.gpus_per_node * self.between), self.between_latency


@dataclass(frozen=True)
class Step:
    """One slow step with its fast loop, per GPU.

    Attributes:
        flops: Matrix products.
        sent: Bytes.
        messages: Collective operations.
        state: Bytes of weights, gradients, message and moments.
        seconds: By part.
    """

    flops: float
    sent: float
    messages: int
    state: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def simulate(config: FitConfig, gpus: int, machine: Machine) -> Step:
    """What a slow step costs on `gpus` GPUs with `config.batch_size` sequences each."""
    report = cost_report(config)
    weights = report.n_weights + report.n_prior_weights
    flops = report.flops_training_step * config.batch_size * config.model.seq_len
    # Each process draws for its own sequences alone.
    normals = (config.fast.steps + 1) * config.batch_size * report.n_local
    message = 4 * weights + BESIDE
    # A ring all-reduce is a reduce-scatter and an all-gather of the same size.
    sent = 2 * (gpus - 1) / gpus * message
    bandwidth, latency = machine.link(gpus)
    return Step(
        flops=flops,
        sent=sent,
        messages=0 if gpus == 1 else 2,
        state=16 * weights + (message if gpus > 1 else 0),
        seconds={
            "compute": machine.overhead + flops / machine.flops,
            "noise": normals / machine.normals,
            "exchange": sent / bandwidth + 2 * 2 * (gpus - 1) * latency,
            "AdamW": PER_WEIGHT_ADAMW * weights / machine.memory,
        },
    )
