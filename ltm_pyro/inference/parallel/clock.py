"""The slow clock of several processes: gradients are summed over them, once per slow step.

Everything that a slow step has to say travels in that one message: the gradient, the numbers of
the metrics, whether a process met NaN, and whether one was asked to stop. So all processes step,
fail and stop together, and none waits for another that will not come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltm_pyro.config import Slow
from ltm_pyro.errors import NonFiniteError
from ltm_pyro.inference.parallel.group import Parallel
from ltm_pyro.inference.schedules import learning_rate
from ltm_pyro.inference.slow_clock import SlowClock, StepSums, adamw

_DIGITS = 4096
"""Tokens are counted in two digits of this base, so that single precision counts them exactly."""


_SUMS = 7
_EXTRA = _SUMS + 2
"""Numbers beside the gradient in the message: sums, then the flags for NaN and for stopping."""


def slow_clock(
    parameters: Iterable[nn.Parameter],
    slow: Slow,
    spare: Iterable[nn.Parameter],
    parallel: Parallel,
) -> SlowClock:
    """The slow clock for one process or many; see `SlowClock`."""
    if parallel.size == 1:
        return SlowClock(parameters, slow, spare)
    kind = ShardedClock if parallel.shard else ReplicatedClock
    return kind(parameters, slow, spare, parallel)


class ReplicatedClock(SlowClock):
    """A `SlowClock` in every process: the same weights, gradients and moments in all.

    Gradients handed to it are of the loss summed over this process's rows; `exchange` makes them
    those of the loss per token of the whole batch.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Slow,
        spare: Iterable[nn.Parameter],
        parallel: Parallel,
    ) -> None:
        super().__init__(parameters, slow, spare)
        self.parallel = parallel
        self.n_weights = sum(p.numel() for p in self.parameters)
        first = next(iter(self.parameters), torch.zeros(0))
        # At least single precision: sums of many small numbers.
        dtype = torch.float32
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        self.layout, size = self._laid_out()
        self.buffer = torch.zeros(size, dtype=dtype, device=first.device)

    def _laid_out(self) -> tuple[list[Place], int]:
        """Where each weight's gradient lies in the message, and the message's length."""
        places, at = [], 0
        for i, p in enumerate(self.parameters):
            places.append(Place(i, 0, p.numel(), at))
            at += p.numel()
        return places, at + _EXTRA

    def exchange(self, sums: StepSums, step: int) -> tuple[StepSums, Tensor]:
        """As `SlowClock.exchange`, of all processes' rows.

        Raises:
            NonFiniteError: in all processes, if there was NaN in one.
            ProcessLostError: if a process is gone.
        """
        total, gradient = self._exchange(sums, step, [])
        norm = self._take(gradient)
        if not bool(norm.isfinite()):
            self.discard()
            raise NonFiniteError([], step)
        return total, norm

    def report(self, error: NonFiniteError, step: int) -> NonFiniteError:
        """Tells the others of NaN in this process; the error that all processes then raise."""
        self.discard()
        try:
            self._exchange(None, step, error.ids)
        except NonFiniteError as of_all:
            return of_all
        return error

    def _exchange(
        self, sums: StepSums | None, step: int, ids: list[int]
    ) -> tuple[StepSums, Tensor]:
        """The one message of a slow step: the sums of all, and the gradient per token.

        Args:
            sums: Of this process; `None` where it has met NaN.
            step: Slow steps done.
            ids: The sequences with NaN in this process.
        """
        self._fill(self.buffer)
        extra = self.buffer.new_tensor(_message(sums, self.parallel))
        gradient, extra = self._summed(extra)
        if bool(extra[-2] > 0):
            self.discard()
            raise NonFiniteError([i for some in self.parallel.gather(ids) for i in some], step)
        self.parallel.stopping = bool(extra[-1] > 0)
        total = _read(extra)
        return total, gradient.div_(total.n_tokens)

    @torch.no_grad()
    def _fill(self, buffer: Tensor) -> None:
        """Writes this process's gradient into the message, zeros where there is none."""
        buffer.zero_()
        for place in self.layout:
            gradient = self.parameters[place.index].grad
            if gradient is not None:
                place.of(buffer).copy_(gradient.flatten()[place.begin : place.end])

    def _summed(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Sends the message; the gradient that this process keeps, and the numbers beside it."""
        self.buffer[-_EXTRA:] = extra
        total = self.parallel.sum(self.buffer)
        return total[:-_EXTRA], total[-_EXTRA:].clone()

    def _take(self, gradient: Tensor) -> Tensor:
        """Puts the gradient in place, clipped; its norm before."""
        for place in self.layout:
            p = self.parameters[place.index]
            if p.grad is not None:
                p.grad = place.of(gradient).view_as(p).to(p.dtype)
        return self.clip()


class ShardedClock(ReplicatedClock):
    """Each process keeps the summed gradient and AdamW's moments of its part of the weights alone.

    The weights themselves stay whole everywhere, since a fast loop reads all of them T_fast times.
    A slow step scatters the summed gradient (one message, with the numbers beside it), adds up the
    norm, steps its part of the weights, and joins the parts: stage 2 of ZeRO (Rajbhandari et al.
    2020). Checkpoints are those of one process.

    torch's own `fully_shard` sends gradients from within the backward pass. A process that met NaN
    in its fast loop never gets there, and the others would wait for it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Slow,
        spare: Iterable[nn.Parameter],
        parallel: Parallel,
    ) -> None:
        super().__init__(parameters, slow, spare, parallel)
        rank = parallel.rank
        begin = rank * (self.part + _EXTRA)
        # Weights may lie on two parts, so what is stepped are pieces of weights.
        self.pieces = {
            place: self._weights(place).clone()
            for place in self.layout
            if begin <= place.at < begin + self.part
        }
        split: tuple[list[Tensor], list[Tensor]] = ([], [])
        for place, piece in self.pieces.items():
            split[0 if self.decays[place.index] else 1].append(piece)
        self.optimizer = adamw(*split, self.slow)
        self.steps = [0] * len(self.parameters)
        self.used = [False] * len(self.parameters)

    def _laid_out(self) -> tuple[list[Place], int]:
        """Equal parts, the last one filled up, each with room for the numbers beside it."""
        size = self.parallel.size
        self.part = -(-self.n_weights // size)
        places, done = [], 0
        for i, p in enumerate(self.parameters):
            begin = 0
            while begin < p.numel():
                part, at = divmod(done, self.part)
                end = min(p.numel(), begin + self.part - at)
                places.append(Place(i, begin, end, part * (self.part + _EXTRA) + at))
                done, begin = done + end - begin, end
        return places, size * (self.part + _EXTRA)

    def _weights(self, place: Place) -> Tensor:
        return self.parameters[place.index].detach().flatten()[place.begin : place.end]

    def _summed(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.buffer.view(self.parallel.size, -1)
        parts[:, -_EXTRA:] = extra
        mine = self.parallel.sum_and_scatter(parts)
        return mine[:-_EXTRA], mine[-_EXTRA:]

    def _take(self, gradient: Tensor) -> Tensor:
        self.used = [p.grad is not None for p in self.parameters]
        super().discard()
        squares = self.parallel.sum(gradient.square().sum())
        norm = squares.sqrt()
        # As in `clip_grad_norm_`.
        gradient.mul_((self.slow.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for place, piece in self.pieces.items():
            if self.used[place.index]:
                piece.grad = place.of(gradient, self._begin).to(piece.dtype)
        return norm

    @property
    def _begin(self) -> int:
        return self.parallel.rank * (self.part + _EXTRA)

    @torch.no_grad()
    def step(self, step: int, total: int) -> float:
        """As `SlowClock.step`, then the parts are joined."""
        for place, piece in self.pieces.items():
            # Others may have written weights since, e.g. a prior that starts anew.
            piece.copy_(self._weights(place))
        lr = learning_rate(self.slow, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.steps = [n + used for n, used in zip(self.steps, self.used, strict=True)]
        whole = self._joined(self.pieces)
        at = 0
        for p in self.parameters:
            p.copy_(whole[at : at + p.numel()].view_as(p))
            at += p.numel()
        self.discard()
        return lr

    def discard(self) -> None:
        """Forgets the written gradient."""
        super().discard()
        for piece in getattr(self, "pieces", {}).values():
            piece.grad = None

    def _joined(self, values: dict[Place, Tensor]) -> Tensor:
        """This process's pieces and those of the others, one parameter after another."""
        mine = self.buffer.new_zeros(self.part)
        for place, value in values.items():
            place.of(mine, self._begin).copy_(value)
        return self.parallel.join_parts(mine)

    def state(self) -> dict[str, Tensor]:
        """As `SlowClock.state`; all processes ask together."""
        out: dict[str, Tensor] = {}
        if not any(self.steps):
            return out
        for name in ("exp_avg", "exp_avg_sq"):
            held = {
                place: self.optimizer.state[piece][name]
                for place, piece in self.pieces.items()
                if name in self.optimizer.state[piece]
            }
            whole, at = self._joined(held), 0
            for i, p in enumerate(self.parameters):
                if self.steps[i]:
                    moment = whole[at : at + p.numel()].view_as(p).to(p.dtype)
                    out[f"{i}.step"] = torch.tensor(float(self.steps[i]))
                    out[f"{i}.{name}"] = moment.clone()
                at += p.numel()
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned, in one process or many."""
        for i in range(len(self.parameters)):
            self.steps[i] = int(state.get(f"{i}.step", torch.zeros(())))
        for place, piece in self.pieces.items():
            if not self.steps[place.index]:
                continue
            moments = self.optimizer.state[piece]
            moments["step"] = state[f"{place.index}.step"].clone()
            for name in ("exp_avg", "exp_avg_sq"):
                whole = state[f"{place.index}.{name}"].flatten()
                moments[name] = whole[place.begin : place.end].to(piece).clone()


@dataclass(frozen=True)
class Place:
    """Where some neighbouring numbers of one weight lie in a message.

    Attributes:
        index: Which parameter.
        begin: The first number, counted in the flat parameter.
        end: After the last one.
        at: Where the first one lies in the message.
    """

    index: int
    begin: int
    end: int
    at: int

    def of(self, message: Tensor, begin: int = 0) -> Tensor:
        """Its numbers in a message, or in a part of one that starts at `begin`."""
        first = self.at - begin
        return message[first : first + self.end - self.begin]


def _message(sums: StepSums | None, parallel: Parallel) -> list[float]:
    """As numbers whose sums over the processes, each with as many rows, are those of the batch."""
    stop = float(parallel.asks_to_stop())
    if sums is None:
        return [0.0] * _SUMS + [1.0, stop]
    means = [float(v) / parallel.size for v in (sums.nll, sums.kl, sums.grad_norm)]
    tokens = int(sums.n_tokens)
    digits = [float(tokens // _DIGITS), float(tokens % _DIGITS)]
    return [*means, float(sums.objective), float(sums.gain), *digits, 0.0, stop]


def _read(message: Tensor) -> StepSums:
    """The sums of all processes."""
    nll, kl, grad_norm, objective, gain, high, low = message[:_SUMS].double()
    return StepSums(nll, kl, grad_norm, objective, gain, n_tokens=high * _DIGITS + low)
