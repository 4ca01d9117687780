"""What a fit costs before it runs: weights, floating-point operations, and the KL floor.

Operations are those of matrix products (two per multiply-add), everything else being a few per
cent; those of guide and learned prior are not counted, being few beside the decoder's. Shape
letters as elsewhere: B, T, H, V, L, D, and K_l thoughts per layer. Memory: see `memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ltm_pyro.config import Fast, FitConfig, ModelConfig
from ltm_pyro.diagnostics.memory import MemoryReport, small_fit
from ltm_pyro.engine.kernels.vocabulary import MOST_LOGITS
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT
from ltm_pyro.inference.clocks.schedules import learning_rate, steps_naturally
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.decoder import block_shape, fused

KL_FLOOR_WARNING = 0.05
"""Nats per token above which the fast schedule, and not the text, decides the ELBO."""

_PER_WEIGHT = 16  # bytes: weight, gradient, and AdamW's two moments in float32


@dataclass(frozen=True)
class CostReport:
    """The cost of one configuration; FLOPs are per token of a full sequence.

    Attributes:
        preset: Its name.
        n_weights: Weights of the decoder, the tied embedding counted once; `n_prior_weights` of a
            learned prior.
        n_local: Dimensions of z per sequence, K D.
        fast_steps: T_fast.
        flops_forward: One complete pass through the decoder.
        flops_fast_step: Forward and backward by activations alone, above the first cross-attention.
        flops_fast_loop: All fast steps, and once what lies below the first cross-attention.
        flops_slow_step: Forward and backward with weight gradients, and with checkpointing the
            layers once more.
        flops_training_step: A fast loop and a slow step.
        flops_paper: The count of Kong et al. (2025), (T_fast + 1)(6 N + 6 L H T).
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


def cost_report(config: FitConfig) -> CostReport:
    """The cost of a fit, without running it."""
    model = config.model
    small, guide = small_fit(config)
    n_prior = sum(p.numel() for p in small.thought_prior.parameters())
    start_log_variance = guide.start_log_variance
    # Particles are further rows of the batch for everything that depends on z.
    particles = build_objective(config.objective, **config.objective_options).particles
    parts = _Parts(model)
    below, above, head = parts.attend, parts.above, parts.head
    fast_step = above + 2 * head + _fast_backward_flops(model, parts)
    # With fixed noise every step averages M draws, and the end is scored once more on them.
    fixed = config.fast.noise == "fixed"
    draws = particles * (config.fast.fixed_draws if fixed else 1)
    fast_loop = below + config.fast.steps * draws * fast_step
    if fixed:
        fast_loop += draws * (above + head)
    slow_above = _slow_above_flops(parts, config, particles)
    slow_step = below + parts.attend_backward + particles * slow_above
    if config.slow.word_dropout > 0:  # scored once more with every input token shown
        slow_step += below + particles * (above + head)
    n_local, floor = model.n_thoughts * model.thought_dim, 0.0
    if start_log_variance is not None:
        floor = kl_floor_per_sequence(config.fast, n_local, start_log_variance) / model.seq_len
    return CostReport(
        preset=config.preset,
        n_weights=model.n_weights,
        n_prior_weights=n_prior,
        n_local=n_local,
        fast_steps=config.fast.steps,
        flops_forward=below + above + head,
        flops_fast_step=fast_step,
        flops_fast_loop=fast_loop,
        flops_slow_step=slow_step,
        flops_training_step=fast_loop + slow_step,
        flops_paper=paper_flops_per_token(model, config.fast),
        weight_bytes=_PER_WEIGHT * (model.n_weights + n_prior),
        start_log_variance=start_log_variance,
        fast_reach=fast_reach(config.fast),
        kl_floor_per_token=floor,
    )


def paper_flops_per_token(model: ModelConfig, fast: Fast) -> float:
    """Training FLOPs per token as Kong et al. (2025) count them: (T_fast + 1)(6 N + 6 L H T).

    It charges a weight gradient at every fast step and full attention over T.
    """
    attention = 6 * model.n_layers * model.width * model.seq_len
    return (fast.steps + 1) * (6.0 * model.n_weights + attention)


