"""What users say in Schema-Guided Dialogues, simulated by three models with the same emission.

Two levels of thoughts, one z for the whole session, or turns that stand alone. A turn is the set of
its words, x_j ~ Bernoulli(sigmoid(b_j + z . W_j)): a decoder of text that a study can afford is too
strong a neighbour of thoughts, and too weak a writer, for the three to be told apart. Services and
intents are shown to no model: they are the truth that thoughts and simulations are held to.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass
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
from studies.common import clear, with_errors
from studies.figures import bars_by_arm
from studies.flat_sessions import build, session_code
from studies.telling_apart import predicted, softmax_regression, two_sample_accuracy

ENSEMBLE = 5


@dataclass(frozen=True)
class Dialogues:
    """User turns of dialogues that are about one service.

    Attributes:
        x: (n, S, J) which words a turn has.
        service: (n,) labels.
        intent: (n, S) labels.
    """

    x: Tensor
    service: Tensor
    intent: Tensor

    def select(self, rows: slice) -> Dialogues:
        """Some of them."""
        return Dialogues(self.x[rows], self.service[rows], self.intent[rows])


Said = list[tuple[str, list[tuple[list[str], str]]]]
"""Of every dialogue its service, and for every turn of the user the words and the intent."""


def said(folder: Path, settings: dict[str, Any]) -> tuple[Said, dict[str, int]]:
    """The first user turns of dialogues about one of the commonest services, and these."""
    turns, kept = settings["turns"], Said()
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                dialogue = json.loads(line)
                user = [t for t in dialogue["turns"] if t["s"] == "U"][:turns]
                if len(dialogue["services"]) == 1 and len(user) == turns:
                    texts = (re.sub(r"\d+", "#", t["u"].lower()) for t in user)
                    words = [re.findall(r"[a-z']+|#", text) for text in texts]
                    named = [(t["i"] or ["NONE"])[0] for t in user]
                    service = dialogue["services"][0].rpartition("_")[0]
                    kept.append((service, list(zip(words, named, strict=True))))
    services = commonest((s for s, _ in kept), settings["services"])
    kept = [each for each in kept if each[0] in services]
    order = np.random.default_rng(0).permutation(len(kept))
    return [kept[i] for i in order[: settings["train"] + 2 * settings["held_out"]]], services


def read(folder: Path, settings: dict[str, Any]) -> Dialogues:
    """Which words turns have, services and intents."""
    kept, services = said(folder, settings)
    turns = settings["turns"]
    known = commonest((w for _, turn in kept for words, _ in turn for w in words),
                       settings["vocabulary"])  # fmt: skip
    intents = commonest((i for _, turn in kept for _, i in turn), 1000)
    x = torch.zeros(len(kept), turns, settings["vocabulary"])
    for row, (_, each) in enumerate(kept):
        for t, (words, _) in enumerate(each):
            x[row, t, [known[w] for w in words if w in known]] = 1.0
    return Dialogues(
        x,
        torch.tensor([services[s] for s, _ in kept]),
        torch.tensor([[intents[i] for _, i in each] for _, each in kept]),
    )


def commonest(items: Any, most: int) -> dict[str, int]:
    """Numbers of the items that are met most often."""
    counts = sorted(Counter(items).items(), key=lambda pair: (-pair[1], pair[0]))
    return {item: i for i, (item, _) in enumerate(counts[:most])}


def probe(code: Tensor, label: Tensor) -> tuple[float, float]:
    """Accuracy of a softmax regression, fitted on one half of the rows, on the other; its error."""
    half, classes = len(code) // 2, int(label.max()) + 1
    code = (code - code[:half].mean(0)) / (code[:half].std(0) + 1e-6)
    weights = softmax_regression(code[:half], label[:half], classes)
    right = (predicted(weights, code[half:]).argmax(-1) == label[half:]).double()
    return float(right.mean()), float(right.std() / len(right) ** 0.5)


def simulation(made: Tensor, real: Tensor, train: Dialogues, seed: int) -> dict[str, Any]:
    """How near simulated turns (n, S, J) are to real ones, to classifiers of real services."""
    generator = torch.Generator().manual_seed(seed)
    each, turns = train.x.flatten(0, 1), train.x.shape[1]
    label = train.service.repeat_interleave(turns)
    far, entropy, together = [], [], []
    seen = [[made.mean(1)], [real.mean(1)]]
    for _ in range(ENSEMBLE):
        rows = torch.randint(len(each), (len(each),), generator=generator)
        weights = softmax_regression(each[rows], label[rows], int(label.max()) + 1, ridge=3.0)
        p, q = predicted(weights, made), predicted(weights, real)
        mean = p.mean((0, 1))
        far.append(0.5 * float((mean - q.mean((0, 1))).abs().sum()))
        entropy.append(-float((mean * mean.log()).sum()))
        together.append(float(_agreement(p).mean()))
        for features, by_turn in zip(seen, (p, q), strict=True):
            features += [by_turn.mean(1), _agreement(by_turn)[:, None]]
    accuracy, error = two_sample_accuracy(torch.cat(seen[1], 1), torch.cat(seen[0], 1), seed)
    share = made.sum((0, 1)) / made.sum()
    return {
        "c2st": accuracy, "c2st_error": error, "service_distance": np.mean(far),
        "service_distance_sd": np.std(far), "service_entropy_nats": np.mean(entropy),
        "turns_agree": np.mean(together),
        "word_entropy_nats": -float(torch.xlogy(share, share).sum()),
    }  # fmt: skip


def _agreement(p: Tensor) -> Tensor:
    """Chance that two turns of a session are of one class, p (n, S, C) to (n,)."""
    same = torch.einsum("nsc,ntc->nst", p, p)
    turns = p.shape[1]
    own = same.diagonal(dim1=1, dim2=2).sum(1)
    return (same.sum((1, 2)) - own) / (turns * (turns - 1))


def cell(settings: dict[str, Any], data: Path | None) -> list[dict[str, Any]]:
    """One arm fitted; its bound, what its thoughts know, and what it writes."""
    assert data is not None
    everything, n = read(data, settings), settings["held_out"]
    train = everything.select(slice(2 * n, None))
    held, real = everything.select(slice(n)), everything.select(slice(n, 2 * n))
    seed, arm = settings["seed"], settings["arm"]
    torch.manual_seed(seed)
    emission = BernoulliFactors(settings["vocabulary"], settings["factors"])
    with torch.no_grad():  # no fit of rare words from even odds
        emission.easiness.copy_(torch.logit(train.x.mean((0, 1)), eps=1e-3))
        emission.loadings.mul_(0.3)
    model = build(arm, emission, settings["turns"])
    slow = ltm.Slow(lr=0.03, warmup=0.0, weight_decay=0.0)
    fast = ltm.Fast(steps=settings["fast_steps"])
    svi = ltm.DualRateSVI(model, "mean_field", fast, slow, seed=seed, persistent=True)
    svi.fit(ltm.Batch(train.x.flatten(1)), settings["slow_steps"], batch_size=100, progress=False)
    batch = ltm.Batch(held.x.flatten(1))
    post = svi.infer(batch, steps=settings["last_steps"], progress=False)
    scores = ltm.evaluate(model, post, batch, draws=32, controls=False)
    loss = clustered_mean(-scores["elbo"].values, np.arange(n))
    weighted = clustered_mean(-scores["iw_bound"].values, np.arange(n))
    service, service_error = probe(session_code(model, post.mean), held.service)
    turn = model.segment_thoughts(post.mean).flatten(-2).flatten(0, 1)
    intent, intent_error = probe(turn, held.intent.flatten())
    made = ltm.simulate(model, n, seed=seed).batch.observed.unflatten(1, (settings["turns"], -1))
    share = (held.service == held.service.mode().values).double().mean()
    row = {
        "loss_per_session": loss.value, "loss_error": loss.error, "iw_loss_per_session":
        weighted.value, "kl_per_session": float(scores["kl"].mean()), "service": service,
        "service_error": service_error, "service_majority": float(share), "intent": intent,
        "intent_error": intent_error, **simulation(made, real.x, train, seed),
    }  # fmt: skip
    if arm != "nested":
        return [row]
    return [row, {"arm": "real", **simulation(held.x, real.x, train, seed)}]


def figure(table: pd.DataFrame) -> Figure:
    """Told from real, coherence and distance to the real services, by arm."""
    caption = (
        "Simulated user turns of three models with the same decoder, and real ones held against "
        "real ones. Left: how often a classifier of a session's words tells them from real ones "
        "(0.5: it cannot). Middle: how often two turns of one session are about the same service, "
        "to classifiers of real turns. Right: distance between services of simulated and real "
        "turns (total variation). Means and standard errors over seeds."
    )
    panels = {
        "c2st": "told from real", "turns_agree": "turns agree",
        "service_distance": "distance of services",
    }  # fmt: skip
    return bars_by_arm(table, panels, caption)


def paragraph(table: pd.DataFrame) -> str:
    """Whether two levels write what is more like the real thing."""
    columns = {
        "loss_per_session": "loss, nats per session", "iw_loss_per_session": "with 32 weights",
        "service": "service from thoughts", "intent": "intent from thoughts",
        "c2st": "told from real", "turns_agree": "turns agree",
        "service_distance": "distance of services", "service_entropy_nats": "entropy of services",
        "word_entropy_nats": "entropy of words",
    }  # fmt: skip
    wide = table.pivot_table(index="seed", columns="arm", values=["c2st", "turns_agree",
                                                                   "loss_per_session"])  # fmt: skip
    said = []
    for name, column, sign in (
        ("its simulations are told from real ones less often", "c2st", 1),
        ("its held-out bound is better, in nats per session,", "loss_per_session", 1),
        ("two turns of its sessions agree on the service more often", "turns_agree", -1),
    ):
        for arm in ("flat", "turns_only"):
            gap = sign * (wide[column][arm] - wide[column]["nested"])
            error = float(gap.std() / np.sqrt(len(gap))) if len(gap) > 1 else float("nan")
            shown = clear(float(gap.mean()), error)
            verdict = "supported" if shown and gap.mean() > 0 else "not supported"
            said.append(f"that {name} than with {arm}: {gap.mean():.3f} ± {error:.3f}, {verdict}")
    share = table["service_majority"].mean()
    return (
        with_errors(table, ["arm"], columns)
        + f"\n\nOf the claims for two levels ({table['seed'].nunique()} seeds, differences within "
        "a seed, errors over seeds): " + "; ".join(said) + f". The commonest service has "
        f"{100 * share:.0f} % of the dialogues. Row `real`: held-out dialogues against other "
        "held-out ones, the best that any model can do. What does not follow: anything about the "
        "order of turns, which no arm models and no score reads; about longer sessions, or larger "
        "decoders. Bounds are ELBOs on fresh draws from mean-field posteriors."
    )
