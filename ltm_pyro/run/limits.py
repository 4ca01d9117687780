"""Settings that no memory of this machine can hold, told at once."""

from __future__ import annotations

import torch

from ltm_pyro.checks import memory_bytes, refuse_too_large
from ltm_pyro.config import FitConfig
from ltm_pyro.diagnostics.memory import LEAST_SHARE, decoder_bytes, draws_at_once, rows_at_once

_PER_NUMBER = 16
"""Bytes of a weight or local parameter at least: itself, gradient, Adam's two moments."""


def refuse_oversize(config: FitConfig, processes: int = 1, most: float | None = None) -> None:
    """Refuses settings whose least memory is more than there is, before anything is allocated.

    The least is `LEAST_SHARE` of what the formula of `ltm-pyro cost` gives. What lies between may
    fit or not; if not, the fit ends in the line on memory that has run out, or by the system's
    hand. `most` bytes are those of the fit's device by default.
    """
    model, most = config.model, _memory_of(config.device) if most is None else most
    refuse_too_large(
        f"model.n_layers {model.n_layers}, model.width {model.width}, model.mlp_hidden "
        f"{model.mlp_hidden} and model.vocab_size {model.vocab_size} make {model.n_weights:,} "
        "weights",
        _PER_NUMBER * model.n_weights,
        "choose a smaller model",
        most,
    )
    local = model.n_thoughts * model.thought_dim
    rows, part = rows_at_once(config, processes)
    draws = max(draws_at_once(config))
    many = "" if draws == 1 else f" and {draws} draws (particles, fast.fixed_draws)"
    part_name = "micro_batch" if config.micro_batch else "batch_size"
    for name, value, size, taken in (
        (part_name, part, part, LEAST_SHARE * decoder_bytes(config, processes)),
        ("batch_size", config.batch_size, rows, (8 * model.seq_len + _PER_NUMBER * local) * rows),
        ("eval_draws", config.eval_draws, config.eval_draws, 4 * local * config.eval_draws),
    ):
        fits = int(most / taken * size) if taken > most else size
        remedy = f"at most {fits} fit" if fits else "choose a smaller model or seq_len"
        refuse_too_large(
            f"{name} is {value}, with model.seq_len {model.seq_len}{many}", taken, remedy, most
        )


def _memory_of(device: str) -> float:
    if device.startswith("cuda") and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return memory_bytes()
