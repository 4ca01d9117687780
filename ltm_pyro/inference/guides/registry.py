"""Guide families by name."""

from __future__ import annotations

from typing import Any

from ltm_pyro.doors import exclusive, require_model
from ltm_pyro.errors import InputError, shown
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


def guide_for(guide: LocalGuide | str, model: LatentModel) -> LocalGuide:
    """A guide for `model`, by name or as it is; `InputError` if one does not fit the other."""
    require_model(model)
    if model.device.type == "meta":
        raise InputError("model is on the meta device, which holds no numbers: build it on another")
    if isinstance(guide, str):
        return build_guide(guide, model)
    if not isinstance(guide, LocalGuide):
        kind = f"the class {guide.__name__}" if isinstance(guide, type) else shown(guide)
        raise InputError(
            f"guide is {kind}: must be a family's name ({', '.join(guide_families())}) or "
            "build_guide(name, model); Pyro's autoguides run under pyro.infer.SVI"
        )
    if guide.thought_shape != tuple(model.thought_shape):
        raise InputError(
            f"guide is for thoughts {guide.thought_shape} and the model has "
            f"{tuple(model.thought_shape)}: build_guide({guide.family!r}, model)"
        )
    return guide
