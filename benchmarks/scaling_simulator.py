"""The simulator of `scaling.py`: FLOPs, bytes, messages and seconds of one slow step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltm_pyro.config import Fast, FitConfig, ModelConfig, preset
from ltm_pyro.diagnostics.cost import cost_report

PER_WEIGHT_ADAMW = 28  # bytes: weight, gradient and two moments read, all but the gradient written
BESIDE = 36  # bytes of the numbers beside the gradient

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
    scatters: bool = True
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


def simulate(config: FitConfig, gpus: int, machine: Machine, *, shard: bool = False) -> Step:
    """What a slow step costs on `gpus` GPUs with `config.batch_size` sequences each."""
    report = cost_report(config)
    weights = report.n_weights + report.n_prior_weights
    shard = shard and gpus > 1
    flops = report.flops_training_step * config.batch_size * config.model.seq_len
    rows = gpus * config.batch_size
    normals = (config.fast.steps + 1) * rows * report.n_local
    message = 4 * weights + BESIDE * (gpus if shard else 1)
    # A ring all-reduce is a reduce-scatter and an all-gather of the same size.
    ring = (gpus - 1) / gpus
    sent = 2 * ring * message
    if shard:
        sent = (1 if machine.scatters else 2) * ring * message + ring * 4 * weights + 2 * ring * 4
    bandwidth, latency = machine.link(gpus)
    ring_steps = (4 if shard else 2) * (gpus - 1)
    stepped = weights / gpus if shard else weights
    moments = 8 * stepped + (4 * stepped if shard else 0)
    return Step(
        flops=flops,
        sent=sent,
        messages=0 if gpus == 1 else 3 if shard else 1,
        state=8 * weights + moments + (message if gpus > 1 else 0),
        seconds={
            "compute": machine.overhead + flops / machine.flops,
            "noise": normals / machine.normals,
            "exchange": sent / bandwidth + ring_steps * latency,
            "AdamW": PER_WEIGHT_ADAMW * stepped / machine.memory,
        },
    )
