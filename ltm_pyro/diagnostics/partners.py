"""Whose thoughts a sequence is given when thoughts are shuffled.

Neighbouring pieces of one document say similar things, so a neighbour's thoughts are nearly one's
own: the control would look harmless where thoughts matter. Partners are of another document.
"""

from __future__ import annotations

import torch
from torch import Tensor


def partners_of(n: int, documents: Tensor | None = None) -> Tensor | None:
    """For each of n sequences another one, of another document where documents are known.

    Args:
        n: Sequences.
        documents: (n,) the document of each; without it, each sequence is one of its own.

    Returns:
        (n,) int64 row numbers on the device of `documents`. Each row is used once, unless one
        document has more than half of the rows. `None` where there is no other document.
    """
    if documents is None:
        return torch.arange(n).roll(1) if n > 1 else None
    order = torch.argsort(documents, stable=True)
    _, sizes = torch.unique_consecutive(documents[order], return_counts=True)
    if len(sizes) < 2:
        return None
    largest = int(sizes.max())
    partners = torch.empty_like(order)
    if 2 * largest <= n:
        # Sorted by document, a step of the largest one's size leaves every document.
        partners[order] = order.roll(largest)
        return partners
    start = int(sizes.cumsum(0)[sizes.argmax()]) - largest
    inside = order[start : start + largest]
    outside = torch.cat([order[:start], order[start + largest :]])
    partners[outside] = inside[: len(outside)]
    partners[inside] = outside.repeat(-(-largest // len(outside)))[:largest]
    return partners
