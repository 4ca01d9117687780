"""A batch of sequences: what the model conditions on and the guide is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.errors import InputError, shown
from ltm_pyro.html import show
from ltm_pyro.random import Stream, derive_seed

if TYPE_CHECKING:
    from ltm_pyro.data.sequences import SequenceLayout

_SHOWN = 5  # rows in a notebook
SHORTEST = 16
"""Tokens of the shortest length that a batch is cut to."""


class TrainingData(Protocol):
    """Where `fit` takes its batches: a `SequenceSet`, a `Batch`, or what offers the same."""

    def __len__(self) -> int:
        """How many sequences there are; a batch has no more."""
        ...

    @property
    def training_batch(self) -> Callable[..., Batch]:
        """See `SequenceSet.training_batch`; asked for `lanes` or `rows` only where they matter."""
        ...


class Covariates(dict[str, Tensor]):
    """Covariates by name; one that is missing is told by its name."""

    def __missing__(self, name: str) -> Tensor:
        known = ", ".join(self) or "none"
        raise InputError(
            f"this batch has no covariate {shown(name)} (it has {known}): give "
            f"Batch(x, covariates={{{shown(name)}: ...}})"
        )


@dataclass(frozen=True, repr=False)
class Batch:
    """B sequences with their masks and stable ids.

    Attributes:
        x: Token ids (B, T), int64; real vectors (B, Dx) for the linear-Gaussian oracle; any shape
            (B, ...) for a model of one's own; `None` where the sequences are still to be generated.
        mask: Of x's shape, bool, true where a position is scored. Padded positions of `x` hold a
            valid id.
        ids: (B,) int64, one stable id per sequence. Local parameters and the order in which noise
            is drawn follow the ids, so a permuted batch gets the permuted answer.
        documents: (B,) int64, the document that each sequence was cut from, as its index in the
            corpus; sequences of one document are not independent. `None` where it is not known:
            each sequence then stands for itself.
        corpus: Fingerprint of the corpus that the ids belong to; `None` in a batch made by hand.
            Ids of two corpora may coincide by chance, their fingerprints do not.
        origin: Where the sequences were cut from, which knows their texts and metadata; `None` in a
            batch made by hand. It stays behind when a batch is pickled.
        covariates: What else is known of each row, by name, each (B, ...): a model of one's own may
            read it.

    Raises:
        InputError: if the shapes disagree, there are no rows, or something is of another kind.
    """

    x: Tensor | None
    mask: Tensor = None  # type: ignore[assignment]  # filled in below
    ids: Tensor = None  # type: ignore[assignment]
    documents: Tensor | None = None
    corpus: str | None = None
    origin: SequenceLayout | None = field(default=None, repr=False, compare=False)
    covariates: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x, mask = _scored(self.x, self.mask)
        shape = tuple(mask.shape)
        ids = torch.arange(shape[0], device=mask.device) if self.ids is None else self.ids
        ids = whole_numbers("Batch.ids", ids)
        if ids.shape != shape[:1]:
            raise InputError(f"Batch.ids {tuple(ids.shape)} must hold one id per row of mask")
        documents = self.documents
        if documents is not None:
            documents = whole_numbers("Batch.documents", documents).to(mask.device)
            if documents.shape != ids.shape:
                raise InputError(
                    f"Batch.documents {tuple(documents.shape)} must hold one document per row of "
                    f"mask {shape}"
                )
        if self.corpus is not None and not isinstance(self.corpus, str):
            raise InputError(f"Batch.corpus is {shown(self.corpus)}: must be a fingerprint or None")
        covariates = Covariates()
        for name, value in (self.covariates or {}).items():
            covariates[name] = each = as_tensor(f"Batch.covariates[{name!r}]", value)
            if each.shape[:1] != ids.shape:
                raise InputError(
                    f"Batch.covariates[{name!r}] is {tuple(each.shape)}: must hold one row per row "
                    f"of mask {shape}"
                )
        checked = {"x": x, "mask": mask, "ids": ids.to(mask.device), "documents": documents}
        for name, made in {**checked, "covariates": covariates}.items():
            object.__setattr__(self, name, made)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.mask.shape))
        of = "" if self.corpus is None else f" of corpus {self.corpus[:8]}"
        what = "sequences" if self.x is not None else "sequences still to be generated"
        return f"{type(self).__name__}({shape} {what}{of})"

    def _repr_html_(self) -> str:
        documents = self.documents
        facts = {
            "scored tokens": int(self.mask.sum()),
            "documents": "not known" if documents is None else len(documents.unique()),
            "covariates": ", ".join(self.covariates) or "none",
        }
        few = self.select(slice(_SHOWN))
        table = few.metadata
        if self.x is not None and self.origin is not None and self.origin.tokenizer is not None:
            table = table.assign(text=[shown(text) for text in few.texts()])
        return show(repr(self), facts, tables=[table])

    def __len__(self) -> int:
        return int(self.mask.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the batch lives."""
        return self.mask.device

    @property
    def observed(self) -> Tensor:
        """`x`, for code that cannot work without it; `InputError` if the batch is unobserved."""
        if self.x is None:
            raise InputError("this batch has no x: it describes sequences still to be generated")
        return self.x

    @property
    def n_tokens(self) -> Tensor:
        """Scored positions per sequence, (B,) int64."""
        return self.mask.flatten(1).sum(-1) if self.mask.dim() > 1 else self.mask.long()

    @cached_property
    def text_sizes(self) -> tuple[Tensor, Tensor] | None:
        """Bytes (B,) and white-space words (B,) of the raw text of the scored positions.

        A byte belongs to the token that writes it, a word to the token in which it begins, so those
        of a document's sequences add up to those of its text, whatever the tokenizer. `None` in a
        batch made by hand, and where tokens stand for no text.
        """
        if self.origin is None or self.device.type == "meta":
            return None
        found = self.origin.text_sizes(self.ids.cpu().numpy(), self.mask.cpu().numpy())
        if found is None:
            return None
        n_bytes, n_words = (torch.from_numpy(sizes).to(self.device) for sizes in found)
        return n_bytes, n_words

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        try:
            place = torch.device(device)
            if place.type == "cpu" and place.index:  # torch takes any number for the one CPU
                raise RuntimeError
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"device is {shown(device)}: must be e.g. 'cpu' or 'cuda:0'"
            ) from error
        return self._each(lambda value: value.to(place))

    def select(self, index: Tensor | slice | Sequence[int]) -> Batch:
        """The rows at `index`, in that order."""
        rows = index if isinstance(index, slice) else whole_numbers("index", index)
        return self._each(lambda value: value[rows])

    def unobserved(self) -> Batch:
        """The same sequences with `x` left open: the model then generates them."""
        return Batch(**{**self.plain_fields(), "x": None})

    def plain_fields(self) -> dict[str, Any]:
        """The fields of a plain `Batch` by name, for the constructor of a subclass."""
        return {f.name: getattr(self, f.name) for f in fields(Batch)}

    @property
    def holds_numbers(self) -> bool:
        """Whether there is something to look at: the meta device knows shapes alone."""
        return not self.mask.is_meta

    def usable(self) -> Batch:
        """The batch as ordinary tensors: those of `torch.inference_mode()` are copied.

        `InputError` if it is on the meta device.
        """
        if self.mask.is_meta:
            raise InputError(
                "batch is on the meta device, which holds no numbers: make it on another"
            )
        made = any(isinstance(v, Tensor) and v.is_inference() for v in vars(self).values())
        return self._each(torch.clone) if made and not torch.is_inference_mode_enabled() else self

    def distinct(self) -> Batch:
        """The batch; `InputError` if an id is in it twice: rows and noise belong to ids."""
        ordered = self.ids.sort().values if self.holds_numbers else self.ids[:0]
        repeated = ordered[1:] == ordered[:-1]
        if bool(repeated.any()):
            twice = int(ordered[1:][repeated][0])
            times = int((ordered == twice).sum())
            raise InputError(
                f"batch has sequence id {twice} {times} times: give each row an id of its "
                "own (Batch(x, ids=...))"
            )
        return self

    @property
    def filled_length(self) -> int:
        """The length that it can be cut to: a power of two that holds every row, or all of it."""
        whole = self.mask.shape[1]
        if self.mask.is_meta:
            return whole
        longest = int((self.mask.any(0) * (self.positions + 1)).max())
        return min(whole, max(SHORTEST, 1 << (longest - 1).bit_length()))

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

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with everything changed that holds something for each row."""
        changed: dict[str, Any] = {
            name: change(value)
            for name, value in self.plain_fields().items()
            if isinstance(value, Tensor)
        }
        changed["covariates"] = {name: change(value) for name, value in self.covariates.items()}
        return replace(self, **changed)

    def prefix(self, n: int) -> Batch:
        """The same sequences with their first `n` positions scored, 1 to T - 1 of them."""
        if self.mask.dim() != 2:
            raise InputError(f"prefix of a batch {tuple(self.mask.shape)}: needs sequences (B, T)")
        whole_number("prefix", n, at_least=1, at_most=self.mask.shape[1] - 1)
        return replace(self, mask=self.mask & self.positions.lt(n))

    def suffix(self, n: int) -> Batch:
        """The same sequences with only the positions after the first `n` scored."""
        return replace(self, mask=self.mask & self.positions.ge(n))

    def training_batch(
        self,
        step: int,
        batch_size: int,
        seed: int = 0,
        *,
        lanes: bool = False,
        rows: slice | None = None,
    ) -> Batch:
        """Distinct rows, chosen anew at each slow step; with lanes, row j is one of j, j + B, ...

        Arguments are those of `SequenceSet.training_batch`.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, Stream.BATCH, step))
        n, size = len(self), min(len(self), batch_size)
        if lanes:
            lane = torch.arange(size)
            members = (n - lane - 1) // size + 1
            drawn = torch.rand(size, generator=generator, dtype=torch.float64)
            index = lane + size * (drawn * members).long()
        else:
            index = torch.randperm(n, generator=generator)[:size]
        chosen = chosen_rows(size, rows)
        return self.select(index[chosen.start : chosen.stop].to(self.device))

    @cached_property
    def indices(self) -> Tensor:
        """Rows counted from 0, (B,)."""
        return torch.arange(len(self), device=self.device)

    @property
    def positions(self) -> Tensor:
        """Positions counted from 0, (T,)."""
        return torch.arange(self.mask.shape[1], device=self.device)


