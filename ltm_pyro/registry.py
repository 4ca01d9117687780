"""Families known by name: guides, priors, objectives, tokenizers, and anyone's own.

GUIDES: Registry[type[LocalGuide]] = Registry("guide", "register_guide", needs=LocalGuide)

@GUIDES.register("mine")
class Mine(LocalGuide): ...

GUIDES["mine"], GUIDES.names()
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from ltm_pyro.errors import InputError, shown, unknown_name

T = TypeVar("T", bound=Callable[..., Any])
K = TypeVar("K", bound=Callable[..., Any])

ENTRY_POINTS = "ltm_pyro.plugins"
"""The entry-point group whose modules `load_plugins` imports."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class Registry(Generic[T]):
    """What can be asked for by name: classes or functions, in the order of names.

    Args:
        kind: What is registered, for messages: `"guide"`.
        decorator: The public decorator's name, for messages: `"register_guide"`.
        needs: The class that everything registered must derive from; any callable by default.
        label: The attribute of a class that tells its name, set on registration; none by default.
    """

    def __init__(
        self, kind: str, decorator: str, needs: type | None = None, label: str | None = None
    ) -> None:
        self.kind = kind
        self.decorator = decorator
        self.needs = needs
        self.label = label
        self._known: dict[str, T] = {}

    def register(self, name: str, *, override: bool = False) -> Callable[[K], K]:
        """Decorator: makes what it is put on known under `name`.

        Args:
            name: A letter, then letters, digits, `_`, `.` or `-`; at most 64.
            override: Replace what is known under this name.

        Raises:
            InputError: if the name is taken or cannot be one, or, on use, if what is decorated is
                of another kind.
        """
        if not isinstance(name, str):
            raise InputError(
                f"@{self.decorator} needs a name: write @{self.decorator}('my_{self.kind}')"
            )
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{self.kind} name {shown(name)}: must be a letter, then letters, digits, "
                "'_', '.' or '-', 64 at most"
            )

        def add(value: K) -> K:
            self._refuse_unfit(name, value)
            if not override and self._known.get(name) not in (None, value):
                raise InputError(
                    f"{self.kind} {name!r} is taken by {_called(self._known[name])}: choose "
                    f"another name, or @{self.decorator}({name!r}, override=True) to replace it"
                )
            if self.label is not None:
                setattr(value, self.label, name)
            self._known[name] = cast("T", value)
            return value

        return add

    def _refuse_unfit(self, name: str, value: object) -> None:
        needs = self.needs
        if needs is None:
            if not callable(value):
                raise InputError(f"{self.kind} {name!r} is {shown(value)}: must be callable")
            return
        if not (isinstance(value, type) and issubclass(value, needs)):
            raise InputError(
                f"{self.kind} {name!r} is {shown(value)}: must be a subclass of {needs.__name__}"
            )
        if inspect.isabstract(value):
            missing = ", ".join(sorted(getattr(value, "__abstractmethods__", ())))
            raise InputError(f"{self.kind} {name!r} ({value.__name__}) lacks {missing}: define it")
        others = [other for other, known in self._known.items() if known is value]
        if self.label is not None and others and others != [name]:
            raise InputError(
                f"{_called(value)} is {self.kind} {others[0]!r} already: register a subclass of it"
            )

    def __getitem__(self, name: str) -> T:
        """What is known under `name`; `InputError` if nothing is, with the nearest name."""
        if not isinstance(name, str):
            raise InputError(f"{self.kind} is {shown(name)}: must be one of {', '.join(self)}")
        if name not in self._known:
            raise unknown_name(self.kind, name, self._known)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._known))

    def __len__(self) -> int:
        return len(self._known)

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(self)

    def build(self, name: str, *given: Any, options: Mapping[str, Any]) -> Any:
        """What `name` makes of the arguments `given` and of options checked by their names.

        `InputError` for an unknown name or option (the nearest is offered), one that is missing, or
        a value that the family refuses.
        """
        made = self[name]
        known, needed = option_names(made, len(given), self.needs)
        kind = f"{self.kind} {name!r}"
        for option in options:
            if option not in known:
                if not known:
                    raise InputError(f"{kind} has no options: leave {shown(option)} out")
                raise unknown_name(f"option of {kind}", str(option), known)
        missing = [option for option in needed if option not in options]
        if missing:
            raise InputError(f"{kind} needs the option {missing[0]!r}: give it")
        return made(*given, **options)

    def remove(self, name: str) -> None:
        """Forgets `name`, e.g. after a test that registered it."""
        self._known.pop(name, None)


def option_names(
    made: Callable[..., Any], given: int, top: type | None = None
) -> tuple[list[str], list[str]]:
    """The options of a class or function beyond its first `given` arguments.

    Where a class takes `**options` and hands them up, those of its bases count too, up to `top`.

    Returns:
        All of them, and those without a default.
    """
    calls = (
        [
            c.__dict__["__init__"]
            for c in made.__mro__
            if "__init__" in c.__dict__ and c is not object and issubclass(c, top or object)
        ]
        if isinstance(made, type)
        else [made]
    )
    skip = given + isinstance(made, type)
    known: dict[str, bool] = {}
    for call in calls:
        parameters = list(inspect.signature(call).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
        taken = {p.name for p in named[:skip]}
        for p in parameters:
            if p.name not in taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                known.setdefault(p.name, p.default is p.empty)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(known), [name for name, needed in known.items() if needed]


def load_plugins(modules: tuple[str, ...] = ()) -> None:
    """Imports `modules`, and those of installed packages' entry points, which register families."""
    named = [
        (entry.value.partition(":")[0], entry.name) for entry in entry_points(group=ENTRY_POINTS)
    ]
    for module, source in [*named, *((name, "--import") for name in modules)]:
        try:
            importlib.import_module(module)
        except InputError:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"module {shown(module)} ({source}) cannot be imported: {why[:200]}; put its "
                "folder on PYTHONPATH or mend it"
            ) from error


def _called(value: object) -> str:
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value))
    return f"{module}.{name}"
