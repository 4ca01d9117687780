"""The memory that a fit takes at its worst moment, found without running it.

A training step of the engine itself is run on tensors that have shapes and no values (torch's
`FakeTensorMode`), and the bytes of those that would live are added up. So the answer holds for
every guide, prior, objective and setting, and stays right when the engine changes. It is that of
one process which takes the whole batch, with the kernels of the CPU and uncompiled: compiled code
keeps less. What `ltm-pyro fit` does after training is not in it: the run is read a second time and
scored, which took 3.1 GB of `ltm-small` where training took 2.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ltm_pyro.config import FitConfig
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.live_tensors import LiveTensors
from ltm_pyro.engine.execution import Execution
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides import build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.random import seeded

PROCESS_BYTES = 380_000_000
"""Python, torch and Pyro, 340 MB after a step of a model of a few weights, and 40 MB of work space
that the libraries for matrix products take at any larger size; by `benchmarks/memory.py`."""
COMPILER_BYTES = 115_000_000
"""What torch's compiler adds; measured likewise."""
ALLOCATOR_SHARE = 0.45
"""Of the tensors' peak: memory that glibc keeps, in pieces, when tensors are freed.

Measured from 0 to 0.6 in uncompiled code, and no two runs agree; with
`MALLOC_MMAP_THRESHOLD_=4194304` in the environment it is near 0, and steps take longer."""
COMPILED_ALLOCATOR_SHARE = 0.08
"""The same in compiled code, which holds fewer tensors than are counted: 0 to 0.15 measured."""

_FAST_STEPS = 2
"""As many as are simulated: the third finds nothing that the second did not find."""


@dataclass(frozen=True)
class MemoryReport:
    """The peak memory of a fit, in bytes.

    Attributes:
        staying_bytes: Weights of decoder, prior and guide with AdamW's two moments, which stay.
        fast_loop_bytes: Beyond these at the worst moment of a fast loop: the trunk, activations
            kept for the backward pass, local parameters with their moments, temporaries.
        step_bytes: The same for a whole training step, the slow gradient included.
        peak_tensor_bytes: Of all tensors: what an accelerator holds.
        process_bytes: Python, torch and Pyro, and the compiler where it is used.
        allocator_bytes: Freed by tensors and kept by the C library, on the CPU; an estimate.
        peak_process_bytes: Of the whole process where everything is on the CPU.
    """

    staying_bytes: int
    fast_loop_bytes: int
    step_bytes: int
    process_bytes: int
    allocator_bytes: int

    @property
    def peak_tensor_bytes(self) -> int:
        """Of all tensors at the worst moment."""
        return self.staying_bytes + self.step_bytes

    @property
    def peak_process_bytes(self) -> int:
        """Resident memory of the process at the worst moment, on the CPU."""
        return self.process_bytes + self.peak_tensor_bytes + self.allocator_bytes

    def as_dict(self) -> dict[str, int]:
        """Every figure by its name."""
        return {
            **asdict(self),
            "peak_tensor_bytes": self.peak_tensor_bytes,
            "peak_process_bytes": self.peak_process_bytes,
        }


def memory_report(config: FitConfig) -> MemoryReport:
    """The peak memory of a fit, without running it; takes some seconds, and the weights' memory.

    Args:
        config: The fit. What tells in the answer: `model`, `guide`, `objective`, `batch_size`,
            `micro_batch`, `checkpointing`, `precision`, `compile`, and word dropout.

    Raises:
        InputError: for an unknown guide family, objective or option.
    """
    svi = _without_values(config, shapes := FakeTensorMode(allow_non_fake_inputs=True))
    with shapes, _NoMemory(), pyro.validation_enabled(False):
        stays, fast = _peak(svi, config, lambda batch: svi.infer(batch))
        # Its fast loop is known by now.
        svi.fast = replace(svi.fast, steps=min(svi.fast.steps, 1))
        _, whole = _peak(svi, config, lambda batch: svi.step(batch))
    peak = max(fast, whole)
    share = COMPILED_ALLOCATOR_SHARE if config.compile else ALLOCATOR_SHARE
    return MemoryReport(
        staying_bytes=stays,
        fast_loop_bytes=fast - stays,
        step_bytes=peak - stays,
        process_bytes=PROCESS_BYTES + (COMPILER_BYTES if config.compile else 0),
        allocator_bytes=round(share * peak),
    )


def _without_values(config: FitConfig, shapes: FakeTensorMode) -> DualRateSVI:
    """The fit as it would start, with tensors of `shapes` in place of its own."""
    with seeded(0, torch.device("cpu")):  # some parts look at values while they are built
        model = LatentThoughtModel(config.model)
        guide = build_guide(config.guide, model, **config.guide_options)
    for module in (*model.modules(), *guide.modules()):
        tensors: list[dict[str, Any]] = [module._parameters, module._buffers]
        for own in tensors:
            for name, value in own.items():
                if value is not None:
                    own[name] = shapes.from_tensor(value)
    return DualRateSVI(
        model,
        guide,
        fast=replace(config.fast, steps=min(config.fast.steps, _FAST_STEPS)),
        slow=config.slow,
        elbo=build_objective(config.objective, **config.objective_options),
        execution=Execution(
            precision=config.precision,
            micro_batch=config.micro_batch or None,
            checkpointing=config.checkpointing,
        ),
    )


def _peak(svi: DualRateSVI, config: FitConfig, run: Callable[[Batch], Any]) -> tuple[int, int]:
    """(bytes of weights and moments, peak of all tensors while `run` runs)."""
    weights = svi.clock.parameters
    moments = [torch.zeros_like(p) for p in weights for _ in range(2)]
    batch = Batch(torch.zeros(_rows(config), config.model.seq_len, dtype=torch.long))
    with _Answering(batch.observed, *weights, *moments) as live:
        stays = live.live_bytes
        live.add(batch.observed, batch.mask)
        run(batch)
    return stays, live.peak_bytes


def _rows(config: FitConfig) -> int:
    """Rows to simulate: the parts of a batch are alike, and from the second on gradients add up."""
    return min(config.batch_size, 2 * config.micro_batch or config.batch_size)


class _Answering(LiveTensors):
    """`LiveTensors` in which questions for a value get the answer of a fit that goes well.

    Numbers are finite, no sequence is bad, tokens are in the vocabulary and fill all T positions.

    Args:
        tokens: (B, T) token ids.
        *held: Tensors that live already.
    """

    def __init__(self, tokens: Tensor, *held: Tensor) -> None:
        super().__init__(*held)
        self._tokens = tokens
        self._some: Tensor | None = None
        self._token: Tensor | None = None

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answers a question for a value, runs any other operation and counts what it returns."""
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return self._answer(args[0])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.any.default:
            self._some = out
        elif func in (aten.max.default, aten.min.default) and args[0] is self._tokens:
            self._token = out
        return out

    def _answer(self, value: Tensor) -> bool | int | float:
        if value.dtype == torch.bool:
            return value is not self._some
        if value.is_floating_point():
            return 1.0
        return 0 if value is self._token else self._tokens.shape[1]


class _NoMemory(TorchFunctionMode):
    """Inside the block tensors without values can be copied deeply, and say where they lie.

    Torch would read the memory that they do not have.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answers these two, and does anything else as it would be done."""
        if func is Tensor.data_ptr:
            return id(args[0].untyped_storage())
        if func is Tensor.__deepcopy__:
            return self._copy(*args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _copy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied) if is_parameter else copied
            memo[id(tensor)].requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]
