"""Sessions made from known latents of two levels: intervals, recovery, and simulated sessions.

Intervals are held to a linear-Gaussian session, whose posterior is known exactly. Recovery and
simulation take a corpus of yes-or-no words, whose sessions are of a few types:

    type c;   z_session ~ N(centre_c, 0.3^2);   z_turn ~ N(A z_session, s^2);   words ~ Bernoulli

and three models fitted to it: two levels, one z for the whole session, turns that stand alone.
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
from ltm_pyro.diagnostics.estimates import clustered_mean
from ltm_pyro.models.examples import BernoulliFactors
from ltm_pyro.models.priors.em import fit_mixture
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure, title_and_legend
from studies.clusters import adjusted_rand_index
from studies.common import clear, over_seeds, with_errors
from studies.flat_sessions import ARMS, build, session_code
from studies.telling_apart import explained, two_sample_accuracy

GUIDES = ("exact", "full_rank", "low_rank", "mean_field")
LEVEL = 0.9
FACTORS = 2


def linear_session(seed: int, turns: int) -> ltm.SessionThoughtModel:
    """A random session of two numbers, with turns of two numbers that are seen through noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise = float(0.5 + 0.5 * torch.rand((), generator=generator))
    emission = ltm.LinearGaussian(normal(4, FACTORS), noise, normal(4), (1, FACTORS))
    model = ltm.SessionThoughtModel(emission, turns)
    with torch.no_grad():
        model.thought_prior.transition.copy_(0.7 * normal(FACTORS, FACTORS))
        model.thought_prior.log_scale.copy_(-0.5 + 0.3 * normal(FACTORS))
    return model


@torch.no_grad()
def exact_posterior(model: ltm.SessionThoughtModel, batch: ltm.Batch) -> tuple[Tensor, Tensor]:
    """Means (B, (1 + S) * N) and scales of all thoughts of linear-Gaussian sessions.

    z = M u with u ~ N(0, I), so that x is linear in u.
    """
    emission: Any = model.emission
    prior = model.thought_prior()
    map_ = prior.from_noise(torch.eye(prior.noise_size, dtype=emission.W.dtype)).flatten(1).T
    seen = torch.block_diag(*[emission.W] * model.segments) @ map_[emission.W.shape[1] :]
    noise, bias = float(emission.noise_scale), emission.bias.repeat(model.segments)
    q = ltm.LinearGaussian(seen, noise, bias).posterior(batch)
    covariance = map_ @ q.covariance @ map_.T
    return q.mean.flatten(1) @ map_.T, covariance.diagonal(dim1=-2, dim2=-1).sqrt()


