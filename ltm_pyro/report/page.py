"""The page: a template over the numbers, and nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_STRONGEST = 4.0  # nats of difference at which a token has its full colour
_LONG = 1e7
"""From here on a number that is no count is shown by its power of ten."""
_BARE = 4  # decimals of numbers of which nothing is said
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'"


def render(numbers: Mapping[str, Any], panels: Mapping[str, list[str]]) -> str:
    """The page as HTML, of the numbers of `building` and the SVG elements of each picture."""
    environment = templates(autoescape=True)
    environment.filters |= {"num": number, "tint": tint, "plain": plain, "label": label}
    style, script = (
        Path(__file__).with_name("page").joinpath(name).read_text(encoding="utf-8")
        for name in ("style.css", "script.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        r=numbers,
        panels={name: [Markup(svg) for svg in each] for name, each in panels.items()},
        style=Markup(style),
        script=Markup(script),
        policy=_POLICY.format(digest),
    )


def templates(*, autoescape: bool) -> Environment:
    """What fills in the templates of this folder; a name that is missing is an error."""
    return Environment(
        loader=PackageLoader("ltm_pyro.report", "page"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(value: float | int | None, digits: int | None = None, sign: bool = False) -> Markup:
    """A number for people, with the whole of it beside, for programs and for sorting."""
    if value is None:
        return Markup('<data class="none" value="">&ndash;</data>')
    plus = "+" if sign else ""
    if isinstance(value, int):
        shown = f"{value:{plus},}"
    elif not math.isfinite(value):
        shown = str(value)
    elif abs(value) >= _LONG:
        shown = f"{value:{plus}.5e}"
    else:
        shown = f"{value:{plus},.{_BARE if digits is None else digits}f}"
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


def tint(piece: Mapping[str, float]) -> str:
    """The colour of a token: how much its thoughts took from its surprise, or added to it."""
    gain = (piece["nats_without"] - piece["nats"]) / _STRONGEST
    strength = round(100 * min(abs(gain), 1.0))
    return f"--t:{strength}%" if gain >= 0 else f"--w:{strength}%"


def plain(value: Any) -> str | Markup:
    """A setting as text, its numbers as `number` writes them."""
    if isinstance(value, list):
        return Markup(", ").join(plain(item) for item in value)
    if isinstance(value, Mapping):
        return Markup(", ").join(Markup("{} = {}").format(k, plain(v)) for k, v in value.items())
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return Markup('<data value="{}">{}</data>').format(repr(value), f"{value:g}")
    return number(value) if isinstance(value, int) else str(value)


def label(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ").replace("ppl", "perplexity")
