"""Documents from a Hugging Face dataset, through the optional package `datasets`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ltm_pyro.data.memory import MemorySource
from ltm_pyro.data.records import Document, Reading
from ltm_pyro.data.split import SPLIT_NAMES
from ltm_pyro.errors import InputError, shown, unknown_name

PREFIX = "hf:"


class HubSource:
    """The texts of a dataset, one document per row.

    Without a revision the dataset is named in the cache's key, not its state: name the revision, or
    clear the cache, to follow an update.

    Args:
        dataset: Its name on the hub, e.g. `owner/name` or `owner/name@REVISION`.
        config: Its configuration, where it has several.
        hub_split: Its split to read, which is then split into train, val and test as any corpus.
        reading: Which part of a row is the text; `given`: all its splits, kept as they are.
    """

    def __init__(
        self,
        dataset: str,
        config: str | None = None,
        hub_split: str = "train",
        reading: Reading | None = None,
    ) -> None:
        self.dataset, _, revision = dataset.partition("@")
        if not self.dataset:
            raise InputError(f"{shown(PREFIX + dataset)} names no dataset: write {PREFIX}NAME")
        for what, value in (("config", config or ""), ("hub_split", hub_split)):
            if not isinstance(value, str):
                raise InputError(f"{what} is {shown(value)}: must be a name")
        self.revision, self.config, self.hub_split = revision or None, config, hub_split
        self.reading = reading or Reading()
        self.name = self.dataset.rpartition("/")[2]
        self.files = (dataset,)

    def identity(self) -> Mapping[str, Any] | None:
        """The dataset's name, revision, configuration and split, and how it is read."""
        names = {"dataset": self.dataset, "revision": self.revision, "config": self.config}
        split = {"split": None if self.reading.given else self.hub_split}
        return {"source": "huggingface", **names, **split, **self.reading.identity()}

    def documents(self) -> Iterator[Document]:
        """The text of each row."""
        try:
            yield from MemorySource(self._rows(), self.reading).documents()
        except InputError as error:
            raise InputError(f"{self._shown}: {error}") from None
        except Exception as error:  # names, networks, files: the library raises errors of any kind
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"cannot load {self._shown}: {reason}") from None

    @property
    def _shown(self) -> str:
        return f"the Hugging Face dataset {shown(self.dataset)}"

    def _rows(self) -> Iterable[Any]:
        """Rows, or, where the dataset's own splits are asked for, rows by split."""
        try:
            datasets = importlib.import_module("datasets")
        except ModuleNotFoundError:
            raise InputError(
                f"{shown(self.dataset)} is no file or folder here, and to read it as a dataset an "
                'optional package is needed: pip install "ltm-pyro[hf]"'
            ) from None
        return self._loaded(datasets)

    def _loaded(self, datasets: Any) -> Iterable[Any]:
        options = {"revision": self.revision} if self.revision else {}
        if not self.reading.given:
            options["split"] = self.hub_split
        found = datasets.load_dataset(self.dataset, self.config, **options)
        return _known_splits(found) if self.reading.given else found


class SavedSource(HubSource):
    """A dataset that `save_to_disk` has put into `folder`; its texts, one document per row."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder.resolve().name or "data", **options)
        self._folder = folder

    def identity(self) -> None:
        """Only reading tells what is in it."""

    def _loaded(self, datasets: Any) -> Iterable[Any]:
        found = datasets.load_from_disk(str(self._folder))
        if self.reading.given:
            return _known_splits(found)
        if not isinstance(found, Mapping):
            return found
        if self.hub_split not in found:
            raise unknown_name("hub_split", shown(self.hub_split)[1:-1], list(found))
        return found[self.hub_split]


def is_saved(path: Path) -> bool:
    """Whether `path` is a folder that `save_to_disk` of the library has written."""
    return any(os.path.isfile(path / name) for name in ("dataset_dict.json", "dataset_info.json"))


def _known_splits(found: Any) -> Iterable[Any]:
    """Rows by split; others, such as an unlabelled one, are no part of what is scored."""
    if not isinstance(found, Mapping):
        raise InputError('it has no splits of its own: choose split="document"')
    return {k: v for k, v in found.items() if k.lower() in SPLIT_NAMES}
