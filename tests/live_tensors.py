"""How many bytes of tensors live at a time, followed operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Inside the block, the bytes of all storages that live, and the most that lived at once.

    What an operation allocates and frees within itself is not seen.

    Args:
        *held: Tensors that live already.

    Attributes:
        live_bytes: Now.
        peak_bytes: At most so far.
    """

    def __init__(self, *held: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self.add(*held)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation and counts what it returns."""
        out = func(*args, **(kwargs or {}))
        self.add(*(value for value in tree_leaves(out) if isinstance(value, Tensor)))
        return out

    def add(self, *tensors: Tensor) -> None:
        """Counts tensors that were not made inside the block."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        # oneDNN's own tensors have no storage that could be shared.
        owner = tensor if tensor.is_mkldnn else tensor.untyped_storage()
        key, n_bytes = id(owner), owner.nbytes if isinstance(owner, Tensor) else owner.nbytes()
        known = self._known.get(key)
        if known is not None and known() is owner:
            return

        def gone(reference: weakref.ref[Any]) -> None:
            self.live_bytes -= n_bytes
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(owner, gone)
        self.live_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
