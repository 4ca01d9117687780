"""Tasks whose answer is right or wrong: how they are read, asked, and counted.

A file of tasks has one a line. A line that cannot be used is left out, told by its number on
stderr, and counted; where none can be used there is an `InputError`, and a study ends with status
2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

import ltm_pyro as ltm
from ltm_pyro.data.tokenizer import Tokenizer
from ltm_pyro.diagnostics.estimates import clustered_mean
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.models.latent_thought import LatentThoughtModel
from ltm_pyro.run import Run

T = TypeVar("T")
_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")
_TOLD = 5
"""Bad lines of a file that are told one by one."""


def read_lines(file: Path, parse: Callable[[str], T]) -> tuple[list[T], list[int]]:
    """What `parse` makes of each line, and the numbers, from 1, of the lines left out.

    Args:
        file: UTF-8; lines of white space alone are passed over and not counted.
        parse: Raises `ValueError` with the reason, which must not hold the line's own text.

    Raises:
        InputError: if the file cannot be read, or no line of it can be used.
    """
    name = shown(file.name)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    found, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(parse(line.decode("utf-8").removeprefix("\ufeff")))
        except (ValueError, RecursionError) as error:
            known = {
                UnicodeDecodeError: "not UTF-8",
                UnicodeEncodeError: "it holds a lone surrogate",
                RecursionError: "nested too deeply",
            }
            bad.append((number, known.get(type(error), str(error))))
    for number, reason in bad[:_TOLD]:
        print(f"line {number} of {name} is left out: {reason}", file=sys.stderr)
    if len(bad) > _TOLD:
        print(f"{len(bad) - _TOLD} more lines of {name} are left out", file=sys.stderr)
    if not found:
        why = f"line {bad[0][0]}: {bad[0][1]}" if bad else "it is empty"
        raise InputError(f"{name} has no line that can be used ({why}): give another file")
    return found, [number for number, _ in bad]


@dataclass(frozen=True)
class Problem:
    """A question and how it is answered, the last number behind `####`."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        """As one of the shots of a prompt."""
        return f"{self.prompt}{self.true_answer}"

    @property
    def true_answer(self) -> str:
        """What follows the prompt, as it was fitted."""
        return f" {self.answer}\n\n"

    @property
    def prompt(self) -> str:
        """Up to where the answer begins."""
        return f"Question: {self.question}\nAnswer:"


def gsm8k_problem(line: str) -> Problem:
    """One line of GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    Raises:
        ValueError: saying why it is none.
    """
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError("not JSON") from None
    found = record if isinstance(record, dict) else {}
    question, answer = (
        text.strip() if isinstance(text := found.get(name), str) else ""
        for name in ("question", "answer")
    )
    if not (question and answer):
        raise ValueError('it must be an object with strings "question" and "answer"')
    problem = Problem(question, answer)
    problem.text.encode()
    if final_number(problem.answer) is None:
        raise ValueError("its answer has no number behind ####")
    return problem


def final_number(text: str) -> str | None:
    """The number behind the first `####`, plainly written; `None` where there is none.

    `$1,234.50.` and `1234.5` are one number.
    """
    _, marked, rest = text.partition("####")
    line = rest.partition("\n")[0].replace("$", "").strip()
    found = _NUMBER.match(line) if marked else None
    return None if found is None else f"{float(found[0].replace(',', '')):.12g}"


def pass_at_k(n: int, right: ArrayLike, k: int) -> NDArray[np.float64]:
    """Probability that one of k answers is right, of which `right` of n drawn were.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
        n: Answers drawn for each problem.
        right: (P,) how many of them are right.
        k: At most n.
    """
    if not 1 <= k <= n:
        raise InputError(f"pass@{k} from {n} answers: k must be from 1 to {n}")
    c = np.asarray(right)
    factors = 1.0 - k / np.arange(1, n + 1)
    # 1 - prod_{i = n-c+1}^{n} (1 - k/i); where fewer than k are wrong the product holds a zero.
    return np.array([1.0 - np.prod(factors[n - each :]) if each else 0.0 for each in c])


def wilson(right: float, n: int, rate: float = 0.05) -> tuple[float, float]:
    """Wilson's interval for a share (Wilson 1927).

    Args:
        right: How many of n are right. It may be a sum of numbers between 0 and 1, such as
            `pass_at_k` gives: no such sum varies more than one of zeros and ones with that mean,
            so the interval is then wide rather than narrow.
        n: Independent problems.
        rate: How often it misses.
    """
    z = float(stats.norm.isf(rate / 2))
    share, size = right / n, 1.0 + z * z / n
    middle = (share + z * z / (2 * n)) / size
    half = z * float(np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / size
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Writer:
    """A fitted model that goes on from prompts.

    Attributes:
        svi: Infers q(z | prompt), of which each text has a draw; `None`: z is 0, as in a control.
    """

    model: LatentThoughtModel
    tokenizer: Tokenizer
    svi: DualRateSVI | None

    def __call__(
        self, prompts: Sequence[str], n: int, new_tokens: int, stop: str, **options: Any
    ) -> list[list[str]]:
        """`n` completions of each prompt, up to `stop`, which goes with them.

        Args:
            prompts: What to go on from, none empty.
            n: Completions of each.
            new_tokens: Written at most.
            stop: A completion ends behind it.
            **options: Of `ltm_pyro.generate`.
        """
        if self.svi is None:
            options = {**options, "z": torch.zeros(self.model.thought_shape)}
        texts = ltm.generate(
            self.model, self.tokenizer, prompt=list(prompts), n=n, max_new_tokens=new_tokens,
            svi=self.svi, **options,
        )  # fmt: skip
        written = [t.removeprefix(prompts[i // n]) for i, t in enumerate(texts)]
        cut = ["".join(t.partition(stop)[:2]) for t in written]
        return [cut[i : i + n] for i in range(0, len(cut), n)]


def writers(run: Run) -> dict[str, Writer]:
    """The model of a run and its control; q is fitted in `eval_fast_steps` steps."""
    run.svi.fast = replace(run.svi.fast, steps=run.config.eval_fast_steps)
    return {
        "thoughts": Writer(run.model, run.tokenizer, run.svi),
        "control": Writer(run.control().model, run.tokenizer, None),  # type: ignore[arg-type]
    }


@dataclass(frozen=True)
class Task:
    """What is asked, and which completions are right."""

    prompt: str
    right: Callable[[str], bool]


def graded(
    made: dict[str, Writer], tasks: Sequence[Task], n: int, new_tokens: int, stop: str, seed: int
) -> list[dict[str, Any]]:
    """Accuracy of each writer on the same tasks: of the likeliest answer, and pass@k of n drawn.

    Returns:
        One row a writer: `model`; `greedy`, `pass_1` and, for n above 1, `pass_n`, each with
        Wilson's `_low` and `_high`; and `gain`, its pass@1 above the control's task by task, with
        `gain_error`, of which two on either side hold 95 %.
    """
    rows, share = [], {}
    for name, write in made.items():
        first = write([t.prompt for t in tasks], 1, new_tokens, stop, greedy=True)
        drawn = write([t.prompt for t in tasks], n, new_tokens, stop, seed=seed)
        right = [[t.right(text) for text in texts] for t, texts in zip(tasks, drawn, strict=True)]
        likeliest = [t.right(texts[0]) for t, texts in zip(tasks, first, strict=True)]
        scores = {"greedy": np.array(likeliest, np.float64)}
        scores |= {f"pass_{k}": pass_at_k(n, np.sum(right, 1), k) for k in sorted({1, n})}
        row: dict[str, Any] = {"model": name, "problems": len(tasks)}
        for score, values in scores.items():
            low, high = wilson(float(np.sum(values)), len(tasks))
            row |= {score: float(np.mean(values)), f"{score}_low": low, f"{score}_high": high}
        share[name] = np.asarray(scores["pass_1"])
        rows.append(row)
    gain = clustered_mean(share["thoughts"] - share["control"])
    return [{**row, "gain": gain.value, "gain_error": gain.error} for row in rows]


def answer_nats(
    write: Writer, prompts: Sequence[str], answers: Sequence[str], draws: int = 16
) -> NDArray[np.float64]:
    """-log p(answer | prompt) in nats, (P,).

    With thoughts it is q(z | prompt)'s prediction, the mean of p(answer | prompt, z) over fresh
    draws: q has not seen the answer, and it is no bound. Without them it is exact.
    """
    given = [as_ids(write.tokenizer, prompt) for prompt in prompts]
    whole = [
        torch.cat([p, as_ids(write.tokenizer, a)]) for p, a in zip(given, answers, strict=True)
    ]
    x = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    place = torch.arange(x.shape[1])
    seen, filled = (place < torch.tensor([[len(t)] for t in texts]) for texts in (given, whole))
    if write.svi is None:
        rest = ltm.Batch(x, filled & ~seen)
        exact = ltm.evaluate(write.model, None, rest, 2, mode="prior", controls=False)
        return exact["nll_given_z"].values.astype(np.float64)
    post = write.svi.infer(ltm.Batch(x, seen), progress=False)
    scores = ltm.evaluate(
        write.model, post, ltm.Batch(x, filled), draws, mode="prefix", controls=False
    )
    return -scores["log_predictive"].values.astype(np.float64)


def as_ids(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """The token ids (T,) of a text."""
    return torch.as_tensor(tokenizer.encode(text)).long()
