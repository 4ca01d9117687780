"""From settings to corpus, device, model and guide, the same ones for the same settings."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.config import CorpusConfig, FitConfig, from_dict, to_dict
from ltm_pyro.data.base import Corpus
from ltm_pyro.data.corpus import check_options, load_corpus
from ltm_pyro.data.finding import absolute_path
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.guides import LocalGuide, build_guide
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.random import Stream, derive_seed, seeded

_OWN_SETTING = {"seq_len": "model.seq_len", "cache_dir": "the environment's LTM_PYRO_CACHE"}
"""Arguments of `load_corpus` that other settings give."""

BUILT_IN_TOKENIZERS = ("bytes", "bpe", "symbols")


def open_corpus(config: FitConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus that `config` names.

    Args:
        config: The settings.
        tokenizer: Instead of the one that the settings name.

    Raises:
        InputError: as `load_corpus` does, and for an option that is an argument of it.
    """
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


def check_corpus_options(chosen: CorpusConfig) -> None:
    """Refuses options that no corpus of that name takes, without opening it.

    Raises:
        InputError: naming the setting, where another one sets it.
    """
    own = [name for name in inspect.signature(load_corpus).parameters if name != "options"]
    for option in chosen.options:
        if option in own:
            raise InputError(
                f"{option} is no option of a corpus: leave it out of corpus.options"
                + (f", {_OWN_SETTING[option]} sets it" if option in _OWN_SETTING else "")
            )
    check_options(chosen.name, chosen.options)


def open_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        InputError: if there is no such device here.
    """
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
