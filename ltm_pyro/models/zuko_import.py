"""`zuko`, imported without its side effect.

On import zuko 1.6 turns off the validation of all of torch's distributions, in the whole process.
Import what is needed of it from here: validation stays as it was.
"""

from torch.distributions import Distribution

_validate = Distribution._validate_args

from zuko.flows import MAF, MaskedAutoregressiveTransform  # noqa: E402
from zuko.transforms import (  # noqa: E402
    ComposedTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)

Distribution.set_default_validate_args(_validate)

__all__ = [
    "MAF",
    "ComposedTransform",
    "MaskedAutoregressiveTransform",
    "MonotonicAffineTransform",
    "MonotonicRQSTransform",
]
