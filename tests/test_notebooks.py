"""The course: every notebook is listed, executed, and newer than its code; every solution runs."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
from registries import nothing_left_behind

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
LARGEST_BYTES = 300_000
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


def solutions(path: Path) -> list[str]:
    folded = re.findall(r"<details>.*?</details>", prose(path), flags=re.DOTALL)
    return [BLOCK.findall(solution)[0] for solution in folded]


def executor() -> Any:
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_course_is_numbered_and_listed() -> None:
    assert [name[:3] for name in NAMES] == [f"{n:02d}_" for n in range(1, len(NAMES) + 1)]
    listed = re.findall(r"^notebooks/(\w+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert listed == NAMES
    assert re.findall(r"\(notebooks/(\w+)\.ipynb\)", (ROOT / "README.md").read_text()) == NAMES


@each_notebook
def test_its_outputs_are_of_its_code(path: Path) -> None:
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert executor().is_current(read(path)), f"run `make notebooks`: {path.name} is out of date"
    outputs = [out for cell in code for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert path.stat().st_size < LARGEST_BYTES


def test_a_change_of_code_is_seen() -> None:
    notebook = read(NOTEBOOKS[0])
    next(c for c in notebook.cells if c.cell_type == "code").source += "\n"
    assert not executor().is_current(notebook)


@each_notebook
def test_it_teaches(path: Path) -> None:
    """What opens and closes a lesson, something to predict, and a conclusion that is pinned."""
    text = prose(path)
    missing = [
        part
        for part in ("After this notebook you can", "Know before", "**Predict", "*Conclude:*",
                     "## What to remember", "## Exercises", "## References")
        if part not in text
    ]  # fmt: skip
    assert missing == []
    assert any("assert " in cell.source for cell in cells(path, "code"))
    assert "__version__" in cells(path, "code")[-1].source
    place = NAMES.index(path.stem)
    around = [name for i, name in enumerate(NAMES) if abs(i - place) == 1]
    last = cells(path, "markdown")[-1].source
    assert re.findall(r"\]\((\w+)\.ipynb\)", last) == around


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, i) for path in NOTEBOOKS for i in range(len(solutions(path)))],
    ids=lambda value: value.stem[:2] if isinstance(value, Path) else str(value + 1),
)
def test_a_solution_runs(path: Path, number: int) -> None:
    """After the cells that are tagged `setup`, as a reader has them."""
    names: dict[str, Any] = {"__name__": path.stem}
    setup = [c.source for c in cells(path, "code") if "setup" in c.metadata.get("tags", [])]
    with nothing_left_behind(), matplotlib.rc_context(), warnings.catch_warnings():
        for code in [*setup, solutions(path)[number]]:
            exec(compile(code, f"{path.stem}, solution {number + 1}", "exec"), names)