def chosen_rows(size: int, rows: slice | None) -> range:
    """The rows of a batch of `size` that `rows` names, one or more in a row; all by default."""
    chosen = range(size) if rows is None else range(*rows.indices(size))
    if not chosen or chosen.step != 1:
        raise InputError(
            f"rows {rows} of a batch of {size}: must be one or more rows that follow one another"
        )
    return chosen


def as_tensor(name: str, value: object) -> Tensor:
    """`value` as a tensor of numbers."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} is {shown(value)}: must be a tensor or an array of numbers, rows equally long"
        ) from error
    if tensor.is_complex():
        raise InputError(f"{name} is complex: must be whole or real numbers")
    return tensor


def whole_numbers(name: str, value: object) -> Tensor:
    """`value` as int64; `InputError` if it is of floats or truth values."""
    tensor = as_tensor(name, value)
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise InputError(f"{name} is of {tensor.dtype}: must be whole numbers (int64)")
    return tensor.long()


def _scored(x: object, mask: object) -> tuple[Tensor | None, Tensor]:
    """Positions (B, ...) and which of them count, as `Batch` keeps them."""
    if x is not None:
        x = as_tensor("Batch.x", x)
        if x.dim() < 1:
            raise InputError(f"Batch.x is {tuple(x.shape)}: must be (B, ...), a row a sequence")
        x = x if x.is_floating_point() else x.long()
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if mask is None:
        raise InputError("Batch needs x or a mask: without either it has no shape")
    chosen = _true_or_false("Batch.mask", as_tensor("Batch.mask", mask))
    if x is not None and x.shape != chosen.shape:
        raise InputError(f"Batch.mask {tuple(chosen.shape)} must match x {tuple(x.shape)}")
    if not chosen.numel():
        raise InputError(f"Batch is {tuple(chosen.shape)}: give at least one row, not empty")
    return x, chosen


def _true_or_false(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    if tensor.is_meta or not bool(((tensor == 0) | (tensor == 1)).all()):
        raise InputError(f"{name} holds other numbers than 0 and 1: must be true where x counts")
    return tensor.bool()
