"""Under Pyro's own `SVI`: a guide takes up the first batch by itself, and no second one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError

if TYPE_CHECKING:
    from ltm_pyro.inference.guides.base import LocalGuide


def take_up(guide: LocalGuide, batch: Batch) -> None:
    """Makes the guide hold the rows of `batch`, which it keeps from step to step.

    Raises:
        InputError: if its local parameters are those of other sequences.
    """
    rows = list(guide.local.values())
    ids = None
    if guide.svi_rows is not None and guide.svi_rows[1] is (rows[0] if rows else None):
        ids = guide.svi_rows[0]  # no `reset` since the last step
    same = ids is not None and torch.equal(ids, batch.ids)
    if rows and ids is not None and not same:
        raise InputError(
            f"the guide's rows are those of {len(ids)} other sequences, and pyro.infer.SVI "
            "keeps one batch: use DualRateSVI(model, guide).fit(...), or guide.reset(batch)"
        )
    if guide.n_rows == 0 or not (rows or same):
        guide.reset(batch)
    elif not all(p.requires_grad for p in rows):
        # Left by `infer`, whose answer reads these very tensors.
        guide.load_rows(guide.rows())
    guide.svi_rows = batch.ids, next(iter(guide.local.values()), None)
