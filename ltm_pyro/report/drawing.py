"""Matplotlib figures as inline SVG that follows the page: its font, its colours, its width.

A figure becomes one SVG per panel, so that a phone stacks them at a size that can be read. What is
black, white or grey on paper takes the page's own colours, and so turns with them in the dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ltm_pyro.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED

_PAD = 4 / 72  # inches round a panel
_COLORS = {
    INK: "ink", "#000000": "ink", "#4d4d4d": "soft", "#595959": "soft", "#8c8c8c": "line",
    "#cccccc": "line", "#ececec": "grid", "#ffffff": "paper",
    **{to_hex(color): name for color, name in (
        (BLUE, "blue"), (ORANGE, "orange"), (GREEN, "green"), (RED, "red"),
        (PURPLE, "purple"), (GREY, "grey"),
    )},
}  # fmt: skip
_HEX = re.compile("|".join(_COLORS), re.IGNORECASE)
_FONT = re.compile(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*")
_ID = re.compile(r'(\bid="|url\(#|href="#)')


@dataclass(frozen=True)
class Picture:
    """A figure for the page: an SVG element for each panel, and its caption."""

    panels: list[str]
    caption: str


def picture(figure: Figure, name: str, *, whole: bool = False) -> Picture:
    """The panels of a figure, not to be used any more, with ids that begin with `name`.

    All panels stay together if `whole`, such as a map and its colour bar.
    """
    caption = ""
    for text in figure.texts:
        if text.get_gid() == "caption":
            caption = " ".join(text.get_text().split())
            text.set_visible(False)
    axes = [each for each in figure.axes if each.get_visible()]
    together = whole or bool(figure.legends)
    if not together:
        _label_each(axes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    boxes = [each.get_tightbbox() for each in axes]
    if together:
        groups = [(axes, figure.get_tightbbox())]
    else:
        scale = figure.dpi_scale_trans.inverted()
        groups = [
            ([each], box.transformed(scale))
            for each, box in zip(axes, boxes, strict=True)
            if box is not None
        ]
    panels = []
    for number, (kept, box) in enumerate(groups):
        for each in axes:
            each.set_visible(each in kept)
        panels.append(_svg(figure, box.padded(_PAD), f"{name}-{number}", caption))
    return Picture(panels, caption)


def _label_each(panels: Sequence[Axes]) -> None:
    """Ticks and label of an axis that panels share, at each of them: the page sets them apart."""
    for axes in panels:
        for name, shared in (("x", axes.get_shared_x_axes()), ("y", axes.get_shared_y_axes())):
            twins = [getattr(twin, f"{name}axis") for twin in shared.get_siblings(axes)]
            if len(twins) > 1:
                own = getattr(axes, f"{name}axis")
                own.set_tick_params(**{"labelbottom" if name == "x" else "labelleft": True})
                own.set_label_text(
                    next(filter(None, (t.get_label_text() for t in (own, *twins))), "")
                )


def _svg(figure: Figure, box: Bbox, name: str, label: str) -> str:
    data = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            data, format="svg", bbox_inches=box, transparent=True, metadata={"Date": None}
        )
    text = data.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = _FONT.sub(r"font: \1\2 var(--sans)", text)
    text = _HEX.sub(lambda found: f"var(--{_COLORS[found[0].lower()]})", text)
    text = _ID.sub(rf"\g<1>{name}-", text)
    # Pixels as matplotlib means them, 96 to the inch; the page may shrink it.
    width = round(box.width * 96)
    size = f"max-width:{width}px;flex:1 1 min(100%,{round(0.7 * width)}px)"
    head = f'<svg role="img" aria-label="{html.escape(label)}" style="{size}" '
    body = text[len("<svg ") :]
    body = re.sub(r'(?<= )(width|height)="[\d.]+pt" ', "", body, count=2)
    return head + body
