"""The command line: what each command prints and leaves, and how a fit is stopped and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from cli_helpers import MICRO, environment, program, run_program, write_text

from ltm_pyro import __version__
from ltm_pyro.cli import COMMANDS, main
from ltm_pyro.cli.artefacts import FILES, write_posterior
from ltm_pyro.cli.fit import _parser
from ltm_pyro.cli.printing import default_folder, format_scores, printable
from ltm_pyro.cli.settings import build_config, expand_shortcuts, given_settings
from ltm_pyro.cli.stopping import StopSignals
from ltm_pyro.config import PRESETS, FitConfig
from ltm_pyro.errors import InputError
from ltm_pyro.run import load_run
from ltm_pyro.run.scoring import score_run

STEPS = 4


@pytest.fixture
def no_figures(monkeypatch):
    """Leaves out the pictures, which take longer than a small fit."""
    monkeypatch.setattr("ltm_pyro.cli.artefacts._write_figures", lambda run, held_out: None)
    monkeypatch.setattr("ltm_pyro.cli.artefacts.write_page", lambda *arguments: "")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A finished run, and what `fit` printed; not to be changed."""
    folder = tmp_path_factory.mktemp("fitted")
    text = write_text(folder / "text.txt")
    done = run_program(
        "fit", "--corpus", str(text), "--out", "good", "--steps", str(STEPS), *MICRO, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def settings(*arguments: str, file: Path | None = None) -> FitConfig:
    """The configuration that a command line leads to."""
    expanded = expand_shortcuts(list(arguments))
    parser = _parser(expanded)
    options = parser.parse_args(expanded, defaults=False).as_dict()
    return build_config(given_settings(parser, options, None if file is None else str(file)))


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def test_fit_prints_scores_panel_samples_and_files(fitted):
    folder, told = fitted
    for wanted in (
        "Does the model use its thoughts?",
        "model    ppl_elbo per byte ",
        "model    ppl_iw   per byte ",
        "control  ppl_elbo per byte ",
        "control  ppl_iw   per byte ",
        "sampling",
        "Text 1, its thoughts drawn from the prior",
        "Text after the held-out prompt",
        "shuffled-z penalty",
    ):
        assert wanted in told
    asked_for = {"best", "restarts", "tensorboard"}  # by options of their own
    for name in FILES.keys() - asked_for:
        assert (folder / "good" / name).exists()
        assert f"  {name} " in told
    assert {p.name for p in (folder / "good").iterdir()} == FILES.keys() - asked_for


def test_a_bare_perplexity_is_never_printed(fitted, capsys):
    folder, told = fitted
    assert main(["evaluate", str(folder / "good")]) == 0
    for text in (told, capsys.readouterr().out, (folder / "good" / "scores.json").read_text()):
        assert "perplexity" not in text
        rest = text
        for name in ("elbo", "iw", "predictive", "reconstruction", "z0", "shuffled"):
            rest = rest.replace(f"ppl_{name}", "")
        assert "ppl" not in rest


def test_evaluate_tells_what_fit_told(fitted, capsys):
    folder, told = fitted
    assert main(["evaluate", str(folder / "good")]) == 0
    out = capsys.readouterr().out
    scores = [line for line in told.splitlines() if "ppl_" in line]
    assert scores
    assert [line for line in out.splitlines() if "ppl_" in line] == scores


@pytest.mark.parametrize("mode", ["oracle", "prefix", "prior"])
def test_evaluate_json_is_one_object(fitted, capsys, mode):
    folder, _ = fitted
    arguments = ["--mode", mode, "--json", "--split", "test", "--sequences", "3", "--draws", "5"]
    assert main(["evaluate", str(folder / "good"), *arguments]) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert streams.out.count("\n") == 1
    assert streams.err == ""
    assert found["mode"] == mode
    assert found["draws"] == 5
    assert found["split"] == "test"
    names = ("predictive",) if mode == "prefix" else ("elbo", "iw")
    wanted = {f"ppl_{name}{end}" for name in names for end in ("", "_se", "_sampling_se")}
    assert {*wanted, "control", "unit", "n_documents"} <= set(found)
    assert mode != "prefix" or not {"ppl_elbo", "ppl_iw"} & set(
        found
    )  # no bound, and not called one


def test_evaluate_in_other_modes_is_told_in_words(fitted, capsys):
    folder, _ = fitted
    assert main(["evaluate", str(folder / "good"), "--mode", "prefix", "--prefix", "4"]) == 0
    out = capsys.readouterr().out
    assert "mode prefix" in out
    assert "thoughts?" not in out


def test_generate_writes_the_same_text_twice(fitted, capsys):
    folder, _ = fitted
    texts = []
    for _ in range(2):
        arguments = ["--prompt", "the cat", "--n", "3", "--seed", "1"]
        assert main(["generate", str(folder / "good"), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].count("=== text ") == 3
    assert texts[0].count("\nthe cat") == 3
    assert main(["generate", str(folder / "good"), "--prompt", "the cat", "--seed", "2"]) == 0
    assert capsys.readouterr().out not in texts[0]


def test_generate_takes_every_option(fitted, capsys):
    folder, _ = fitted
    options = ["--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--length", "8"]
    assert main(["generate", str(folder / "good"), *options]) == 0
    greedy = []
    for seed in ("1", "2"):
        arguments = ["--greedy", "--prompt", "the", "--n", "1", "--seed", seed]
        assert main(["generate", str(folder / "good"), *arguments]) == 0
        greedy.append(capsys.readouterr().out.splitlines()[-1])
    assert all(text for text in greedy)


@pytest.mark.parametrize("name", ["p.nc", "p.zarr"])
def test_export_writes_a_tree(fitted, tmp_path, capsys, name):
    from ltm_pyro.export import load_datatree

    folder, _ = fitted
    target = tmp_path / name
    assert main(["export", str(folder / "good"), "--out", str(target), "--draws", "3"]) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    groups = set(load_datatree(target).children)
    assert {"posterior", "prior", "log_likelihood", "observed_data", "sample_stats"} <= groups
    assert set(load_datatree(folder / "good" / "posterior.nc").children) >= groups


def test_a_posterior_is_needed_to_write_one(fitted, tmp_path):
    run = load_run(fitted[0] / "good")
    with pytest.raises(InputError, match="no posterior"):
        write_posterior(tmp_path / "p.nc", run, score_run(run, run.corpus(), mode="prior"))


LARGER = ("ltm-medium", "ltm-large")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGER)) for n in PRESETS]
)
def test_cost_of_every_preset(name, capsys):
    assert main(["cost", name]) == 0
    assert f"Cost of {name}" in capsys.readouterr().out


