"""One record per sequence: every local tensor of a row side by side, with a checksum.

    crc32 (4 bytes) | lane (4) | id (8) | column | column | ... | padding to 8 bytes

A record lies in one place on disk, so that a row costs one read, and says itself whose it is and
whether it is whole.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltm_pyro.errors import InputError

Records = NDArray[np.uint8]
"""(B, R) bytes: one record of R bytes per row."""

_HEADER = np.dtype([("crc", np.uint32), ("lane", np.uint32), ("id", np.int64)])
_CRC_BYTES = 4
_ALIGNMENT = 8
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


@dataclass(frozen=True)
class Column:
    """One local tensor of a row.

    Attributes:
        name: As in the rows that the store is given.
        dtype: By its torch name, e.g. `float32`.
        shape: Of one row, without the leading B.
        offset: Bytes from the start of the record.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the column in a record."""
        return int(np.prod(self.shape, dtype=np.int64)) * _DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


@dataclass(frozen=True)
class RowLayout:
    """Where each column lies in a record.

    Attributes:
        columns: By name, in the order of their offsets.
        record_bytes: R.
    """

    columns: Mapping[str, Column]
    record_bytes: int

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> RowLayout:
        """The layout of `rows`, each (B, ...).

        Raises:
            InputError: if a tensor is of a kind that records cannot hold.
        """
        columns, offset = {}, _HEADER.itemsize
        for name, value in rows.items():
            dtype = str(value.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise InputError(
                    f"local parameter {name!r} is {dtype}: the store holds {', '.join(_DTYPES)}"
                )
            columns[name] = Column(name, dtype, tuple(value.shape[1:]), offset)
            offset += columns[name].n_bytes
        return cls(columns, -(-offset // _ALIGNMENT) * _ALIGNMENT)

    def to_json(self) -> dict[str, Any]:
        """All there is to it, as JSON types."""
        columns = [
            {"name": c.name, "dtype": c.dtype, "shape": list(c.shape)}
            for c in self.columns.values()
        ]
        return {"byteorder": sys.byteorder, "record_bytes": self.record_bytes, "columns": columns}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RowLayout:
        """What `to_json` wrote.

        Raises:
            ValueError: if it cannot be read here.
        """
        if saved["byteorder"] != sys.byteorder:
            raise ValueError(f"its numbers are {saved['byteorder']}-endian")
        fresh = {
            str(c["name"]): torch.empty((0, *c["shape"]), dtype=_DTYPES[c["dtype"]])
            for c in saved["columns"]
        }
        layout = cls.of(fresh)
        if layout.record_bytes != saved["record_bytes"]:
            raise ValueError("its columns do not add up to its records")
        return layout

    def difference(self, rows: Mapping[str, Tensor]) -> str | None:
        """The first of `rows`, each (B, ...), that has no place here, in words."""
        for name, value in rows.items():
            given = f"{tuple(value.shape[1:])} {str(value.dtype).removeprefix('torch.')}"
            held = str(self.columns.get(name, "absent"))
            if held != given:
                return f"{name} should be {given} and is {held}"
        return None

    def pack(self, ids: Tensor, lanes: Tensor, rows: Mapping[str, Tensor]) -> Records:
        """Records (B, R) of all columns in `rows`, each (B, ...), for `ids` and `lanes` (B,)."""
        records = np.zeros((len(ids), self.record_bytes), dtype=np.uint8)
        header = self.headers(records)
        header["id"], header["lane"] = ids.cpu().numpy(), lanes.cpu().numpy()
        for name, column in self.columns.items():
            value = rows[name].detach().cpu().reshape(len(ids), -1).contiguous()
            end = column.offset + column.n_bytes
            records[:, column.offset : end] = value.view(torch.uint8).numpy()
        header["crc"] = [zlib.crc32(record[_CRC_BYTES:].data) for record in records]
        return records

    def unpack(self, records: Records, name: str) -> Tensor:
        """The column `name` of `records` (B, R), as a tensor (B, ...) of its own."""
        column = self.columns[name]
        data = records[:, column.offset : column.offset + column.n_bytes].copy()
        flat = torch.from_numpy(data).view(_DTYPES[column.dtype])
        return flat.reshape(len(records), *column.shape)

    def headers(self, records: Records) -> NDArray[Any]:
        """`crc`, `lane` and `id` of `records` (B, R), as a structured view (B,)."""
        return records[:, : _HEADER.itemsize].view(_HEADER)[:, 0]

    def broken(self, records: Records) -> int | None:
        """The first of `records` (B, R) that is not what was written, or `None`."""
        for row, (record, crc) in enumerate(
            zip(records, self.headers(records)["crc"].tolist(), strict=True)
        ):
            if zlib.crc32(record[_CRC_BYTES:].data) != crc:
                return row
        return None
