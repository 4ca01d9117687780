"""Public functions check what they are given where it comes in, by their own annotations.

    @door
    def evaluate(model: LatentModel, post: Posterior | None, batch: Batch, draws: int = 64): ...

refuses a `draws` of 1.5, a `batch` of None and a `model` that is none, each in one line that names
the argument. Rooms behind the door trust what they get. Ranges that belong to one function are its
own business.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.checks import MOST, MOST_SEED, real_number, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError, shown
from ltm_pyro.exclusive import exclusively, usual_modes
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.contract import first_use, require_model

P = ParamSpec("P")
R = TypeVar("R")

_HOW = {
    "Batch": "a Batch: corpus.val.batch(range(8)), or ltm_pyro.Batch(x)",
    "Posterior": "a Posterior: svi.infer(batch)",
    "DualRateSVI": "a DualRateSVI(model, guide)",
    "LatentThoughtModel": "a language model, LatentThoughtModel",
    "str": "a text",
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "NoneType": "None",
}


def door(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function: arguments checked, one caller at a time, torch's usual modes.

    See `exclusive` for the last two. The first batch that a model meets here also shows whether the
    model keeps its contract (`first_use`). Calls from within another door are trusted.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def enter(*args: P.args, **kwargs: P.kwargs) -> R:
        with exclusively() as outermost:
            if not outermost:
                return function(*args, **kwargs)
            with usual_modes():
                bound = signature.bind(*args, **kwargs)
                hints = _hints(function)
                for name, value in bound.arguments.items():
                    if name in hints and value is not signature.parameters[name].default:
                        bound.arguments[name] = _checked(name, value, hints[name])
                _meet(bound.arguments)
                return function(*bound.args, **bound.kwargs)

    return enter


@cache
def _hints(function: Callable[..., Any]) -> Mapping[str, tuple[type, ...]]:
    """The classes that each argument may be of, where its annotation is of classes alone."""
    found = {}
    for name, hint in typing.get_type_hints(function).items():
        union = typing.get_origin(hint) in (Union, types.UnionType)
        classes = typing.get_args(hint) if union else (hint,)
        plain = Any not in classes and all(
            isinstance(c, type) and not getattr(c, "_is_protocol", False) for c in classes
        )
        if name != "return" and plain and hint is not object:
            found[name] = classes
    return found


def _checked(name: str, value: Any, classes: tuple[type, ...]) -> Any:
    if value is None and type(None) in classes:
        return None
    if LatentModel in classes:
        require_model(value)
        return value
    if bool in classes and isinstance(value, bool | np.bool_):
        return bool(value)
    numbers = int in classes or float in classes
    if numbers and str not in classes:
        if float in classes:
            return real_number(name, value)
        if name == "seed":
            return whole_number(name, value, at_least=0, at_most=MOST_SEED)
        return whole_number(name, value, at_most=MOST)
    if isinstance(value, bool) or not isinstance(value, classes):
        how = " or ".join(_HOW.get(c.__name__, f"a {c.__name__}") for c in classes)
        raise InputError(f"{name} is {_described(value)}: must be {how}")
    return usable(value) if isinstance(value, Batch) else value


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return shown(value)


def usable(batch: Batch) -> Batch:
    """The batch as ordinary tensors: those of `torch.inference_mode()` are copied.

    Raises:
        InputError: if it is on the meta device.
    """
    if batch.mask.is_meta:
        raise InputError("batch is on the meta device, which holds no numbers: make it on another")
    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor) and v.is_inference()}
    if not tensors or torch.is_inference_mode_enabled():
        return batch
    names = {f.name for f in fields(batch)}
    copies: dict[str, Any] = {k: v.clone() for k, v in tensors.items() if k in names}
    return replace(batch, **copies)


def _meet(arguments: Mapping[str, Any]) -> None:
    model, batch = arguments.get("model"), arguments.get("batch")
    if isinstance(batch, Batch) and isinstance(model, torch.nn.Module) and batch.x is not None:
        meet(typing.cast("LatentModel", model), batch)


def meet(model: LatentModel, batch: Batch) -> None:
    """Checks a batch against a model, and a model against its contract where it is new."""
    batch = batch.to(model.device)
    model.check(batch)
    if batch.holds_numbers and not bool(batch.mask.any()):
        raise InputError("batch has no position that its mask scores: mask is false throughout")
    if not type(model).__module__.startswith("ltm_pyro."):  # those are held to it by tests
        first_use(model, batch)
