"""Variational Bayes, Langevin and HMC chains, and an encoder, at equal evaluations of the decoder.

In training: whatever moves z between two slow steps, the decoder that comes out is scored by one
and the same valid bound. At test: one decoder, q or chains that saw the first half of a sequence,
and the probability that they give to the rest, which is a likelihood whatever q is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ltm_pyro as ltm
from ltm_pyro.config import Fast, FitConfig
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.corpus import load_corpus
from ltm_pyro.diagnostics.bounds import Likelihoods, evaluate
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.inference.clocks.fast import FastLoop, FastResult, RowOptimizer, local_optimizer
from ltm_pyro.inference.mcmc.target import State, setting
from ltm_pyro.inference.mcmc.transition import Factor, take_step
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, RED, house_figure
from ltm_pyro.random import Stream, derive_seed, seeded
from studies.common import bounds_of, config_of, exact_loss, over_seeds, with_errors

MANY = 64
"""T_fast of the bound by which decoders are compared, and draws of a prediction."""

LEAPFROG = 4
"""Gradients of one HMC proposal."""

COLORS = {"natural": BLUE, "adam": GREEN, "ula": ORANGE, "hmc": RED}


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One decoder trained by one kind of inference; by `natural`, the test too."""
    kind, _, size = settings["study.kind"].partition(" ")
    config = config_of(settings)
    corpus = load_corpus("mixture", seq_len=config.model.seq_len)
    each = 1 if kind == "amortised" else config.fast.steps + 1
    # Longer: as many evaluations as the others, on more text.
    longer = size == "longer"
    steps = config.steps * (config.fast.steps + 1) if longer else config.steps
    step_size = 0.0 if longer else float(size or 0)
    svi = _fit(kind, step_size, config, corpus, steps)
    batch = spread(corpus.val, settings["study.sequences"])
    model: Any = svi.model
    judge = ltm.DualRateSVI(model, "mean_field", seed=config.seed)
    row = {
        "part": "training", "kind": settings["study.kind"] if longer else kind,
        "step_size": step_size, "slow_steps": steps, "evaluations": each * steps,
        "truth_loss": exact_loss(corpus, batch),
        **bounds_of(model, judge.infer(batch, MANY, progress=False), batch),
    }  # fmt: skip
    if kind in ("amortised", "semi-amortised"):
        row["own_q_loss"] = bounds_of(model, svi.infer(batch, progress=False), batch)["elbo_loss"]
    rows: list[dict[str, Any]] = [row]
    if kind == "natural":
        rows += _predictions(model, corpus, batch, settings)
    return rows


def _fit(
    kind: str, step_size: float, config: FitConfig, corpus: Corpus, steps: int
) -> ltm.DualRateSVI:
    """A decoder trained for `steps` slow steps by one kind of inference."""
    model = LatentThoughtModel(config.model)
    chains = kind in ("ula", "hmc")
    family = {"amortised": "amortized", "semi-amortised": "semi_amortized"}.get(kind, "mean_field")
    fast = _adam(config.fast) if kind == "adam" else config.fast
    svi = ltm.DualRateSVI(model, "delta" if chains else family, fast, config.slow, seed=config.seed)
    if chains:
        svi.fast_loop = ChainLoop(svi, kind, step_size)
    svi.fit(corpus.train, steps, config.batch_size, progress=False)
    return svi


def _adam(fast: Fast) -> Fast:
    return Fast(steps=fast.steps, optimizer="adam", lr=0.1)


class ChainLoop(FastLoop):
    """A fast loop that moves one chain per sequence instead of q, from a draw of the prior.

    Its last state is the point at which the slow step is taken. The KL weight tempers the prior's
    part of the target, as it does in the ELBO.

    Args:
        svi: Of a guide that holds points.
        kernel: `ula` or `hmc`.
        step_size: In units of the prior's scale.
    """

    def __init__(self, svi: ltm.DualRateSVI, kernel: str, step_size: float) -> None:
        super().__init__(svi.model, svi.guide, svi.elbo, svi.clock.parameters)
        self.kernel, self.step_size = kernel, step_size

    def __call__(
        self, batch: Batch, fast: Fast, seed: int, *, weight: float = 1.0, **_: Any
    ) -> tuple[FastResult, RowOptimizer]:
        """As many gradients of log p(x, z) as `fast` has steps."""
        self.guide.reset(batch)
        states = chain(self.model, batch, self.kernel, self.step_size, fast.steps, seed, weight)
        point = states[-1].z[0].unflatten(-1, self.model.thought_shape)
        self.guide.load_rows({"point": point})
        zero = torch.zeros(3, device=batch.device)
        return FastResult(*zero), local_optimizer(self.guide, fast)


