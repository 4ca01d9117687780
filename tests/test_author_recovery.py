"""The probe of authors: what it is asked about, and that it finds what is there."""

from __future__ import annotations

from pathlib import Path

import author_recovery
import numpy as np
import pytest

WORDS = {"Ada_Alder": "alas aloud across again about", "Bo_Birch": "brook bring bold below back"}


@pytest.fixture
def novels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two authors who share no word, four books each; a third of two books, who has no word of his
    own."""
    monkeypatch.setenv("LTM_PYRO_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    both = " ".join(WORDS.values())
    for author, words in {**WORDS, "Cy_Cedar": both}.items():
        for book in range(2 if author == "Cy_Cedar" else 4):
            lines = [" ".join(rng.choice(words.split(), 12)) for _ in range(150)]
            (tmp_path / f"{author}__Book_{book}.txt").write_text("\n\n".join(lines))
    return tmp_path


def test_every_book_is_asked_about_by_a_fit_that_has_not_seen_it(
    novels: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []
    one_fit = author_recovery.one_fit

    def seen(fitted, unseen, options, seed):  # type: ignore[no-untyped-def]
        fits.append(({book.name for book in fitted}, {book.name for book in unseen}))
        return one_fit(fitted, unseen, options, seed)

    monkeypatch.setattr(author_recovery, "one_fit", seen)
    page = novels / "page.md"
    page.write_text("before <!-- authors:begin -->old<!-- authors:end --> after")
    small = ["--seq_len", "32", "--vocab_size", "300", "--embed_steps", "1", "--steps", "2"]
    results = author_recovery.main(
        [
            str(novels),
            *small,
            "--learn_from",
            "6",
            "--ask",
            "4",
            "--seeds",
            "0",
            "--markdown",
            str(page),
        ]
    )
    assert all(not fitted & unseen for fitted, unseen in fits)
    asked = sorted(set().union(*(unseen for _, unseen in fits)))
    assert sorted(results["book"].unique()) == asked
    assert asked == [
        f"{author}__Book_{n}.txt" for author in ("Ada_Alder", "Bo_Birch") for n in (2, 3)
    ] + ["Cy_Cedar__Book_0.txt", "Cy_Cedar__Book_1.txt"]
    # One name for all is right for a third exactly.
    assert set(results.groupby(["features", "author"])["right"].size()) == {8}
    found = results.groupby(["features", "author"])["right"].mean()
    assert found["pairs of bytes, no model", "Ada Alder"] == 1.0
    assert found["pairs of bytes, no model", "Bo Birch"] == 1.0
    printed = capsys.readouterr().out
    assert "above one name for all (33%)" in printed
    assert page.read_text().startswith("before <!-- authors:begin -->\n| features of a text")


def test_a_probe_finds_what_is_linear_and_does_not_find_what_is_not_there() -> None:
    rng = np.random.default_rng(1)
    y = np.repeat(["a", "b", "c", "d"], 60)
    books = np.char.add(y, np.tile(np.repeat(["1", "2", "3"], 20), 4))
    noise = rng.standard_normal((240, 400))  # more features than texts
    told = noise + 0.5 * rng.standard_normal((4, 400)).repeat(60, 0)
    half = np.tile(np.arange(60) < 40, 4)
    right = [
        (author_recovery.probe(x[half], y[half], books[half])(x[~half]) == y[~half]).mean()
        for x in (told, noise)
    ]
    assert right[0] > 0.9
    assert right[1] == pytest.approx(0.25, abs=0.2)  # four standard errors of 80 texts
