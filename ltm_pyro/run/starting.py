"""A new run that starts from the weights of another."""

from __future__ import annotations

from ltm_pyro.config import to_dict
from ltm_pyro.errors import InputError
from ltm_pyro.run import checkpoint as checkpoints
from ltm_pyro.run.changes import difference
from ltm_pyro.run.checkpoint import Checkpoint, put, take, weights_of
from ltm_pyro.run.folder import CONTROL, Run


def start_from(run: Run, other: Run) -> dict[str, bytes]:
    """Gives a new run the weights of another, and its control those of the other's control.

    The guide's shared weights go along where the guide is the same one. A run that was fitted
    without a control lends its own decoder to the new control: both start alike, as always.

    Returns:
        The files of the control's first checkpoint, if there is one.
    """
    mine, its = run.config, other.config
    asked = {k: v for k, v in to_dict(its.model).items() if k != "seq_len"}
    changed = difference(mine, {"model": asked}, "this fit", other.label)
    if changed is not None:
        raise InputError(f"{changed}: --init_from needs the same model; leave that setting out")
    if run.tokenizer.to_json() != other.tokenizer.to_json():
        raise InputError(
            f"the tokenizer of this fit's corpus is not that of {other.label}, whose weights it "
            "should start from: load the corpus with tokenizer=run.tokenizer"
        )
    run.model.load_state_dict(other.model.state_dict())
    if (mine.guide, dict(mine.guide_options)) == (its.guide, dict(its.guide_options)):
        run.guide.load_state_dict(take(weights_of(other.svi), "guide."))
    if not mine.control:
        return {}
    fitted = other.control().model if its.control else other.model
    first = Checkpoint(
        put("model.", fitted.state_dict()), {"slow_step": 0, "config": to_dict(mine)}
    )
    return {f"{CONTROL}/{k}": v for k, v in checkpoints.to_files(first).items()}
