"""What pip, conda and a reader of the repository get."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ltm_pyro

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch"}
"""Packages that conda-forge calls otherwise than the Python Package Index."""
OLDEST, NEWEST = {"python_version": "3.11"}, {"python_version": "3.13"}


def _ranges(lines: list[str]) -> dict[str, str]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed}


def _constraints(environment: dict[str, str]) -> dict[str, str]:
    """Pinned version per package on a Python version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    assert len({pin.name for pin in chosen}) == len(chosen), "a package is pinned twice"
    return {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in chosen}


def test_conda_environment_equals_the_runtime_dependencies() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    listed = _ranges([entry for entry in conda["dependencies"] if entry != "pip"])
    assert listed.pop("python") == PROJECT["requires-python"]
    declared = _ranges(PROJECT["dependencies"])
    assert listed == {CONDA_NAMES.get(name, name): spec for name, spec in declared.items()}


@pytest.mark.parametrize("environment", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_every_requirement_is_pinned_within_its_range(environment: dict[str, str]) -> None:
    pins = _constraints(environment)
    requirements = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["hf"]]
    for requirement in map(Requirement, requirements):
        version = pins[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}: pinned at {version}"


def test_constraints_are_plain_pins() -> None:
    # A local build label (+cpu) or an index would bind the file to one kind of machine.
    pin = re.compile(r'[a-z0-9-]+==[\w.]+( ; python_version (<|>=) "3\.\d+")?')
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)] == []
    assert _constraints(OLDEST)["torch"] == "2.13.0"


def test_arviz_is_supported_in_both_generations() -> None:
    assert _constraints(OLDEST)["arviz"].startswith("0.23.")
    assert _constraints(NEWEST)["arviz"].startswith("1.")


def _imported_packages(path: Path) -> set[str]:
    """Top-level names that a module imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_every_import_is_a_declared_dependency() -> None:
    imported = set().union(*map(_imported_packages, (ROOT / "ltm_pyro").rglob("*.py")))
    third_party = imported - set(sys.stdlib_module_names) - {"ltm_pyro"}
    declared = set(_ranges([*PROJECT["dependencies"], *EXTRAS["data"], *EXTRAS["hf"]]))
    distributions = packages_distributions()
    undeclared = {
        name
        for name in third_party
        if declared.isdisjoint(map(canonicalize_name, distributions.get(name, [name])))
    }
    assert undeclared == set()


@pytest.mark.parametrize("name", ["models", "inference"])
def test_top_level_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / "ltm_pyro" / name
    assert link.is_dir()


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == ltm_pyro.__version__ == PROJECT["version"]


def test_the_citation_names_the_licence_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == PROJECT["license"]
    assert any("2502.01567" in reference["doi"] for reference in citation["references"])


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The ordinary and the editable wheel, built by the backend's own hooks from a copy.

    A copy, because the backend leaves a `build` folder behind, whose stale files it would pack the
    next time.
    """
    work = tmp_path_factory.mktemp("packaging")
    source = work / "source"
    skipped = shutil.ignore_patterns("__pycache__", "runs", "build", "dist", "*.egg-info", ".*")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    built = {}
    for kind in ("wheel", "editable"):
        script = f"from setuptools.build_meta import build_{kind} as f; print(f({str(work)!r}))"
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        # The two wheels bear one name.
        built[kind] = (work / result.stdout.splitlines()[-1]).rename(work / f"{kind}.zip")
    return built


def _members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_installing_puts_only_the_package_into_site_packages(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    wheel = shutil.copy(
        wheels["wheel"], tmp_path / f"ltm_pyro-{PROJECT['version']}-py3-none-any.whl"
    )
    site = tmp_path / "site-packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", site, wheel], check=True)
    top_level = {path.name for path in site.iterdir()} - {"bin"}
    assert top_level == {"ltm_pyro", f"ltm_pyro-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_module_and_the_typing_marker(wheels: dict[str, Path]) -> None:
    members = set(_members(wheels["wheel"]))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ltm_pyro").rglob("*.py")}
    assert members >= modules | {"ltm_pyro/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in members)


def test_an_editable_install_exposes_only_the_package(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["editable"]) as archive:
        finder = next(name for name in archive.namelist() if name.endswith("_finder.py"))
        (mapping,) = re.findall(r"^MAPPING: .* = (\{.*\})$", archive.read(finder).decode(), re.M)
        paths = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".pth")]
    assert set(ast.literal_eval(mapping)) == {"ltm_pyro"}
    # A .pth line that is not an import would put a folder on the path, with all that lies in it.
    assert all(line.startswith("import ") for text in paths for line in text.splitlines())


LEFT_ALONE = """
import os, random
import numpy as np
import torch

def state():
    # torch sets its own.
    named = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    modes = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return named, modes, numbers

before = state()
import ltm_pyro as ltm
assert [getattr(ltm, name) for name in ltm.__all__]
assert state() == before, "importing"
model = ltm.LatentThoughtModel.from_preset("nano", vocab_size=16)
guide = ltm.build_guide("mean_field", model)
before = state()
ltm.DualRateSVI(model, guide, fast=ltm.Fast(steps=2), persistent=True)
assert state() == before, "constructing"
"""


def test_importing_and_constructing_leave_the_process_as_it_was() -> None:
    subprocess.run([sys.executable, "-c", LEFT_ALONE], check=True, cwd=ROOT)
