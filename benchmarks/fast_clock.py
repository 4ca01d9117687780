"""Decoder evaluations until the fresh-draw ELBO is within 0.5 nats of its converged value.

    .venv/bin/ltm-pyro fit --preset mixture --no-control --out runs/mixture
    .venv/bin/python benchmarks/fast_clock.py runs/demo runs/mixture

Three fast clocks on the linear-Gaussian oracle and on held-out sequences of finished runs: the
published recipe (log variance started at -5, one fixed draw, Adam at 0.34 falling by a cosine),
Adam on fresh draws, and the natural gradient. One evaluation is one draw of one sequence, so their
number is T_fast. Converged is the exact best mean field on the oracle, elsewhere the best that a
clock on fresh draws reaches in `--longest` steps. Prints a Markdown table and what made it.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import ltm_pyro as ltm

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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--draws", type=int, default=32, help="fresh draws of a score")
    parser.add_argument("--longest", type=int, default=512, help="largest T_fast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.stdout.write(
        f"| case | {' | '.join(CLOCKS)} | Adam / natural | behind at {args.longest}: "
        f"{', '.join(CLOCKS)} |\n|{'---|' * (len(CLOCKS) + 3)}\n"
    )
    for noise in (1.0, 0.3, 0.1):
        oracle = oracle_with(noise)
        batch = oracle.simulate(args.sequences, seed=args.seed)
        best = float(oracle.best_mean_field_elbo(batch).mean())

        def exact(
            post: ltm.Posterior, oracle: ltm.LinearGaussian = oracle, batch: ltm.Batch = batch
        ) -> float:
            return float(exact_elbo(oracle, post, batch).mean())

        row(f"oracle, noise {noise:g}", oracle, batch, exact, args, best)
    for folder in args.runs:
        run = ltm.load_run(folder)
        batch = run.corpus().val.batch(range(args.sequences))

        def scored(
            post: ltm.Posterior, model: ltm.LatentModel = run.model, batch: ltm.Batch = batch
        ) -> float:
            scores = ltm.evaluate(model, post, batch, draws=args.draws, seed=args.seed + 1)
            return float(scores["elbo"].mean())

        row(folder.rstrip("/"), run.model, batch, scored, args)
    sys.stdout.write(
        f"\n`{shlex.join(['python', *sys.argv])}`: T_fast within {WITHIN} nats, from {list(GRID)}; "
        f"seed {args.seed}, {args.sequences} sequences, {args.draws} draws; ltm_pyro "
        f"{ltm.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}.\n"
    )


def row(
    name: str,
    model: ltm.LatentModel,
    batch: ltm.Batch,
    score: Score,
    args: argparse.Namespace,
    best: float | None = None,
) -> None:
    """Measures one case and prints its row."""

    def reached(clock: str, steps: int) -> float:
        start, fast = CLOCKS[clock]
        guide = ltm.build_guide("mean_field", model, init_log_variance=start)
        svi = ltm.DualRateSVI(model, guide, replace(fast, steps=steps), seed=args.seed)
        return score(svi.infer(batch, progress=False))

    last = {clock: reached(clock, args.longest) for clock in CLOCKS}
    best = max(last["Adam"], last["natural"]) if best is None else best
    steps = {}
    for clock in CLOCKS:
        tried = (t for t in GRID if t <= args.longest and reached(clock, t) >= best - WITHIN)
        steps[clock] = next(tried, None)
    cells = [f"never in {args.longest}" if t is None else str(t) for t in steps.values()]
    adam, natural = steps["Adam"], steps["natural"]
    ratio = "-" if adam is None or natural is None else f"{adam / natural:.1f}"
    behind = ", ".join(f"{best - value:.3f}" for value in last.values())
    sys.stdout.write(f"| {name} | {' | '.join(cells)} | {ratio} | {behind} |\n")
    sys.stdout.flush()


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
