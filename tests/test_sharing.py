"""A run given away and taken up again: its card, its files, and what is refused. No network."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_helpers import MICRO, write_text

import ltm_pyro as ltm
from ltm_pyro.cli import main
from ltm_pyro.errors import InputError
from ltm_pyro.run import hub

TRAP = "<script>alert(1)</script>[x](javascript:1)|`\x1b[31m"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and scored run; not to be changed."""
    folder = tmp_path_factory.mktemp("shared")
    text = write_text(folder / "text.txt", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltm_pyro.cli.artefacts._write_figures", lambda *arguments: None)
        patch.setattr("ltm_pyro.cli.artefacts.write_page", lambda *arguments: "")
        arguments = ["--corpus", str(text), "--out", str(folder / "run"), "--steps", "2", *MICRO]
        arguments += ["--corpus.options.fractions", "[0.5, 0.4, 0.1]"]
        assert main(["fit", *arguments]) == 0
    return folder / "run"


class FakeHub:
    """`huggingface_hub`, with folders of this machine for repositories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.HfApi = lambda token=None: self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, **_) -> None:
        for path in [p for p in (self.root / repo_id).rglob("*") if p.is_file()]:
            name = str(path.relative_to(self.root / repo_id))
            if any(fnmatch.fnmatch(name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in [p for p in Path(folder_path).rglob("*") if p.is_file()]:
            name = path.relative_to(folder_path)
            if any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                target = self.root / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, **_) -> None:
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def snapshot_download(self, repo_id, *, revision, token, allow_patterns) -> str:
        """Links, as the Hub's cache has them."""
        if not (self.root / repo_id).exists():
            raise OSError("404 Client Error\nRepository Not Found")
        cache = self.root / "cache" / f"{repo_id.replace('/', '--')}" / (revision or "0123456789ab")
        shutil.rmtree(cache, ignore_errors=True)
        for path in [p for p in (self.root / repo_id).rglob("*") if p.is_file()]:
            name = path.relative_to(self.root / repo_id)
            if any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).symlink_to(path)
        return str(cache)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path / "cache"))
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "_library", lambda: made)
    return made


def test_the_card_tells_data_scores_checks_and_limits(fitted: Path) -> None:
    run = ltm.load_run(fitted)
    card = run.model_card()
    scores = json.loads((fitted / "scores.json").read_text())
    for wanted in (
        "## Data", "## Scores", "## Checks", "Not made:", "## When not to use it",
        run.facts["corpus"]["sha256"], f"{scores['ppl_elbo']:.4f}", "upper bound",
        "Simulation-based calibration", f"{scores['control']['ppl_elbo']:.4f}",
    ):  # fmt: skip
        assert wanted in card
    assert str(fitted.parent) not in card  # no path of the sender's
    assert f"{scores['ppl_elbo']:.4g} ±" in run._repr_html_()


def test_texts_of_others_do_nothing_in_a_card(fitted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fitted, tmp_path / "run")
    facts = json.loads((folder / "config.json").read_text())
    facts["corpus"]["name"] = TRAP * 20
    facts["corpus"]["card"]["warnings"] = [TRAP]
    (folder / "config.json").write_text(json.dumps(facts))
    scores = json.loads((folder / "scores.json").read_text())
    scores["split"] = scores["mode_meaning"] = TRAP
    (folder / "scores.json").write_text(json.dumps(scores))
    card = ltm.load_run(folder).model_card()
    assert "<script" not in card
    assert "](javascript" not in card
    assert "\x1b" not in card
    assert max(map(len, card.splitlines())) < 1200
    (folder / "scores.json").write_text('{"unit": 3}')
    with pytest.raises(InputError, match="incomplete"):
        ltm.load_run(folder).model_card()
    (folder / "scores.json").unlink()
    assert "has not been scored" in ltm.load_run(folder).model_card()


def test_a_run_comes_back_from_the_hub_as_it_went(
    fitted: Path, fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ltm.load_run(fitted)
    assert run.push_to_hub("me/mine").endswith("me/mine")
    there = {str(p.relative_to(fake.root / "me/mine")) for p in (fake.root / "me").rglob("*.*")}
    assert {"README.md", "config.json", "tokenizer.json", "scores.json"} <= there
    assert not [name for name in there if name.endswith((".nc", ".png", ".html", ".lock"))]
    back = ltm.from_pretrained("me/mine")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, back.model.state_dict()[name])
    assert not [p for p in back.folder.rglob("*") if p.is_symlink()]
    assert back.model_card() == run.model_card().replace(
        f"# {fitted.name}", f"# {back.folder.name}"
    )
    mine = ltm.from_pretrained("me/mine", tmp_path / "mine")
    assert mine.folder == tmp_path / "mine"
    with pytest.raises(InputError, match="exists"):
        ltm.from_pretrained("me/mine", tmp_path / "mine")
    assert ltm.load_run("hf:me/mine@v1").svi.slow_step == 2
    # A second push takes the place of the first one's weights.
    assert main(["share", str(fitted), "--to", "me/mine"]) == 0
    assert "me/mine" in capsys.readouterr().out
    assert len(list((fake.root / "me/mine/checkpoint").glob("*.safetensors"))) == 1


def test_what_cannot_be_shared_is_told_in_a_line(
    fitted: Path, fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ltm.load_run(fitted)
    for name in ("", "a/b/c", "../x", "a b", "x\ny", 3):
        with pytest.raises(InputError, match="OWNER/NAME"):
            run.push_to_hub(name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="404") as told:
        ltm.from_pretrained("no/where")
    assert "\n" not in str(told.value)
    run.svi.slow_step += 1
    with pytest.raises(InputError, match="not saved"):
        run.push_to_hub("me/mine")
    (fake.root / "me" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="no run"):
        ltm.from_pretrained("me/empty")
    assert not list((tmp_path / "cache" / "hub").glob("*"))
    ltm.load_run(fitted).push_to_hub("me/changed")
    [weights] = (fake.root / "me/changed/checkpoint").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        ltm.from_pretrained("me/changed")
    assert main(["share", str(fitted), "--to", "a/b/c"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_card_on_the_command_line(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["share", str(fitted)]) == 0
    assert "## When not to use it" in capsys.readouterr().out
    assert main(["share", str(fitted), "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text().startswith("---\nlibrary_name")


def test_the_real_library_has_what_is_called() -> None:
    """The names and arguments that the fake stands for."""
    real = pytest.importorskip("huggingface_hub", reason="an optional package")
    from inspect import signature

    for function, names in (
        (real.HfApi.create_repo, ("repo_id", "private", "exist_ok")),
        (real.HfApi.upload_folder, ("repo_id", "revision", "folder_path", "allow_patterns",
                                    "delete_patterns", "commit_message")),
        (real.HfApi.upload_file, ("repo_id", "revision", "path_or_fileobj", "path_in_repo",
                                  "commit_message")),
        (real.snapshot_download, ("repo_id", "revision", "token", "allow_patterns")),
    ):  # fmt: skip
        assert set(names) <= set(signature(function).parameters)


def test_without_the_library_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> SimpleNamespace:
        raise ImportError(name)

    monkeypatch.setattr("ltm_pyro.run.hub.importlib.import_module", absent)
    with pytest.raises(InputError, match="huggingface_hub"):
        ltm.from_pretrained("me/mine")
