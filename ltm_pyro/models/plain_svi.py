"""Under Pyro's own `SVI`: it steps what a program tells it of by `pyro.param`, and nothing else."""

from __future__ import annotations

from itertools import count

import pyro
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn


def svi_asks() -> bool:
    """Whether someone collects parameters just now, as `pyro.infer.SVI` does around each step."""
    # Not `am_i_wrapped`, which tells of any handler: under most of them a weight that is told of
    # would be left in the global store for nothing.
    with block_messengers(_collects) as collecting:
        return bool(collecting)


def _collects(handler: Messenger) -> bool:
    return isinstance(handler, TraceMessenger) and handler.param_only


def tell_parameters(module: nn.Module) -> None:
    """Tells of a module's weights by name, those that are not frozen.

    The names are of the class, with a number where another module of that class has them already:
    Pyro would hand out the other's weights under the same name.
    """
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    store = pyro.get_param_store()
    kind = type(module).__name__
    for number in count(1):
        label = kind if number == 1 else f"{kind}_{number}"
        names = {f"{label}$$${name}": p for name, p in weights.items()}
        if all(name not in store or store[name] is p for name, p in names.items()):
            break
    for name, p in names.items():
        pyro.param(name, p)