def coverage(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """How often 90 % intervals hold the thoughts that made the data, by guide and by level."""
    seed, turns = settings["seed"], settings["turns"]
    model = linear_session(seed, turns)
    made = ltm.simulate(model, settings["sessions"], seed=seed)
    truth, half = made.z.flatten(1), 1.6448536
    means, scales = exact_posterior(model, made.batch)
    rows = []
    for guide in GUIDES:
        mean, sd, extra = means, scales, {}
        if guide != "exact":
            fast = ltm.Fast(steps=settings["coverage_fast_steps"])
            elbo = ltm.build_objective("stl", particles=4)
            post = ltm.DualRateSVI(model, guide, fast, elbo=elbo, seed=seed).infer(made.batch)
            mean, sd = post.mean.flatten(1), post.sd.flatten(1)
            extra = {"mean_off_scales": float(((mean - means) / scales).abs().mean())}
        inside = ((truth - mean).abs() < half * sd).double()
        for level, part in (
            ("session", inside[:, :FACTORS]),
            ("turn", inside[:, FACTORS:]),
            ("both", inside),
        ):
            share = clustered_mean(part.mean(1).numpy(), np.arange(len(part)))
            rows.append(
                {"part": "coverage", "arm": guide, "level": level, "coverage": share.value,
                 "coverage_error": share.error, **extra}
            )  # fmt: skip
    return rows


def corpus(settings: dict[str, Any], n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words (n, S * J), types (n,), session latents (n, N), turn latents (n, S, N).

    The world is a function of the cell's seed, the sessions of `seed`.
    """
    world = torch.Generator().manual_seed(settings["seed"])
    types, items, turns = settings["types"], settings["items"], settings["turns"]
    angle = torch.arange(types) * 2 * torch.pi / types
    centres = 1.4 * torch.stack([angle.cos(), angle.sin()], 1)
    loadings = 1.5 * torch.randn(items, FACTORS, generator=world)
    easiness = torch.randn(items, generator=world) - 0.5
    generator = torch.Generator().manual_seed(1000 + seed)
    kind = torch.randint(types, (n,), generator=generator)
    session = centres[kind] + 0.3 * torch.randn(n, FACTORS, generator=generator)
    turn = session[:, None] + 0.6 * torch.randn(n, turns, FACTORS, generator=generator)
    words = torch.bernoulli((turn @ loadings.T + easiness).sigmoid(), generator=generator)
    return words.flatten(1), kind, session, turn


def features(x: Tensor, turns: int) -> Tensor:
    """What a discriminator sees of sessions: words' shares, and how they go together."""
    shares = x.float().unflatten(1, (turns, -1)).mean(1)
    row, column = torch.triu_indices(shares.shape[1], shares.shape[1])
    centred = shares - 0.5
    return torch.cat([shares, centred[:, row] * centred[:, column]], 1)


def recovery(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm fitted, then what it knows of held-out sessions and what it writes itself."""
    seed, turns, n = settings["seed"], settings["turns"], settings["train"]
    train = ltm.Batch(corpus(settings, n, 2 * seed)[0])
    words, kind, session, turn = corpus(settings, 2 * n, 2 * seed + 1)
    held = ltm.Batch(words[:n])
    losses, rows = {}, []
    for arm in ARMS:
        torch.manual_seed(seed)
        model = build(arm, BernoulliFactors(settings["items"], FACTORS), turns)
        slow = ltm.Slow(lr=0.05, warmup=0.0, weight_decay=0.0)
        svi = ltm.DualRateSVI(
            model, "full_rank", ltm.Fast(steps=8), slow, seed=seed, persistent=True
        )
        svi.fit(train, settings["slow_steps"], batch_size=min(100, n), progress=False)
        post = svi.infer(held, steps=64)
        scores = ltm.evaluate(model, post, held, draws=64, controls=False)
        losses[arm] = -scores["elbo"].values
        code = session_code(model, post.mean)
        clusters = fit_mixture(code, settings["types"], seed).log_joint(code).argmax(1)
        each = model.segment_thoughts(post.mean).flatten(-2)
        made = ltm.simulate(model, n, seed=seed).batch.observed
        accuracy, error = two_sample_accuracy(
            features(words[n:], turns), features(made, turns), seed
        )
        rows.append(
            {"part": "recovery", "arm": arm, "loss_per_session": float(losses[arm].mean()),
             "ari": adjusted_rand_index(clusters, kind[:n]),
             "r2_session": explained(code, session[:n]),
             "r2_turn": explained(each.flatten(0, 1), turn[:n].flatten(0, 1)),
             "c2st": accuracy, "c2st_error": error}
        )  # fmt: skip
        gain = clustered_mean(losses[arm] - losses["nested"], np.arange(n))
        rows[-1] |= {"loss_over_nested": gain.value, "loss_over_nested_error": gain.error}
    null, error = two_sample_accuracy(features(words[n:], turns), features(words[:n], turns), seed)
    return [*rows, {"part": "recovery", "arm": "real", "c2st": null, "c2st_error": error}]


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """Both parts of one seed."""
    return [*coverage(settings), *recovery(settings)]


def figure(table: pd.DataFrame) -> Figure:
    """Coverage by guide and level, and recovery by arm."""
    caption = (
        "Left: share of 90 % intervals that hold the thought that made the data, over random "
        "linear-Gaussian sessions; 'exact' is the known posterior. Right: what three models know "
        "of held-out sessions of known types, and how often a classifier tells their simulated "
        "sessions from real ones (dashed: it cannot). Means and standard errors over seeds."
    )
    with house_figure((8.4, 3.4), caption) as fig:
        left, right = fig.subplots(1, 2)
        for level, color in (("session", BLUE), ("turn", ORANGE)):
            rows = table[(table["part"] == "coverage") & (table["level"] == level)]
            mean = over_seeds(rows, ["arm"], "coverage")
            left.errorbar(
                mean["arm"], mean["mean"], mean["error"].fillna(0.0), fmt="o", color=color,
                label=level,
            )  # fmt: skip
        left.axhline(LEVEL, linestyle="--", linewidth=1.0, color=INK)
        left.set_ylabel("coverage of 90 % intervals")
        title_and_legend(left, "")
        rows = table[(table["part"] == "recovery") & table["arm"].isin(ARMS)]
        columns = {"ari": "ARI", "r2_session": "R2 session", "r2_turn": "R2 turn", "c2st": "C2ST"}
        for shift, (arm, color) in enumerate(zip(ARMS, (BLUE, ORANGE, GREEN), strict=True)):
            at = np.arange(len(columns)) + 0.25 * (shift - 1)
            means = [over_seeds(rows[rows["arm"] == arm], ["arm"], c).iloc[0] for c in columns]
            right.bar(
                at, [m["mean"] for m in means], 0.23, color=color, label=arm.replace("_", " "),
                yerr=[0.0 if np.isnan(m["error"]) else m["error"] for m in means],
            )  # fmt: skip
        right.axhline(0.5, xmin=0.76, linestyle="--", linewidth=1.0, color=INK)
        right.set_xticks(np.arange(len(columns)), list(columns.values()))
        title_and_legend(right, "")
    return fig


def paragraph(table: pd.DataFrame) -> str:
    """What is covered, what is recovered, and by how much two levels are better than one."""
    covered = table[table["part"] == "coverage"]
    found = table[table["part"] == "recovery"]
    both = over_seeds(covered[covered["level"] == "both"], ["arm"], "coverage").set_index("arm")
    full, seeds = both["mean"]["full_rank"], table["seed"].nunique()
    kept = abs(full - LEVEL) < 0.03
    better = []
    for arm in ("flat", "turns_only"):
        gain = over_seeds(found[found["arm"] == arm], ["arm"], "loss_over_nested").iloc[0]
        verdict = "" if clear(gain["mean"], gain["error"]) else ", which is no difference"
        better.append(
            f"{gain['mean']:.2f} ± {gain['error']:.2f} nats per session than {arm}{verdict}"
        )
    return "\n\n".join(
        [
            with_errors(covered, ["arm", "level"], {"coverage": "coverage of 90 % intervals"}),
            with_errors(
                found, ["arm"],
                {"loss_per_session": "loss, nats per session", "ari": "ARI of types",
                 "r2_session": "R2 of session latents", "r2_turn": "R2 of turn latents",
                 "c2st": "told from real by a classifier"},
            ),
            f"90 % intervals of `full_rank` hold {100 * full:.1f} % of the thoughts that made "
            f"linear-Gaussian sessions, {'within' if kept else 'NOT within'} 3 points of 90 "
            f"(exact posterior {100 * both['mean']['exact']:.1f} %, mean field "
            f"{100 * both['mean']['mean_field']:.1f} %; {seeds} random systems). Fitted to a "
            "corpus of sessions of known types, the model with two levels has a held-out bound "
            f"that is better by {better[0]}, and by {better[1]}. C2ST: 0.5 is what no classifier "
            "can tell; the row `real` is real sessions against real ones. What does not follow: "
            "anything about text, or about types that overlap more. The types are a mixture and "
            "the prior is normal, so that a classifier may tell all three arms.",
        ]
    )  # fmt: skip
