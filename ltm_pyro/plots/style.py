"""The look that all figures share, and how they are saved."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from ltm_pyro.diagnostics.estimates import Estimate
from ltm_pyro.errors import InputError
from ltm_pyro.run.files import write_atomic

Floats = NDArray[np.floating[Any]]

BLUE, ORANGE, GREEN, RED, PURPLE, _, _, GREY, *_ = sns.color_palette("colorblind")
INK = "#262626"
_CAPTION_SIZE = 9.0  # points

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8c8c8c",
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 10,
    "axes.labelsize": 9.5, "axes.labelcolor": INK, "text.color": INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#ececec", "grid.linewidth": 0.8,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "xtick.color": "#595959", "ytick.color": "#595959",
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.8,
    "ytick.major.width": 0.8, "ytick.minor.size": 0, "legend.fontsize": 9, "legend.frameon": False,
    "legend.borderaxespad": 0.1, "legend.borderpad": 0.1, "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4, "legend.handletextpad": 0.5, "lines.linewidth": 1.7,
}  # fmt: skip


class FreeFigure(Figure):
    """A figure that a notebook shows though no pyplot backend knows it."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self, dpi=100)


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG: without the software's version, so the same figure is the same file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    return data.getvalue()


@contextmanager
def house_figure(size: tuple[float, float], caption: str) -> Iterator[Figure]:
    """A figure in the house style, with room for the caption below."""
    width, height = size
    lines = textwrap.wrap(caption, width=int(width * 14.3))
    room = (len(lines) * 1.35 * _CAPTION_SIZE + 8) / 72
    # Constrained layout leaves the caption's share of the height alone.
    share = room / (height + room)
    layout = ConstrainedLayoutEngine(rect=(0, share, 1, 1 - share), w_pad=0.08, h_pad=0.08)
    with mpl.rc_context({**sns.plotting_context("notebook"), **sns.axes_style("ticks"), **_STYLE}):
        figure = FreeFigure(figsize=(width, height + room), layout=layout)
        figure.text(
            0.09 / width, share * 0.93, "\n".join(lines), va="top", fontsize=_CAPTION_SIZE,
            linespacing=1.3, color="#4d4d4d", gid="caption",
        )  # fmt: skip
        yield figure
        # Ticks are made when first drawn, in the style of that moment: so draw in this one.
        figure.draw_without_rendering()


def drawable(text: str, family: str = "sans-serif") -> str:
    """`text` as Matplotlib can draw it: no markup, and a square for what the font does not have."""
    font = get_font(findfont(FontProperties(family=[family])))  # both are cached
    known = (c if c == "\n" or font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in text)
    return "".join(known).replace("$", r"\$")


def require(data: xr.Dataset, name: str, source: str) -> None:
    """Refuses a Dataset without a column, dimension or attribute that those of `source` have."""
    if name not in {*data.variables, *data.dims, *data.attrs}:
        raise InputError(f"this Dataset has no {name} to draw: give the one of {source}")


def estimates(
    axes: Axes, x: ArrayLike, found: Sequence[Estimate], fmt: str = "o", **style: Any
) -> None:
    """Means, each with two errors on either side, which hold 95 %."""
    errors = [2 * np.nan_to_num(each.error) for each in found]
    axes.errorbar(x, [each.value for each in found], yerr=errors, fmt=fmt, **style)


def named_bars(axes: Axes, bars: Sequence[tuple[str, float, float, Any]]) -> None:
    """Bars of (name, nats per sequence, error, colour), with two errors on either side."""
    for place, (_, value, error, color) in enumerate(bars):
        axes.bar(place, value, color=color, alpha=0.8, width=0.6)
        axes.errorbar(place, value, yerr=2 * np.nan_to_num(error), color=INK, capsize=4, lw=1.2)
    axes.set_ylabel("nats per sequence")
    axes.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axes.grid(visible=False, axis="x")


def whole_numbers(axes: Axes, of: str = "x") -> None:
    """Ticks of an axis at whole numbers alone."""
    getattr(axes, f"{of}axis").set_major_locator(MaxNLocator(integer=True))


def zero_line(axes: Axes, value: float = 0.0, **style: Any) -> None:
    """The horizontal line that values are read against."""
    axes.axhline(value, **{"color": INK, "lw": 1.0, **style})


def title_and_legend(axes: Axes, title: str) -> None:
    """Title and legend on one line above the axes, where they cover nothing."""
    axes.set_title(title)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(labels))


def common_legend(figure: Figure, axes: Axes) -> None:
    """One legend above all panels, of what one of them holds."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", ncols=len(labels), borderaxespad=0.6
    )  # fmt: skip


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Writes a PNG; at any moment the old file is there, or the whole new one.

    Args:
        figure: The figure.
        path: Where to.
        dpi: Pixels per inch.

    Raises:
        InputError: if it cannot be written.
    """
    write_atomic(Path(path), png_bytes(figure, dpi))
    return Path(path)
