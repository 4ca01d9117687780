"""Guide families by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from ltm_pyro.doors import exclusive, require_model
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.registry import Registry

GUIDES: Registry[type[LocalGuide]] = Registry(
    "guide", "register_guide", needs=LocalGuide, label="family"
)
G = TypeVar("G", bound=type[LocalGuide])


def register_guide(name: str, *, override: bool = False) -> Callable[[G], G]:
    """Class decorator: makes a guide family known to `build_guide` under `name`.

    Args:
        name: E.g. `"my_guide"`.
        override: Replace a family of that name.

    Raises:
        InputError: if the name is taken, or the class is no complete `LocalGuide`.
    """
    return cast("Callable[[G], G]", GUIDES.register(name, override=override))


def guide_families() -> tuple[str, ...]:
    """Names of all registered families."""
    return GUIDES.names()


@exclusive
def build_guide(name: str, model: LatentModel, /, **options: Any) -> LocalGuide:
    """A guide of the family `name` for `model`.

    Args:
        name: A registered family, e.g. `"mean_field"`.
        model: The model whose thoughts it describes.
        **options: Options of the family.

    Raises:
        InputError: for an unknown family or option; the nearest name is offered.
    """
    require_model(model)
    guide: LocalGuide = GUIDES.build(name, model, options=options)
    guide.built_with = options
    return guide.to(model.device)
