"""Every setting, with its meaning and its limits; and the presets.

The dataclasses are frozen and check themselves, so a configuration that exists is one that can run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Strict

from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.schema import Finite, Options, Whole, settings, validated

ScheduleName = Literal["constant", "cosine", "warmup_cosine"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
Precision = Literal["fp32", "bf16"]
Multiplier = Callable[[int, int], float]
"""A schedule of one's own: (step, total) -> factor on the learning rate."""

# What memory allows is decided by `ltm_pyro.run.limits`; these keep a slip of the keyboard from
# becoming a number that no library takes.
MOST_FAST_STEPS = 10**6
Count = Annotated[Whole, Gt(0), Le(10**9)]
Draws = Annotated[Whole, Ge(2), Le(10**9)]
"""A standard error needs two."""
CountOrNone = Annotated[Whole, Ge(0), Le(10**9)]
Seed = Annotated[Whole, Ge(0), Le(2**63 - 1)]
FastSteps = Annotated[Whole, Gt(0), Le(MOST_FAST_STEPS)]
Depth = Annotated[Whole, Gt(0), Le(256)]
"""Of what is a Python object each: layers."""
Rate = Annotated[Finite, Gt(0), Le(1e30)]
Share = Annotated[Finite, Ge(0), Le(1)]
ShareBelowOne = Annotated[Finite, Ge(0), Lt(1)]
Text = Annotated[str, Strict()]
Switch = Annotated[bool, Strict()]


@settings("model")
class ModelConfig:
    """The prior, and the shape of prior and decoder."""

    vocab_size: Count = 256
    """V: tokens that the decoder chooses from. BOS is an input only and is not counted."""
    seq_len: Count = 128
    """T: the longest sequence that is scored or generated."""
    n_layers: Depth = 3
    """L: decoder layers."""
    width: Count = 128
    """H: width of the residual stream."""
    n_heads: Count = 4
    """Attention heads; they share `width` equally, an even number of dimensions each."""
    mlp_hidden: Count = 344
    """Hidden units of each SwiGLU block."""
    window: Count = 8
    """Positions that self-attention sees, the current one included."""
    thoughts_per_layer: Count = 2
    """K_l: thought vectors that feed each layer; K = L * K_l."""
    thought_dim: Count = 16
    """D: width of a thought vector."""
    prior: Text = "standard_normal"
    """p(z): `standard_normal`, or learned: `mixture`, `flow`, `autoregressive`, `state_space`,
    `hierarchical`."""
    prior_options: Options = field(default_factory=dict)
    """Options of the prior, e.g. `{"components": 8}` for `mixture`."""

    def __post_init__(self) -> None:
        # Which priors and options there are, `build_prior` knows.
        if self.width % (2 * self.n_heads):
            raise InputError(
                f"model.width {self.width} with {self.n_heads} heads: width must be a multiple of "
                "twice the number of heads (rotary positions turn pairs of dimensions)"
            )

    @property
    def n_thoughts(self) -> int:
        """K: thought vectors of one sequence, over all layers."""
        return self.n_layers * self.thoughts_per_layer

    @property
    def n_weights(self) -> int:
        """Weights of the decoder, the tied embedding counted once."""
        width = self.width
        layer = (
            4 * width**2  # self-attention: queries, keys, values, output
            + 2 * width**2  # cross-attention: queries, output
            + 2 * self.thought_dim * width  # keys and values of the thoughts
            + 3 * width * self.mlp_hidden
            + 3 * width  # gains of the three norms
        )
        return self.vocab_size * width + self.n_layers * layer + 2 * width  # BOS, the last norm


