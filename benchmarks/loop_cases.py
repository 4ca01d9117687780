"""One workload, and the loops that are measured on it in turn.

a     the published algorithm, eager fp32          published_loop.py
a16   the same under bf16 autocast (bf16 rows)
b     the engine by hand, without Pyro             lean_loop.py
c     ltm.DualRateSVI
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, Protocol

import torch
from lean_loop import LeanLoop
from loop_memory import peak_bytes
from matrix_rate import MatrixRate, fast_step_products
from published_loop import PublishedLoop

import ltm_pyro as ltm
from ltm_pyro.config import preset

Precision = Literal["fp32", "bf16"]
Part = Literal["infer", "step"]
PARTS: tuple[Part, ...] = ("infer", "step")


class Loop(Protocol):
    """What the loops have in common."""

    def infer(self, batch: ltm.Batch) -> object: ...

    def step(self, batch: ltm.Batch) -> object: ...


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        preset: Of the model, and of its fast clock.
        precision: Of the decoder in (b) and (c).
        batch_size: B.
        length: T.
        fast_steps: T_fast.
        compile: Compile the likelihood of (b) and (c).
        device: A torch device.
        seed: Of weights, tokens and noise.
        model: Fields of `ModelConfig` that differ from the preset's.
    """

    preset: str
    precision: Precision
    batch_size: int
    length: int
    fast_steps: int
    compile: bool
    device: str
    seed: int
    model: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """B x T."""
        return self.batch_size * self.length


class Workload:
    """Weights, data and loops of a case.

    All loops work on the same weights. Those that learn in a slow step are put back before each
    timed call, outside of the time.

    Args:
        case: What to build.
        only: The loops to build; by default all that the precision has.
    """

    def __init__(self, case: Case, only: tuple[str, ...] | None = None) -> None:
        self.case = case
        self.device = torch.device(case.device)
        self.compiled = case.compile
        with torch.random.fork_rng():
            torch.manual_seed(case.seed)
            model = ltm.LatentThoughtModel.from_preset(case.preset, **dict(case.model))
            for name, p in model.named_parameters():
                # It starts at zero, and thoughts would not matter yet.
                if name.endswith("cross_attention.out.weight"):
                    torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
            tokens = torch.randint(model.config.vocab_size, (case.batch_size, case.length))
        self.model = model.to(self.device)
        self.batch = ltm.Batch(tokens).to(self.device)
        config = preset(case.preset)
        # All loops are Adam's, so that their numbers agree.
        fast = ltm.Fast(steps=case.fast_steps, optimizer="adam", lr=0.1)
        slow = ltm.Slow(lr=config.slow.lr)
        svi = ltm.DualRateSVI(
            self.model,
            ltm.build_guide("mean_field", self.model),
            fast=fast,
            slow=slow,
            seed=case.seed,
            execution=ltm.Execution(compile=case.compile, precision=case.precision),
        )
        self.loops: dict[str, Loop] = {
            "a": PublishedLoop(self.model, fast, slow, case.seed),
            "a16": PublishedLoop(self.model, fast, slow, case.seed, autocast=True),
            "b": LeanLoop(self.model, fast, slow, case.seed, case.precision),
            "c": svi,
        }
        present = [name for name in self.loops if name != "a16" or case.precision == "bf16"]
        self.loops = {name: self.loops[name] for name in only or present}
        self._weights = [p.detach().clone() for p in self.model.parameters()]

    def warm_up(self, names: Iterable[str], parts: tuple[Part, ...] = PARTS) -> None:
        """Runs these loops once, which compiles; notes where the compiler failed."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for name in names:
                for part in parts:
                    self.seconds(name, part)
        self.compiled = self.case.compile and not any("uncompiled" in str(w.message) for w in seen)

    def call(self, name: str, part: Part) -> Callable[[], object]:
        """One run of a loop's part, on weights put back."""
        with torch.no_grad():
            for p, kept in zip(self.model.parameters(), self._weights, strict=True):
                p.copy_(kept)
        run = getattr(self.loops[name], part)
        return lambda: run(self.batch)

    def seconds(self, name: str, part: Part) -> float:
        """Seconds of one run."""
        run = self.call(name, part)
        _synchronize(self.device)
        began = time.perf_counter()
        run()
        _synchronize(self.device)
        return time.perf_counter() - began

    def peak(self, name: str, part: Part) -> int:
        """Bytes at the worst moment of one run, beyond weights, data and optimiser states."""
        return peak_bytes(self.call(name, part), self.device)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times of all loops in turn, their ratios, peak memory, and the share of the matrix rate.

    Args:
        case: What to measure.
        rounds: Times that each loop runs, one after the other: a b c, a b c, ...

    Returns:
        Plain types for JSON. Times in seconds, memory in bytes.
    """
    work = Workload(case)
    work.warm_up(work.loops)
    config = work.model.config
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    rate = MatrixRate(fast_step_products(config, case.batch_size, case.length), work.device, dtype)
    times: dict[Part, dict[str, list[float]]] = {
        part: {name: [] for name in work.loops} for part in PARTS
    }
    for _ in range(rounds):
        for part in PARTS:
            for name in work.loops:
                times[part][name].append(work.seconds(name, part))
        rate.measure()
    row: dict[str, Any] = {**asdict(case), "vocab_size": config.vocab_size, "rounds": rounds}
    row["compiled"] = work.compiled
    for part in PARTS:
        row[part] = _summary(case, times[part])
        row[part]["peak_bytes"] = {name: work.peak(name, part) for name in work.loops}
    row["matrix"] = _matrix(case, rate, median(times["infer"]["c"]))
    return row


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median of the rounds' ratios with the smallest and the largest."""
    ratios = [x / y for x, y in zip(above, below, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def _summary(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    work = case.tokens * case.fast_steps
    out: dict[str, Any] = {
        "seconds": times,
        "tokens_x_fast_steps_per_second": {n: work / median(s) for n, s in times.items()},
    }
    for above, below in (("a", "c"), ("a16", "c"), ("c", "b")):
        if above in times:
            out[f"{above}/{below}"] = ratio(times[above], times[below])
    return out


def _matrix(case: Case, rate: MatrixRate, seconds: float) -> dict[str, Any]:
    """Share of the matrix rate that (c) reaches in its fast loop."""
    per_step = seconds / case.fast_steps
    out: dict[str, Any] = {"seconds_per_fast_step": per_step, "products": rate.rows()}
    for name, attention in (("weights", False), ("with_attention", True)):
        flops, alone = rate.totals(attention=attention)
        out[name] = {
            "flops_per_fast_step": flops,
            "gflops_per_second": flops / alone / 1e9,
            "reached_gflops_per_second": flops / per_step / 1e9,
            "share": alone / per_step,
        }
    return out


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
