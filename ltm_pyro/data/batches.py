"""A batch of sequences: what the model conditions on and the guide is fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.errors import InputError


class Origin(Protocol):
    """Where sequences were cut from."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """By which their texts became tokens."""
        ...

    def metadata(self, ids: NDArray[np.int64]) -> pd.DataFrame:
        """What is known of the sequences `ids` (B,), one row each."""
        ...


@dataclass(frozen=True, repr=False)
class Batch:
    """B sequences with their masks and stable ids.

    Attributes:
        x: Token ids (B, T), int64; or real vectors (B, Dx) for the linear-Gaussian oracle; `None`
            where the sequences are still to be generated.
        mask: (B, T) bool, true where a position is scored. Padded positions of `x` hold a valid id.
        ids: (B,) int64, one stable id per sequence. Local parameters and the order in which noise
            is drawn follow the ids, so a permuted batch gets the permuted answer.
        documents: (B,) int64, the document that each sequence was cut from, as its index in the
            corpus; sequences of one document are not independent. `None` where it is not known:
            each sequence then stands for itself.
        corpus: Fingerprint of the corpus that the ids belong to; `None` in a batch made by hand.
            Ids of two corpora may coincide by chance, their fingerprints do not.
        origin: Where the sequences were cut from, which knows their texts and metadata; `None` in a
            batch made by hand. It stays behind when a batch is pickled.

    Raises:
        InputError: if the shapes disagree.
    """

    x: Tensor | None
    mask: Tensor = None  # type: ignore[assignment]  # filled in below
    ids: Tensor = None  # type: ignore[assignment]
    documents: Tensor | None = None
    corpus: str | None = None
    origin: Origin | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        x, mask, ids = self.x, self.mask, self.ids
        if x is not None:
            x = torch.as_tensor(x)
            if x.dim() != 2:
                raise InputError(f"Batch.x must be (B, T), not {tuple(x.shape)}: add a batch axis")
            x = x if x.is_floating_point() else x.long()
        if mask is None:
            if x is None:
                raise InputError("Batch needs x or a mask: without either it has no shape")
            mask = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        mask = torch.as_tensor(mask).bool()
        if ids is None:
            ids = torch.arange(mask.shape[0], device=mask.device)
        ids = torch.as_tensor(ids).long()
        if x is not None and x.shape != mask.shape:
            raise InputError(f"Batch.mask {tuple(mask.shape)} must match x {tuple(x.shape)}")
        if ids.shape != mask.shape[:1]:
            raise InputError(f"Batch.ids {tuple(ids.shape)} must hold one id per row of mask")
        documents = self.documents
        if documents is not None:
            documents = torch.as_tensor(documents).long()
            if documents.shape != ids.shape:
                raise InputError(
                    f"Batch.documents {tuple(documents.shape)} must hold one document per row of "
                    f"mask {tuple(mask.shape)}"
                )
        for name, value in (("x", x), ("mask", mask), ("ids", ids), ("documents", documents)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.mask.shape))
        of = "" if self.corpus is None else f" of corpus {self.corpus[:8]}"
        what = "sequences" if self.x is not None else "sequences still to be generated"
        return f"{type(self).__name__}({shape} {what}{of})"

    def __len__(self) -> int:
        return int(self.mask.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the batch lives."""
        return self.mask.device

    @property
    def observed(self) -> Tensor:
        """`x`, for code that cannot work without it.

        Raises:
            InputError: if the batch is unobserved.
        """
        if self.x is None:
            raise InputError("this batch has no x: it describes sequences still to be generated")
        return self.x

    @property
    def n_tokens(self) -> Tensor:
        """Scored positions per sequence, (B,) int64."""
        return self.mask.sum(-1)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in self._per_row().items()}
        return replace(self, **moved)

    def select(self, index: Tensor | slice) -> Batch:
        """The rows at `index`, in that order."""
        chosen = {name: value[index] for name, value in self._per_row().items()}
        return replace(self, **chosen)

    def unobserved(self) -> Batch:
        """The same sequences with `x` left open: the model then generates them."""
        return Batch(**{**self.plain_fields(), "x": None})

    def plain_fields(self) -> dict[str, Any]:
        """The fields of a plain `Batch` by name, for the constructor of a subclass."""
        return {f.name: getattr(self, f.name) for f in fields(Batch)}

    def texts(self, tokenizer: Tokenizer | None = None) -> list[str]:
        """The text of each sequence, masked positions left out; cut characters become U+FFFD.

        Args:
            tokenizer: For a batch made by hand; one from a corpus knows its own.

        Raises:
            InputError: if there is no text or no tokenizer.
        """
        chosen = tokenizer or (self.origin.tokenizer if self.origin is not None else None)
        if chosen is None:
            raise InputError(
                "this batch was made by hand and knows no tokenizer: give texts(tokenizer)"
            )
        rows = zip(self.observed.cpu(), self.mask.cpu(), strict=True)
        return [chosen.decode(x[mask].numpy()) for x, mask in rows]

    @property
    def metadata(self) -> pd.DataFrame:
        """What is known of each sequence, one row each; see `SequenceSet.metadata`."""
        ids = self.ids.cpu().numpy()
        if self.origin is not None:
            return self.origin.metadata(ids)
        known = {} if self.documents is None else {"document": self.documents.cpu().numpy()}
        return pd.DataFrame(known, index=pd.Index(ids, name="id"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": None}

    def _per_row(self) -> dict[str, Any]:
        """The plain fields that hold something for each row."""
        return {k: v for k, v in self.plain_fields().items() if isinstance(v, Tensor)}

    def prefix(self, n: int) -> Batch:
        """The same sequences with only their first `n` positions scored.

        Raises:
            InputError: if `n` is not between 1 and T - 1.
        """
        length = self.mask.shape[1]
        if not 1 <= n < length:
            raise InputError(f"prefix of {n} positions: must be from 1 to {length - 1}")
        return replace(self, mask=self.mask & self.positions.lt(n))

    def suffix(self, n: int) -> Batch:
        """The same sequences with only the positions after the first `n` scored."""
        return replace(self, mask=self.mask & self.positions.ge(n))

    @cached_property
    def indices(self) -> Tensor:
        """Rows counted from 0, (B,)."""
        return torch.arange(len(self), device=self.device)

    @property
    def positions(self) -> Tensor:
        """Positions counted from 0, (T,)."""
        return torch.arange(self.mask.shape[1], device=self.device)
