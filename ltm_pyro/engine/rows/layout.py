"""What a row holds, and a row as bytes: every local tensor of a sequence side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.errors import InputError

Columns = dict[str, tuple[str, tuple[int, ...]]]
"""By name: the dtype as torch calls it, and the shape of one row."""


@dataclass(frozen=True)
class RowLayout:
    """The tensors of a row, in the order of their names."""

    columns: Columns

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> RowLayout:
        """The layout of `rows`, each (B, ...)."""
        return cls(
            {
                name: (str(rows[name].dtype).removeprefix("torch."), tuple(rows[name].shape[1:]))
                for name in sorted(rows)
            }
        )

    @classmethod
    def from_json(cls, saved: Any) -> RowLayout:
        """What `to_json` returned; `ValueError` for anything else."""
        try:
            columns = {
                str(name): (str(dtype), tuple(int(n) for n in shape))
                for name, (dtype, shape) in saved.items()
            }
            known = all(
                isinstance(getattr(torch, d, None), torch.dtype) for d, _ in columns.values()
            )
        except (AttributeError, TypeError, ValueError):
            known = False
        if not known:
            raise ValueError("no columns")
        return cls(columns)

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {name: [dtype, list(shape)] for name, (dtype, shape) in self.columns.items()}

    def packed(self, rows: Mapping[str, Tensor]) -> list[bytes]:
        """`rows` (B, ...), of these columns, as one record for each sequence."""
        if self.columns.keys() - rows.keys():
            raise self._foreign(f"{min(self.columns.keys() - rows.keys())!r} is missing")
        self._check(rows)
        parts = [
            rows[name].detach().cpu().contiguous().reshape(len(rows[name]), -1).view(torch.uint8)
            for name in self.columns
        ]
        return [row.tobytes() for row in torch.cat(parts, dim=1).numpy()]

    def filled(
        self, fresh: Mapping[str, Tensor], records: Mapping[int, bytes]
    ) -> dict[str, Tensor]:
        """`fresh` (B, ...), any of the columns, with `records` in place of some rows.

        Args:
            fresh: What a row is where there is no record.
            records: By row, as `packed` made them.
        """
        self._check(fresh)
        out = {name: value.clone() for name, value in fresh.items()}
        if not records:
            return out
        table = np.frombuffer(b"".join(records.values()), dtype=np.uint8).reshape(len(records), -1)
        places = torch.tensor(list(records))
        start = 0
        for name, (dtype, shape) in self.columns.items():
            kind = getattr(torch, dtype)
            end = start + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            if name in out:
                values = torch.from_numpy(table[:, start:end].copy()).view(kind)
                device = out[name].device
                out[name][places.to(device)] = values.reshape(-1, *shape).to(device)
            start = end
        return out

    def _check(self, rows: Mapping[str, Tensor]) -> None:
        for name, (dtype, shape) in RowLayout.of(rows).columns.items():
            known = self.columns.get(name)
            if known != (dtype, shape):
                raise self._foreign(f"{name!r} is {shape} {dtype}, stored is {known}")

    @staticmethod
    def _foreign(difference: str) -> InputError:
        return InputError(
            f"the rows stored are of another guide or dtype: {difference}; use the one that filled "
            "them, or fit anew"
        )
