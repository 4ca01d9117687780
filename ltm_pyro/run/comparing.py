"""`compare_runs`: several fits of one corpus, scored alike, and what sets them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from ltm_pyro.checks import QUIET_SECONDS, one_of
from ltm_pyro.config import to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.batches import Batch
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.data.split import SPLITS
from ltm_pyro.diagnostics.bounds import evaluate
from ltm_pyro.diagnostics.held_out import spread
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError, shown
from ltm_pyro.reading import as_path
from ltm_pyro.run.changes import SCORING, flat
from ltm_pyro.run.folder import CONFIG, Run
from ltm_pyro.run.opening import load_run
from ltm_pyro.run.run_comparison import RunComparison
from ltm_pyro.run.scoring import control_scores

Per = Literal["token", "byte", "word"]

_NO_CHOICE = ("model.vocab_size", "corpus.name")
"""Follow from the corpus, which is the same."""
_NEUTRAL = (*SCORING, *_NO_CHOICE, "device", "compile", "checkpoint_every", "control")
"""Settings that no fit depends on, but for rounding."""
_MOST_IN_LABEL = 3  # settings; beyond that a folder's name says more


@door
def compare_runs(
    runs: str | Path | Sequence[str | Path | Run],
    *,
    corpus: Corpus | None = None,
    split: str | None = None,
    sequences: int | None = None,
    draws: int | None = None,
    per: Per | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> RunComparison:
    """Scores several runs on the same held-out text, and tells what their errors allow.

    Runs that differ in their seed alone are fits of one recipe: their differences to others have
    the error of training in them, beside that of having sampled these documents. A recipe with one
    fit allows a verdict on that fit.

    Where tokenizers or sequence lengths differ, scores are per byte of the raw text, and paired by
    document; sequences then begin at other places, so the text scored is the same only where all of
    the split is (`sequences` as large as it).

    Args:
        runs: Run folders or runs, two or more, or one folder that holds run folders. The first is
            the baseline.
        corpus: Their corpus, where it cannot be loaded again since a program held it.
        split: `val`, `test` or `train`; by default the one that fits are scored on.
        sequences: How many, drawn over the split's documents; where runs cut it into different
            ones, so many of the run with the longest, and as much text of the others. This,
            `draws` and the steps of inference are by default the most that any run's settings ask
            for, the same for all.
        draws: S, fresh draws per sequence.
        per: `token`, `byte` or `word`; by default tokens where all runs have the same ones, else
            bytes.
        seed: Of the draws.
        device: Where to compute; where each was fitted by default.
        progress: Show a progress bar on stderr, if it takes longer than a few seconds.

    Returns:
        A `RunComparison`: print it, or take `.frame()`, `.plot()`, `.dataset`.

    Raises:
        InputError: if there are fewer than two runs, one is named twice, or they were fitted to
            different corpora or hold out different documents.
    """
    opened = [run if isinstance(run, Run) else load_run(run, device=device) for run in _each(runs)]
    if len(opened) < 2:
        raise InputError(f"{len(opened)} run to compare: give two or more run folders")
    _refuse_other_corpora(opened)
    configs, corpora = [run.config for run in opened], _corpora(opened, corpus)
    split = corpora[0].held_out() if split is None else one_of("split", split, SPLITS)
    parts: list[SequenceSet] = [getattr(each, split) for each in corpora]
    _refuse_other_documents(opened, parts)
    same = len({part.corpus for part in parts}) == 1
    per = _unit(per, same)
    count = max(c.eval_sequences for c in configs) if sequences is None else sequences
    # As much of the text from each: the one with the longest sequences gets as many as asked for.
    share = max(count / max(len(part), 1) for part in parts)
    draws = max(c.eval_draws for c in configs) if draws is None else draws
    steps = max(c.eval_fast_steps for c in configs)
    batches = [spread(part, round(share * len(part))) for part in parts]
    pairs = list(zip(opened, batches, strict=True))
    with tqdm(pairs, disable=not progress, unit="run", delay=QUIET_SECONDS) as bar:
        scored = [_scores(run, batch, draws, steps, per, seed) for run, batch in bar]
    data, settings = _joined(opened, scored)
    data.attrs |= {
        "unit": opened[0].tokenizer.unit if per == "token" else per,
        "split": split,
        "same_sequences": int(same),
        "n_sequences": int(data["n_sequences"].max()),
        "n_documents": data.sizes["document"],
        "draws": draws,
        "fast_steps": steps,
        "seed": seed,
        "corpus": corpora[0].name,
        "corpus_sha256": corpora[0].sha256,
    }
    return RunComparison(data, settings)


def _unit(per: Per | None, same_tokens: bool) -> Per:
    """What scores are divided by."""
    if per is None:
        return "token" if same_tokens else "byte"
    one_of("per", per, get_args(Per))
    if per == "token" and not same_tokens:
        raise InputError("per is 'token', and tokens differ between these runs: choose per='byte'")
    return per


def _joined(runs: Sequence[Run], scored: Sequence[xr.Dataset]) -> tuple[xr.Dataset, pd.DataFrame]:
    """The scores of all runs with what tells these apart, and the settings of their groups."""
    labels = _labels(runs)
    groups, settings = _groups(runs, labels)
    data = xr.concat(scored, "run", join="outer", fill_value=0.0, coords="minimal")
    data = data.assign_coords(
        run=labels,
        group=("run", groups),
        seed=("run", [run.config.seed for run in runs]),
        step=("run", [run.svi.slow_step for run in runs]),
        steps=("run", [run.config.steps for run in runs]),
    )
    data.attrs = {"baseline": groups[0]}
    return data, settings


def run_folders(place: str | Path) -> list[Path]:
    """The run folders that `place` stands for: itself, or those that it holds, by name."""
    folder = as_path("run folder", place)
    inner = sorted(p.parent for p in folder.glob(f"[!.]*/{CONFIG}"))
    return [folder] if (folder / CONFIG).exists() or not inner else inner


def _each(runs: str | Path | Sequence[str | Path | Run]) -> list[Path | Run]:
    """The runs and run folders that `runs` names, each once."""
    given = [runs] if isinstance(runs, str | Path) else list(runs)
    out: list[Path | Run] = []
    for run in given:
        if not isinstance(run, str | Path | Run):
            raise InputError(f"runs holds {shown(run)}: give run folders, or what load_run returns")
        out += [run] if isinstance(run, Run) else run_folders(run)
    places = [(run.folder if isinstance(run, Run) else run).resolve() for run in out]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"run folder {str(place)!r} is named twice: give each once")
    return out


def _refuse_other_corpora(runs: Sequence[Run]) -> None:
    first = runs[0].facts["corpus"]["sha256"]
    for run in runs:
        if (other := run.facts["corpus"]["sha256"]) != first:
            raise InputError(
                f"{runs[0].label} and {str(run.folder)!r} were fitted to different corpora "
                f"(SHA-256 {first[:12]} and {other[:12]}): compare runs of one corpus"
            )


def _corpora(runs: Sequence[Run], corpus: Corpus | None) -> list[Corpus]:
    """The corpus of each run, loaded once for all that share it."""
    if corpus is not None:
        for run in runs:
            if corpus.fingerprint != run.facts["corpus"].get("fingerprint"):
                raise InputError(
                    f"the corpus given has other text, tokens or sequence length than {run.label}: "
                    "load it with tokenizer=run.tokenizer and the run's seq_len"
                )
        return [corpus] * len(runs)
    loaded: dict[str, Corpus] = {}
    out = []
    for run in runs:
        key = repr((run.config.corpus, run.facts["corpus"].get("fingerprint")))
        if key not in loaded:
            loaded[key] = run.corpus()
        out.append(loaded[key])
    return out


def _refuse_other_documents(runs: Sequence[Run], parts: Sequence[SequenceSet]) -> None:
    first = np.unique(parts[0].documents)
    for run, part in zip(runs, parts, strict=True):
        if not np.array_equal(first, np.unique(part.documents)):
            raise InputError(
                f"{runs[0].label} and {str(run.folder)!r} hold out different documents: compare "
                "runs of one split (corpus.split, split_by and seed)"
            )


def _scores(run: Run, batch: Batch, draws: int, steps: int, per: Per, seed: int) -> xr.Dataset:
    """What a run gives the documents of `batch`: nats and sizes, added up by document."""
    batch = batch.to(run.model.device)
    post = run.svi.infer(batch, steps, progress=False)
    scores = evaluate(run.model, post, batch, draws, controls=False, seed=seed)
    control = control_scores(run, batch)
    if f"n_{per}s" not in scores:
        raise InputError(f"the {per}s of {run.label} are not known: compare runs per token")
    size = scores[f"n_{per}s"].values.astype(np.float64)
    columns = {
        "elbo": scores["elbo"].values,
        "iw_bound": scores["iw_bound"].values,
        "kl": scores["kl"].values,
        "control": np.nan * size if control is None else -control["nll_z0"].values,
        "size": size,
    }
    documents, place = np.unique(scores["document"].values, return_inverse=True)
    totals: dict[str, Any] = {
        name: ("document", np.bincount(place, weights=values, minlength=len(documents)))
        for name, values in columns.items()
    }
    return xr.Dataset({**totals, "n_sequences": len(batch)}, coords={"document": documents})


def _labels(runs: Sequence[Run]) -> list[str]:
    """What each run is called: its folder's name, or its path where that is not enough."""
    names = [run.folder.resolve().name for run in runs]
    unique = len(set(names)) == len(names)
    return names if unique else [str(run.folder) for run in runs]


