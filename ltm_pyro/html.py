"""What objects show of themselves in a notebook: a line, facts, tables; everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_CELL = "text-align:left;padding:0 1em 0 0;vertical-align:top;background:none"


def show(
    title: str,
    facts: Mapping[str, object] | None = None,
    *,
    tables: Sequence[pd.DataFrame] = (),
    notes: Sequence[str] = (),
    details: str = "",
) -> str:
    """HTML for `_repr_html_`: what it is, facts by name, tables, sentences at the end.

    `details` is text, line by line, that is shown when it is asked for.
    """
    rows = "".join(
        f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{escape(_told(value))}'
        "</td></tr>"
        for name, value in (facts or {}).items()
    )
    parts = [f"<div><b>{escape(title)}</b>"]
    parts += [f"<table>{rows}</table>"] if rows else []
    parts += [table.to_html(float_format="{:.4g}".format, border=0) for table in tables]
    parts += [f'<p style="margin:0.3em 0">{escape(note)}</p>' for note in notes]
    if details:
        parts.append(f"<details><summary>more</summary><pre>{escape(details)}</pre></details>")
    return "".join([*parts, "</div>"])


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
