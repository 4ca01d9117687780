"""From settings to corpus, device, model, guide and fit, the same ones for the same settings."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.config import CorpusConfig, FitConfig, from_dict, to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.corpus import check_options, load_corpus
from ltm_pyro.data.finding import IN_MEMORY, absolute_path
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.engine.execution import Execution
from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.random import Stream, derive_seed, seeded

_OWN_SETTING = {"seq_len": "model.seq_len", "cache_dir": "the environment's LTM_PYRO_CACHE"}
"""Arguments of `load_corpus` that other settings give."""

BUILT_IN_TOKENIZERS = ("bytes", "bpe", "symbols")


def open_corpus(config: FitConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus that `config` names; `tokenizer` stands for the one that it names."""
    chosen = config.corpus
    check_corpus_options(chosen)
    options: dict[str, Any] = dict(chosen.options)
    arguments: dict[str, Any] = {
        f.name: getattr(chosen, f.name) for f in fields(chosen) if f.name not in ("name", "options")
    }
    if tokenizer is not None:
        arguments["tokenizer"] = tokenizer
        options.pop("vocab_size", None)  # of one that is learned
    return load_corpus(chosen.name, seq_len=config.model.seq_len, **arguments, **options)


def reopened_corpus(config: FitConfig, tokenizer: Tokenizer, sha256: str, owner: str) -> Corpus:
    """The corpus that a run, `owner`, was fitted to, loaded again; its SHA-256 must be the same."""
    if config.corpus.name == IN_MEMORY:
        raise InputError(
            f"the corpus of {owner} was in the memory of a program: load it again by load_corpus, "
            "with tokenizer=run.tokenizer, and give it where a corpus is asked for"
        )
    corpus = open_corpus(config, tokenizer if config.init_from else None)
    if corpus.tokenizer.to_json() != tokenizer.to_json():
        corpus = open_corpus(config, tokenizer)
    if corpus.sha256 != sha256:
        raise InputError(
            f"corpus {config.corpus.name!r} is not the one that {owner} was fitted to (SHA-256 "
            f"{corpus.sha256[:12]}, then {sha256[:12]}): restore the text, or fit anew (the "
            "built-in pydoc differs between builds of Python)"
        )
    return corpus


def check_corpus_options(chosen: CorpusConfig) -> None:
    """Refuses options that no corpus of that name takes, without opening it."""
    own = [name for name in inspect.signature(load_corpus).parameters if name != "options"]
    for option in chosen.options:
        if option in own:
            raise InputError(
                f"{option} is no option of a corpus: leave it out of corpus.options"
                + (f", {_OWN_SETTING[option]} sets it" if option in _OWN_SETTING else "")
            )
    check_options(chosen.name, chosen.options)


def open_device(name: str) -> torch.device:
    """The device called `name`; `InputError` if there is no such device here."""
    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("holds no numbers, or is another name of the one CPU")
        torch.zeros(1, device=device)
    except Exception:  # a backend that is not installed fails in a way of its own
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            here.append("mps")
        raise InputError(
            f"device {shown(name)} is absent: this machine has {', '.join(here)}; choose with "
            "--device"
        ) from None
    return device


def initial_model(config: FitConfig, device: str | None = None) -> LatentThoughtModel:
    """The model before the first step: the same weights for the same settings, on any device."""
    place = open_device(device or config.device)
    with seeded(derive_seed(config.seed, Stream.INITIAL), torch.device("cpu")):
        return LatentThoughtModel(config.model).to(place)


def initial_guide(config: FitConfig, model: LatentThoughtModel) -> LocalGuide:
    """The guide before the first step."""
    with seeded(derive_seed(config.seed, Stream.INITIAL, 1), torch.device("cpu")):
        return build_guide(config.guide, model, **config.guide_options)


def initial_fit(config: FitConfig, device: str | None, parallel: Parallel) -> DualRateSVI:
    """The fit before the first step."""
    model = initial_model(config, device)
    # Held-out sequences, of whatever number, are then inferred in parts of that size too.
    rows = max(1, config.batch_size // parallel.size)
    svi = DualRateSVI(
        model,
        initial_guide(config, model),
        fast=config.fast,
        slow=config.slow,
        elbo=build_objective(config.objective, **config.objective_options),
        seed=config.seed,
        persistent=config.persistent,
        execution=Execution(
            precision=config.precision,
            micro_batch=config.micro_batch or rows,
            checkpointing=config.checkpointing,
            parallel=parallel,
        ),
    )
    svi.batch_size = config.batch_size
    return svi


def absolute_paths(config: FitConfig) -> FitConfig:
    """`config` with the paths in it made absolute, so that the run can be used from anywhere."""
    corpus = config.corpus
    paths = {"name": absolute_name(corpus.name), "tokenizer": absolute_name(corpus.tokenizer)}
    start = config.init_from and str(Path(config.init_from).absolute())
    corpus = from_dict(CorpusConfig, {**to_dict(corpus), **paths})
    return replace(config, corpus=corpus, init_from=start)


def absolute_name(name: str) -> str:
    """The absolute path, where `name` is the path of something and not a built-in name."""
    if name in BUILT_IN_TOKENIZERS:
        return name
    try:
        return absolute_path(name)
    except InputError:
        return name  # loading it tells what is wrong