def test_other_corpora_and_guides(tmp_path, monkeypatch, capsys):
    """A synthetic corpus, whose tokens are symbols; a point posterior, which has no ELBO."""
    monkeypatch.chdir(tmp_path)
    small = [*MICRO, "--steps", "2", "--no-control"]
    assert main(["fit", "--corpus", "mixture", "--corpus.options.classes", "2", *small]) == 0
    told = capsys.readouterr().out
    assert "ppl_elbo per token" in told
    assert "control  ppl" not in told
    assert (tmp_path / "runs" / "nano-mixture" / "posterior.nc").exists()
    write_text(tmp_path / "text.txt")
    arguments = ["--corpus", "text.txt", "--guide", "delta", "--persistent", "--out", "delta"]
    assert main(["fit", *arguments, *small]) == 0
    assert not (tmp_path / "delta" / "scores.png").exists()
    assert json.loads((tmp_path / "delta" / "scores.json").read_text())["ppl_elbo"] is None


@pytest.mark.usefixtures("no_figures")
def test_overwrite_replaces_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    arguments = ["--corpus", "text.txt", "--steps", "2", "--no-control", "--out", "run", *MICRO]
    for seed in ("3", "4"):
        assert main(["fit", *arguments, "--overwrite", "--seed", seed]) == 0
        assert load_run(tmp_path / "run").config.seed == int(seed)


