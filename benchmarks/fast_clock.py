"""Decoder evaluations, and seconds, until the fresh-draw ELBO is within 0.5 nats of convergence.

    .venv/bin/ltm-pyro fit --preset mixture --no-control --out runs/mixture
    .venv/bin/ltm-pyro fit --preset tiny --steps 150 --fast.steps 4 --slow.thoughts_start 0.6 \
        --slow.kl_hold 0.7 --slow.kl_full 0.9 --no-control --out runs/tiny
    .venv/bin/python benchmarks/fast_clock.py runs/mixture runs/demo runs/tiny --write

Three fast clocks on the linear-Gaussian oracle and on held-out sequences of finished runs: the
published recipe (log variance started at -5, one fixed draw, Adam at 0.34 falling by a cosine),
Adam on fresh draws, and the natural gradient, of a run at the run's own rate. One evaluation is one
draw of one sequence, so their number is T_fast. Converged is the exact best mean field on the
oracle, elsewhere the best that a clock on fresh draws reaches in `--longest` steps. The settings of
the clocks were chosen on validation sequences; these are of the test split.

Seconds to an equal bound take engine and clock together: the published algorithm in eager PyTorch
(`published_loop.py`) against the compiled engine, in turns. Prints Markdown tables and what made
them; with `--write` they replace what stands between the markers in docs/speed.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from published_loop import PublishedLoop
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.diagnostics.held_out import spread

WITHIN = 0.5
"""Nats per sequence."""
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300, 384, 512)
CLOCKS = {
    "published": (-5.0, ltm.Fast(optimizer="adam", lr=0.34, noise="fixed")),
    "Adam": (0.0, ltm.Fast(optimizer="adam", lr=0.1)),
    "natural": (0.0, ltm.Fast()),
}
Score = Callable[[ltm.Posterior], float]
"""ELBO in nats per sequence, mean over the batch."""
Course = dict[int, float]
"""The score by T_fast, up to the first that is near enough."""
PAGE = Path(__file__).resolve().parents[1] / "docs/speed.md"
BEGIN, END = "<!-- clock:begin -->", "<!-- clock:end -->"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--draws", type=int, default=32, help="fresh draws of a score")
    parser.add_argument("--longest", type=int, default=512, help="largest T_fast on the oracle")
    parser.add_argument("--longest-run", type=int, default=256, help="and on a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/speed.md")
    args = parser.parse_args()
    steps, times = [], []
    for noise in (1.0, 0.3, 0.1):
        oracle = oracle_with(noise)
        batch = oracle.simulate(args.sequences, seed=args.seed)
        best = float(oracle.best_mean_field_elbo(batch).mean())

        def exact(
            post: ltm.Posterior, oracle: ltm.LinearGaussian = oracle, batch: ltm.Batch = batch
        ) -> float:
            return float(exact_elbo(oracle, post, batch).mean())

        case = Case(f"oracle, noise {noise:g}", oracle, batch, exact, args.seed, args.longest, best)
        steps.append(case.steps_row())
    for folder in args.runs:
        run = ltm.load_run(folder)
        batch = spread(run.corpus().test, args.sequences)

        def scored(
            post: ltm.Posterior, model: ltm.LatentModel = run.model, batch: ltm.Batch = batch
        ) -> float:
            scores = ltm.evaluate(
                model, post, batch, draws=args.draws, seed=args.seed + 1, controls=False
            )
            return float(scores["elbo"].mean())

        name = f"{run.config.preset}, {run.config.steps} slow steps"
        case = Case(
            name, run.model, batch, scored, args.seed, args.longest_run, rate=run.config.fast.lr
        )
        steps.append(case.steps_row())
        times.append(case.time_row(run.model))
    text = "\n".join([*STEPS_HEAD, *steps, "", *TIME_HEAD, *times, "", footnote(args)])
    if args.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    sys.stdout.write(f"{text}\n")


STEPS_HEAD = [
    f"| case | {' | '.join(CLOCKS)} | Adam / natural | behind in the end: {', '.join(CLOCKS)} |",
    f"|{'---|' * (len(CLOCKS) + 3)}",
]
TIME_HEAD = [
    "| case | published's best bound: steps, seconds, ours | ratio | within "
    f"{WITHIN} nats: Adam in the published loop, ours | ratio |",
    f"|{'---|' * 5}",
]


class Case:
    """One model and its sequences.

    Args:
        name: Of its rows.
        model: The model.
        batch: Sequences.
        score: The bound of a posterior of theirs.
        seed: Of the noise.
        longest: Largest T_fast.
        best: The converged score; by default the best of the clocks on fresh draws.
        rate: Of the natural clock.
    """

    def __init__(
        self,
        name: str,
        model: ltm.LatentModel,
        batch: ltm.Batch,
        score: Score,
        seed: int,
        longest: int,
        best: float | None = None,
        rate: float = ltm.Fast().lr,
    ) -> None:
        self.rate = rate
        self.name, self.model, self.batch, self.score = name, model, batch, score
        self.seed, self.longest = seed, longest
        self.last = {clock: self.reached(clock, longest) for clock in CLOCKS}
        self.best = max(self.last["Adam"], self.last["natural"]) if best is None else best
        self.courses = {clock: self.course(clock) for clock in CLOCKS}

    def svi(self, clock: str, steps: int) -> ltm.DualRateSVI:
        """A fit that does nothing but infer with this clock."""
        start, fast = CLOCKS[clock]
        guide = ltm.build_guide("mean_field", self.model, init_log_variance=start)
        compiled = ltm.Execution(compile=isinstance(self.model, ltm.LatentThoughtModel))
        fast = replace(fast, steps=steps, lr=self.rate if clock == "natural" else fast.lr)
        return ltm.DualRateSVI(self.model, guide, fast, seed=self.seed, execution=compiled)

    def reached(self, clock: str, steps: int) -> float:
        """The score after a loop of `steps`."""
        return self.score(self.svi(clock, steps).infer(self.batch, progress=False))

    def course(self, clock: str) -> Course:
        """Scores of longer and longer loops, until one is near enough."""
        found: Course = {}
        for steps in (t for t in GRID if t <= self.longest):
            if clock == "published" and steps & (steps - 1):
                continue  # it is never near, and the best of these powers of two says how far
            found[steps] = self.reached(clock, steps)
            if found[steps] >= self.best - WITHIN:
                break
        return found

    def first(self, clock: str, bound: float) -> int | None:
        """The shortest loop that reaches a bound."""
        return next((t for t, value in self.courses[clock].items() if value >= bound), None)

    def steps_row(self) -> str:
        """Steps to within `WITHIN` nats."""
        steps = {clock: self.first(clock, self.best - WITHIN) for clock in CLOCKS}
        cells = [f"never in {self.longest}" if t is None else str(t) for t in steps.values()]
        adam, natural = steps["Adam"], steps["natural"]
        ratio = "-" if adam is None or natural is None else f"{adam / natural:.1f}"
        behind = ", ".join(f"{self.best - value:.2f}" for value in self.last.values())
        return f"| {self.name} | {' | '.join(cells)} | {ratio} | {behind} |"

    def time_row(self, model: ltm.LatentThoughtModel) -> str:
        """Seconds to an equal bound: the published loop's best, and within `WITHIN` nats."""
        course = self.courses["published"]
        theirs = max(course, key=lambda t: course[t])
        cells = [self.name]
        for clock, long, bound in (
            ("published", theirs, course[theirs]),
            ("Adam", self.first("Adam", self.best - WITHIN), self.best - WITHIN),
        ):
            short = self.first("natural", bound)
            if long is None or short is None:
                cells += [f"not reached in {self.longest}", "-"]
                continue
            loop = PublishedLoop(model, replace(CLOCKS[clock][1], steps=long), ltm.Slow())
            ours = self.svi("natural", short)
            slow, fast = in_turns(
                partial(loop.infer, self.batch),
                partial(ours.infer, self.batch, progress=False),
            )
            cells += [f"{long} steps, {slow:.2f} s; {short}, {fast:.3f} s", f"{slow / fast:.0f}"]
        return f"| {' | '.join(cells)} |"


