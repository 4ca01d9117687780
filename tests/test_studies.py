"""Studies: what is computed is kept, and a study that was stopped goes on."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from ltm_pyro.run import create_run, train, train_control
from studies import harness
from studies.__main__ import main
from studies.common import config_of, train_both, with_errors
from studies.wikitext import articles

RESULTS = harness.HOME / "results"

TOY = """
def cell(settings, data):
    if settings["seed"] == STOP:
        raise KeyboardInterrupt
    return [{"double": 2 * settings["n"]}, {"double": 0}]

def figure(table):
    from matplotlib.figure import Figure
    return Figure()

def paragraph(table):
    return f"{len(table)} rows"
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of its own, whose third seed stops it."""
    plan = {"question": "Twice?", "grid": {"n": [1, 2]}, "seeds": [0, 1, 2], "fixed": {"a": 3}}
    plan |= {"smoke": {"seeds": [0]}, "chosen": "Sizes were set after trials."}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(harness, "HOME", tmp_path)
    monkeypatch.setattr("studies.__path__", [str(tmp_path)])
    import studies.toy

    studies.toy.STOP = 2
    return tmp_path


def test_a_stopped_study_keeps_what_it_has_and_goes_on(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import studies.toy

    assert main(["toy"]) == 130
    assert "goes on" in capsys.readouterr().err
    kept = list((toy / "results/toy/cells").glob("*.json"))
    assert len(kept) == 2  # n = 1, seeds 0 and 1
    before = {path: path.stat().st_mtime_ns for path in kept}
    studies.toy.STOP = None
    assert main(["toy"]) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    table = (toy / "results/toy/table.csv").read_text().splitlines()
    assert table[0] == "a,n,seed,double"
    assert len(table) == 1 + 2 * 2 * 3
    text = (toy / "results/toy/README.md").read_text()
    assert "12 rows" in text
    assert "python -m studies toy" in text
    assert "after trials" in text


@pytest.mark.parametrize("name", harness.names())
def test_a_result_says_what_was_chosen_after_trials(name: str) -> None:
    chosen = yaml.safe_load((harness.HOME / f"{name}.yaml").read_text()).get("chosen", "")
    result = harness.HOME / "results" / name / "README.md"
    assert not result.exists() or chosen.strip() in result.read_text()


def test_one_row_is_computed_anew(toy: Path) -> None:
    import studies.toy

    studies.toy.STOP = None
    assert main(["toy"]) == 0
    kept = sorted((toy / "results/toy/cells").glob("*.json"))
    for path in kept:
        path.write_text(json.dumps({**json.loads(path.read_text()), "mark": 1}))
    assert main(["toy", "--row", "3"]) == 0
    assert sum("mark" not in json.loads(path.read_text()) for path in kept) == 1


def test_a_row_of_a_table_without_cells_is_computed_anew(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a fresh clone; the other rows stay."""
    import studies.toy

    studies.toy.STOP = None
    assert main(["toy"]) == 0
    out = toy / "results/toy"
    for path in (out / "cells").glob("*.json"):
        path.unlink()
    before = (out / "table.csv").read_text()
    assert main(["toy", "--row", "7"]) == 0  # n = 2, seed 0, the second of its rows
    assert (out / "table.csv").read_text() == before
    (path,) = (out / "cells").glob("*.json")
    assert [row["n"] for row in json.loads(path.read_text())["rows"]] == [2, 2]
    assert "double" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in harness.names() if (RESULTS / n).exists()])
def test_each_row_of_a_result_belongs_to_one_cell(name: str, tmp_path: Path) -> None:
    """So that `--row` finds it."""
    plan = yaml.safe_load((harness.HOME / f"{name}.yaml").read_text())
    wanted = plan.get("data") or []
    cells = [str(value) for value in (plan.get("grid") or {}).get("corpus.name", [])]
    corpora = [wanted] if isinstance(wanted, str) else wanted
    for corpus in (*corpora, *(c.removeprefix("DATA/") for c in cells if "DATA/" in c)):
        (tmp_path / corpus).mkdir(parents=True, exist_ok=True)
    study = harness.Study.load(name, data=tmp_path)
    for row in range(len(pd.read_csv(RESULTS / name / "table.csv"))):
        study._cell_of(row)


