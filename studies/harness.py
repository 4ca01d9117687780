"""What all studies share: a grid of cells, each computed once, then a table, a figure, a paragraph.

A study NAME is two files. `studies/NAME.yaml` says what is asked and what is varied:

    question: Does ...?
    grid: {fast_steps: [1, 4, 16]}      every combination, times every seed
    seeds: [0, 1, 2]
    fixed: {steps: 300}                 settings that all cells share
    smoke: {grid: ..., seeds: [0], fixed: {steps: 2}}       in place of the above with --smoke
    data: wikitext2                     a corpus of the folder --data, or a list of them: then
                                        `cell` gets the folder itself
    chosen: Sizes were set ...          what was set after trials were seen, for README.md

Cells whose `corpus.name` is `DATA/NAME` are computed where --data has it, and else left out.

`studies/NAME.py` has three functions: `cell(settings, data)` computes one row (or several, as a
list of dicts), `figure(table)` draws the table, `paragraph(table)` says in words what comes out,
and what does not. A finished cell is a JSON file named by the hash of its settings and of its
script, and of what it reads (names, sizes and times of change): a study that was stopped goes on,
and one whose script or data has changed starts anew. A change of what the script imports is not
seen: then delete `cells` by hand.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pandas as pd
import pyro
import torch
import yaml
from tqdm.auto import tqdm

import ltm_pyro
from ltm_pyro.errors import InputError, unknown_name

HOME = Path(__file__).parent
Settings = dict[str, Any]


def names() -> list[str]:
    """All studies."""
    return sorted(path.stem for path in HOME.glob("*.yaml"))


@dataclass(frozen=True)
class Study:
    """One study, as its YAML describes it.

    Attributes:
        name: Of its two files.
        question: What it asks.
        cells: Settings of every cell, the seed among them.
        code: The module with `cell`, `figure` and `paragraph`.
        data: What `cell` gets: the corpus that it reads, the folder of several, or `None`.
        reads: The corpora.
        chosen: What was set after trials were seen; not part of a cell's hash.
        out: Where table, figure, paragraph and finished cells go.
        command: That makes all of it.
    """

    name: str
    question: str
    cells: list[Settings]
    code: ModuleType
    data: Path | None
    reads: list[Path]
    chosen: str
    out: Path
    command: str

    @classmethod
    def load(
        cls, name: str, *, smoke: bool = False, data: Path | None = None, out: Path | None = None
    ) -> Study:
        """Reads `studies/NAME.yaml`.

        Raises:
            InputError: if there is no such study, or it needs data that is not given.
        """
        if name not in names():
            raise unknown_name("study", name, names())
        plan = _plan(name)
        if smoke:
            plan = {**plan, **plan["smoke"]}
        wanted = plan.get("data")
        reads = [wanted] if isinstance(wanted, str) else wanted or []
        for corpus in reads:
            if data is None:
                raise InputError(f"study {name!r} reads {corpus!r}: give --data FOLDER that has it")
            if not (data / corpus).exists():
                raise InputError(f"--data {str(data)!r} has no {corpus!r}: give another folder")
        cells = [cell for cell in _cells(plan) if _has_its_corpus(cell, data)]
        given = bool(wanted) or any("DATA/" in str(cell.get("corpus.name")) for cell in cells)
        command = f"python -m studies {name}" + " --smoke" * smoke + " --data DATA" * given
        return cls(
            name=name,
            question=plan["question"],
            cells=cells,
            code=importlib.import_module(f"studies.{name}"),
            data=data / wanted if data and isinstance(wanted, str) else data if given else None,
            reads=[data / corpus for corpus in reads if data],
            chosen=plan.get("chosen", "").strip(),
            out=(out or HOME / "results") / (f"{name}_smoke" if smoke else name),
            command=command,
        )

    def run(self) -> pd.DataFrame:
        """Computes what is missing, then writes `table.csv`, `figure.png` and `README.md`."""
        for settings in tqdm(self.cells, desc=self.name, unit="cell"):
            self._computed(settings)
        return self._written()

    def anew(self, row: int) -> pd.DataFrame:
        """The rows of the cell that made row `row` of the table, computed anew.

        The table may be one that came with the repository, without cells: it then stays as it is.

        Raises:
            InputError: if there is no such row, or its settings are no cell's any more.
        """
        settings = self._cell_of(row)
        self._kept(settings).unlink(missing_ok=True)
        rows = self._computed(settings)
        if all(self._kept(each).exists() for each in self.cells):
            self._written()
        return pd.DataFrame(rows)

    def _computed(self, settings: Settings) -> list[dict[str, Any]]:
        """The rows of one cell, computed if they are not there."""
        path = self._kept(settings)
        if path.exists():
            return json.loads(path.read_text("utf-8"))["rows"]
        pyro.set_rng_seed(settings["seed"])
        began = time.perf_counter()
        made = self.code.cell(settings, self.data)
        rows = [{**settings, **row} for row in (made if isinstance(made, list) else [made])]
        kept = {"rows": rows, "seconds": round(time.perf_counter() - began, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        half.write_text(json.dumps(kept, default=float), "utf-8")
        half.replace(path)
        return rows

    def _kept(self, settings: Settings) -> Path:
        """Where the rows of a cell are kept."""
        source = Path(self.code.__file__ or "").read_bytes()
        known = [settings, ltm_pyro.__version__, *self._fingerprint]
        key = json.dumps(known, sort_keys=True).encode() + source
        return self.out / "cells" / f"{hashlib.sha256(key).hexdigest()[:16]}.json"

    @cached_property
    def _fingerprint(self) -> list[Any]:
        """Names, sizes and times of change of the files that it reads."""
        files = [file for corpus in self.reads for file in sorted(corpus.rglob("*"))]
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        return [[name, info.st_size, info.st_mtime_ns] for name, info in stats]

    def _cell_of(self, row: int) -> Settings:
        """The cell that row `row` of the table comes from: the one with its settings."""
        path = self.out / "table.csv"
        if not path.exists():
            raise InputError(f"--row {row}: {str(path)!r} is not there yet; leave --row out first")
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not 0 <= row < len(table):
            raise InputError(f"--row {row}: the table has rows 0 to {len(table) - 1}")
        told = dict(zip(table.columns, table.iloc[row], strict=True))
        differing = [_differing(told, cell) for cell in self.cells]
        # A cell may name one of its several rows otherwise: a reference beside what it varies.
        if not differing or min(differing) > 1:
            raise InputError(
                f"--row {row}: no cell of studies/{self.name}.yaml has its settings: give --data "
                "if it reads a corpus, or run the study anew"
            )
        return self.cells[differing.index(min(differing))]

    def _written(self) -> pd.DataFrame:
        """What all finished cells come to, as files too."""
        kept = [self._kept(each) for each in self.cells]
        done = [json.loads(path.read_text("utf-8")) for path in kept if path.exists()]
        table = pd.DataFrame([row for each in done for row in each["rows"]])
        self.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(self.out / "table.csv", index=False, float_format="%.6g")
        with mpl.rc_context({"backend": "Agg"}):
            self.code.figure(table).savefig(self.out / "figure.png", dpi=110, bbox_inches="tight")
        seconds = sum(each["seconds"] for each in done)
        seeds = sorted({each["seed"] for each in self.cells})
        made = (
            f"Made by `{self.command}`: {len(done)} of {len(kept)} cells, seeds {seeds}, "
            f"{seconds / 60:.0f} minutes in all on {torch.get_num_threads()} thread(s) of "
            f"{os.cpu_count()} cores ({platform.machine()}, no GPU), ltm_pyro "
            f"{ltm_pyro.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}."
        )
        said = [self.code.paragraph(table).strip(), self.chosen]
        text = [f"# {self.question}", *filter(None, said), "![figure](figure.png)", made]
        (self.out / "README.md").write_text("\n\n".join(text) + "\n", "utf-8")
        return table


def _has_its_corpus(cell: Settings, data: Path | None) -> bool:
    """Whether a cell's corpus is there, if it is one of the folder --data."""
    name = str(cell.get("corpus.name", ""))
    wanted = name.removeprefix("DATA/")
    return name == wanted or (data is not None and (data / wanted).exists())


