"""What a test must leave as it found it: the process-wide state of torch and Pyro."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK

# What pytest writes as the reason of a skip that was given none.
_NO_REASON = ("", "unconditional skip")


@dataclass(frozen=True)
class GlobalState:
    """A snapshot of the settings that one test could change under another's feet."""

    values: dict[str, Any]

    @classmethod
    def capture(cls) -> GlobalState:
        """Read every guarded setting."""
        return cls(
            {
                "torch default dtype": torch.get_default_dtype(),
                "torch grad mode": torch.is_grad_enabled(),
                "torch inference mode": torch.is_inference_mode_enabled(),
                "torch anomaly detection": torch.is_anomaly_enabled(),
                "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
                "torch float32 matmul precision": torch.get_float32_matmul_precision(),
                "torch threads": torch.get_num_threads(),
                "torch.distributions validation": torch.distributions.Distribution._validate_args,
                "pyro parameter store": sorted(pyro.get_param_store().keys()),
                "pyro handler stack": len(_PYRO_STACK),
                **{f"pyro setting {name}": value for name, value in pyro.settings.get().items()},
            }
        )

    def differences(self, after: GlobalState) -> list[str]:
        """One line per setting that `after` has otherwise."""
        return [
            f"{name}: {before!r} -> {after.values[name]!r}"
            for name, before in self.values.items()
            if after.values[name] != before
        ]

    def restore(self) -> None:
        """Put back what can be put back, so that one leak fails one test and not its followers."""
        torch.set_default_dtype(self.values["torch default dtype"])
        torch.set_grad_enabled(self.values["torch grad mode"])
        torch.autograd.set_detect_anomaly(self.values["torch anomaly detection"])
        torch.use_deterministic_algorithms(self.values["torch deterministic algorithms"])
        torch.set_float32_matmul_precision(self.values["torch float32 matmul precision"])
        torch.set_num_threads(self.values["torch threads"])
        pyro.settings.set(
            **{
                name.removeprefix("pyro setting "): value
                for name, value in self.values.items()
                if name.startswith("pyro setting ")
            }
        )
        torch.distributions.Distribution.set_default_validate_args(
            self.values["torch.distributions validation"]
        )
        pyro.clear_param_store()
        del _PYRO_STACK[self.values["pyro handler stack"] :]


def lacks_reason(longrepr: object) -> bool:
    """Whether a skipped report's `longrepr`, (path, line, text), says why the test was skipped."""
    if not isinstance(longrepr, tuple):
        return False
    return longrepr[2].removeprefix("Skipped").lstrip(":").strip() in _NO_REASON
