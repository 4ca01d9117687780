"""The report: its numbers, its order, and text that must not act."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from cli_helpers import MICRO, write_text
from report_helpers import hostile_run, numbers_of

from ltm_pyro.cli import main
from ltm_pyro.cli.fit import _parser
from ltm_pyro.cli.settings import build_config, expand_shortcuts, given_settings
from ltm_pyro.config import FitConfig, preset
from ltm_pyro.diagnostics.compare import Comparison
from ltm_pyro.errors import InputError
from ltm_pyro.report import make_report
from ltm_pyro.report.checks import FAILED, NOT_MADE, PASSED, _of_the_posterior
from ltm_pyro.report.identity import fit_command
from ltm_pyro.report.text import visible
from ltm_pyro.report.verdict import _answer
from ltm_pyro.run import load_run

ORDER = [
    *("Verdict", "Identity", "Data", "Course of the fit", "Held-out scores", "By document"),
    *("Trust in the weights", "Use of thoughts", "Gaps and reference", "Map of thoughts"),
    *("Surprise", "Samples", "Checks", "Files"),
]


def test_what_a_comparison_does_not_know_fails_no_check() -> None:
    """An encoder has no fast loop to be too short, and a chain that disagrees measures nothing."""
    guides = ["amortized", "mean_field"]
    columns = {
        "truncation_gap_per_sequence": [math.nan, 0.3],
        "truncation_gap_per_sequence_error": [math.nan, 0.2],
        "reference_scale_ratio_median": [math.nan, math.nan],
    }
    data = xr.Dataset({n: ("guide", v) for n, v in columns.items()}, {"guide": guides})
    loop, scales, *_ = _of_the_posterior(Comparison(data))
    assert loop["state"] == PASSED
    assert "0.30 nats" in loop["found"]
    assert scales["state"] == NOT_MADE
    encoder = Comparison(data.isel(guide=[0]))
    assert _of_the_posterior(encoder)[0]["state"] == NOT_MADE


class Page(HTMLParser):
    """What a browser would make of a page: tags, numbers with their text, and the other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag == "data":
            self.numbers.append((dict(attrs)["value"] or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        if not {"svg", "style", "script"}.isdisjoint(self._open):
            return
        if "data" in self._open:
            self.numbers[-1] = (self.numbers[-1][0], self.numbers[-1][1] + data)
        elif "h2" in self._open:
            self.headings.append(data)
        else:
            self.words.append(data)


def leaves(value: Any) -> list[Any]:
    """Every number, text and truth value in a tree of JSON types."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_sections_come_in_their_order(page: Page) -> None:
    assert page.headings == ORDER


def test_every_number_of_the_page_is_in_the_json(run: Path, page: Page) -> None:
    known = leaves(numbers_of(run))
    numbers = {x for x in known if isinstance(x, int | float) and not isinstance(x, bool)}
    assert len(page.numbers) > 100
    for whole, shown in page.numbers:
        if not whole:
            assert shown == "\N{EN DASH}"
            continue
        assert float(whole) in numbers
        decimals = len(shown.partition(".")[2])
        if "e" in shown:
            assert float(shown) == pytest.approx(float(whole), rel=1e-5)
        else:
            assert abs(float(shown.replace(",", "")) - float(whole)) <= 0.5001 * 10**-decimals
    # What is said in words comes from there too: the template itself holds no decimals.
    told = "\n".join(str(x) for x in known if isinstance(x, str))
    for word in re.findall(r"\d+\.\d+", " ".join(page.words)):
        assert word in told


def test_its_numbers_are_those_of_the_scores(run: Path) -> None:
    report = numbers_of(run)
    scores = json.loads((run / "scores.json").read_text())
    assert report["held_out"]["scores"] == scores
    elbo, weighted, control = report["held_out"]["rows"]
    for row, name in ((elbo, "ppl_elbo"), (weighted, "ppl_iw")):
        assert row["ppl_per_token"] == pytest.approx(scores[name], rel=1e-12)
        assert row["ppl_per_token_mc_se"] == pytest.approx(scores[f"{name}_se"], rel=1e-9)
        sampling = scores[f"{name}_sampling_se"]
        assert row["ppl_per_token_sampling_error"] == pytest.approx(sampling, rel=1e-9)
        assert row["bits_per_byte"] == pytest.approx(math.log2(scores[name]), rel=1e-12)
    assert elbo["nats_per_sequence"] == pytest.approx(scores["nats_per_sequence"]["elbo"])
    assert control["ppl_per_token"] == pytest.approx(scores["control"]["ppl_elbo"])
    gain = report["verdict"]["gains"]["elbo"]["nats_per_sequence"]
    exact = scores["control"]["nll_per_sequence"]
    assert gain == pytest.approx(
        scores["nats_per_sequence"]["elbo"] + exact, abs=1e-4
    )  # single precision
    rows = report["documents"]["rows"]
    sizes = [row["sequences"] for row in rows]
    mean = sum(row["elbo_gain"] * n for row, n in zip(rows, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(gain, abs=1e-9)


def test_text_is_shown_and_never_obeyed(run: Path, page: Page) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"img", "iframe", "object", "b>", "i"} & {tag for tag, _ in page.tags}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert "\0" not in html
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", html)  # direction is the page's business
    for piece in (p for one in numbers_of(run)["surprise"] for p in one["pieces"]):
        assert piece["text"] in page.words or not piece["text"].strip()
    texts = [attrs for _, attrs in page.tags if str(attrs.get("class", "")).startswith("text")]
    assert texts
    assert all(attrs.get("dir") == "auto" for attrs in texts)


def test_the_page_needs_nothing_from_anywhere(page: Page) -> None:
    for tag, attrs in page.tags:
        link = attrs.get("src") or attrs.get("href") or attrs.get("xlink:href") or "#"
        assert link.startswith(("#", "data:")), f"{tag} loads {link}"
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv")) or ""
    assert "default-src 'none'" in policy


def test_no_script_but_its_own_may_run(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    [script] = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html


def test_ids_are_unique(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\0b\x1b", "a⟨U+0000⟩b⟨U+001B⟩"),
        ("\u202eab", "⟨U+202E⟩ab"),
        ("👩\u200d👧 שלום\n\t", "👩\u200d👧 שלום\n\t"),
    ],
)
def test_what_acts_is_shown_by_its_number(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_panels_that_share_an_axis_are_labelled_each(run: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    for name, label in (("documents", "gain over the control"), ("course", "slow step")):
        figure = html[html.index(f'id="figure-{name}"') :].partition("</figure>")[0]
        panels = re.findall(r"<svg.*?</svg>", figure, flags=re.DOTALL)
        assert len(panels) > 1
        assert all(label in panel for panel in panels), f"a panel of {name} has no {label!r}"


@pytest.mark.parametrize(("used", "answer"), [(True, "yes, in this fit"), (False, "not shown")])
def test_a_gain_is_not_put_down_to_thoughts_that_are_not_used(used: bool, answer: str) -> None:
    gain = {"nats_per_sequence": 0.0118, "error": 0.0036, "documents": 11,
            "too_few_documents": False, "told_apart": True}  # fmt: skip
    gains = {"elbo": {**gain, "told_apart": False}, "iw_bound": gain}
    scores = {"collapse": {"uses_thoughts": used}, "n_documents": 11}
    found, sentence = _answer(gains, scores)
    assert found == answer
    assert ("reason is not shown" in sentence) is not used
    assert "0.0118 ± 0.0036" in sentence  # never "0.01 ± 0.00"


def test_checks_tell_what_was_not_made(run: Path) -> None:
    checks = {check["name"]: check for check in numbers_of(run)["checks"]}
    assert {check["state"] for check in checks.values()} <= {PASSED, FAILED, NOT_MADE}
    assert checks["The fit is finished"]["state"] == PASSED
    assert checks["scores.json says the same"]["state"] == PASSED
    for name in ("Simulation-based calibration", "Importance weights can be relied on"):
        assert checks[name]["state"] == NOT_MADE
        assert checks[name]["remedy"]


def test_files_are_listed_with_their_hashes(run: Path) -> None:
    files = {each["name"]: each for each in numbers_of(run)["files"]}
    for name in ("config.json", "scores.json", "metrics.csv", "control/metrics.csv"):
        data = (run / name).read_bytes()
        assert files[name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert files[name]["bytes"] == len(data)


def test_the_command_scores_every_mode(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    report, before = json.loads(out.with_suffix(".json").read_text()), numbers_of(run)
    modes = {row["mode"] for row in report["held_out"]["rows"]}
    assert modes == {"oracle", "prefix", "prior"}
    assert before["held_out"]["modes_not_made"] == ["prefix", "prior"]
    assert report["held_out"]["scores"] == before["held_out"]["scores"]
    assert report["samples"] == before["samples"]


def test_runs_are_set_against_each_other(run: Path, tmp_path: Path) -> None:
    out, twin = tmp_path / "page.html", tmp_path / "twin"
    shutil.copytree(run, twin)
    arguments = ["--out", str(out), "--draws", "2", "--sequences", "8"]
    assert main(["report", str(run), "--against", str(twin), *arguments]) == 0
    groups = json.loads(out.with_suffix(".json").read_text())["held_out"]["against"]["groups"]
    assert groups["twin"]["elbo_difference_per_byte"] == 0.0
    assert Page(out.read_text(encoding="utf-8")).headings == ORDER


def test_a_run_without_control_density_or_steps_has_a_page(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    folder = tmp_path / "point"
    fit = ["fit", "--corpus", str(text), "--out", str(folder), "--steps", "2", "--no-control"]
    assert main([*fit, "--guide", "delta", *MICRO]) == 0
    report = numbers_of(folder)
    assert report["verdict"]["answer"] == "not judged"
    assert report["documents"] is None
    assert Page((folder / "report.html").read_text(encoding="utf-8")).headings == ORDER


def test_khats_are_judged_and_held_out_bounds_shown(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    folder = tmp_path / "judged"
    fit = ["fit", "--corpus", str(text), "--out", str(folder), "--steps", "2", *MICRO]
    assert main([*fit, "--eval_draws", "1000", "--held_out.every", "2"]) == 0
    report = numbers_of(folder)
    assert [row["step"] for row in report["course"]["held_out"]] == [2]
    checks = {check["name"]: check["state"] for check in report["checks"]}
    assert checks["Every step is recorded and finite"] == PASSED
    assert report["khat"]["limit"] == pytest.approx(1 - 1 / 3)
    assert "figure-khat" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_used_is_told_in_a_line(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page.txt")]) == 2
    assert "must end in .html" in capsys.readouterr().err
    assert main(["report", str(run), "--against", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path)]) == 2
    text = write_text(tmp_path / "text.txt")
    other = tmp_path / "other"
    fit = ["fit", "--corpus", str(text), "--out", str(other), "--steps", "1", "--no-control"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltm_pyro.cli.artefacts._write_figures", lambda run, held_out: None)
        patch.setattr("ltm_pyro.cli.artefacts.write_page", lambda *arguments: "")
        assert main([*fit, *MICRO]) == 0
    mine = load_run(run)
    with pytest.raises(InputError, match="corpora"):
        make_report(mine, mine.corpus(), against=[load_run(other)])


@pytest.mark.parametrize(
    "config",
    [
        preset("nano"),
        dataclasses.replace(
            preset("mixture"), seed=3, guide="low_rank", guide_options={"rank": 2}, control=False
        ),
        dataclasses.replace(
            preset("nano"), model=dataclasses.replace(preset("nano").model, prior="mixture"),
            slow=dataclasses.replace(preset("nano").slow, lr=1e-3, betas=(0.8, 0.9)),
        ),
    ],
    ids=["nano", "mixture", "learned prior"],
)  # fmt: skip
def test_the_command_makes_the_same_settings_again(config: FitConfig) -> None:
    arguments = expand_shortcuts(shlex.split(fit_command(config, "runs/a b"))[2:])
    parser = _parser(arguments)
    options = parser.parse_args(arguments, defaults=False).as_dict()
    assert options.pop("out") == "runs/a b"
    assert build_config(given_settings(parser, options, None)) == config


def test_the_python_of_its_page_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"runs/book"', repr(str(run))), "report.md", "exec"), {})
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "page.json").exists()
