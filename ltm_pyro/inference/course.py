"""The course of a fit: one row of metrics per slow step, told in a line and read as a frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

Metrics = dict[str, float]
_SHOWN = 8  # rows at the end of a table in a notebook


class Course(list[Metrics]):
    """Rows of metrics in the order of slow steps; see `DualRateSVI.step` for what they hold."""

    def __repr__(self) -> str:
        if not self:
            return "Course(no slow step yet)"
        first, last = self[0], self[-1]
        told = next((n for n in last if n.endswith("_per_token") and n in first), None)
        rise = "" if told is None else f", {told} {first[told]:.4g} to {last[told]:.4g}"
        steps = f"{first['step']:.0f} to {last['step']:.0f}"
        return f"Course(slow steps {steps}{rise}; .frame() has all)"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.frame().tail(_SHOWN).to_html(float_format='{:.4g}'.format)}"

    def frame(self) -> pd.DataFrame:
        """The rows as a frame, indexed by slow step."""
        import pandas as pd

        frame = pd.DataFrame(list(self))
        return frame.set_index(frame.pop("step").astype(int)) if len(frame) else frame