def in_turns(*calls: Callable[[], object], rounds: int = 3) -> list[float]:
    """Median seconds of each, after one call that compiles."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, kept in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                kept.append(time.perf_counter() - began)
    return [median(kept) for kept in seconds]


def footnote(args: argparse.Namespace) -> str:
    """What the numbers are, and what made them."""
    command = shlex.join(["python", "benchmarks/fast_clock.py", *sys.argv[1:]])
    return (
        f"Steps T_fast until the mean ELBO is within {WITHIN} nats of the converged one, of "
        f"{list(GRID)}. Seconds: {args.sequences} sequences, fp32; ours compiled, the published "
        f"loop eager. Made by `{command}`: seed {args.seed}, {args.draws} fresh draws a score; "
        f"ltm_pyro {ltm.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; {torch.get_num_threads()} thread(s) of {os.cpu_count()} "
        f"cores ({platform.machine()})."
    )


def oracle_with(noise: float) -> ltm.LinearGaussian:
    """Eight dimensions behind twelve, loadings of variance 1/8."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 8, generator=generator, dtype=torch.float64) / 8**0.5
    return ltm.LinearGaussian(W, noise, shape=(2, 4))


def exact_elbo(oracle: ltm.LinearGaussian, post: ltm.Posterior, batch: ltm.Batch) -> Tensor:
    """Of a factorised normal q in closed form, (B,): the log-likelihood is quadratic in z."""
    spread = post.sd.square().flatten(-2) @ oracle.W.square().mT
    log_lik = oracle.log_likelihood(post.mean, batch)
    return log_lik - 0.5 * spread.sum(-1) / oracle.noise_scale**2 - post.kl()


if __name__ == "__main__":
    main()