def _cells(plan: dict[str, Any]) -> list[Settings]:
    """Every combination of the grid with every seed, on top of what is fixed."""
    grid = plan.get("grid") or {}
    return [
        {**(plan.get("fixed") or {}), **dict(zip(grid, values, strict=True)), "seed": seed}
        for values in itertools.product(*grid.values())
        for seed in plan["seeds"]
    ]


def _differing(told: Mapping[str, str], cell: Settings) -> int:
    """How many settings of a cell are others in a row of the table; lists make several rows."""
    shared = [n for n, value in cell.items() if n in told and not isinstance(value, list)]
    return sum(_text(told[name]) != _text(cell[name]) for name in shared)


def _text(value: Any) -> str:
    """A setting as a table tells it: numbers with six digits, whatever their type."""
    if isinstance(value, dict):
        value = value.get("name", value)
    try:
        return f"{float(str(value)):.6g}"
    except ValueError:
        return "" if value is None else str(value)


def _plan(name: str) -> dict[str, Any]:
    """What `studies/NAME.yaml` says.

    Raises:
        InputError: if it is no YAML, or lacks something.
    """
    file = f"studies/{name}.yaml"
    try:
        plan = yaml.safe_load((HOME / f"{name}.yaml").read_text("utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {' '.join(str(error).split())[:200]}") from error
    needed = {"question": str, "seeds": list, "smoke": dict}
    for key, kind in needed.items():
        if not isinstance(plan, dict) or not isinstance(plan.get(key), kind):
            raise InputError(f"{file} needs {key!r}, a {kind.__name__}: see studies/harness.py")
    grid = plan.get("grid") or {}
    if not isinstance(grid, dict) or not all(isinstance(each, list) for each in grid.values()):
        raise InputError(f"{file}: grid must hold a list of values for each setting")
    return plan
