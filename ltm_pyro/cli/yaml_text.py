"""YAML from a person: of bounded size and depth, and without aliases that multiply."""

from __future__ import annotations

import datetime
from typing import Any

import yaml

from ltm_pyro.errors import InputError

LARGEST = 2**20
"""Characters."""
DEEPEST = 50
_MOST_VALUES = 100_000


def load(text: str, what: str) -> Any:
    """The values that the YAML `text`, called `what` in messages, stands for."""
    if len(text) > LARGEST:
        raise InputError(f"{what} is longer than {LARGEST} characters: settings take a page or two")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise InputError(f"{what} has aliases that multiply: write the values out")
        return _plain(loader.construct_document(node), what)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply, or contains itself: flatten it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", "cannot be parsed")
        raise InputError(f"{what} is not YAML{where}: {problem}") from None
    except InputError:
        raise
    except ValueError as error:  # a number of thousands of digits, a thirteenth month
        raise InputError(f"{what} holds a value that cannot be read: {error}") from None


def _values(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """How many values `node` stands for, aliases written out; `RecursionError` if too deep."""
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [item for part in parts for item in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_values(item, known, depth + 1) for item in inner)
    return known[id(node)]


def _plain(value: Any, what: str) -> Any:
    """`value`, known to be of JSON's types."""
    if isinstance(value, dict):
        return {key: _plain(item, what) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, what) for item in value]
    if isinstance(value, bytes | set | datetime.date):
        raise InputError(
            f"{what} holds a {type(value).__name__}: settings are texts, numbers, true, false, "
            "lists and groups of these; quote it"
        )
    return value
