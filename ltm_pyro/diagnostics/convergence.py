"""Were there enough fast steps? Answered for each sequence, in nats, against Monte Carlo noise.

The ELBO that a fast loop prints has one draw per step: its noise hides the gain of a step, and a
learning rate that is far too small looks as flat as a loop that has arrived. So the loop is run
again for fewer and for more steps, each q is scored on fresh draws, the same for all of them, and
what could still be gained is looked for twice:

    gain_doubling     ELBO(q after 2 T steps) - ELBO(q after T)      the same recipe, for longer
    gain_other_rate   ELBO(q_T led on at a rate of our own) - ELBO(q_T)

Because both sides of a difference share their draws, its error is far below that of either side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.infer import ELBO
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.bounds import standard_error
from ltm_pyro.diagnostics.estimates import Values, columns, sequence_coords
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.fast import local_optimizer
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.random import Stream, derive_seed, seeded

ENOUGH, NOT_ENOUGH, CANNOT_TELL = "enough", "not enough", "cannot tell"
CONFIDENCE = 3.0
"""Standard errors between a gain and the tolerance before a verdict is given: for a gain right at
the tolerance, one sequence in 700 gets a wrong one."""
MIN_DRAWS = 16
"""Below it a standard error is itself too uncertain for the verdict's error rate to hold."""
_PROBE_STEPS, _PROBE_RATE = 64, 0.1
"""At the rate of the probe, falling to 0, 64 steps of Adam reach about three prior scales."""


def objective_draws(
    model: LatentModel, post: Posterior, batch: Batch, draws: int, seed: int = 0
) -> Tensor:
    """Log p(x | z_s) + log p(z_s) - log q(z_s) at fresh z_s ~ q: the mean over s is the ELBO.

    (S, B) float64, nats. Two posteriors of one family get the same noise from the same seed, so
    that differences of these values are far less noisy than the values. Without a closed-form KL on
    purpose: near p(z | x) these are nearly constant. A point mass has no density: its log q is left
    out, and the values are the log joint.
    """
    batch = batch.to(model.device)
    prepared = model.prepare(batch)
    with torch.no_grad():
        with seeded(derive_seed(seed, Stream.SCORE, 1), batch.device):
            z = post.sample(draws)
        log_lik = torch.stack([model.log_likelihood(draw, prepared).double() for draw in z])
        value = log_lik + post.prior.log_prob(z).double()
        return value - post.log_prob(z).double() if post.has_density else value


def mean_and_error(draws: Tensor) -> tuple[Values, Values]:
    """Mean of (S, ...) draws and its standard error, (...) each."""
    return draws.mean(0).cpu().numpy(), standard_error(draws).cpu().numpy()


def with_errors(pairs: Mapping[str, tuple[Values, Values]], *dims: str) -> dict[str, Any]:
    """Variables of a Dataset in nats: each value under its name, and its error as `_se`."""
    return {
        f"{name}{ending}": (dims, values, {"units": "nats"})
        for name, pair in pairs.items()
        for ending, values in zip(("", "_se"), pair, strict=True)
    }


def continue_from(
    svi: DualRateSVI,
    rows: dict[str, Tensor],
    batch: Batch,
    fast: Fast,
    *,
    guide: LocalGuide | None = None,
    elbo: ELBO | None = None,
) -> Posterior:
    """A fast loop of its own clock that starts at given local parameters; `svi` is left alone.

    Guide and objective are those of `svi` unless given; `rows` are the guide's local parameters,
    (B, ...) by name, in the order of `batch`.
    """
    guide = svi.guide if guide is None else guide
    elbo = svi.elbo if elbo is None else elbo
    loop = DualRateSVI(svi.model, guide, fast, svi.slow, elbo=elbo, seed=svi.seed, persistent=True)
    batch = batch.to(svi.model.device)
    guide.load_rows(rows)
    assert loop.store is not None
    loop.store.scatter(batch.ids, {**rows, **local_optimizer(guide, fast, loop.elbo).state()})
    return loop.infer(batch, warm_start=True)


