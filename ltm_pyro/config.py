"""Every setting, with its meaning and its limits; and the presets.

The dataclasses are frozen and check themselves, so a configuration that exists is one that can run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from ltm_pyro.errors import InputError, unknown_name

ScheduleName = Literal["constant", "cosine", "warmup_cosine"]
SCHEDULES: tuple[str, ...] = ("constant", "cosine", "warmup_cosine")
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[str, ...] = ("fp32", "bf16")
Multiplier = Callable[[int, int], float]
"""A schedule of one's own: (step, total) -> factor on the learning rate."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_schedule(owner: str, schedule: object) -> None:
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise unknown_name(f"{owner}.schedule", schedule, SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The prior, and the shape of prior and decoder."""

    vocab_size: int = 256
    """V: tokens that the decoder chooses from. BOS is an input only and is not counted."""
    seq_len: int = 128
    """T: the longest sequence that is scored or generated."""
    n_layers: int = 3
    """L: decoder layers."""
    width: int = 128
    """H: width of the residual stream."""
    n_heads: int = 4
    """Attention heads; they share `width` equally, an even number of dimensions each."""
    mlp_hidden: int = 344
    """Hidden units of each SwiGLU block."""
    window: int = 8
    """Positions that self-attention sees, the current one included."""
    thoughts_per_layer: int = 2
    """K_l: thought vectors that feed each layer; K = L * K_l."""
    thought_dim: int = 16
    """D: width of a thought vector."""
    prior: str = "standard_normal"
    """p(z): `standard_normal`, or learned: `mixture`, `flow`, `autoregressive`."""
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the prior, e.g. `{"components": 8}` for `mixture`."""

    def __post_init__(self) -> None:
        # Which priors and options there are, `build_prior` knows.
        _require(isinstance(self.prior, str), f"model.prior is {self.prior!r}: must be a name")
        _require(
            isinstance(self.prior_options, Mapping),
            f"model.prior_options is {self.prior_options!r}: must be a group of settings",
        )
        for f in dataclasses.fields(self):
            if f.name in ("prior", "prior_options"):
                continue
            value = getattr(self, f.name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
            _require(ok, f"model.{f.name} is {value!r}: must be a whole number above 0")
        _require(
            self.width % (2 * self.n_heads) == 0,
            f"model.width {self.width} with {self.n_heads} heads: width must be a multiple of "
            "twice the number of heads (rotary positions turn pairs of dimensions)",
        )

    @property
    def n_thoughts(self) -> int:
        """K: thought vectors of one sequence, over all layers."""
        return self.n_layers * self.thoughts_per_layer


@dataclass(frozen=True, kw_only=True)
class Fast:
    """The fast clock: how the local parameters of q(z_i) are fitted, per sequence."""

    steps: int = 16
    """T_fast: gradient steps per sequence; 0 leaves q where the guide starts it."""
    lr: float = 0.1
    """Peak learning rate of Adam on the local parameters."""
    schedule: ScheduleName | Multiplier = "cosine"
    """How the learning rate runs over the T_fast steps."""
    final_fraction: float = 0.1
    """The learning rate's last value as a fraction of its peak (cosine schedules)."""
    warmup: float = 0.0
    """Share of the steps spent rising from zero (`warmup_cosine`)."""
    noise: Literal["fresh", "fixed"] = "fresh"
    """`fresh`: new draws each fast step. `fixed`: the same draws through the whole loop; the
    objective on those draws is then not a bound (see `score_on_own_draws`)."""
    fixed_draws: int = 1
    """M: draws that `noise="fixed"` averages over."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates for the first and second moment; on fresh noise the second is lower in the
    first steps (see `RowAdam`)."""
    average: float = 0.4
    """Share of the steps beyond the first 100, counted from the end, over which local parameters
    are averaged, so that what is left of the gradient noise cancels (Polyak & Juditsky 1992).
    Fresh noise only."""

    def __post_init__(self) -> None:
        _require(
            isinstance(self.steps, int) and self.steps >= 0,
            f"fast.steps is {self.steps!r}: must be a whole number, 0 or more",
        )
        _require(0 < self.lr <= 1e30, f"fast.lr is {self.lr}: must be above 0 and at most 1e30")
        _check_schedule("fast", self.schedule)
        _require(0 <= self.final_fraction <= 1, "fast.final_fraction must be from 0 to 1")
        _require(0 <= self.warmup < 1, "fast.warmup must be from 0 to below 1")
        _require(0 <= self.average < 1, "fast.average must be from 0 to below 1")
        if self.noise not in ("fresh", "fixed"):
            raise unknown_name("fast.noise", str(self.noise), ("fresh", "fixed"))
        _require(
            self.fixed_draws >= 1, f"fast.fixed_draws is {self.fixed_draws}: must be 1 or more"
        )
        _check_betas("fast", self.betas)


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The slow clock: how decoder, prior and shared guide parameters are fitted."""

    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    schedule: ScheduleName | Multiplier = "warmup_cosine"
    """How the learning rate runs over the fit."""
    final_fraction: float = 0.1
    """The learning rate's last value as a fraction of its peak (cosine schedules)."""
    warmup: float = 0.05
    """Share of the fit spent rising from zero (`warmup_cosine`)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for the first and second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; gains and embeddings are not decayed."""
    clip_norm: float = 1.0
    """Largest Euclidean norm of the slow gradient (per-token loss); longer ones are shortened."""
    thoughts_start: float = 0.0
    """Share of the fit after which thoughts join. Until then z is 0 and no fast loop runs: the
    decoder, whose cross-attention starts at zero, trains as the autoregressive model."""
    kl_start: float = 1.0
    """KL weight at the start of the fit; 1 means no annealing."""
    kl_hold: float = 0.3
    """Share of the fit during which the KL weight stays at `kl_start`."""
    kl_full: float = 0.7
    """Share of the fit after which the KL weight is 1."""
    word_dropout: float = 0.0
    """Probability that the decoder, while it is trained, is not shown a token before (it reads the
    BOS vector in its place; every token is still scored). Scores and generation show all."""

    def __post_init__(self) -> None:
        _require(0 < self.lr <= 1e30, f"slow.lr is {self.lr}: must be above 0 and at most 1e30")
        _check_schedule("slow", self.schedule)
        _require(0 <= self.final_fraction <= 1, "slow.final_fraction must be from 0 to 1")
        _require(0 <= self.warmup < 1, "slow.warmup must be from 0 to below 1")
        _require(self.weight_decay >= 0, "slow.weight_decay must be 0 or more")
        _require(self.clip_norm > 0, "slow.clip_norm must be above 0")
        _require(
            0 <= self.thoughts_start < 1,
            f"slow.thoughts_start is {self.thoughts_start}: must be from 0 to below 1",
        )
        _require(0 <= self.kl_start <= 1, f"slow.kl_start is {self.kl_start}: must be from 0 to 1")
        _require(
            0 <= self.kl_hold <= self.kl_full <= 1,
            "slow.kl_hold and slow.kl_full must satisfy 0 <= kl_hold <= kl_full <= 1",
        )
        _require(
            0 <= self.word_dropout <= 1,
            f"slow.word_dropout is {self.word_dropout}: must be from 0 to 1",
        )
        _check_betas("slow", self.betas)


def _check_betas(owner: str, betas: tuple[float, float]) -> None:
    ok = len(betas) == 2 and all(0 <= b < 1 for b in betas)
    _require(ok, f"{owner}.betas is {betas}: must be two numbers from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text, and how it becomes sequences."""

    name: str = "pydoc"
    """A built-in name (`pydoc`, `mixture`), a path, or a Hugging Face dataset (`hf:NAME`)."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe` (trained on the training split), or a folder with a GPT-2 vocabulary."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    seed: int = 0
    """Seed of the split, and of a synthetic corpus."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `load_corpus`, e.g. `{"classes": 8}` for `mixture`."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """One fit, whole: with the package's version it determines the result."""

    preset: str = "nano"
    """The preset that the other fields started from."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Which text."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Prior and decoder. `vocab_size` is taken from the corpus."""
    guide: str = "mean_field"
    """Family of the local posterior."""
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the guide family."""
    objective: str = "elbo"
    """What the clocks maximise: `elbo`, `stl`, `iwae`, `dreg`, `renyi`, `beta` or `free_bits`."""
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the objective, e.g. `{"particles": 8}`."""
    fast: Fast = field(default_factory=Fast)
    """The fast clock."""
    slow: Slow = field(default_factory=Slow)
    """The slow clock."""
    steps: int = 300
    """Slow steps."""
    batch_size: int = 16
    """B: sequences per slow step."""
    seed: int = 0
    """Seed of initial weights, batches and noise."""
    device: str = "cpu"
    """A torch device, e.g. `cpu` or `cuda`."""
    compile: bool = True
    """Compile the likelihood of the fast loop; without a compiler it runs uncompiled."""
    precision: Precision = "fp32"
    """Of the decoder's matrix products while it is fitted: `fp32`, or `bf16`, faster where the
    processor has it. Weights, local parameters, KL and sums stay in fp32, and so do scores."""
    micro_batch: int = 0
    """Rows that both clocks take at a time, to save memory; 0: all rows of the batch."""
    checkpointing: bool = False
    """Compute layers again in the slow step's backward pass instead of keeping what they did."""
    shard: bool = False
    """Where processes share the fit, spread gradients and AdamW's moments over them."""
    persistent: bool = False
    """Keep local parameters per sequence id, in the run folder, and warm-start from them."""
    control: bool = True
    """Also train the same decoder without thoughts, for as many slow steps, as a control."""
    checkpoint_every: int = 50
    """Slow steps between checkpoints."""
    eval_sequences: int = 64
    """Held-out sequences that are scored after the fit."""
    eval_draws: int = 64
    """S: draws per sequence in those scores."""
    eval_fast_steps: int = 32
    """T_fast when a fitted run scores and exports: a longer loop closes more of the gap that
    truncation leaves, and costs little where no decoder is trained."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "checkpoint_every")
        for name in (*counts, "eval_sequences", "eval_draws", "eval_fast_steps"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
            _require(ok, f"{name} is {value!r}: must be a whole number above 0")
        for name in ("seed", "micro_batch"):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            _require(ok, f"{name} is {value!r}: must be a whole number, 0 or more")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", str(self.precision), PRECISIONS)


_ANNEALED = Slow(kl_start=0.02)
_LATE_THOUGHTS = Slow(thoughts_start=0.7, kl_start=0.02, kl_hold=0.76, kl_full=0.9)

PRESETS: dict[str, FitConfig] = {
    # A demonstration in minutes on two cores: most slow steps train the decoder alone, cheaply.
    "nano": FitConfig(
        preset="nano",
        model=ModelConfig(seq_len=256),
        fast=Fast(steps=8, lr=0.2), slow=_LATE_THOUGHTS, steps=450, batch_size=8, eval_draws=32,
    ),
    # The synthetic corpus whose exact likelihood is known: only thoughts can tell its classes.
    "mixture": FitConfig(
        preset="mixture",
        corpus=CorpusConfig(name="mixture"),
        model=ModelConfig(
            vocab_size=16, seq_len=64, n_layers=2, width=64, n_heads=4, mlp_hidden=172,
            window=1, thoughts_per_layer=2, thought_dim=8,
        ),
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
        corpus=CorpusConfig(tokenizer="gpt2"),
        model=ModelConfig(
            vocab_size=50257, seq_len=1024, n_layers=n_layers, width=512, n_heads=8,
            mlp_hidden=1376, window=256, thoughts_per_layer=thoughts // n_layers, thought_dim=512,
        ),
        fast=Fast(steps=fast_steps, lr=0.3),
        slow=Slow(lr=4e-4, kl_start=0.02),
        batch_size=8, steps=100_000, checkpoint_every=1000, control=False,
    )  # fmt: skip


PRESETS["ltm-small"] = _paper_preset("ltm-small", 3, 24, 16)
PRESETS["ltm-medium"] = _paper_preset("ltm-medium", 6, 24, 16)
PRESETS["ltm-large"] = _paper_preset("ltm-large", 12, 96, 64)


def preset(name: str) -> FitConfig:
    """The preset called `name`.

    Raises:
        InputError: if there is none; the nearest name is offered.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types.

    Raises:
        InputError: if it holds a schedule that is a Python function, which cannot be written down.
    """
    plain = dataclasses.asdict(config)
    for clock in ("fast", "slow"):
        if clock in plain and callable(plain[clock]["schedule"]):
            raise InputError(f"{clock}.schedule is a function: only named schedules can be saved")
    return plain


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds a configuration from plain types, refusing keys that it does not know.

    Args:
        cls: One of the dataclasses above.
        values: Field values; nested mappings for nested dataclasses; fields left out keep their
            defaults.
        where: Dotted path for messages, e.g. `"fast."`.

    Raises:
        InputError: on an unknown key (the nearest one is offered) or a value out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    nested: dict[str, type[Any]] = {
        "corpus": CorpusConfig, "model": ModelConfig, "fast": Fast, "slow": Slow,
    }  # fmt: skip
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name("key", f"{where}{key}", [f"{where}{name}" for name in fields])
        if key in nested and isinstance(value, Mapping):
            value = from_dict(nested[key], value, f"{where}{key}.")
        elif key == "betas":
            value = tuple(value)
        out[key] = value
    try:
        return cls(**out)
    except TypeError as error:
        raise InputError(f"{where or 'configuration'}: {error}") from None
