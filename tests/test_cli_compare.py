"""`ltm-pyro compare`: what it prints, what it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
from cli_helpers import MICRO, write_text

from ltm_pyro.cli import main
from ltm_pyro.cli.compare import parse_guides
from ltm_pyro.config import CorpusConfig
from ltm_pyro.errors import InputError
from ltm_pyro.run import create_run

GUIDES = "mean_field,low_rank:rank=1,amortized"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 0: what is compared are guides, not decoders."""
    folder = tmp_path_factory.mktemp("compared")
    text = write_text(folder / "text.txt", blocks=40)
    parsed = _settings("--corpus", str(text), *MICRO)
    assert parsed.corpus == CorpusConfig(name=str(text))
    return create_run(folder / "run", parsed).folder


def _settings(*arguments: str):
    from ltm_pyro.cli.fit import _parser
    from ltm_pyro.cli.settings import build_config, expand_shortcuts, given_settings

    expanded = expand_shortcuts(list(arguments))
    parser = _parser(expanded)
    options = parser.parse_args(expanded, defaults=False).as_dict()
    return build_config(given_settings(parser, options, None))


def test_it_prints_a_table_and_leaves_three_files(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name for p in run.iterdir()}
    status = main(
        ["compare", str(run), "--guides", GUIDES, "--budget", "16", "--reference", "hmc",
         "--subset", "2", "--reference_draws", "50"]
    )  # fmt: skip
    told = capsys.readouterr().out
    assert status == 0
    for wanted in ("mean_field", "low_rank", "amortized", "verdict", "baseline", "Reference hmc"):
        assert wanted in told
    made = {p.name for p in run.iterdir()} - before
    assert made == {"comparison.csv", "comparison.nc", "comparison.png"}
    table = pd.read_csv(run / "comparison.csv", index_col=0)
    assert list(table.index) == ["mean_field", "low_rank", "amortized"]
    assert (table["decoder_evaluations"] <= 16).all()
    with xr.open_datatree(run / "comparison.nc", engine="h5netcdf") as tree:
        assert dict(tree.dataset.sizes) == {"guide": 3, "sequence": 5, "other": 3, "fit": 1}


def test_json_is_one_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--guides", "mean_field,delta", "--budget", "2", "--no-gaps", "--json"]
    assert main(["compare", str(run), *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["baseline"] == "mean_field"
    assert told["guides"]["delta"]["elbo_per_sequence"] is None
    assert told["notes"]


def test_a_family_takes_its_options() -> None:
    assert parse_guides("mean_field, low_rank:rank=4:init_log_variance=-1,flow:kind=spline") == {
        "mean_field": {},
        "low_rank": {"rank": 4, "init_log_variance": -1},
        "flow": {"kind": "spline"},
    }
    for text, message in (
        ("", "write families like"),
        ("mean_field,,delta", "write families like"),
        ("mean_field,mean_field", "named twice"),
        ("low_rank:4,delta", "write it as rank=4"),
    ):
        with pytest.raises(InputError, match=message):
            parse_guides(text)


@pytest.mark.parametrize(
    "scrap",
    ["[", "]", "{", "}", "{a", "[1", "!!python/object/apply:os.system", "&a 1", "*a", "'", '"', "@",
     "%", "`", "|", ">", "- 1", "? x", "2020-99-99", "2020-01-01", "!!int x", "!!binary x", "\x00",
     "\x1b[31m", "[" * 5000, "0x", "1__0_", "---", "..."],
)  # fmt: skip
def test_scraps_of_yaml_are_no_options(scrap: str) -> None:
    """Either a plain scalar comes out, or one short line that names the option."""
    try:
        value = parse_guides(f"low_rank:rank={scrap}")["low_rank"]["rank"]
    except InputError as error:
        line = str(error)
        assert "guides" in line
        assert len(line) < 250
        assert line.isprintable()
    else:
        assert value is None or isinstance(value, str | int | float | bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guides", "mean_field"], "at least two families"),
        (["--guides", "mean_field,full_rnk"], "did you mean 'full_rank'"),
        (["--guides", "mean_field,low_rank:rank=999"], "rank"),
        (["--guides", "mean_field,mixture:components=0"], "components"),
        (["--guides", "mean_field,delta", "--reference", "nuts"], "unknown reference 'nuts'"),
        (["--guides", "mean_field,delta", "--budget", "0"], "budget is 0"),
        (["--guides", "mean_field,low_rank:rank=["], "guides gives 'rank' as '['"),
        (["--guides", "mean_field,low_rank:rank=true"], "rank"),
        (["--guides", "mean_field,low_rank:rank=1.5"], "rank"),
        (["--guides", "mean_field,low_rank:rank=1e20"], "rank"),
        (["--guides", "mean_field,low_rank:guide=1"], "guide"),
        (["--guides", "mean_field,low_rank:rank=1:rank=2"], "twice"),
        (["--guides", "mean_field,delta", "--budget", "1e20"], "budget"),
        (["--guides", "mean_field,delta", "--budget", "9" * 30], "budget is 9999"),
        (["--guides", "mean_field,delta", "--draws", "1"], "draws is 1:"),
        (["--guides", "mean_field,delta", "--draws", "9" * 20], "draws is 9999"),
        (["--guides", "mean_field,delta", "--restarts", "0"], "restarts is 0"),
        (["--guides", "mean_field,delta", "--subset", "0"], "subset is 0"),
        (
            ["--guides", "mean_field,delta", "--reference", "hmc", "--reference_draws", "9" * 18],
            "reference_options: draws is 9999",
        ),
        (["--guides", "mean_field,delta", "--split", "dev"], "unknown split 'dev'"),
        (["--guides", "mean_field,delta", "--seed", "-1"], "seed is -1"),
        (["--guide", "mean_field"], "did you mean '--guides'"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    assert main(["compare", str(run), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before


def test_ctrl_c_keeps_the_guides_that_are_done(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltm_pyro.diagnostics.compare import comparison

    real, seen = comparison.fit_and_score, []

    def interrupted(label: str, *arguments):
        seen.append(label)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(label, *arguments)

    monkeypatch.setattr(comparison, "fit_and_score", interrupted)
    arguments = ["--guides", "mean_field,delta,low_rank", "--budget", "2", "--no-gaps"]
    assert main(["compare", str(run), *arguments]) == 130
    told = capsys.readouterr().out
    assert "Interrupted" in told
    assert "low_rank" not in told
    assert list(pd.read_csv(run / "comparison.csv", index_col=0).index) == ["mean_field", "delta"]
