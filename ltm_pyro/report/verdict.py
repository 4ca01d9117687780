"""What the scores allow to say of a fit, in words, and what they do not."""

from __future__ import annotations

import math
from typing import Any

from ltm_pyro.diagnostics.control import paired_loss
from ltm_pyro.diagnostics.estimates import BOUNDS, PERPLEXITIES
from ltm_pyro.run.scoring import HeldOut

_LABELS = {"elbo": "the ELBO", "iw_bound": "the importance-weighted bound"}


def verdict(held_out: HeldOut, scores: dict[str, Any]) -> dict[str, Any]:
    """Do thoughts help, by how much, how sure; and what is not supported.

    A bound above the control's exact log-likelihood, by more than its paired error, shows that this
    fit of the model gives the text more probability than this fit of the control. That thoughts are
    why takes more: another document's thoughts must hurt. A bound below the control shows nothing:
    the model may still be better.

    Of scores of mode `oracle` and their `summary`, it gives `answer` in a word or two, `sentence`,
    `use`, `gains` (by bound: nats per sequence above the control with `error`, two of which on
    either side hold 95 %, and whether it is `told_apart`) and `not_supported`, a list of sentences.
    """
    gains = _gains(held_out)
    answer, sentence = _answer(gains, scores)
    return {
        "answer": answer,
        "sentence": sentence,
        "use": _use(scores["collapse"]),
        "gains": gains,
        "not_supported": _not_supported(gains, scores),
    }


def _gains(held_out: HeldOut) -> dict[str, dict[str, Any]]:
    """Each bound less the control's log-likelihood, paired."""
    if held_out.control is None:
        return {}
    out = {}
    for name in BOUNDS:
        found = paired_loss(held_out.scores, held_out.control, name, "sequence")
        out[PERPLEXITIES[name][0]] = {
            "nats_per_sequence": -found.value,
            "error": found.error,
            "documents": found.documents,
            "too_few_documents": found.few,
            "told_apart": not found.few and found.differs(),
        }
    return out


def _answer(gains: dict[str, dict[str, Any]], scores: dict[str, Any]) -> tuple[str, str]:
    if not gains:
        return "not judged", (
            "There is no control, the same decoder trained without thoughts, so whether thoughts "
            "help cannot be told: fit with control on."
        )
    if any(gain["too_few_documents"] for gain in gains.values()):
        return "not judged", (
            "The held-out sequences come from too few documents to trust any error: score more."
        )
    above = [
        name for name, gain in gains.items() if gain["told_apart"] and gain["nats_per_sequence"] > 0
    ]
    if above:
        chosen = gains[above[-1]]
        label = _LABELS[above[-1]]
        other = [_LABELS[name] for name in gains if name not in above]
        rest = f" {other[0][0].upper()}{other[0][1:]} alone would not show it." if other else ""
        panel = scores["collapse"]
        used = panel is not None and panel["uses_thoughts"]
        doubt = "" if used else " That its thoughts are the reason is not shown."
        return "yes, in this fit" if used else "not shown", (
            f"Held-out text is more probable under this model than under the same decoder without "
            f"thoughts: {label} lies {_with_error(chosen)} nats per sequence above "
            f"the control, paired over {chosen['documents']} {_documents(scores)}.{rest}{doubt}"
        )
    best = gains["iw_bound"]
    verdict = ": the two are not told apart."
    if best["told_apart"]:
        verdict = ". It is below; whether the model itself is worse, a bound cannot say."
    return "not shown", (
        f"That thoughts help is not shown: {_LABELS['iw_bound']} lies {_with_error(best, '+')} "
        f"nats per sequence from the same decoder without thoughts, paired over "
        f"{best['documents']} {_documents(scores)}{verdict}"
    )


def _with_error(gain: dict[str, Any], sign: str = "") -> str:
    """Both with two decimals, or as many as show the error."""
    error = gain["error"]
    digits = max(2, 1 - math.floor(math.log10(error))) if 0 < error < math.inf else 2
    return f"{gain['nats_per_sequence']:{sign}.{digits}f} ± {error:.{digits}f}"


def _documents(scores: dict[str, Any]) -> str:
    return "documents" if scores["n_documents"] else "sequences (documents are not known)"


def _use(panel: dict[str, Any] | None) -> str:
    if panel is None or panel["penalty_shuffled"] is None:
        return "Whether the decoder uses its thoughts is not judged."
    if panel["note"]:  # too few documents
        return "Whether the decoder uses them is not judged."
    loss = f"{panel['penalty_shuffled']:.2f} ± {panel['penalty_shuffled_se']:.2f}"
    if panel["uses_thoughts"]:
        return f"The decoder uses them: another document's thoughts cost {loss} nats per sequence."
    return (
        f"That the decoder uses them is not shown: another document's thoughts cost {loss} nats "
        "per sequence."
    )


def _not_supported(gains: dict[str, dict[str, Any]], scores: dict[str, Any]) -> list[str]:
    out = [
        "That thoughts pay in training, or that this recipe is better: this is one fit of each, "
        "and another seed gives other weights. It takes several seeds.",
        f"Anything about other text than the {scores['split']} split of this corpus.",
    ]
    khat = scores["khat"]
    if khat["median"] is None:
        out.append(
            "How far the importance-weighted bound can be relied on: its weights were not judged, "
            f"which takes 1,000 draws (here {scores['draws']}). Its Monte Carlo error is a lower "
            "limit."
        )
    elif khat["share_above_limit"]:
        out.append(
            f"The importance-weighted bound of {khat['share_above_limit']:.0%} of the sequences: "
            "k-hat is above its limit, so it is loose there and its error too small."
        )
    panel = scores["collapse"]
    if panel is not None and not panel["uses_thoughts"]:
        out.append("That what thoughts say is the reason for any difference to the control.")
    if gains and all(gain["nats_per_sequence"] < 0 for gain in gains.values()):
        out.append(
            "That the model is worse than the control: bounds lie below the log-likelihood that "
            "they bound."
        )
    out.append(
        "That intervals of z are calibrated, or q is near the posterior, unless a check below says "
        "so."
    )
    return out
