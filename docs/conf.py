"""Sphinx: the pages of this folder, the notebooks as they were committed, the API from docstrings.

Nothing is executed and nothing is fetched: `make docs`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ltm_pyro

# Sphinx reads what lies below this folder alone; the copy is not committed.
HERE = Path(__file__).resolve().parent
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

project = "ltm_pyro"
author = "The ltm-pyro contributors"
release = version = ltm_pyro.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "*.json"]
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"
html_theme = "furo"
html_title = "ltm_pyro"


def setup(app: Any) -> None:
    """Links to notebooks are written as they lie in the repository, so that they work there too."""
    app.connect("source-read", _notebooks_beside_the_pages)


def _notebooks_beside_the_pages(app: Any, name: str, source: list[str]) -> None:
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")