def _groups(runs: Sequence[Run], labels: Sequence[str]) -> tuple[list[str], pd.DataFrame]:
    """The group of each run, and the settings in which groups differ.

    A group holds runs with the same settings but for the seed, each with a seed of its own.
    """
    members: list[tuple[dict[str, Any], list[int]]] = []
    for number, run in enumerate(runs):
        settings = {k: v for k, v in flat(to_dict(run.config)).items() if k not in _NEUTRAL}
        settings.pop("seed")
        for known, those in members:
            if known == settings and all(runs[i].config.seed != run.config.seed for i in those):
                those.append(number)
                break
        else:
            members.append((settings, [number]))
    differing = _differing([settings for settings, _ in members])
    rows = [{name: settings.get(name) for name in differing} for settings, _ in members]
    names = [_group_label(row, [labels[i] for i in those]) for row, (_, those) in
             zip(rows, members, strict=True)]  # fmt: skip
    if len(set(names)) < len(names):
        names = [", ".join(labels[i] for i in those) for _, those in members]
    of_run = {i: name for name, (_, those) in zip(names, members, strict=True) for i in those}
    frame = pd.DataFrame(rows, index=pd.Index(names, name="group"), columns=differing, dtype=object)
    return [of_run[i] for i in range(len(runs))], frame


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for each in settings for name in each)
    return [n for n in names if any(each.get(n) != settings[0].get(n) for each in settings)]


def _group_label(row: Mapping[str, Any], labels: Sequence[str]) -> str:
    if len(labels) == 1 or not row or len(row) > _MOST_IN_LABEL:
        return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
    last = [name.rpartition(".")[2] for name in row]
    short = last if len(set(last)) == len(last) else list(row)
    told = [(name, v) for name, v in zip(short, row.values(), strict=True) if v is not None]
    return ", ".join(f"{name}={shown(value).strip(chr(39))}" for name, value in told)
