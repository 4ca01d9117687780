"""Executes notebooks and writes their outputs, marked with the code that they are of.

    python notebooks/execute.py [NOTEBOOK ...]

Without names: those whose outputs are older than their code.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells in their order."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def is_current(notebook: nbformat.NotebookNode) -> bool:
    """Whether the outputs are of the code that stands beside them."""
    return notebook.metadata.get("ltm_pyro", {}).get("executed") == code_hash(notebook)


def execute(path: Path) -> None:
    """Executes one notebook in place; keeps no progress bars and no times."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=300, resources=where, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata["ltm_pyro"] = {"executed": code_hash(notebook)}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or [
        path
        for path in sorted(HERE.glob("*.ipynb"))
        if not is_current(nbformat.read(path, as_version=4))
    ]
    for path in chosen:
        start = time.perf_counter()
        execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size // 1024} kB")
