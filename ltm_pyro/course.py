"""The course of a fit: one row of metrics per slow step, told in a line and read as a frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from ltm_pyro.html import show

if TYPE_CHECKING:
    import pandas as pd

Metrics = dict[str, float]
_SHOWN = 8  # rows at the end of a table in a notebook


class Course(list[Metrics]):
    """Rows of metrics in the order of slow steps; see `DualRateSVI.step` for what they hold.

    A list of rows that also reads as the frame of them: `metrics["elbo"]`, `metrics.tail()`,
    `metrics.plot(y="elbo")`.
    """

    @overload
    def __getitem__(self, key: SupportsIndex) -> Metrics: ...
    @overload
    def __getitem__(self, key: slice) -> Course: ...
    @overload
    def __getitem__(self, key: str) -> pd.Series: ...
    @overload
    def __getitem__(self, key: list[str]) -> pd.DataFrame: ...
    def __getitem__(self, key: Any) -> Any:
        """A row by its place, or a column by its name."""
        if isinstance(key, str | list):
            return self.frame()[key]
        found = super().__getitem__(key)
        return Course(found) if isinstance(key, slice) else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.frame(), name)

    def __repr__(self) -> str:
        if not self:
            return "Course(no slow step yet)"
        first, last = self[0], self[-1]
        told = next((n for n in last if n.endswith("_per_token") and n in first), None)
        rise = "" if told is None else f", {told} {first[told]:.4g} to {last[told]:.4g}"
        steps = f"{first['step']:.0f} to {last['step']:.0f}"
        return f"Course(slow steps {steps}{rise}; .frame() has all)"

    def _repr_html_(self) -> str:
        return show(repr(self), tables=[self.frame().tail(_SHOWN)])

    def frame(self) -> pd.DataFrame:
        """The rows as a frame, indexed by slow step."""
        import pandas as pd

        frame = pd.DataFrame(list(self))
        return frame.set_index(frame.pop("step").astype(int)) if len(frame) else frame


def bound_name(metrics: Mapping[str, float]) -> str:
    """`elbo`, or `log_joint` in the metrics of a point mass."""
    return "log_joint" if "log_joint" in metrics else "elbo"


def headline(metrics: Mapping[str, float]) -> dict[str, str]:
    """What a progress bar shows of a slow step."""
    name = f"{bound_name(metrics)}_per_token"
    told = {name: f"{metrics[name]:.3f}"}
    return {**told, "kl": f"{metrics['kl']:.1f}"} if "kl" in metrics else told
