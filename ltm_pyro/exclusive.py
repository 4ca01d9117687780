"""One caller at a time: threads take turns at everything that runs a program or draws.

Pyro keeps its stack of handlers, and torch its global generator, once per process: two threads that
sample at the same time would find each other's handlers there, and each other's random numbers.
Every public function that samples therefore holds one lock of the process, so that what threads get
is what one thread would have got. A thread may enter again what it holds. Work that should run side
by side belongs into processes.

What is called under the lock (a fit's callbacks) must not wait for another thread that
wants it. Code outside this package that draws from torch's global generator, or runs a Pyro
program, in another thread at the same time, takes `exclusively` itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

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