@settings("fast")
class Fast:
    """The fast clock: how the local parameters of q(z_i) are fitted, per sequence."""

    steps: Annotated[Whole, Ge(0), Le(MOST_FAST_STEPS)] = 16
    """T_fast: gradient steps per sequence; 0 leaves q where the guide starts it."""
    optimizer: Literal["natural", "adam"] = "natural"
    """`natural`: along the natural gradient, in units of q, for the families that have a normal in
    them, and Adam at a quarter of the rate for what has none. `adam`: Adam for all, as always with
    `noise="fixed"`, whose objective narrows q without end."""
    lr: Rate = 0.4
    """Peak learning rate on the local parameters; a quarter of it suits `adam`."""
    momentum: ShareBelowOne = 0.0
    """Share of the last step that a natural step keeps."""
    schedule: ScheduleName | Multiplier = "cosine"
    """How the learning rate runs over the T_fast steps."""
    final_fraction: Share | None = None
    """The learning rate's last value as a fraction of its peak (cosine schedules); by default half
    for natural steps, which are averaged, and a tenth for Adam's."""
    warmup: ShareBelowOne = 0.0
    """Share of the steps spent rising from zero (`warmup_cosine`)."""
    noise: Literal["fresh", "fixed"] = "fresh"
    """`fresh`: new draws each fast step. `fixed`: the same draws through the whole loop; the
    objective on those draws is then not a bound (see `score_on_own_draws`)."""
    fixed_draws: Count = 1
    """M: draws that `noise="fixed"` averages over."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Adam's decay rates for the first and second moment; on fresh noise the second is lower in the
    first steps (see `RowAdam`)."""
    average: ShareBelowOne = 0.75
    """Share of the steps (of `adam`'s beyond the first 100), counted from the end, over which local
    parameters are averaged, the later the more, so that what is left of the gradient noise cancels
    (Polyak & Juditsky 1992). Fresh noise only."""


@settings("slow")
class Slow:
    """The slow clock: how decoder, prior and shared guide parameters are fitted."""

    lr: Rate = 4e-3
    """Peak learning rate of AdamW."""
    schedule: ScheduleName | Multiplier = "warmup_cosine"
    """How the learning rate runs over the fit."""
    final_fraction: Share = 0.1
    """The learning rate's last value as a fraction of its peak (cosine schedules)."""
    warmup: ShareBelowOne = 0.05
    """Share of the fit spent rising from zero (`warmup_cosine`)."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW's decay rates for the first and second moment."""
    weight_decay: Annotated[Finite, Ge(0), Le(1e30)] = 0.1
    """Decoupled weight decay of matrices; gains and embeddings are not decayed."""
    clip_norm: Rate = 1.0
    """Largest Euclidean norm of the slow gradient (per-token loss); longer ones are shortened."""
    thoughts_start: Share = 0.0
    """Share of the fit after which thoughts join (1: never, as in the control). Until then z is 0
    and no fast loop runs: the decoder, whose cross-attention starts at zero, trains as the
    autoregressive model."""
    kl_start: Share = 1.0
    """KL weight at the start of the fit; 1 means no annealing."""
    kl_hold: Share = 0.3
    """Share of the fit during which the KL weight stays at `kl_start`."""
    kl_full: Share = 0.7
    """Share of the fit after which the KL weight is 1."""
    word_dropout: Share = 0.0
    """Probability that the decoder, while it is trained, is not shown a token before (it reads the
    BOS vector in its place; every token is still scored). Scores and generation show all."""

    def __post_init__(self) -> None:
        if self.kl_hold > self.kl_full:
            raise InputError(
                f"slow.kl_hold is {self.kl_hold} and slow.kl_full {self.kl_full}: the first must "
                "not be above the second"
            )


@settings("corpus")
class CorpusConfig:
    """Which text, and how it becomes sequences."""

    name: Text = "pydoc"
    """A built-in name (`pydoc`, `mixture`), a path or pattern, or a Hugging Face dataset
    (`hf:NAME`, `hf:NAME@REVISION`)."""
    tokenizer: Text = "bytes"
    """`bytes`, `bpe` (trained on the training split), a registered name, a `tokenizer.json`, or a
    folder with GPT-2's vocabulary."""
    encoding: Text = "utf-8"
    """Encoding of text files that do not begin with a mark of their own."""
    newlines: Literal["lf", "keep"] | None = None
    """By default line ends of files become line feeds; `lf`: of strings in records too; `keep`."""
    text_field: Text = "text"
    """The field of a record that is its text; dots lead into nested ones, as in `turns.text`."""
    turn_separator: Text = "\n"
    """Between the strings, where the text is a list of turns."""
    split: Text | None = None
    """`document` (the default), `group` by `split_by`, or `given`: as files or datasets have it."""
    split_by: Text | None = None
    """For `group`: a field, `file`, or `file:PATTERN`, found in the file's name."""
    seed: Seed = 0
    """Seed of the split, and of a synthetic corpus."""
    options: Options = field(default_factory=dict)
    """Further options of `load_corpus`, e.g. `{"classes": 8}` for `mixture`."""


