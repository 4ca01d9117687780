"""Doors: public functions take callers one at a time, and check what they are given.

    @door
    def evaluate(model: LatentModel, post: Posterior | None, batch: Batch, draws: int = 64): ...

refuses, by its own annotations, a `draws` of 1.5, a `batch` of None and a `model` that is none,
each in one line that names the argument. Rooms behind the door trust what they get. Ranges that
belong to one function are its own business.

Threads take turns at everything that runs a program or draws. Pyro keeps its stack of handlers, and
torch its global generator, once per process: two threads that sample at the same time would find
each other's handlers there, and each other's random numbers. A thread may enter again what it
holds. Work that should run side by side belongs into processes. What is called under the lock (a
fit's callbacks) must not wait for another thread that wants it. Code outside this package that
draws from torch's global generator, or runs a Pyro program, in another thread at the same time,
takes `exclusively` itself.
"""

from __future__ import annotations

import inspect
import os
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from inspect import getattr_static
from typing import Any, ParamSpec, TypeVar, Union

import numpy as np
import torch
from torch import Tensor, nn

from ltm_pyro.checks import MOST, MOST_SEED, real_number, whole_number
from ltm_pyro.errors import InputError, shown

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()
_depth = 0


def _fresh_lock() -> None:
    global _lock, _depth
    _lock, _depth = threading.RLock(), 0


if hasattr(os, "register_at_fork"):
    # Who held the lock is not in the child: it would wait for ever.
    os.register_at_fork(after_in_child=_fresh_lock)


@contextmanager
def exclusively() -> Iterator[bool]:
    """Inside the block no other thread is in such a block; gives whether this one was in none."""
    global _depth
    with _lock:
        _depth += 1
        try:
            yield _depth == 1
        finally:
            _depth -= 1


def nested() -> bool:
    """Whether a public function has been called from within another one."""
    return _depth > 1


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function: other threads wait, and torch computes in its usual modes.

    Its usual modes are those that a process starts in: gradients are recorded, and new tensors are
    on the CPU. A caller's `torch.inference_mode()`, `torch.no_grad()` or default device ends at the
    door, so that nothing comes out of it in another way.
    """

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with exclusively() as outermost:
            if not outermost:
                return function(*args, **kwargs)
            with usual_modes():
                return function(*args, **kwargs)

    return alone


@contextmanager
def usual_modes() -> Iterator[None]:
    """Inside the block torch records gradients and puts new tensors on the CPU."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            # Only then: it costs something at each of torch's calls.
            stack.enter_context(torch.device("cpu"))
        yield


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
    model keeps its contract. Calls from within another door are trusted.
    """
    signature = inspect.signature(function)

    @exclusive
    @wraps(function)
    def enter(*args: P.args, **kwargs: P.kwargs) -> R:
        if nested():
            return function(*args, **kwargs)
        bound, hints = signature.bind(*args, **kwargs), _hints(function)
        for name, value in bound.arguments.items():
            if name in hints and value is not signature.parameters[name].default:
                bound.arguments[name] = _checked(name, value, hints[name])
        model, batch = (bound.arguments.get(name) for name in ("model", "batch"))
        if isinstance(model, nn.Module) and getattr(batch, "x", None) is not None:
            meet(model, batch)
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
    if any(c.__name__ == "LatentModel" for c in classes):
        return require_model(value)
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
        raise InputError(f"{name} is {described(value)}: must be {how}")
    return value.usable() if hasattr(value, "usable") else value


def described(value: object) -> str:
    """As `shown`, but for a tensor, of which its shape is told."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


MEMBERS = (
    "prior", "log_likelihood", "prepare", "check", "thought_shape", "device", "parameters",
)  # fmt: skip
"""What inference asks of a model; `LatentModel` gives all but the first from two methods."""


def require_model(model: Any) -> Any:
    """`model`, known to be one."""
    how = "derive it from ltm_pyro.LatentModel, which asks for prior() and likelihood(z, batch)"
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {shown(model)}: {how}")
    if "_parameters" not in vars(model):
        raise InputError(f"model is a {type(model).__name__}: call super().__init__() in its own")
    missing = [name for name in MEMBERS if getattr_static(model, name, None) is None]
    if missing:
        raise InputError(f"model is a {type(model).__name__} without {', '.join(missing)}: {how}")
    for name, p in model.named_parameters():
        if p.is_inference():
            raise InputError(
                f"model has weights made under torch.inference_mode() ({name}): build it outside"
            )
    return model


FIRST_USE: list[Callable[[Any, Any], None]] = []
"""Called with a model that is not the package's own and the batch that it meets; `models.base` puts
the contract's `first_use` here."""


def meet(model: Any, batch: Any) -> None:
    """Checks a batch against a model, and a model against its contract where it is new."""
    batch = batch.to(model.device)
    model.check(batch)
    if batch.holds_numbers and not bool(batch.mask.any()):
        raise InputError("batch has no position that its mask scores: mask is false throughout")
    if not type(model).__module__.startswith("ltm_pyro."):  # those are held to it by tests
        for held in FIRST_USE:
            held(model, batch)
