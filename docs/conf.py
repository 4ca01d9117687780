"""Sphinx: the pages of this folder, the notebooks as they were committed, the API from docstrings.

Nothing is executed and nothing is fetched: `make docs`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

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
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_math_renderer = "mathml"


def setup(app: Any) -> None:
    """Formulas that browsers draw themselves; links to notebooks as they lie in the repository."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("source-read", _notebooks_beside_the_pages)


def _formula(writer: Any, node: nodes.Element) -> None:
    """MathML, which needs no script and no network."""
    block = isinstance(node, nodes.math_block)
    spaced = node.astext().replace(r"\log", r"\log\,")  # which TeX does by itself
    formula = tex2mathml(spaced, as_block=block)
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def _notebooks_beside_the_pages(app: Any, name: str, source: list[str]) -> None:
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")