@pytest.mark.parametrize(
    ("text", "named"),
    [("a: [1", "no YAML"), ("- 1", "question"), ("{question: Q, smoke: {}}", "seeds"),
     ("{question: Q, seeds: [0], smoke: {}, grid: {n: 1}}", "grid")],
)  # fmt: skip
def test_a_malformed_plan_is_refused(
    toy: Path, text: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy / "toy.yaml").write_text(text)
    assert main(["toy"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "toy.yaml" in told
    assert named in told


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["toi"], "toi"), (["toy", "--row", "99"], "99")],
)
def test_what_does_not_exist_is_refused(
    toy: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import studies.toy

    studies.toy.STOP = None
    assert main(arguments) == 2
    assert named in capsys.readouterr().err


def test_cells_of_a_corpus_that_is_not_there_are_left_out(toy: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load((toy / "toy.yaml").read_text())
    plan["grid"] = {"corpus.name": ["mixture", "DATA/here", "DATA/elsewhere"]}
    (toy / "toy.yaml").write_text(yaml.safe_dump(plan))
    data = tmp_path / "data"
    (data / "here").mkdir(parents=True)
    found = harness.Study.load("toy", data=data)
    assert {cell["corpus.name"] for cell in found.cells} == {"mixture", "DATA/here"}
    assert found.data == data
    assert config_of({"corpus.name": "DATA/here"}, data).corpus.name == str(data / "here")
    alone = harness.Study.load("toy")
    assert {cell["corpus.name"] for cell in alone.cells} == {"mixture"}
    assert "--data" in found.command
    assert "--data" not in alone.command


def test_means_stand_with_their_errors_over_seeds() -> None:
    table = pd.DataFrame({"study.a": [1, 1, 2], "seed": [0, 1, 0], "loss": [3.0, 5.0, 7.0]})
    assert with_errors(table, ["study.a"], {"loss": "loss, nats"}) == (
        "| a | loss, nats |\n|---|---|\n| 1 | 4.00 ± 1.00 |\n| 2 | 7 |"
    )


def test_a_control_that_shares_the_start_is_the_one_fitted_alone(tmp_path: Path) -> None:
    small = {"seq_len": 16, "n_layers": 1, "width": 16, "n_heads": 2, "mlp_hidden": 16}
    config = config_of({"preset": "nano", "model": small, "steps": 6, "slow.thoughts_start": 0.5,
                        "batch_size": 2, "fast.steps": 2, "compile": False})  # fmt: skip
    both, alone = (create_run(tmp_path / name, config) for name in ("both", "alone"))
    corpus = both.corpus()
    train_both(both, corpus)
    train(alone, corpus, progress=False)
    train_control(alone, corpus, progress=False)
    # One computation, done once or twice: bit for bit.
    for mine, its in ((both.svi, alone.svi), (both.control(), alone.control())):
        for name, value in mine.model.state_dict().items():
            assert torch.equal(value, its.model.state_dict()[name]), name
    assert len(both.control_metrics()) == len(both.metrics) == 6


def test_articles_are_cut_before_their_headings() -> None:
    text = (
        " \n = One = \n \n said so \n = no heading = \n \n = = Part = = \n \n \n = Two = \n \n b "
    )
    assert len(articles(text)) == 2
    assert articles("no heading \n") == ["no heading \n"]


@pytest.mark.slow
@pytest.mark.parametrize("name", harness.names())
def test_every_study_runs(name: str, tmp_path: Path) -> None:
    plan = yaml.safe_load((harness.HOME / f"{name}.yaml").read_text())
    arguments = [name, "--smoke", "--out", str(tmp_path)]
    if "data" in plan:
        make_data(tmp_path)
        arguments += ["--data", str(tmp_path)]
    assert main(arguments) == 0
    out = tmp_path / f"{name}_smoke"
    assert {"table.csv", "figure.png", "README.md"} <= {path.name for path in out.iterdir()}


def make_data(folder: Path) -> None:
    """A little of every corpus that a study may ask for."""
    words = ["one thought", "another thought", "nothing at all", "it was late", "she said so"]
    texts = [" ".join(words[(book + i * i) % 5] for i in range(400)) for book in range(8)]
    for name in ("novels", "wikitext2", "tinyshakespeare", "gsm8k"):
        (folder / name).mkdir()
    for book, text in enumerate(texts):
        (folder / "novels" / f"author{book % 3} - book{book}.md").write_text(text)
    lines = " \n ".join(text[i : i + 300] for text in texts for i in range(0, 4000, 300))
    lines += "".join(f" \n = Article {i} = \n \n {text[i:400]} \n" for i, text in enumerate(texts))
    for file in ("wikitext2/train.txt", "wikitext2/valid.txt", "wikitext2/test.txt"):
        (folder / file).write_text(lines)
    (folder / "tinyshakespeare" / "input.txt").write_text(lines)
    problems = [
        {"question": f"{words[i % 5]}: how many are {i} and 3?", "answer": f"#### {i + 3}"}
        for i in range(300)
    ]
    for name in ("train", "test"):
        problem_lines = "".join(json.dumps(each) + "\n" for each in problems)
        (folder / "gsm8k" / f"{name}.jsonl").write_text(problem_lines)
    make_dialogues(folder / "sgd")


def make_dialogues(folder: Path) -> None:
    """Of three services, in the form of the reduced Schema-Guided Dialogues."""
    folder.mkdir()
    said = {"Hotels": "a room in town", "Buses": "a seat to town", "Movies": "show me films"}
    with gzip.open(folder / "train.jsonl.gz", "wt", encoding="utf-8") as out:
        for i in range(120):
            service = list(said)[i % 3]
            turns = [
                {
                    "s": "US"[t % 2],
                    "u": f"{said[service]} {i} please",
                    "i": [f"Find{service}"][: t + 1],
                }
                for t in range(8)
            ]
            out.write(json.dumps({"services": [f"{service}_1"], "turns": turns}) + "\n")
