"""The processes that share a fit: who they are, and what they say to each other.

Started by `torchrun`, they meet through torch's own distributed package: gloo on CPUs, nccl on
CUDA devices. Everything a fit or a score exchanges passes through `Parallel`, which also notices
when a process is gone. The default, `Parallel()`, is one process, which exchanges nothing.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ltm_pyro.errors import InputError, NonFiniteError, ProcessLostError, ToldElsewhereError

TIMEOUT = timedelta(hours=1)
"""How long a process waits for one that is alive and silent, e.g. tokenising a large corpus."""
_NUMBERS = 16  # in the small message of a slow step, at most
_NOTICE = 1.0  # seconds in which the system tells that a process has ended
_BROKEN = re.compile("connection|closed|reset|peer|timed out|socket|remote process", re.IGNORECASE)
T = TypeVar("T")


class Parallel:
    """The processes that share a fit. Made by `join`; `Parallel()` is one process alone.

    A batch of B sequences is shared in equal parts: process r of W holds rows [r B/W, (r + 1) B/W).

    Attributes:
        rank: r, this process's number, from 0.
        size: W.
        device: Where this process computes.
        asks_to_stop: Asked at each slow step whether this process wants the fit to stop.
        stopping: Set by the slow step, in all processes at the same step, once one wants to.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")
        self.asks_to_stop: Callable[[], bool] = bool
        self.stopping = False
        self._whereabouts: list[tuple[str, int]] = []
        if size > 1:
            self._whereabouts = self.gather((socket.gethostname(), os.getpid()))

    def __repr__(self) -> str:
        return f"Parallel(rank={self.rank}, size={self.size})"

    @property
    def is_rank_0(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """This process's rows of a batch of `total` sequences; see `refuse_unequal`."""
        refuse_unequal(total, self.size)
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def share(self, total: int) -> slice:
        """This process's rows of `total` that need not be shared equally; maybe none."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place: one message."""
        if self.size > 1:
            with self._peers():
                dist.all_reduce(values)
        return values

    def total(self, parts: Sequence[Mapping[str, Tensor]], step: int) -> dict[str, float]:
        """Sums by name over the parts of this process's rows and over processes, in float64.

        One small message of each slow step, before the gradient's: none waits in vain. It also
        tells whether one wants to stop; all then find `stopping`. Where one has failed (`report`),
        all raise its `NonFiniteError`.
        """
        numbers = [torch.stack([part[name].double() for part in parts]).sum() for name in parts[0]]
        total = self._agreed(torch.stack(numbers), [], step)
        return dict(zip(parts[0], total.tolist(), strict=True))

    def report(self, error: NonFiniteError, step: int) -> NonFiniteError:
        """Tells the others of NaN in this process; the error that all processes then raise."""
        try:
            self._agreed(torch.empty(0), error.ids, step)
        except NonFiniteError as of_all:
            return of_all
        return error

    def _agreed(self, numbers: Tensor, failed: list[int], step: int) -> Tensor:
        """The numbers summed over processes; empty where this one has failed, of `failed`."""
        if self.size == 1:
            return numbers
        flags = torch.tensor([float(not len(numbers)), float(self.asks_to_stop())])
        # Who fails does not know how many numbers there are: a place for each, and then the flags.
        message = torch.zeros(_NUMBERS + 2, dtype=torch.float64, device=self.device)
        message[: len(numbers)], message[-2:] = numbers, flags
        total = self.sum(message)
        if bool(total[-2] > 0):
            raise NonFiniteError([i for some in self.gather(failed) for i in some], step)
        self.stopping = bool(total[-1] > 0)
        return total[: len(numbers)]

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """The gradients of all processes, added up in one message."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.size == 1 or not gradients:
            return
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            if p.grad is not None:
                p.grad = part.view_as(p).to(p.dtype)

    def join_parts(self, part: Tensor) -> Tensor:
        """The parts (n,) of all processes one after another, (W n,): one message."""
        join = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        out = part.new_empty(self.size * len(part))
        with self._peers():
            join(out, part)
        return out

    def gather(self, value: T) -> list[T]:
        """Everybody's `value`, small and of plain types."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        with self._peers():
            dist.all_gather_object(out, value)
        return out

    def gather_rows(self, mine: Tensor, dim: int = 0) -> Tensor:
        """Everybody's rows put together in the order of the processes; parts may differ in size."""
        if self.size == 1:
            return mine
        counts = self.gather(mine.shape[dim])
        front = mine.movedim(dim, 0)
        padded = front.new_zeros((max(counts), *front.shape[1:]))
        padded[: len(front)] = front
        kind = padded.dtype
        # Not every backend has a wire format for booleans.
        flat = padded.flatten().to(torch.uint8) if kind == torch.bool else padded.flatten()
        whole = self.join_parts(flat).to(kind).view(self.size, *padded.shape)
        parts = [part[:count] for part, count in zip(whole, counts, strict=True)]
        return torch.cat(parts).movedim(0, dim).contiguous()

    def broadcast_tensors(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's tensors, by name, on the CPU where they were there; in everybody."""
        if self.size == 1:
            return values
        shapes = self.broadcast(
            {k: (tuple(v.shape), v.dtype, v.device.type) for k, v in values.items()}
        )
        out = {}
        for name, (shape, dtype, place) in shapes.items():
            at = self.device if place == self.device.type else torch.device(place)
            held = values[name].contiguous() if self.is_rank_0 else torch.empty(shape, dtype=dtype)
            sent = held.to(self.device)
            with self._peers():
                dist.broadcast(sent, 0)
            out[name] = sent.to(at)
        return out

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, small and of plain types, in everybody."""
        if self.size == 1:
            return value
        held = [value]
        with self._peers():
            dist.broadcast_object_list(held, 0, device=self.device)
        return held[0]

    def barrier(self) -> None:
        """Goes on when every process has come here."""
        self.gather(None)

    def on_rank_0(self, work: Callable[[], T]) -> T | None:
        """Rank 0 does `work` while the others wait; its answer there, else `None`.

        Where it fails, the others raise `ToldElsewhereError`.
        """
        if self.size == 1:
            return work()
        if not self.is_rank_0:
            if self.broadcast(""):
                raise ToldElsewhereError
            return None
        try:
            answer = work()
        except BaseException as error:
            self.broadcast(type(error).__name__)
            raise
        self.broadcast("")
        return answer

    def reports(self, lost: list[int]) -> bool:
        """Whether this process tells of those that are gone: the first one left on its machine."""
        here = self._whereabouts[self.rank][0] if self._whereabouts else ""
        hosts = enumerate(host for host, _ in self._whereabouts)
        return self.rank == next((r for r, h in hosts if h == here and r not in lost), self.rank)

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Turns the backend's complaint about a broken connection into one about the process."""
        try:
            yield
        except RuntimeError as error:
            lost = self._lost()
            if not lost and not _BROKEN.search(str(error)):
                raise
            raise ProcessLostError(lost, self.size, self.reports(lost)) from None

    def _lost(self) -> list[int]:
        """Processes of this machine that have ended, as far as the system tells within moments."""
        here = socket.gethostname()
        until = time.monotonic() + _NOTICE
        while True:
            lost = [
                rank
                for rank, (host, pid) in enumerate(self._whereabouts)
                if host == here and not alive(pid)
            ]
            if lost or time.monotonic() > until:
                return lost
            time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process of this machine still runs; one that only waits to be buried does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another's process, or a system without /proc
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def refuse_unequal(total: int, size: int) -> None:
    """Refuses a batch that the processes cannot share equally, saying what would do."""
    if total % size or total < size:
        below, above = total // size * size, -(-total // size) * size
        raise InputError(
            f"a batch of {total} sequences cannot be shared equally by {size} processes: "
            f"batch_size is that of all processes together, so choose a multiple of {size}, "
            f"e.g. {below or above}"
        )


def started() -> tuple[int, int]:
    """(rank, processes) as `torchrun` started this one; (0, 1) otherwise."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise InputError(
            "RANK and WORLD_SIZE in the environment are not numbers: start many processes with "
            "torchrun, or unset both"
        ) from None


def join(device: str) -> Parallel:
    """Meets the other processes that `torchrun` started; alone where it started none.

    With `cuda` each process takes the device of its number on its machine.
    """
    rank, size = started()
    if size == 1:
        return Parallel()
    place = _own_device(device)
    backend = "nccl" if place.type == "cuda" else "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        store, _, _ = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"process {rank} cannot meet the {size - 1} others: {first_line}; start all with "
            "torchrun"
        ) from None
    return Parallel(rank, size, place)


def _own_device(device: str) -> torch.device:
    """The device of this process among those of its machine."""
    if not device.startswith("cuda"):
        return torch.device(device)
    if device != "cuda":
        raise InputError(
            f"device {device!r} for several processes: say --device cuda, and each takes its own"
        )
    local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= present:
        raise InputError(
            f"this machine has {present} CUDA devices and process {local} on it would need one "
            "more: start fewer processes with --nproc-per-node"
        )
    return torch.device("cuda", local)


def leave(together: bool = True) -> None:
    """Closes the connections, where there are any; `together`, none before all have come here.

    A process that ends with open ones may be aborted by its own threads, all its work done.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    with suppress(RuntimeError):  # another has gone without a word
        if together:
            dist.barrier()
    dist.destroy_process_group()