@settings("held_out")
class HeldOut:
    """The bound on held-out text while a fit goes on, in `metrics.csv`."""

    every: CountOrNone = 0
    """Slow steps between bounds; 0: none. With bounds, the best checkpoint is kept too."""
    sequences: Count = 32
    """Sequences of the validation split, the same ones each time."""
    draws: Draws = 8
    """S: fresh draws per sequence."""
    fast_steps: FastSteps = 16
    """T_fast when they are inferred."""
    patience: CountOrNone = 0
    """Bounds in a row without a new best one after which the fit stops; 0: it never does."""

    def __post_init__(self) -> None:
        if self.patience and not self.every:
            raise InputError(
                f"held_out.patience is {self.patience} and held_out.every 0: a fit stops early on "
                "its held-out bound, so set held_out.every too"
            )


@settings("")
class FitConfig:
    """One fit, whole: with the package's version it determines the result."""

    preset: Text = "nano"
    """The preset that the other fields started from."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Which text."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Prior and decoder. `vocab_size` is taken from the corpus."""
    guide: Text = "mean_field"
    """Family of the local posterior."""
    guide_options: Options = field(default_factory=dict)
    """Options of the guide family."""
    objective: Text = "elbo"
    """What the clocks maximise: `elbo`, `stl`, `iwae`, `dreg`, `renyi`, `beta` or `free_bits`."""
    objective_options: Options = field(default_factory=dict)
    """Options of the objective, e.g. `{"particles": 8}`."""
    fast: Fast = field(default_factory=Fast)
    """The fast clock."""
    slow: Slow = field(default_factory=Slow)
    """The slow clock."""
    steps: Count = 300
    """Slow steps."""
    batch_size: Count = 16
    """B: sequences per slow step."""
    held_out: HeldOut = field(default_factory=HeldOut)
    """The bound on held-out text while the fit goes on, and early stopping."""
    seed: Seed = 0
    """Seed of initial weights, batches and noise."""
    restarts: Annotated[Whole, Gt(0), Le(1000)] = 1
    """Independent fits, with the seeds that follow; the chains of an export."""
    init_from: Text = ""
    """A run whose last weights the fit starts from; its model, tokenizer and settings too, where
    nothing else is said."""
    device: Text = "cpu"
    """A torch device, e.g. `cpu` or `cuda`."""
    compile: Switch = True
    """Compile the likelihood of the fast loop; without a compiler it runs uncompiled."""
    precision: Precision = "fp32"
    """Of the decoder's matrix products while it is fitted: `fp32`, or `bf16`, faster where the
    processor has it. Weights, local parameters, KL and sums stay in fp32, and so do scores."""
    micro_batch: CountOrNone = 0
    """Rows that both clocks take at a time, to save memory; 0: all rows of the batch."""
    checkpointing: Switch = False
    """Compute layers again in the slow step's backward pass instead of keeping what they did."""
    persistent: Switch = False
    """Keep local parameters per sequence id, in the run folder, and warm-start from them."""
    control: Switch = True
    """Also train the same decoder without thoughts, for as many slow steps, as a control."""
    checkpoint_every: Count = 50
    """Slow steps between checkpoints."""
    eval_sequences: Count = 64
    """Held-out sequences that are scored after the fit."""
    eval_draws: Draws = 64
    """S: draws per sequence in those scores."""
    eval_fast_steps: FastSteps = 32
    """T_fast when a fitted run scores and exports: a longer loop closes more of the gap that
    truncation leaves, and costs little where no decoder is trained."""


