"""One small reader per kind of file; the parsing is libraries'."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ltm_pyro.data.files import name_of, opened
from ltm_pyro.errors import InputError

Chunks = Iterator[str]
Record = tuple[str, Any]
"""Where it stands, for messages, and a string or a mapping."""
_LONGEST_FIELD = 2**28  # characters of a CSV field; the library stops at 2^17, a short book
_PARQUET_ROWS = 256
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,15})(\.\d{1,15})?")


def json_lines(file: Path, text: Chunks) -> Iterator[Record]:
    """One JSON value per line."""
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            where = f"line {number} of {name_of(file)}"
            yield where, _parsed(line.removeprefix("\ufeff"), where, "each line must be")


def json_list(file: Path, text: Chunks) -> Iterator[Record]:
    """A list of objects or strings; one JSON value per line will do too, as many tools write it."""
    whole = "".join(text)
    try:
        records = json.loads(whole)
    except ValueError as error:
        if "Extra data" in str(error):
            yield from json_lines(file, iter([whole]))
            return
        records = _parsed(whole, name_of(file), "it must be a list of, or")
    except RecursionError:
        raise _too_deep(name_of(file)) from None
    del whole
    if not isinstance(records, list):
        records = [records]
    for number, record in enumerate(records):
        yield f"item {number} of {name_of(file)}", record


def table(file: Path, text: Chunks) -> Iterator[Record]:
    """Rows below a line of names; every value is a string."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    lines = (f"{line}\n" for line in _lines(text))
    header = next(lines, "")
    delimiter = "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","
    rows = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, row in enumerate(rows):
            where = f"row {number} of {name_of(file)}"
            if None in row:
                raise InputError(f"{where} has more fields than the first line has names: check it")
            yield where, {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        raise InputError(
            f"row {number + 1} of {name_of(file)} is no row of a table ({error}): check its quotes "
            "and line ends"
        ) from None


def parquet(file: Path) -> Iterator[Record]:
    """The rows of a parquet file, some at a time."""
    try:
        library = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise InputError(
            f"{name_of(file)} is a parquet table, and to read it an optional package is needed: "
            'pip install "ltm-pyro[data]"'
        ) from None
    number = 0
    try:
        with opened(file):  # refuses what is no regular file
            pass
        with library.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"row {number} of {name_of(file)}", row
                    number += 1
    except InputError:
        raise
    except (OSError, ValueError) as error:  # what the library's own errors derive from
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name_of(file)} is no parquet table: {reason}") from None


TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".csv", ".tsv")
RECORDS: dict[str, Callable[[Path, Chunks], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_list,
    ".csv": table,
    ".tsv": table,
}
PARQUET = ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, *RECORDS, PARQUET)


def number_or_text(value: Any) -> Any:
    """The number that a table's `value` is the usual way of writing, or `value` itself."""
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    return float(value) if found[2] else int(value)


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{where} is not JSON ({str(error).partition(':')[0]}): {what} one JSON object with a "
            'string "text"'
        ) from None
    except RecursionError:
        raise _too_deep(where) from None


def _too_deep(where: str) -> InputError:
    return InputError(f"{where} is nested too deeply to be read")


def _lines(text: Chunks) -> Iterator[str]:
    """Lines that end with a line feed only: JSON strings may hold other Unicode line breaks."""
    held: list[str] = []
    for chunk in text:
        *complete, rest = chunk.split("\n")
        for line in complete:
            yield "".join([*held, line])
            held.clear()
        held.append(rest)
    if any(held):
        yield "".join(held)
