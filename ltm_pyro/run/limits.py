"""Settings that no memory of this machine can hold, or that scoring will refuse, told at once."""

from __future__ import annotations

import torch

from ltm_pyro.capacity import memory_bytes, refuse_too_large
from ltm_pyro.config import FitConfig
from ltm_pyro.errors import InputError

_PER_WEIGHT = 16  # bytes: weight, gradient, and AdamW's two moments in float32
_PER_LOCAL = 16  # the same of a local parameter


def refuse_oversize(config: FitConfig, processes: int = 1, most: float | None = None) -> None:
    """Refuses settings whose least memory is more than there is, before anything is allocated.

    The least is a part of what a fit takes, and easily told: `ltm-pyro cost` has the whole.

    Args:
        config: The fit.
        processes: That share it.
        most: Bytes that there are; those of the fit's device by default.

    Raises:
        InputError: naming the setting, what it takes and what would fit.
    """
    model, most = config.model, _memory_of(config.device) if most is None else most
    refuse_too_large(
        f"model.n_layers {model.n_layers}, model.width {model.width}, model.mlp_hidden "
        f"{model.mlp_hidden} and model.vocab_size {model.vocab_size} make {model.n_weights:,} "
        "weights",
        _PER_WEIGHT * model.n_weights,
        "choose a smaller model",
        most,
    )
    local = model.n_thoughts * model.thought_dim
    rows = -(-config.batch_size // processes)
    part = min(rows, config.micro_batch or rows)
    particles = config.objective_options.get("particles", 1)
    draws = particles if isinstance(particles, int) and particles > 0 else 1
    if config.fast.noise == "fixed":
        draws *= config.fast.fixed_draws
    kept = model.width if config.checkpointing else 4 * model.width + 2 * model.mlp_hidden
    # Two bytes a number: bf16 keeps half of what is kept.
    row = draws * (2 * model.seq_len * model.n_layers * kept + 4 * local)
    held = 8 * model.seq_len + _PER_LOCAL * local
    many = "" if draws == 1 else f" and {draws} draws (particles, fast.fixed_draws)"
    for name, value, size, each in (
        ("micro_batch" if config.micro_batch else "batch_size", part, part, row),
        ("batch_size", config.batch_size, rows, held),
        ("eval_draws", config.eval_draws, config.eval_draws, 4 * local),
    ):
        fits = int(most // each) if most < float("inf") else value
        remedy = f"at most {fits} fit" if fits else "choose a smaller model or seq_len"
        refuse_too_large(
            f"{name} is {value}, with model.seq_len {model.seq_len}{many}",
            size * each,
            remedy,
            most,
        )


def refuse_unscorable(config: FitConfig) -> None:
    """Refuses settings with which a finished fit could not be scored.

    Raises:
        InputError: naming the setting.
    """
    if config.eval_draws < 2:
        raise InputError(
            f"eval_draws is {config.eval_draws}: must be 2 or more, a standard error needs two"
        )


def _memory_of(device: str) -> float:
    if device.startswith("cuda") and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return memory_bytes()
