"""Guide families by name."""

from __future__ import annotations

from typing import Any

from ltm_pyro.doors import exclusive, require_model
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.registry import Registry

GUIDES: Registry[type[LocalGuide]] = Registry(
    "guide", "register_guide", needs=LocalGuide, label="family"
)
register_guide = GUIDES.register
"""Class decorator: makes a guide family known to `build_guide` by name; see `Registry.register`."""
guide_families = GUIDES.names
"""Names of all registered families."""


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
