"""What comes from outside, checked against types: settings and the files of a run folder.

Pydantic checks; here its findings become one line that names the field, what it holds and what it
must be. Nothing is converted, but for a list that stands for a tuple, as JSON writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    JsonValue,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from ltm_pyro.errors import InputError, shown, unknown_name
from ltm_pyro.html import show


def _plain_number(value: object) -> object:
    """Refuses what merely can be made a number, such as a tensor."""
    if isinstance(value, int | float):
        return value
    raise ValueError


def _lists(value: object) -> object:
    """`value` with lists for tuples, as JSON writes them."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


Whole = Annotated[int, Strict()]
"""A whole number, which neither a text nor `True` is."""
Finite = Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_plain_number)]
"""A number that is neither infinite nor NaN."""

Options = Annotated[Mapping[str, JsonValue], BeforeValidator(_lists)]
"""Settings whose names the callee knows, of JSON's types."""

C = TypeVar("C", bound=type[Any])
T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(name: str) -> Callable[[C], C]:
    """Class decorator: a frozen dataclass that checks its fields whenever it is made.

    In messages `name`, e.g. `"fast"`, stands before a field's.
    """

    def decorate(cls: C) -> C:
        made = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
        checked = made.__init__

        @functools.wraps(checked)
        def __init__(self: Any, **values: Any) -> None:
            try:
                checked(self, **values)
            except ValidationError as error:
                raise _input_error(error, cls, name) from None

        made.__init__ = __init__  # type: ignore[method-assign]
        made.__repr__ = _changed  # type: ignore[method-assign]
        made._repr_html_ = _all  # type: ignore[attr-defined]
        return cast("C", made)

    return decorate


def _changed(self: Any) -> str:
    """The settings that differ from their defaults, as they are written in Python."""
    told = []
    for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if value != default:
            told.append(f"{field.name}={value!r}")
    return f"{type(self).__name__}({', '.join(told)})"


def _all(self: Any) -> str:
    """Every setting, for a notebook."""
    facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return show(type(self).__name__, facts)


def validated(cls: type[T], values: Mapping[str, Any], name: str = "") -> T:
    """`values` by field as an instance of the dataclass `cls`, nested ones too.

    What is left out keeps its default. An unknown key, of which the nearest known one is offered,
    and a value of the wrong type or out of range are refused; `name` stands before a field's.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise _input_error(error, cls, name) from None


def _input_error(error: ValidationError, cls: type[Any], name: str) -> InputError:
    """The first thing that was found, in one line."""
    found = error.errors(include_url=False)[0]
    own = found.get("ctx", {}).get("error")
    if isinstance(own, InputError):
        return own
    path, owner, spec = _place(found["loc"], cls, name)
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        prefix = path[: len(path) - len(str(found["loc"][-1]))]
        return unknown_name("key", path, [f"{prefix}{field}" for field in _fields(owner)])
    value = found["input"]
    if spec is not None and _is_group(spec.annotation) and not isinstance(value, Mapping):
        inner = [str(part) for part in found["loc"] if str(part) != "[key]"]
        if ".".join(inner) not in path:
            return InputError(
                f"an option in {path} is {shown(value)}: names must be texts, and values texts, "
                "numbers, true, false, lists or groups of these"
            )
    if found["type"].startswith("missing") and isinstance(found["loc"][-1], str):
        return InputError(f"{path} is missing")
    if found["type"] == "invalid_key":
        return InputError(f"key {shown(value)}: must be a text")
    if spec is None:
        return InputError(f"{path or 'the settings'} is {shown(value)}: {found['msg']}")
    names = _names(spec.annotation)
    if names and isinstance(value, str):
        return unknown_name(path, shown(value).strip("'"), names)
    expected = f"{_kind(spec.annotation)}{_range(list(spec.metadata))}"
    return InputError(f"{path} is {shown(value)}: must be {expected}")


def _place(
    loc: tuple[int | str, ...], cls: type[Any], name: str
) -> tuple[str, type[Any], FieldInfo | None]:
    """Dotted name of the place `loc`, the class that it belongs to, and its field there."""
    names, owner, spec = [name] if name else [], cls, None
    for part in loc:
        if spec is not None:
            inner = _model(spec.annotation)
            if inner is None:
                break
            owner = inner
        names.append(str(part))
        spec = _fields(owner).get(str(part))
        if spec is None:
            break
    return ".".join(names), owner, spec


def _fields(cls: type[Any]) -> dict[str, FieldInfo]:
    return getattr(cls, "__pydantic_fields__", {})


def _model(hint: Any) -> type[Any] | None:
    """The dataclass that a field holds, if it holds one."""
    for option in (hint, *get_args(hint)):
        if _fields(option):
            return option if isinstance(option, type) else None
    return None


def _is_group(hint: Any) -> bool:
    """Whether a field holds names with values."""
    return any(option in (dict, Mapping) for option in (hint, get_origin(hint)))


def _kind(hint: Any) -> str:
    names = _names(hint)
    if names:
        return "one of " + ", ".join(names)
    if _model(hint) is not None or _is_group(hint):
        return "a group of settings"
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *metadata = get_args(hint)
        return f"{_kind(inner)}{_range(metadata)}"
    if origin is tuple:
        return _kind(get_args(hint)[0]).replace("a number", "two numbers", 1)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_kind(option) for option in get_args(hint)))
    if origin is list:
        return "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint, "nothing" if hint is type(None) else "something else")


def _range(metadata: list[Any]) -> str:
    """The limits of a number, in words."""
    bounds = {
        name: getattr(m, name)
        for m in metadata
        for name in ("ge", "gt", "le", "lt")
        if isinstance(m, Ge | Gt | Le | Lt) and hasattr(m, name)
    }
    low, high = bounds.get("ge"), bounds.get("le")
    if low is not None and "lt" in bounds:
        return f" from {low} to below {bounds['lt']}"
    if low is not None and high == 1:
        return f" from {low} to {high}"
    words = [
        *([] if low is None else [f", {low} or more"]),
        *([f" above {bounds['gt']}"] if "gt" in bounds else []),
        *([] if high is None else [f", at most {high}"]),
    ]
    return "".join(words)


def _names(hint: Any) -> list[str]:
    """The names that a field allows, if it is a choice of names."""
    if get_origin(hint) is Literal:
        return [str(name) for name in get_args(hint)]
    return [name for option in get_args(hint) if option is not hint for name in _names(option)]
