"""Threads, forks and processes: what they get is what one thread gets, or an error that says so."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from known_models import TINY, make_language_model, make_oracle, make_tokens

import ltm_pyro as ltm
from ltm_pyro.config import Fast, Slow
from ltm_pyro.data.tokenizer import ByteTokenizer
from ltm_pyro.doors import exclusive, exclusively
from ltm_pyro.errors import InputError, NonFiniteError, ProcessLostError, ToldElsewhereError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.random import seeded

THREADS, CALLS = 8, 16
FAST = Fast(steps=3)
BYTES = replace(TINY, vocab_size=256)


def together(work: Callable[[int], Any]) -> list[Any]:
    """`work(0..CALLS)` in threads that begin at the same moment."""
    ready = threading.Barrier(THREADS)

    def one(i: int) -> Any:
        if i < THREADS:
            ready.wait(10)
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(CALLS)))


def language_svi() -> DualRateSVI:
    model = make_language_model(BYTES)
    return DualRateSVI(model, ltm.build_guide("mean_field", model), FAST, Slow(lr=1e-3))


def test_one_model_shared_gives_what_one_thread_gets() -> None:
    svi = language_svi()
    batch = make_tokens(4, BYTES)

    def work(i: int) -> Any:
        post = svi.infer(batch, seed=i)
        scores = ltm.evaluate(svi.model, post, batch, draws=4, seed=i)
        return post.mean, scores["elbo"].values

    alone = [work(i) for i in range(CALLS)]
    for (mean, elbo), (mean_alone, elbo_alone) in zip(together(work), alone, strict=True):
        assert torch.equal(mean, mean_alone)
        np.testing.assert_array_equal(elbo, elbo_alone)


def test_a_model_each_trains_as_in_one_thread() -> None:
    batch = make_tokens(4, BYTES)

    def work(i: int) -> Any:
        with exclusively():
            torch.manual_seed(0)
            svi = language_svi()
        rows = [svi.step(batch) for _ in range(2)]
        return [row["elbo"] for row in rows], svi.model.state_dict()

    alone = work(0)
    for elbo, state in together(work):
        assert elbo == alone[0]
        for name, value in state.items():
            assert torch.equal(value, alone[1][name]), name


def test_generated_text_is_the_seed_s() -> None:
    svi = language_svi()
    tokenizer = ByteTokenizer()

    def text(seed: int) -> list[str]:
        return ltm.generate(svi.model, tokenizer, prompt="ab", n=2, seed=seed, svi=svi)

    alone = text(5)
    for got in together(lambda i: text(5)):
        assert got == alone


def test_a_thread_that_seeds_torch_beside_a_draw_is_not_silent() -> None:
    oracle = make_oracle()
    post = DualRateSVI(oracle, ltm.build_guide("mean_field", oracle), FAST).infer(
        oracle.simulate(3)
    )

    def draw() -> None:
        with seeded(1, torch.device("cpu")):
            beside = threading.Thread(target=torch.manual_seed, args=(0,))
            beside.start()
            beside.join()
            post.sample(2)

    with pytest.raises(RuntimeError, match="seeded by something else") as caught:
        draw()
    assert "exclusively" in str(caught.value)
    with seeded(2**63 + 5, torch.device("cpu")), seeded(0, torch.device("cpu")):
        post.sample(2)


def test_a_door_leaves_the_caller_s_modes_as_they_were_and_enters_again() -> None:
    @exclusive
    def inner() -> bool:
        return torch.is_grad_enabled()

    @exclusive
    def outer() -> tuple[bool, bool, str]:
        with torch.no_grad():
            again = inner()
        return torch.is_grad_enabled(), again, str(torch.zeros(1).device)

    with torch.inference_mode(), torch.device("meta"):
        assert outer() == (True, False, "cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.zeros(1).is_meta
    with exclusively() as outermost:
        assert outermost
    with pytest.raises(InputError, match="names"):
        exclusive(lambda: (_ for _ in ()).throw(InputError("names")))()


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_a_lock_of_its_parent() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusively():
            held.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    try:
        child = multiprocessing.get_context("fork").Process(target=_enter)
        child.start()
        child.join(10)
        assert child.exitcode == 0
    finally:
        done.set()
        holder.join()


def _enter() -> None:
    with exclusively():
        pass


@pytest.mark.parametrize(
    "error",
    [
        InputError("what, why, remedy"),
        NonFiniteError([3, 4], 7),
        NonFiniteError([], -1),
        ProcessLostError([1], 3, tells=False),
        ToldElsewhereError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: Exception) -> None:
    error.add_note("and a note")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def _diverge(seed: int) -> None:
    oracle = make_oracle()
    svi = DualRateSVI(
        oracle, ltm.build_guide("mean_field", oracle), Fast(steps=3, lr=1e30, optimizer="adam")
    )
    svi.infer(oracle.simulate(3, seed=seed))


def test_a_divergence_in_a_process_pool_names_its_sequences_and_leaves_the_pool() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(NonFiniteError) as caught:
            pool.submit(_diverge, 0).result(60)
        assert caught.value.ids
        assert pool.submit(abs, -1).result(60) == 1
