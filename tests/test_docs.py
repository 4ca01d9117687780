"""What README and docs tell people to run, runs; what they point at is there.

Commands run as printed, with smaller sizes added behind them: a later option wins.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from cli_helpers import MICRO, write_text
from registries import nothing_left_behind

import ltm_pyro as ltm
from ltm_pyro.cli import COMMANDS, main
from ltm_pyro.config import PRESETS
from ltm_pyro.inference.guides.registry import GUIDES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = re.compile(r"\bruns/\w+|\bRUN\b")
SMALL = {
    "fit": [*MICRO, "--steps", "1", "--eval_fast_steps", "2"],
    "compare": ["--budget", "64", "--sequences", "3", "--draws", "4", "--device", "cpu"],
    "evaluate": ["--sequences", "3", "--draws", "4"],
    "generate": ["--prompt", "The cat", "--length", "14"],
    "export": ["--sequences", "2"],
    "share": [],
    "report": ["--sequences", "3", "--draws", "2"],
    "cost": [],
    "watch": ["--once"],
}
HELD_OUT = ["--held_out.every", "1", "--held_out.sequences", "2", "--held_out.fast_steps", "1"]


def code_lines(page: Path) -> Iterator[str]:
    """Lines of fenced and indented blocks, and code in the text, continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        yield from block.splitlines()
    yield from (line.strip() for line in outside.splitlines() if line.startswith("    "))
    yield from (code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", outside))


def commands() -> list[str]:
    """Each command of the package that a page shows, once, without `torchrun` around it."""
    found: dict[str, None] = {}
    for page in PAGES:
        for line in code_lines(page):
            words = shlex.split(line, comments=True) if "ltm" in line else []
            if "ltm_pyro" in words and words[0] == "torchrun":
                words = words[words.index("ltm_pyro") :]
            whole = len(words) > 2 and words[0] in ("ltm-pyro", "ltm_pyro") and words[1] in COMMANDS
            if whole and "..." not in line and "--import" not in words:
                found[shlex.join(words[1:])] = None
    return list(found)


def test_the_pages_show_commands() -> None:
    assert {command.split()[0] for command in commands()} == set(COMMANDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read: a text, and a run under each name that is read."""
    folder = tmp_path_factory.mktemp("docs")
    write_text(folder / "book.txt")
    write_text(folder / "other.txt", blocks=15)
    (folder / "grid.yaml").write_text("seed: [0, 1]")
    (folder / "novels").mkdir()
    for author in ("Austen", "Dickens", "Doyle", "Twain"):
        book = write_text(folder / "novels" / f"{author}__a_book.md")
        book.write_text(book.read_text().replace("cat", author))
    return folder


def fit_small(folder: Path, out: str) -> None:
    arguments = ["--corpus", str(folder / "book.txt"), "--out", str(folder / out)]
    assert main(["fit", *arguments, *SMALL["fit"], *HELD_OUT]) == 0


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_pages_runs(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *given = shlex.split(RUN.sub(lambda m: m.group().replace("RUN", "runs/any"), command))
    monkeypatch.chdir(place)
    resumes = "--resume" in given
    runs = [word for word in given if RUN.fullmatch(word)]
    for read in runs:
        is_read = name != "fit" or resumes or f"--init_from {read}" in command
        if not Path(read).exists() and is_read:
            fit_small(place, read)
    if name == "fit" and not resumes:
        given = [*given, "--device", "cpu", *SMALL["fit"]]
        given += [] if "--sweep" in given else ["--overwrite"]
        if "--corpus" not in given and "mixture" not in given:
            given += ["--corpus", "book.txt"]
    elif name == "compare" and (len(runs) > 1 or not Path(runs[0], "config.json").exists()):
        given += SMALL["evaluate"]
    elif resumes:
        given += ["--steps", "2"] if "--steps" in given else []
    else:
        given += SMALL[name]
    assert main([name, *given]) == 0, capsys.readouterr().err


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures, which tests of their own draw."""
    monkeypatch.setattr("ltm_pyro.cli.artefacts._write_figures", lambda run, held_out: None)
    monkeypatch.setattr("ltm_pyro.cli.artefacts.write_page", lambda *arguments: "")


@pytest.mark.usefixtures("quick_reports")
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_as_it_stands(
    preset: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One slow step of a small model, with everything that is not a size as the preset has it."""
    given = ["fit", "--preset", preset, "--out", str(place / preset), *SMALL["fit"]]
    if PRESETS[preset].corpus.name == "pydoc":
        given += ["--corpus", str(place / "book.txt")]
    assert main(given) == 0, capsys.readouterr().err


def python_blocks() -> list[str]:
    """The Python of README, each block going on from those before it."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    code = "\n".join(python_blocks())
    small = re.sub(r"seq_len=\d+", "seq_len=32", code)
    small = small.replace('"pydoc"', repr(str(write_text(tmp_path / "book.txt", blocks=60))))
    small = re.sub(r"\bsteps=\d{2,}", "steps=2", small)
    small = re.sub(r"range\(32\)", "range(4)", small)
    small = re.sub(r"budget=\d+", "budget=4", small)
    small = small.replace(
        "vocab_size=corpus.vocab_size", "vocab_size=corpus.vocab_size, seq_len=32"
    )
    names: dict[str, object] = {}
    exec(compile(small, "README.md", "exec"), names)
    assert names["scores"].sizes["sequence"] == 4  # type: ignore[attr-defined]
    assert len(names["texts"]) == 2  # type: ignore[arg-type]


def test_the_python_of_the_page_on_runs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "runs.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    write_text(Path("book.txt"), blocks=60)
    told: list[tuple[str, object]] = []

    class Service(ModuleType):
        """A service that notes what it is asked for."""

        def __getattr__(self, name: str) -> object:
            return lambda *given, **named: told.append((name, named or given)) or self

    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, Service(name))
    exec(compile(code, "runs.md", "exec"), {"ltm": ltm})
    asked = [name for name, _ in told]
    assert asked == [
        *("init", *["log"] * 4, "finish"),
        *("start_run", *["log_metrics"] * 4, "end_run"),
    ]
    assert "+-" in capsys.readouterr().out


def own_blocks() -> list[str]:
    """The Python of docs/your_own.md, each block complete in itself."""
    text = (ROOT / "docs" / "your_own.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", own_blocks(), ids=["model", "guide", "prior", "objective", "svi"])
def test_your_own_runs_as_printed(block: str) -> None:
    with nothing_left_behind():
        exec(compile(block, "your_own.md", "exec"), {"__name__": "your_own"})


def test_a_module_of_your_own_is_known_to_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = next(block for block in own_blocks() if "register_guide" in block)
    (tmp_path / "my_module.py").write_text(guide[: guide.index("oracle =")])
    monkeypatch.syspath_prepend(tmp_path)
    text = write_text(tmp_path / "book.txt")
    given = ["--import", "my_module", "--guide", "laplace_tails", "--corpus", str(text)]
    try:
        done = main(["fit", *given, "--out", str(tmp_path / "mine"), *SMALL["fit"]])
        assert done == 0, capsys.readouterr().err
    finally:
        GUIDES.remove("laplace_tails")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_files_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    files = re.findall(r"`((?:benchmarks|docs|tests|notebooks|ltm_pyro)/[\w./]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [n for n in files if "_build" not in n and not (ROOT / n).exists()]
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([a-z][\w-]*)", text)
    missing += [target for target in targets if f"\n{target}:" not in makefile]
    assert missing == []


def test_every_public_name_is_in_the_pages() -> None:
    """In prose, and in the reference that Sphinx makes from docstrings."""
    reference = (ROOT / "docs" / "api.rst").read_text()
    listed = re.findall(r"^\.\. auto\w+:: ([\w.]+)", reference, flags=re.MULTILINE)
    assert sorted({*ltm.__all__} - {*listed}) == ["__version__"]
    assert len(listed) == len(set(listed))


def test_every_line_beside_its_formula_is_in_its_file() -> None:
    page = (ROOT / "docs" / "pyro_to_maths.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| .* \| `(ltm_pyro/[\w/]+\.py)` \|$", page, flags=re.MULTILINE)
    assert len(rows) > 12
    for line, file in rows:
        assert line in (ROOT / file).read_text(), f"{file} has no line {line!r}"


@pytest.mark.parametrize("page", ["from_svi.md", "arviz.md", "neighbours.md"])
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    for block in blocks:
        with nothing_left_behind():
            exec(compile(block, page, "exec"), {"__name__": page})


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(re.findall(r"^(\w+)$", index, flags=re.MULTILINE))
