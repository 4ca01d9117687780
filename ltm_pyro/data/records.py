"""Records: what a source gives, taken apart into a document's text and what else is known of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ltm_pyro.checks import one_of
from ltm_pyro.data.files import Newlines
from ltm_pyro.errors import InputError, did_you_mean, shown

TEXT = "text"
_SHOWN_FIELDS, _SHOWN_NAMES = 8, 20
_DEPTH = 8  # of nested objects whose fields become columns; what lies deeper stays one value
_NOT_THERE = object()


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text.
        file: Number of its file, as its source counts them.
        offset: Where it begins in the file: bytes of the text as UTF-8, or the number of its record
            counted from 0.
        split: `train`, `val` or `test` where its source tells; `""` where it does not.
        fields: What else its record holds, by dotted names.
    """

    text: str
    file: int = 0
    offset: int = 0
    split: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where documents come from."""

    @property
    def name(self) -> str:
        """For people and for the name of the cache entry."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that `Document.file` counts."""
        ...

    def identity(self) -> Mapping[str, Any] | None:
        """JSON types that change whenever the documents may have changed.

        `None` where only reading tells; a source may then be one that can be read but once.
        """
        ...

    def documents(self) -> Iterator[Document]:
        """The documents in source order, one at a time; empty ones are left out by the reader."""
        ...


@dataclass(frozen=True)
class Reading:
    """How files and records become documents.

    Attributes:
        encoding: Of text files that do not begin with a mark of their own.
        newlines: None, `lf` or `keep`; see `load_corpus`.
        text_field: Which part of a record is its text; dots lead into nested objects and through
            lists, as in `turns.text`.
        turn_separator: Between the strings of a list, such as the turns of a dialogue.
        given: Keep the splits that the source has.
    """

    encoding: str = "utf-8"
    newlines: Newlines = None
    text_field: str = TEXT
    turn_separator: str = "\n"
    given: bool = False

    def __post_init__(self) -> None:
        if self.newlines is not None:
            one_of("newlines", self.newlines, ("lf", "keep"))
        if not isinstance(self.text_field, str) or not self.text_field:
            raise InputError(f"text_field is {shown(self.text_field)}: must be a string")
        if not isinstance(self.turn_separator, str):
            raise InputError(f"turn_separator is {shown(self.turn_separator)}: must be a string")
        check_unicode(self.turn_separator, "turn_separator")

    def identity(self) -> dict[str, str]:
        """What determines the texts of records, as JSON types."""
        names = ("newlines", "text_field", "turn_separator")
        return {name: getattr(self, name) for name in names}

    def take(self, record: object, where: str) -> tuple[str, dict[str, Any]]:
        """The text and the other fields of `record`, which messages call `where`."""
        text, fields = self._taken(record, where)
        check_unicode(text, where)
        text = text.lstrip("\ufeff")  # a byte order mark
        if self.newlines == "lf":  # escapes in JSON, and whatever a parquet table holds
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return text, fields

    def _taken(self, record: object, where: str) -> tuple[str, dict[str, Any]]:
        name = self.text_field
        if isinstance(record, str):
            return record, {}
        if not isinstance(record, Mapping):
            raise InputError(
                f'{where} has no string "{shown(name)[1:-1]}": it is {_kind(record)}; each '
                "must be a string, or an object with a string among its fields"
            )
        value = _dig(record, name)
        if isinstance(value, list | tuple | np.ndarray) and len(value):
            turns = list(value)
            if all(isinstance(turn, str) for turn in turns):
                value = self.turn_separator.join(turns)
        if not isinstance(value, str):
            raise InputError(self._no_text(record, value, where))
        inside = f"{name}."
        others = ((k, v) for k, v in _flat(record) if k != name and not k.startswith(inside))
        return value, dict(others)

    def _no_text(self, record: Mapping[str, Any], value: object, where: str) -> str:
        if value is not _NOT_THERE:
            found = f"it is {_kind(value)}"
        else:
            names = [str(name) for name, _ in _flat(record)]
            listed = ", ".join(shown(n)[1:-1] for n in names[:_SHOWN_FIELDS]) or "none"
            hint = did_you_mean(self.text_field, names)
            found = f"{hint}its fields are {listed}{', ...' if len(names) > _SHOWN_FIELDS else ''}"
        return (
            f'{where} has no string "{shown(self.text_field)[1:-1]}": {found}; name the field with '
            "text_field (--corpus.text_field)"
        )


def check_unicode(text: str, where: str) -> None:
    """Refuses what no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds a lone surrogate (\\uD800 to \\uDFFF), which is not valid Unicode "
            "text: write the file's escapes in pairs"
        ) from None


def row_of(fields: Mapping[str, Any], numbers: dict[str, int], where: str) -> bytes:
    """`fields` as JSON, by the numbers of their names, which `numbers` gets to know.

    `InputError` about `where` if they cannot be written down.
    """
    if not fields:
        return b""
    row = {numbers.setdefault(name, len(numbers)): value for name, value in fields.items()}
    try:
        text = json.dumps(row, ensure_ascii=False, default=_plain, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError):
        raise InputError(
            f"{where} holds fields that cannot be written as JSON: leave them out"
        ) from None
    return text.encode("utf-8", "replace")  # a lone surrogate, which no frame can hold


def joined_names(names: Iterable[str]) -> str:
    """Names for a message, the first few of them."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN_NAMES} more" if len(listed) > _SHOWN_NAMES else ""
    return ", ".join(listed[:_SHOWN_NAMES]) + more


def _dig(record: object, name: str) -> Any:
    """What the dotted `name` leads to, through lists element by element."""
    if isinstance(record, Mapping):
        if name in record:
            return record[name]
        head, dot, rest = name.partition(".")
        return _dig(record[head], rest) if dot and head in record else _NOT_THERE
    if isinstance(record, list | tuple | np.ndarray):
        found = [_dig(item, name) for item in record]
        return _NOT_THERE if any(item is _NOT_THERE for item in found) else found
    return _NOT_THERE


def _flat(record: Mapping[Any, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Fields by dotted names; a list of objects becomes a list for each of their fields."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and depth < _DEPTH:
            yield from _flat(value, f"{name}.", depth + 1)
        elif (
            isinstance(value, list | tuple)
            and value
            and depth < _DEPTH
            and all(isinstance(item, Mapping) for item in value)
        ):
            inner = list(dict.fromkeys(key for item in value for key in item))
            columns = {key: [item.get(key) for item in value] for key in inner}
            yield from _flat(columns, f"{name}.", depth + 1)
        else:
            yield name, value


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {shown(value)}"


def _plain(value: object) -> Any:
    """A value that JSON does not know, as one that it does."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return shown(value)