class _Parts:
    """FLOPs per token of the decoder's parts forward, and of attention's backward.

    Attributes:
        attend: A layer below its cross-attention: projections and windowed attention.
        attend_backward: Its backward to inputs and weights: two products per projection.
        cross: One of cross-attention's two products, all heads' thoughts at once.
        project: Keys and values of one layer's thoughts, once per sequence, spread over its tokens.
        meet: The same of taking the positions' projections to keys and values.
        think: A layer from its cross-attention on.
        head: One product of the output: logits; a second one is the gradient by h.
        above: From the first cross-attention to the last layer's end.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.layers = model.n_layers
        product = 0.0  # of attention's two, masked pairs included
        if model.window > 1:
            n_blocks, block, span = block_shape(model.window, model.seq_len)
            product = 2.0 * model.width * n_blocks * block * span / model.seq_len
        # Gradients of both; where it is fused, the scores once more before.
        self.attention_backward = (5 if fused(model.window, model.seq_len) else 4) * product
        self.attend = 2.0 * 4 * model.width**2 + 2 * product
        self.attend_backward = 2.0 * 8 * model.width**2 + self.attention_backward
        self.cross = 2.0 * model.width * model.n_heads * model.thoughts_per_layer
        spread = 4.0 * model.width * model.thoughts_per_layer / model.seq_len
        self.project, self.meet = spread * model.thought_dim, spread * model.width
        self.mlp = 2.0 * 3 * model.width * model.mlp_hidden
        self.think = self.project + self.meet + 2 * self.cross + self.mlp
        self.head = 2.0 * model.width * model.vocab_size
        self.above = (self.layers - 1) * self.attend + self.layers * self.think


def _fast_backward_flops(model: ModelConfig, parts: _Parts) -> float:
    """Backward to the thoughts with frozen weights: one product per projection.

    Below the first cross-attention nothing depends on z, so that one's scores pass no gradient to
    the positions, and nothing is passed on from there. The head's part is `_Parts.head`.
    """
    attend = 2.0 * 4 * model.width**2 + parts.attention_backward
    think = parts.think + 2 * parts.cross
    return (parts.layers - 1) * attend + parts.layers * think - parts.cross


def _slow_above_flops(parts: _Parts, config: FitConfig, particles: int) -> float:
    """Forward from the first cross-attention on, and backward to all weights.

    Two products per projection, one where the input is z; for the head the gradients by h and by
    the embedding, and where not all logits are held these once more.
    """
    think = parts.project + 2 * parts.meet + 4 * parts.cross + 2 * parts.mlp
    backward = (parts.layers - 1) * parts.attend_backward + parts.layers * think
    # A checkpointed layer is computed again up to the input of its last product.
    again = parts.above - parts.layers * parts.mlp / 3 if config.checkpointing else 0.0
    rows = particles * (config.micro_batch or config.batch_size)
    held = rows * config.model.seq_len * config.model.vocab_size <= MOST_LOGITS
    return parts.above + again + backward + (3 if held else 4) * parts.head


def format_cost(
    report: CostReport, memory: MemoryReport | None = None, measured: int | None = None
) -> str:
    """As text for the terminal, with the `memory_report` and `measured_bytes` where given."""
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
        ("weights, gradients, AdamW", _bytes(report.weight_bytes)),
        ("KL floor of the fast schedule", f"{report.kl_floor_per_token:.4f} nats per token"),
        *(_memory_rows(memory) if memory is not None else []),
        *([] if measured is None else [("  measured, one real step", _bytes(measured))]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"Cost of {report.preset}",
        *(f"  {name:<{width}}  {value}" for name, value in rows),
        "",
        f"This engine performs {paper:.2f} of the paper's count, (T_fast + 1)(6 N + 6 L H T): its",
        "fast loop computes no weight gradients, attention stops at the window, and what lies",
        "below the first cross-attention is computed once per batch. Matrix products alone.",
    ]
    if report.warning is not None:
        lines += ["", report.warning]
    return "\n".join(lines)


def _memory_rows(memory: MemoryReport) -> list[tuple[str, str]]:
    return [
        ("memory, at most: weights and moments", _bytes(memory.weights_bytes)),
        ("  activations of a micro batch", _bytes(memory.activations_bytes)),
        ("  rows of q, with moments", _bytes(memory.rows_bytes)),
        ("  or draws while scoring", _bytes(memory.scoring_bytes)),
        ("  peak of all tensors", _bytes(memory.tensor_bytes)),
        ("  Python, libraries, compiler", _bytes(memory.process_bytes)),
        ("  kept by the C library", _bytes(memory.allocator_bytes)),
        ("  peak of the process, on a CPU", _bytes(memory.peak_bytes)),
    ]


def _flops(value: float) -> str:
    return f"{value / 1e9:.3g} GFLOP" if value >= 1e8 else f"{value / 1e6:.3g} MFLOP"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def fast_reach(fast: Fast) -> float:
    """R: the sum of the fast learning rates; Adam moves a parameter at most about so far."""
    return sum(learning_rate(fast, step, fast.steps) for step in range(fast.steps))


def kl_floor_per_sequence(fast: Fast, n_dims: int, init_log_variance: float = 0.0) -> float:
    """KL in nats of K D dimensions that the fast schedule cannot undo, whatever the text.

    A dimension that carries nothing starts at log variance l0 and ends at some l, where it costs
    (e^l - 1 - l) / 2 nats. Adam moves it by at most about R; a natural step, in units u, by
    u^2 rate (1 - e^l) / 2, the KL's gradient, and by at most u.
    """
    left = init_log_variance
    if not steps_naturally(fast):
        left = math.copysign(max(abs(left) - fast_reach(fast), 0.0), left)
    else:
        for step in range(fast.steps if left else 0):
            unit = LOG_VARIANCE_UNIT
            slope = 0.5 * unit * -math.expm1(left) * learning_rate(fast, step, fast.steps)
            left += unit * min(max(slope, -1.0), 1.0)
    return n_dims * 0.5 * (math.exp(left) - 1.0 - left)
