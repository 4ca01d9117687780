"""What a fit costs before it runs: weights, floating-point operations, memory, and the KL floor.

Operations are those of matrix products (two per multiply-add), everything else being a few per
cent; memory is that of float32 activations kept for the backward pass. Shape letters as elsewhere:
B, T, H, V, L, D, and K_l thoughts per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ltm_pyro.config import Fast, FitConfig, ModelConfig
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.inference.random import seeded
from ltm_pyro.inference.schedules import fast_reach, kl_floor_per_sequence
from ltm_pyro.models.cross_entropy import CHUNK_ELEMENTS
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.models.layers import BLOCK

KL_FLOOR_WARNING = 0.05
"""Nats per token above which the fast schedule, and not the text, decides the ELBO."""

_FLOAT = 4  # bytes of a float32
_PER_WEIGHT = 16  # bytes: weight, gradient, and AdamW's two moments in float32


@dataclass(frozen=True)
class CostReport:
    """The cost of one configuration.

    FLOPs are per token of a full sequence; a training step is a fast loop and a slow step.

    Attributes:
        preset: Its name.
        n_weights: Weights of the decoder, the tied embedding counted once.
        n_prior_weights: Weights of a learned prior; its operations are not counted, being few
            beside the decoder's.
        n_local: Dimensions of z per sequence, K D.
        fast_steps: T_fast.
        flops_forward: One complete pass through the decoder.
        flops_fast_step: One fast step: forward and backward by activations alone, above the first
            cross-attention.
        flops_fast_loop: All fast steps, and once what lies below the first cross-attention.
        flops_slow_step: Forward and backward with weight gradients.
        flops_training_step: Fast loop and slow step.
        flops_paper: The count of Kong et al. (2025), (T_fast + 1)(6 N + 6 L H T).
        activation_bytes: Kept for the backward pass of the slow step, the larger of the two.
        activation_bytes_fast: The same of a fast step.
        weight_bytes: Weights, gradients and AdamW's moments.
        start_log_variance: Where the guide's log variances start; `None` where it has none.
        fast_reach: R, the sum of the fast learning rates.
        kl_floor_per_token: KL in nats that the fast schedule cannot undo, whatever the text.
    """

    preset: str
    n_weights: int
    n_prior_weights: int
    n_local: int
    fast_steps: int
    flops_forward: float
    flops_fast_step: float
    flops_fast_loop: float
    flops_slow_step: float
    flops_training_step: float
    flops_paper: float
    activation_bytes: int
    activation_bytes_fast: int
    weight_bytes: int
    start_log_variance: float | None
    fast_reach: float
    kl_floor_per_token: float

    @property
    def warning(self) -> str | None:
        """One line where the KL floor is too high, else `None`."""
        if self.kl_floor_per_token <= KL_FLOOR_WARNING:
            return None
        return (
            f"warning: the KL floor is {self.kl_floor_per_token:.2f} nats per token (above "
            f"{KL_FLOOR_WARNING}): log variances start at {self.start_log_variance:g} and the fast "
            f"learning rates sum to {self.fast_reach:.2f}; start q at the prior (log variance 0) "
            "or raise fast.steps or fast.lr"
        )


def cost_report(config: FitConfig, start_log_variance: float | None = None) -> CostReport:
    """The cost of a fit, without running it.

    Args:
        config: The fit.
        start_log_variance: Where the guide's log variances start; by default where the configured
            guide says.

    Raises:
        InputError: for an unknown guide family or option.
    """
    model = config.model
    guide_start, n_prior = _guide_start_and_prior_weights(config)
    if start_log_variance is None:
        start_log_variance = guide_start
    forward = _forward_flops(model)
    below = _attend_flops(model)
    # Particles are further rows of the batch for everything that depends on z.
    particles = build_objective(config.objective, **config.objective_options).particles
    rows = config.batch_size * particles
    rescored = _rescored_flops(model, rows)
    fast_step = forward - below + _fast_backward_flops(model) + rescored
    # With fixed noise every step averages M draws, and the end is scored once more on them.
    draws = particles * (config.fast.fixed_draws if config.fast.noise == "fixed" else 1)
    fast_loop = below + config.fast.steps * draws * fast_step
    if config.fast.noise == "fixed":
        fast_loop += draws * (forward - below)
    slow_step = particles * (forward + _slow_backward_flops(model) + rescored)
    n_weights = count_weights(model)
    n_local = model.n_thoughts * model.thought_dim
    return CostReport(
        preset=config.preset,
        n_weights=n_weights,
        n_prior_weights=n_prior,
        n_local=n_local,
        fast_steps=config.fast.steps,
        flops_forward=forward,
        flops_fast_step=fast_step,
        flops_fast_loop=fast_loop,
        flops_slow_step=slow_step,
        flops_training_step=fast_loop + slow_step,
        flops_paper=paper_flops_per_token(model, config.fast),
        activation_bytes=activation_bytes(model, rows),
        activation_bytes_fast=activation_bytes(model, rows, fast=True),
        weight_bytes=_PER_WEIGHT * (n_weights + n_prior),
        start_log_variance=start_log_variance,
        fast_reach=fast_reach(config.fast),
        kl_floor_per_token=0.0
        if start_log_variance is None
        else kl_floor_per_sequence(config.fast, n_local, start_log_variance) / model.seq_len,
    )


def _guide_start_and_prior_weights(config: FitConfig) -> tuple[float | None, int]:
    """Asks guide and prior, built with a decoder as small as can be for thoughts of this shape."""
    small = replace(config.model, vocab_size=1, width=2, n_heads=1, mlp_hidden=1)
    with seeded(0, torch.device("cpu")):
        model = LatentThoughtModel(small)
        guide = build_guide(config.guide, model, **config.guide_options)
    n_prior = sum(p.numel() for p in model.thought_prior.parameters())
    return guide.start_log_variance, n_prior


def count_weights(model: ModelConfig) -> int:
    """Weights of the decoder, the tied embedding counted once."""
    width = model.width
    layer = (
        4 * width**2  # self-attention: queries, keys, values, output
        + 2 * width**2  # cross-attention: queries, output
        + 2 * model.thought_dim * width  # keys and values of the thoughts
        + 3 * width * model.mlp_hidden
        + 3 * width  # gains of the three norms
    )
    return model.vocab_size * width + model.n_layers * layer + 2 * width  # BOS and the last norm


def paper_flops_per_token(model: ModelConfig, fast: Fast) -> float:
    """Training FLOPs per token as Kong et al. (2025) count them: (T_fast + 1)(6 N + 6 L H T).

    It charges a weight gradient at every fast step and full attention over T.
    """
    attention = 6 * model.n_layers * model.width * model.seq_len
    return (fast.steps + 1) * (6.0 * count_weights(model) + attention)


def _block_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(number of blocks, queries per block, keys per block) of windowed self-attention."""
    length = model.seq_len
    if model.window >= length:
        return 1, length, length
    block = max(model.window, BLOCK)
    return -(-length // block), block, block + model.window - 1


def _self_attention_product(model: ModelConfig) -> float:
    """FLOPs per token of one of attention's two products, masked pairs included."""
    if model.window == 1:
        return 0.0
    n_blocks, block, span = _block_shape(model)
    return 2.0 * model.width * n_blocks * block * span / model.seq_len


def _attend_flops(model: ModelConfig) -> float:
    """Forward of a layer below its cross-attention: projections and windowed attention."""
    return 2.0 * 4 * model.width**2 + 2 * _self_attention_product(model)


def _cross_product(model: ModelConfig) -> float:
    return 2.0 * model.width * model.thoughts_per_layer


def _thought_projection(model: ModelConfig) -> float:
    """Keys and values of the thoughts, once per sequence, spread over its tokens."""
    return 4.0 * model.width * model.thought_dim * model.thoughts_per_layer / model.seq_len


def _mlp_flops(model: ModelConfig) -> float:
    return 2.0 * 3 * model.width * model.mlp_hidden


def _head_flops(model: ModelConfig) -> float:
    return 2.0 * model.width * model.vocab_size


def _forward_flops(model: ModelConfig) -> float:
    think = (
        2.0 * 2 * model.width**2
        + _thought_projection(model)
        + 2 * _cross_product(model)
        + _mlp_flops(model)
    )
    return model.n_layers * (_attend_flops(model) + think) + _head_flops(model)


def _rescored_flops(model: ModelConfig, batch_size: int) -> float:
    """Logits beyond one chunk are computed again in the backward pass."""
    chunked = batch_size * model.seq_len * model.vocab_size > CHUNK_ELEMENTS
    return _head_flops(model) if chunked else 0.0


_ATTENTION_BACKWARD = 5
"""Products in the backward pass of fused attention: scores again, and gradients of the scores,
queries, keys and values."""


def _fast_backward_flops(model: ModelConfig) -> float:
    """Backward to the thoughts with frozen weights: one product per projection.

    Below the first cross-attention nothing depends on z, so neither layer 0's self-attention nor
    its cross-attention's queries are passed.
    """
    attend = 2.0 * 4 * model.width**2 + _ATTENTION_BACKWARD * _self_attention_product(model)
    think = (
        2.0 * 2 * model.width**2
        + _thought_projection(model)
        + _ATTENTION_BACKWARD * _cross_product(model)
        + _mlp_flops(model)
    )
    layers = model.n_layers * (attend + think) - attend - 2.0 * model.width**2
    return layers + _head_flops(model)


def _slow_backward_flops(model: ModelConfig) -> float:
    """Backward to all weights: two products per projection, one where the input is z."""
    layer = (
        4.0 * (4 + 2) * model.width**2
        + _thought_projection(model)
        + _ATTENTION_BACKWARD * (_self_attention_product(model) + _cross_product(model))
        + 2 * _mlp_flops(model)
    )
    return model.n_layers * layer + 2 * _head_flops(model)


def activation_bytes(model: ModelConfig, batch_size: int, *, fast: bool = False) -> int:
    """Bytes kept for the backward pass of one step, weights not counted.

    Counted by what each operation of the decoder keeps on the CPU in float32; other devices and
    compiled graphs keep less. One chunk of logits is included.

    Args:
        model: Shapes.
        batch_size: B.
        fast: Of a fast step (weights frozen: projections keep no input) instead of the slow one.
    """
    floats = _layer_floats(model, fast=fast) * model.n_layers
    if fast:
        # Layer 0 starts at its cross-attention, on a trunk that needs no gradient.
        floats -= _self_attention_floats(model, fast=True) + model.width
    floats += (1 if fast else 3) * model.width  # the last norm
    logits = min(batch_size * model.seq_len * model.vocab_size, CHUNK_ELEMENTS)
    return _FLOAT * round(floats * batch_size * model.seq_len + logits)


def _layer_floats(model: ModelConfig, *, fast: bool) -> float:
    """Floats kept per token by one layer."""
    # A norm keeps its input; with learning gains also the normalised input, and the projection
    # after it then keeps the product.
    norm = (1 if fast else 3) * model.width
    cross = norm + 2 * model.width + model.n_heads  # queries, output, normalisers
    # Gate and up, silu(gate); with learning weights also their product.
    mlp = norm + (3 if fast else 4) * model.mlp_hidden
    return _self_attention_floats(model, fast=fast) + cross + mlp


def _self_attention_floats(model: ModelConfig, *, fast: bool) -> float:
    norm = (1 if fast else 3) * model.width
    if model.window == 1:
        # The output projection's input is a view of queries, keys and values together.
        return norm + (0 if fast else 3 * model.width)
    if model.window >= model.seq_len:
        # Queries and keys turned, the unturned triple that the values are a view of, the output.
        return norm + (2 + 3 + 1) * model.width + model.n_heads
    n_blocks, block, span = _block_shape(model)
    queries = n_blocks * block / model.seq_len
    keys = n_blocks * span / model.seq_len
    projected = 0 if fast else model.width  # input of the output projection
    mask = queries * span
    kept = (2 * queries + 2 * keys) * model.width + queries * model.n_heads
    return norm + kept + mask + projected


def format_cost(report: CostReport) -> str:
    """The report as text for the terminal."""
    paper = report.flops_training_step / report.flops_paper
    rows = [
        ("weights", f"{report.n_weights / 1e6:.2f} M"),
        *([("weights of the prior", f"{report.n_prior_weights:,}")] * (report.n_prior_weights > 0)),
        ("dimensions of z per sequence", f"{report.n_local:,}"),
        ("forward", f"{_flops(report.flops_forward)} per token"),
        (f"fast loop, {report.fast_steps} steps", f"{_flops(report.flops_fast_loop)} per token"),
        ("slow step", f"{_flops(report.flops_slow_step)} per token"),
        ("training step, this engine", f"{_flops(report.flops_training_step)} per token"),
        ("training step, paper's count", f"{_flops(report.flops_paper)} per token"),
        ("activations of a training step", _bytes(report.activation_bytes)),
        ("weights, gradients, AdamW", _bytes(report.weight_bytes)),
        ("KL floor of the fast schedule", f"{report.kl_floor_per_token:.4f} nats per token"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"Cost of {report.preset}", *(f"  {name:<{width}}  {value}" for name, value in rows)]
    lines += [
        "",
        f"This engine performs {paper:.2f} of the paper's count, (T_fast + 1)(6 N + 6 L H T): its",
        "fast loop computes no weight gradients, attention stops at the window, and what lies",
        "below the first cross-attention is computed once per batch. Matrix products; float32.",
    ]
    if report.warning is not None:
        lines += ["", report.warning]
    return "\n".join(lines)


def _flops(value: float) -> str:
    return f"{value / 1e9:.3g} GFLOP" if value >= 1e8 else f"{value / 1e6:.3g} MFLOP"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
