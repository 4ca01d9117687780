"""Documents from a Hugging Face dataset, through the optional package `datasets`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from ltm_pyro.errors import InputError

PREFIX = "hf:"


class HubSource:
    """The strings in one column of one split of a dataset, one document per row.

    The dataset is named in the cache's key, not its revision: clear the cache to follow an update.

    Args:
        dataset: Its name on the hub, e.g. `owner/name`.
        config: Its configuration, where it has several.
        split: Its split to read. The corpus is then split into train, val and test as any other.
    """

    def __init__(self, dataset: str, config: str | None = None, split: str = "train") -> None:
        self.dataset = dataset
        self.config = config
        self.split = split
        self.name = dataset.rpartition("/")[2]

    def identity(self) -> Mapping[str, Any]:
        """The dataset's name, configuration and split."""
        names = {"dataset": self.dataset, "config": self.config, "split": self.split}
        return {"source": "huggingface", **names}

    def documents(self) -> Iterator[str]:
        """The `text` of each row."""
        for number, row in enumerate(self._rows()):
            text = row.get("text")
            if not isinstance(text, str):
                raise InputError(
                    f'row {number} of {self._shown} has no string "text": choose a dataset with a '
                    "text column"
                )
            yield text

    @property
    def _shown(self) -> str:
        return f"the Hugging Face dataset {self.dataset!r}"

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        try:
            datasets = importlib.import_module("datasets")
        except ModuleNotFoundError:
            raise InputError(
                f"{self.dataset!r} is no file or folder here, and to read {self._shown} an "
                'optional package is needed: pip install "ltm-pyro[hf]"'
            ) from None
        try:
            yield from datasets.load_dataset(self.dataset, self.config, split=self.split)
        except (OSError, ValueError) as error:  # what the library raises for names and networks
            reason = " ".join(str(error).split())
            raise InputError(f"cannot load {self._shown}: {reason}") from None