_ANNEALED = Slow(kl_start=0.02)

PRESETS: dict[str, FitConfig] = {
    # A demonstration in minutes on two cores, by the recipe at which thoughts pay on text
    # (docs/recipes.md): long sequences, of which a small decoder sees few tokens at a time, and
    # thoughts that join when it has learned what those tell.
    "nano": FitConfig(
        preset="nano",
        model=ModelConfig(
            seq_len=1024, n_layers=2, width=64, mlp_hidden=172, window=8, thought_dim=8
        ),
        fast=Fast(steps=4),
        slow=Slow(lr=6e-3, final_fraction=0.02, thoughts_start=0.7),
        steps=1200, batch_size=8, eval_sequences=128, eval_draws=32,
    ),
    # The synthetic corpus whose exact likelihood is known: only thoughts can tell its classes, and
    # a prior of clusters has their shape; N(0, I) costs nats of KL for where the clusters lie.
    "mixture": FitConfig(
        preset="mixture",
        corpus=CorpusConfig(name="mixture"),
        model=ModelConfig(
            vocab_size=16, seq_len=64, n_layers=2, width=64, n_heads=4, mlp_hidden=172,
            window=1, thoughts_per_layer=2, thought_dim=8, prior="mixture",
        ),
        fast=Fast(lr=0.2),  # the KL to that prior is taken on draws: a higher rate leaves its noise
        slow=replace(_ANNEALED, lr=1e-2, kl_full=0.6), steps=600,
        eval_sequences=256, eval_fast_steps=64,
    ),
    "tiny": FitConfig(
        preset="tiny",
        corpus=CorpusConfig(tokenizer="bpe", options={"vocab_size": 8192}),
        model=ModelConfig(
            vocab_size=8192, seq_len=256, n_layers=4, width=256, n_heads=4, mlp_hidden=688,
            window=64, thoughts_per_layer=2, thought_dim=32,
        ),
        slow=replace(_ANNEALED, lr=2e-3), batch_size=8, steps=2000,
    ),
}  # fmt: skip


def _paper_preset(name: str, n_layers: int, thoughts: int, fast_steps: int) -> FitConfig:
    """A model of Kong et al. (2025): thoughts in total, equally over the layers."""
    return FitConfig(
        preset=name,
        # As many tokens as GPT-2's vocabulary has, where the text is large enough to learn them.
        corpus=CorpusConfig(tokenizer="bpe", options={"vocab_size": 50257}),
        model=ModelConfig(
            vocab_size=50257, seq_len=1024, n_layers=n_layers, width=512, n_heads=8,
            mlp_hidden=1376, window=256, thoughts_per_layer=thoughts // n_layers, thought_dim=512,
        ),
        fast=Fast(steps=fast_steps),
        slow=Slow(lr=4e-4, kl_start=0.02),
        batch_size=8, steps=100_000, checkpoint_every=1000, control=False,
    )  # fmt: skip


PRESETS["ltm-small"] = _paper_preset("ltm-small", 3, 24, 16)
PRESETS["ltm-medium"] = _paper_preset("ltm-medium", 6, 24, 16)
PRESETS["ltm-large"] = _paper_preset("ltm-large", 12, 96, 64)


def preset(name: str) -> FitConfig:
    """The preset called `name`; `InputError` if there is none; the nearest name is offered."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types; `InputError` where a schedule is a function."""
    plain = dataclasses.asdict(config)
    for clock in ("fast", "slow"):
        if clock in plain and callable(plain[clock]["schedule"]):
            raise InputError(f"{clock}.schedule is a function: only named schedules can be saved")
    return plain


from_dict = validated
"""What `to_dict` gave, as the dataclass that is named first again."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in their places, group by group."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        if isinstance(value, Mapping) and isinstance(mine, Mapping):
            value = merged(mine, value)
        out[key] = value
    return out