def chain(
    model: Any, batch: Batch, kernel: str, size: float, evaluations: int, seed: int,
    weight: float = 1.0,
) -> list[State]:  # fmt: skip
    """The states of one chain per sequence, from the prior, for so many gradients."""
    each = LEAPFROG if kernel == "hmc" else 1
    with setting(model, batch, None) as place, seeded(derive_seed(seed, Stream.MCMC), model.device):
        target = place.target(place.path)
        state = place.start(target, 1)
        one = torch.ones_like(state.terms[0, 0])
        weights, factor = torch.stack([weight * one, one]), Factor(place.scale)
        states = [state]
        for _ in range(evaluations // each):
            leaps = torch.full_like(one, each, dtype=torch.long)
            state = take_step(
                target, state, weights, factor, size * one, leaps, adjusted=kernel == "hmc"
            ).state
            states.append(state)
    return states


def _predictions(
    model: Any, corpus: Any, batch: Batch, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The loss of the second half, given what inference made of the first."""
    half = batch.mask.shape[1] // 2
    first, rest = batch.prefix(half), Likelihoods(model, batch.suffix(half))
    truth = exact_loss(corpus, batch) - exact_loss(corpus, first)
    rows = []
    for evaluations in settings["study.evaluations"]:
        for kind in settings["study.tests"]:
            name, _, size = kind.partition(" ")
            if name in ("natural", "adam"):
                fast = Fast(steps=evaluations)
                clock = _adam(fast) if name == "adam" else fast
                svi = ltm.DualRateSVI(model, "mean_field", clock, seed=settings["seed"])
                post = svi.infer(first, progress=False)
                scores = evaluate(model, post, batch, MANY, mode="prefix", controls=False)
                loss = -float(scores["log_predictive"].mean())
            else:
                states = chain(model, first, name, float(size), evaluations, settings["seed"])
                loss = float(_mixture_loss(rest, states[len(states) // 2 :], model.thought_shape))
            rows.append(
                {"part": "test", "kind": name, "step_size": float(size or 0),
                 "evaluations": evaluations, "rest_loss": loss, "truth_rest_loss": truth}
            )  # fmt: skip
    return rows


def _mixture_loss(rest: Likelihoods, states: list[State], shape: tuple[int, int]) -> Tensor:
    """Mean loss of the mixture over a chain's states, nats per sequence."""
    kept = [states[i] for i in np.unique(np.linspace(0, len(states) - 1, MANY).astype(int))]
    log_p = rest(torch.stack([state.z[0].unflatten(-1, shape) for state in kept]))
    return (np.log(len(kept)) - log_p.logsumexp(0)).mean()


def figure(table: pd.DataFrame) -> Figure:
    """The bounds of decoders by kind, and predictions against evaluations."""
    caption = (
        "Held-out loss, nats per sequence, mean and standard error over seeds. Left: decoders "
        "trained by each kind of inference with equal evaluations of the decoder per slow step "
        "(amortised: one; amortised, longer: as many in all, on more text), all scored by the "
        "same bound, mean field after 64 natural steps on fresh draws; chains at the step size "
        "that serves them best. Right: one decoder; the loss of a sequence's second half, given "
        "what was inferred from the first. Dashed: the corpus's own entropy."
    )
    with house_figure((9.2, 3.8), caption) as fig:
        left, right = fig.subplots(1, 2)
        trained = _best(table[table["part"] == "training"], ["kind", "slow_steps"], "iw_loss")
        for column, marker, label in (("elbo_loss", "o", "ELBO"), ("iw_loss", "s", "IW")):
            mean = over_seeds(trained, ["kind", "slow_steps"], column)
            place = np.arange(len(mean))
            left.errorbar(
                mean["mean"], place, xerr=mean["error"].fillna(0.0), fmt=marker, color=INK,
                mfc="white" if marker == "o" else INK, label=label,
            )  # fmt: skip
        left.set_yticks(place, mean["kind"])
        left.invert_yaxis()
        left.axvline(float(trained["truth_loss"].mean()), ls="--", lw=1.0, color=INK)
        left.set(xlabel="loss of the trained decoder")
        tested = _best(table[table["part"] == "test"], ["kind", "evaluations"], "rest_loss")
        for kind, rows in tested.groupby("kind", sort=False):
            mean = over_seeds(rows, ["evaluations"], "rest_loss")
            right.errorbar(
                mean["evaluations"], mean["mean"], mean["error"].fillna(0.0), marker="o", ms=4,
                color=COLORS[str(kind)], label=str(kind),
            )  # fmt: skip
        right.axhline(float(tested["truth_rest_loss"].mean()), ls="--", lw=1.0, color=INK)
        right.set_xscale("log", base=2)
        right.set(xlabel="evaluations of the decoder", ylabel="loss of the second half")
        for axes in (left, right):
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, fontsize=8)
    return fig


def _best(rows: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Of each group the rows at the step size whose mean over seeds is lowest."""
    mean = rows.groupby([*by, "step_size"], sort=False)[column].mean()
    best = mean.groupby(by, sort=False).idxmin().dropna()
    keys = set(best)
    place = [*by, "step_size"]
    return rows[[tuple(row) in keys for row in rows[place].itertuples(index=False, name=None)]]


def paragraph(table: pd.DataFrame) -> str:
    """Which inference trains the better decoder, and which predicts better at equal evaluations."""
    training, test = table[table["part"] == "training"], table[table["part"] == "test"]
    trained = _best(training, ["kind", "slow_steps"], "iw_loss")
    against = trained[trained["kind"] == "natural"].set_index("seed")["iw_loss"]
    lines = []
    for (kind, _), rows in trained.groupby(["kind", "slow_steps"], sort=False):
        if kind == "natural":
            continue
        gap = rows.set_index("seed")["iw_loss"] - against
        error = float(gap.std() / np.sqrt(len(gap)))
        size, steps = rows["step_size"].iloc[0], int(rows["slow_steps"].iloc[0])
        lines.append(
            f"- {kind}{f', step size {size:g}' if size else ''}, {steps} slow steps: "
            f"{gap.mean():+.1f} ± {error:.1f} nats per sequence against natural steps (IW, paired "
            "by seed; above 0: worse)."
        )
    tested = _best(test, ["kind", "evaluations"], "rest_loss")
    for evaluations, rows in tested.groupby("evaluations"):
        means = rows.groupby("kind", sort=False)["rest_loss"].mean()
        found = ", ".join(f"{kind} {value:.1f}" for kind, value in means.items())
        lines.append(f"- at test, {evaluations} evaluations: {found}.")
    truth = test["truth_rest_loss"].mean()
    columns = {
        "evaluations": "evaluations", "elbo_loss": "ELBO",
        "iw_loss": "IW", "own_q_loss": "the encoder's own ELBO",
    }  # fmt: skip
    shown = with_errors(training, ["kind", "step_size", "slow_steps"], columns)
    found = with_errors(
        test, ["kind", "step_size", "evaluations"], {"rest_loss": "loss of the rest"}
    )
    return (
        "Decoders trained at equal evaluations per slow step, scored by one and the same bound, "
        f"and predictions of a second half (its entropy: {truth:.1f} nats):\n\n"
        + "\n".join(lines)
        + "\n\nStep sizes of chains were chosen on these very scores, in their favour; every "
        "chain starts from the prior. An encoder's own work is not counted in evaluations, in its "
        "favour. A chain's prediction is a mixture over the second half of its states, q's over "
        f"{MANY} draws, which cost no evaluation of the first half. Not tested: chains that go on "
        "from visit to visit, several chains per sequence, real text, larger models.\n\n"
        f"Training, nats per sequence, ± standard error over seeds:\n\n{shown}\n\n"
        f"Test:\n\n{found}"
    )