def test_a_fit_that_fails_before_its_first_step_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise InputError("no")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ltm_pyro.run.train", refuse)
    write_text(tmp_path / "text.txt")
    assert main(["fit", "--corpus", "text.txt", "--out", "run", *MICRO]) == 2
    assert capsys.readouterr().err == "ltm-pyro: error: no\n"
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.usefixtures("no_figures")
def test_sigkill_then_resume_gives_the_same_bits(fitted, tmp_path, monkeypatch):
    """Killed at any moment: after the first checkpoint of the model, and again in the control."""
    folder, _ = fitted
    arguments = ["--corpus", str(folder / "text.txt"), "--steps", "30", *MICRO]
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--out", "whole", *arguments]) == 0
    command = ["fit", "--out", "killed", *arguments]
    for moment in ("checkpoint", "control"):
        process = subprocess.Popen(
            program(*command), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
        )
        _wait_for(lambda m=moment: _slow_step(tmp_path / "killed" / m) >= 2, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        command = ["fit", "--resume", "--out", "killed"]
    assert _slow_step(tmp_path / "killed" / "control") < 30
    assert main(command) == 0
    assert tensor_files(tmp_path / "killed") == tensor_files(tmp_path / "whole")
    scores = [json.loads((tmp_path / r / "scores.json").read_text()) for r in ("killed", "whole")]
    assert {**scores[0], "run": ""} == {**scores[1], "run": ""}


def _slow_step(folder: Path) -> int:
    state = folder / "state.json"
    return json.loads(state.read_text())["state"]["slow_step"] if state.exists() else -1


def _wait_for(condition, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the fit ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_fit_says_how_to_go_on(fitted, tmp_path, number, status):
    folder, _ = fitted
    arguments = ["--corpus", str(folder / "text.txt"), "--steps", "2000", *MICRO]
    process = subprocess.Popen(
        program("fit", "--out", "run", *arguments),
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    _wait_for(lambda: _slow_step(tmp_path / "run" / "checkpoint") >= 2, process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status
    assert "go on with: ltm-pyro fit --resume --out run" in told
    assert "Traceback" not in told
    run = load_run(tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == run.svi.slow_step + 1


@pytest.mark.usefixtures("no_figures")
def test_resume_starts_a_fit_that_was_killed_before_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    arguments = ["--corpus", "text.txt", "--steps", "2", "--no-control", "--out", "run", *MICRO]
    assert main(["fit", "--resume", *arguments]) == 0
    assert "no run in 'run' yet: starting it" in capsys.readouterr().err
    assert main(["fit", "--resume", *arguments]) == 0
    assert "Resumed  at slow step 2" in capsys.readouterr().out


def test_nan_is_told_with_the_checkpoint_that_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    arguments = ["--corpus", "text.txt", "--steps", "20", "--out", "run", *MICRO]
    assert main(["fit", *arguments, "--slow.lr", "1e30", "--slow.schedule", "constant"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ltm-pyro: error: the ")
    assert "is not finite at slow step" in line
    step = load_run(tmp_path / "run").svi.slow_step
    assert f"the checkpoint of step {step} is kept in 'run'" in line


def test_settings_are_layered(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\nsteps: 7\nslow: {lr: 1e-2}\ncorpus: mine.txt\n")
    found = settings("--slow.lr", "1e-3", "--fast.betas", "[0.5,0.6]", file=file)
    assert found.preset == "tiny"
    assert found.model == PRESETS["tiny"].model
    assert (found.steps, found.slow.lr, found.fast.betas) == (7, 1e-3, (0.5, 0.6))
    assert (found.corpus.name, found.corpus.tokenizer) == ("mine.txt", "bpe")
    assert found.corpus.options == PRESETS["tiny"].corpus.options
    assert settings() == PRESETS["nano"]


def test_a_preset_s_tokenizer_options_go_with_its_tokenizer():
    assert settings("--preset", "tiny", "--tokenizer", "bytes").corpus.options == {}
    assert settings("--preset", "tiny", "--corpus", "mixture").corpus.options == {}
    assert settings("--preset", "tiny", "--tokenizer=bpe").corpus.options == {"vocab_size": 8192}


def test_switches_and_shortcuts():
    found = settings("--no-control", "--no-compile", "--persistent", "--encoding=latin-1")
    assert (found.control, found.compile, found.persistent) == (False, False, True)
    assert found.corpus.encoding == "latin-1"
    found = settings(
        "--compile", "false", "--control=false", "--checkpointing", "True", "--persistent"
    )
    assert (found.control, found.compile, found.checkpointing, found.persistent) == (0, 0, 1, 1)
    assert settings("--corpus.options.a", "[1, 2]").corpus.options == {"a": [1, 2]}
    assert settings("--corpus.options", "{a: 1}").corpus.options == {"a": 1}


def test_every_field_is_an_option_with_its_description(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--preset", "tiny", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for field in dataclasses.fields(FitConfig):
        nested = getattr(PRESETS["nano"], field.name)
        if not dataclasses.is_dataclass(nested):
            assert f"--{field.name} " in told
            continue
        for inner in dataclasses.fields(nested):
            known = f"{field.name}.{inner.name}" != "model.vocab_size"
            assert (f"--{field.name}.{inner.name} " in told) == known
    assert "(default: 2000)" in told  # that of the preset


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: ltm-pyro {command}")
    assert f"  ltm-pyro {command} " in told.partition("examples:")[2]
    if command == "fit":
        assert r"turn_separator TURN_SEPARATOR" in told
        assert r"(default: \n)" in told


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_first_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    told = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert f"  {name:<10}{what}" in told


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ltm-pyro {__version__}\n"


def test_start_is_quick(tmp_path):
    """Limits 2 s and 4 s; doubled, because other tests may be running beside this one."""
    began = time.monotonic()
    assert run_program("--help", cwd=tmp_path).returncode == 0
    assert time.monotonic() - began < 4
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import ltm_pyro"], env=environment(), check=True)
    assert time.monotonic() - began < 8


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ltm_pyro.cli import main; main(['--help']); "
        "heavy = {'torch', 'pyro', 'arviz', 'matplotlib', 'xarray', 'numpy'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            program("--help"), cwd=tmp_path, env=environment(), stdout=closed,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


def test_warnings_are_one_line(monkeypatch, capsys):
    import ltm_pyro.cli.cost

    def warn(arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("slow\nhere", stacklevel=1)
        return 0

    monkeypatch.setattr(ltm_pyro.cli.cost, "run", warn)
    assert main(["cost", "nano"]) == 0
    assert capsys.readouterr().err == "ltm-pyro: warning: slow here\n"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (OSError(28, "No space left on device", "/x/y"), 2, "cannot write '/x/y'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_other_ends(monkeypatch, capsys, error, status, told):
    import ltm_pyro.cli.cost

    def fail(arguments):
        raise error

    monkeypatch.setattr(ltm_pyro.cli.cost, "run", fail)
    assert main(["cost", "nano"]) == status
    assert told in capsys.readouterr().err


def test_an_error_that_nobody_has_thought_of_is_a_line_of_its_own(monkeypatch, capsys):
    import ltm_pyro.cli.cost

    def fail(arguments):
        raise RuntimeError("wires crossed")

    monkeypatch.setattr(ltm_pyro.cli.cost, "run", fail)
    assert main(["cost", "nano"]) == 1
    told = capsys.readouterr().err
    assert "wires crossed" in told
    assert told.count("\n") == 1


def test_a_second_signal_stops_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signals.status == 130
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert signals.status == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "once more stops at once" in capsys.readouterr().err


def test_terminals_are_safe_from_generated_text():
    assert printable("a\x1b[2J\nb\tc\x00é") == "a\ufffd[2J\nb\tc\ufffdé"


def test_default_folder_names_preset_and_corpus():
    assert default_folder(PRESETS["nano"]) == "runs/nano-pydoc"
    assert default_folder(settings("--corpus", "some/book.txt")) == "runs/nano-book"
    assert default_folder(settings("--corpus", "/")) == "runs/nano-corpus"
    assert default_folder(settings("--corpus", "books/*.md")) == "runs/nano-corpus"


def test_scores_that_are_not_finite_are_told(fitted):
    from ltm_pyro.run.scoring import summary

    run = load_run(fitted[0] / "good")
    scores = summary(run, score_run(run, run.corpus(), draws=4))
    row = scores["per_unit"]["token"]["scores"]["elbo"]
    row.update(dict.fromkeys(row))
    scores.update(
        khat={**dict.fromkeys(scores["khat"]), "in_words": "not judged"},
    )
    told = format_scores(scores)
    assert "ppl_elbo per byte none" in told
    assert "k-hat    not judged" in told
    assert torch.isfinite(torch.tensor(scores["ppl_iw"]))


LONG = ("ltm-medium", "ltm-large")  # `ltm-small` with more layers


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in sorted(PRESETS)],
)
def test_every_preset_fits_as_it_stands(tmp_path, name, no_figures, capsys):
    """With its own corpus settings, tokenizer and shapes; short texts and one step alone."""
    own = [] if name == "mixture" else ["--corpus", str(write_text(tmp_path / "text.txt", 60))]
    small = ["--steps", "1", "--batch_size", "1", "--fast.steps", "1", "--no-compile"]
    scores = ["--eval_sequences", "2", "--eval_draws", "2", "--eval_fast_steps", "1"]
    arguments = [*own, *small, *scores, "--model.seq_len", "16", "--no-control"]
    assert main(["fit", "--preset", name, "--out", str(tmp_path / "run"), *arguments]) == 0
    assert "Files in" in capsys.readouterr().out
    recorded = load_run(tmp_path / "run").config
    assert recorded.preset == name
    assert recorded.corpus.tokenizer == PRESETS[name].corpus.tokenizer