def judge(
    gain: Values, error: Values, tolerance: float, draws: int
) -> tuple[NDArray[np.str_], Values]:
    """Whether gains (B,) are below or above the tolerance, nats, by `CONFIDENCE` standard errors.

    Gives `enough`, `not enough` or `cannot tell`, and the draws at which the answer would be clear:
    the S in use where it is, infinite where the gain equals the tolerance.
    """
    distance = np.abs(gain - tolerance)
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.ceil(draws * np.square(CONFIDENCE * error / distance))
    clear = CONFIDENCE * error < distance
    side = np.where(gain < tolerance, ENOUGH, NOT_ENOUGH)
    return np.where(clear, side, CANNOT_TELL), np.where(clear, float(draws), needed)


@door
def fast_convergence(
    svi: DualRateSVI,
    batch: Batch,
    *,
    steps: int | None = None,
    draws: int = 256,
    tolerance: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """The course of the ELBO over fast steps, and whether they were enough, per sequence.

    The loop is run anew for 0, T/4, T/2, T and 2 T steps, each with its whole schedule and the
    noise of `svi`, and led on from T at a rate of our own. The verdict holds the larger of the two
    gains against the tolerance: `enough` if both are below it by `CONFIDENCE` standard errors, `not
    enough` if one is above it by as many, `cannot tell` otherwise. It costs about
    4 T + max(T, 64) fast steps and 6 S passes of the decoder.

    Args:
        svi: The recipe that is judged. Its model, clocks and store are left alone.
        batch: The sequences.
        steps: T, the fast clock's own by default.
        draws: S, fresh draws per checkpoint.
        tolerance: Nats per sequence that may be left on the table.
        seed: Of the draws.

    Returns:
        Dataset over `checkpoint` (steps done) and `sequence`, nats: `objective`, `objective_se`;
        `behind`, `behind_se`: the same minus its value at T, on common draws. Per sequence:
        `gain_doubling`, `gain_other_rate`, `gain_per_step` (over the second half of the loop), each
        with `_se`; `noise_per_draw`, the standard deviation of one draw of the ELBO at T;
        `verdict`; `remedy`: `none`, `more steps`, `another rate` (doubling would bring little, the
        other rate more) or `more draws`; `draws_needed`.

        Attributes: `steps`, `draws`, `tolerance`, `share_enough`, `share_not_enough`,
        `share_cannot_tell`, `sentence`, and `objective_kind`, which is the log joint for a point
        mass and else the ELBO, whatever the fast loop itself maximises.

    Raises:
        InputError: for a family without local parameters, or a number out of range.
    """
    steps = svi.fast.steps if steps is None else steps
    _check(steps, draws, tolerance)
    batch = batch.to(svi.model.device)
    done = sorted({0, steps // 4, steps // 2, steps, 2 * steps})
    values, posts = [], {}
    for count in done:
        posts[count] = svi.infer(batch, count)
        if not svi.guide.local_parameters():  # known once it holds the batch
            raise InputError(
                f"{svi.guide.family!r} has no local parameters, so no fast loop that could be too "
                "short: see its amortisation gap in gap_decomposition"
            )
        values.append(objective_draws(svi.model, posts[count], batch, draws, seed))
    last, many = posts[steps], max(steps, _PROBE_STEPS)
    probe = Fast(steps=many, optimizer="adam", lr=_PROBE_RATE, final_fraction=0.0)
    led_on = continue_from(svi, last.parameters, batch, probe)
    other = objective_draws(svi.model, led_on, batch, draws, seed)
    data = _columns(done, torch.stack(values, 1), other, steps)
    _add_verdict(data, tolerance, draws)
    data = data.assign_coords(sequence_coords(batch, data.variables))
    data.attrs.update(
        steps=steps,
        draws=draws,
        seed=seed,
        tolerance=tolerance,
        guide=last.family,
        objective_kind="elbo" if last.has_density else "log joint: a point mass has no ELBO",
    )
    data.attrs["sentence"] = _sentence(data)
    return data


def _check(steps: int, draws: int, tolerance: float) -> None:
    if steps < 1:
        raise InputError(f"steps is {steps}: a fast loop to judge has at least 1")
    if draws < MIN_DRAWS:
        raise InputError(f"draws is {draws}: a verdict needs at least {MIN_DRAWS}")
    whole_number("draws", draws, bytes_each=8)
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise InputError(f"tolerance is {tolerance}: must be a number of nats above 0")


def _columns(done: list[int], values: Tensor, other: Tensor, steps: int) -> xr.Dataset:
    """All numbers of `fast_convergence`, in nats; `values` (S, checkpoints, B)."""
    at, half = values[:, done.index(steps)], values[:, done.index(steps // 2)]
    course = {"objective": mean_and_error(values), "behind": mean_and_error(values - at[:, None])}
    gains = {
        "gain_doubling": mean_and_error(values[:, -1] - at),
        "gain_other_rate": mean_and_error(other - at),
        "gain_per_step": mean_and_error((at - half) / (steps - steps // 2)),
    }
    return xr.Dataset(
        {
            **with_errors(course, "checkpoint", "sequence"),
            **with_errors(gains, "sequence"),
            **columns("sequence", "nats", noise_per_draw=at.std(0)),
        },
        coords={"checkpoint": done},
    )


def _add_verdict(data: xr.Dataset, tolerance: float, draws: int) -> None:
    (longer, longer_needs), (other, other_needs) = (
        judge(data[name].values, data[f"{name}_se"].values, tolerance, draws)
        for name in ("gain_doubling", "gain_other_rate")
    )
    either = (longer == NOT_ENOUGH) | (other == NOT_ENOUGH)
    both = (longer == ENOUGH) & (other == ENOUGH)
    verdict = np.where(either, NOT_ENOUGH, np.where(both, ENOUGH, CANNOT_TELL))
    remedy = np.where(longer == NOT_ENOUGH, "more steps", "another rate")
    remedy = np.where(either, remedy, np.where(both, "none", "more draws"))
    needed = np.where(verdict == CANNOT_TELL, np.maximum(longer_needs, other_needs), float(draws))
    data["verdict"] = ("sequence", verdict)
    data["remedy"] = ("sequence", remedy)
    data["draws_needed"] = ("sequence", needed, {"units": "draws"})
    for name in (ENOUGH, NOT_ENOUGH, CANNOT_TELL):
        data.attrs[f"share_{name.replace(' ', '_')}"] = float((verdict == name).mean())


def _sentence(data: xr.Dataset) -> str:
    """The answer for all sequences together, in words."""
    n, steps, tolerance = data.sizes["sequence"], data.attrs["steps"], data.attrs["tolerance"]
    verdict, remedy = data["verdict"].values, data["remedy"].values
    enough, short = int((verdict == ENOUGH).sum()), int((verdict == NOT_ENOUGH).sum())
    parts = [f"{steps} fast steps are enough for {enough} of {n} sequences (within {tolerance:g})"]
    if short:
        lost = np.maximum(data["gain_doubling"].values, data["gain_other_rate"].values)
        more, rate = int((remedy == "more steps").sum()), int((remedy == "another rate").sum())
        median = float(np.median(lost[verdict == NOT_ENOUGH]))
        why = [f"{more} gain by more steps"] * (more > 0)
        why += [f"{rate} only at another learning rate"] * (rate > 0)
        parts.append(
            f"not enough for {short} ({', '.join(why)}; median {median:.2g} nats still to be had)"
        )
    if enough + short < n:
        needed = float(np.median(data["draws_needed"].values[verdict == CANNOT_TELL]))
        about = f"about {needed:,.0f}" if needed < 1e6 else "more than a million"
        parts.append(
            f"for {n - enough - short} this noise does not tell (typically needs {about} draws)"
        )
    return "; ".join(parts) + "."
