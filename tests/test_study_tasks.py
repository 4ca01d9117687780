"""What studies count: answers, pass@k, intervals and distances; and lines that are no tasks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ltm_pyro.errors import InputError
from studies.__main__ import main
from studies.arithmetic import LENGTH, asked_pairs, problems, text
from studies.last_word import passage, plain_line
from studies.tasks import final_number, gsm8k_problem, pass_at_k, read_lines, wilson
from studies.text_quality import (
    distinct,
    frontier_area,
    self_bleu,
    triple_frontier_distance,
    word_entropy,
)

GOOD = {"question": "How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("so it is\n#### 18", "18"),
        ("#### $1,234.50.", "1234.5"),
        ("#### -3\n#### 4", "-3"),
        ("####  -$7", "-7"),
        ("####1e9", "1"),
        ("#### 2.0", "2"),
        ("18", None),
        ("#### none", None),
        ("####\n18", None),
        ("", None),
    ],
)
def test_the_answer_is_the_number_behind_the_marks(written: str, number: str | None) -> None:
    assert final_number(written) == number


def test_pass_at_k_is_unbiased() -> None:
    """Against its definition: the share of k-subsets of the n answers with a right one."""
    n = 6
    for k in (1, 2, 5, 6):
        for c in range(n + 1):
            expected = 1.0 - math.comb(n - c, k) / math.comb(n, k)
            assert pass_at_k(n, [c], k)[0] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match="k must be"):
        pass_at_k(3, [1], 4)


@pytest.mark.parametrize(("right", "n"), [(0, 20), (3, 20), (20, 20), (371, 1319)])
def test_wilson_is_scipys(right: int, n: int) -> None:
    other = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((other.low, other.high), abs=1e-12)


BAD = [
    b"{not json}",
    b'{"question": "a"}',
    b'"a string"',
    b'{"question": "a", "answer": 3}',
    json.dumps({**GOOD, "answer": "it is 5"}).encode(),
    b'{"question": "\xff", "answer": "#### 1"}',
    b"[" * 100_000,
    json.dumps({**GOOD, "question": "\ud800"}).encode(),
]


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_is_no_problem_is_told_by_its_number(
    bad: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps(GOOD).encode()
    file = tmp_path / "test.jsonl"
    file.write_bytes(b"\n".join([good, b"", bad, good, b""]))
    found, left_out = read_lines(file, gsm8k_problem)
    assert [p.question for p in found] == [GOOD["question"]] * 2
    assert left_out == [3]  # empty lines count as lines, and are not bad
    told = capsys.readouterr().err
    assert "line 3" in told
    assert "test.jsonl" in told
    assert len(told) < 200
    file.write_bytes(bad)
    with pytest.raises(InputError, match="line 1"):
        read_lines(file, gsm8k_problem)


def test_what_no_text_holds_is_no_line() -> None:
    assert plain_line("a\tplain line") == "a\tplain line"
    for wrong in ("nul \0", "escape \x1b[31m", "lost \ufffd"):
        with pytest.raises(ValueError, match="control or replacement"):
            plain_line(wrong)


def test_a_passage_ends_before_its_last_word() -> None:
    line = " the old man went down to the sea again , 12 of them . "
    assert passage(line, 20) == ("down to the sea again , 12 of "[-20:].partition(" ")[2], "them ")
    assert passage(line, 1000) is None
    assert passage(" 1 2 ", 1) is None


def test_sums_are_right_and_asked_pairs_are_never_fitted() -> None:
    rng = np.random.default_rng(0)
    kept = asked_pairs()
    assert (kept == kept.T).all()
    assert 0.1 < kept[10:, 10:].mean() < 0.3
    for _ in range(50):
        written = text(rng, 4)
        assert len(written) <= LENGTH
        secrets = set()
        for line in written.splitlines():
            pair, total = line.split("=")
            a, b = map(int, pair.split("+"))
            assert not kept[a, b]
            secrets.add(int(total) - a - b)
        assert len(secrets) == 1
    few, many = (problems(1, 20, 2, 4, shots) for shots in (0, 3))
    for one, other in zip(few, many, strict=True):
        assert other.prompt.endswith(one.prompt)  # the same sums, more examples before them
        pair, total = other.prompt.splitlines()[0].split("=")
        secret = int(total) - sum(map(int, pair.split("+")))
        a, b = map(int, one.prompt[:-1].split("+"))
        assert kept[a, b]
        assert one.right(f"{a + b + secret}\n")
        assert not one.right(f"{a + b + secret}")


def test_distances_of_texts_know_same_from_other() -> None:
    rng = np.random.default_rng(0)
    words = [["sun", "moon", "star", "sky"], ["iron", "coal", "tin", "ore"]]
    drawn = [[" ".join(rng.choice(w, 20)) for _ in range(60)] for w in (*words, words[0])]
    one, other, again = drawn
    assert triple_frontier_distance(one, again) < 0.2
    assert triple_frontier_distance(one, other) > 0.9
    p = np.array([0.25, 0.75])
    assert frontier_area(p, p) == pytest.approx(1.0, abs=1e-9)
    assert frontier_area(p, p[::-1]) == pytest.approx(frontier_area(p[::-1], p), abs=1e-9)


def test_repetition_is_counted() -> None:
    same, apart = ["a b c d e"] * 4, ["a b c d e", "f g h i j", "k l m n o"]
    assert self_bleu(same) == pytest.approx(1.0, abs=1e-9)
    assert self_bleu(apart) < 0.05
    assert distinct(same, 1) == pytest.approx(5 / 20)
    assert distinct(apart, 2) == 1.0
    assert math.isnan(distinct(["a"], 2))
    assert word_entropy(["a b", "c d"]) == pytest.approx(2.0)


@pytest.mark.slow
def test_gsm8k_runs_on_a_malformed_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad lines are told, counted and left out, and the status is 0; without a good one it is 2."""
    data, out = tmp_path / "gsm8k", tmp_path / "out"
    data.mkdir()
    lines = [
        json.dumps({"question": f"How many are {i} and 3?", "answer": f"{i + 3}\n#### {i + 3}"})
        for i in range(300)
    ]
    (data / "train.jsonl").write_text("\n".join(lines))
    (data / "test.jsonl").write_text("\n".join([*lines[:9], "{broken", *lines[10:20]]))
    arguments = ["gsm8k", "--smoke", "--data", str(tmp_path), "--out", str(out)]
    assert main(arguments) == 0
    assert "line 10 of 'test.jsonl'" in capsys.readouterr().err
    said = (out / "gsm8k_smoke" / "README.md").read_text()
    assert "0 lines of train.jsonl and 1 lines of test.jsonl (line 10)" in said
    (data / "test.jsonl").write_text("{broken\n")
    assert main(arguments) == 2
    assert "test.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_last_words_run_on_a_malformed_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As GSM8K does: what is no text is told by its line's number, counted and left out."""
    data = tmp_path / "wikitext2"
    data.mkdir()
    line = "the old man went down to the sea again and the boat was not there , so he sat . "
    (data / "train.txt").write_text("\n".join(f" {i} {line * 3}" for i in range(300)))
    (data / "test.txt").write_bytes(
        b"\n".join([*[line.encode()] * 9, b"\xff\xfe broken", b" = title = ", b"nul \0 nul"])
    )
    arguments = ["last_word", "--smoke", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "line 10 of 'test.txt'" in told
    assert "line 12 of 'test.txt'" in told
    said = (tmp_path / "out" / "last_word_smoke" / "README.md").read_text()
    assert "2 lines of test.txt (line 10, 12)" in said
