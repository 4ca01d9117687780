"""The built-in corpus `pydoc`: Python's own reference prose, about 2 MB, nothing downloaded."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ltm_pyro.data.records import Document
from ltm_pyro.errors import InputError

_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "pydoc_data"}
_LEAST_DOCUMENT = 128  # characters; what is left of a shorter one is mostly headings
_LEAST_PARAGRAPH = 40  # characters; shorter ones recur by chance, as "See also:" does
_BLANK_LINES = re.compile(r"\n[ \t]*\n")


class PydocSource:
    """One document per topic of `pydoc_data.topics` and per module of the standard library.

    A module's document is its docstrings, read from its source without importing it; tests are left
    out. The language reference repeats whole sections from topic to topic, and modules repeat
    docstrings, which would put the same text into training and test split: a paragraph of 40
    characters or more is kept only where it first occurs. Shorter topics come first, so that a
    section stays with the topic that is about it.

    The text differs between builds of Python: compare the corpus's `sha256` before comparing
    scores.
    """

    name = "pydoc"
    files = ("",)

    def identity(self) -> Mapping[str, Any]:
        """The build of Python, and where its library lies."""
        return {"source": "pydoc", "python": sys.version, "library": str(_library())}

    def documents(self) -> Iterator[Document]:
        """Topics from short to long, then modules, package by package."""
        seen: set[str] = set()
        number = 0
        for text in (*_topics(), *_module_texts(_library())):
            kept = _without_repeats(text, seen)
            if len(kept) >= _LEAST_DOCUMENT:
                yield Document(kept + "\n", 0, number)
                number += 1


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise InputError(
            "this Python lacks pydoc_data.topics, which the corpus 'pydoc' is made of: install the "
            "full standard library, or give a text file"
        ) from None
    return sorted(topics.values(), key=lambda text: (len(text), text))


def _module_texts(library: Path) -> Iterator[str]:
    """The docstrings of each module, joined by blank lines."""
    for folder, packages, names in os.walk(library):
        # In place, so that the rest is not even walked: names with hyphens are build files and
        # installed packages.
        packages[:] = sorted(p for p in packages if p.isidentifier() and p not in _SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield "\n\n".join(_docstrings(Path(folder, name)))


def _docstrings(file: Path) -> list[str]:
    """The docstrings in `file`; none where it cannot be read or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found = [ast.get_docstring(tree) or "", *_definitions(tree.body)]
    return [text for text in found if text and _is_unicode(text)]


def _definitions(body: list[ast.stmt]) -> Iterator[str]:
    """Docstrings of the classes, methods and functions defined in `body`, in its order."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _definitions(node.body)
            yield from _definitions(node.orelse)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _without_repeats(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which it adds its own."""
    kept = []
    for paragraph in _BLANK_LINES.split(text):
        words = " ".join(paragraph.split())
        if words not in seen:
            kept.append(paragraph)
        if len(words) >= _LEAST_PARAGRAPH:
            seen.add(words)
    return "\n\n".join(kept).strip("\n")
