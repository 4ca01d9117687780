"""Sequences: every token once, ids that stay, batches that are functions of their arguments."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.data.sequences import SequenceLayout, SequenceSet
from ltm_pyro.errors import InputError
from ltm_pyro.models.latent_thought import LatentThoughtModel

LENGTHS = np.array([7, 1, 4, 12, 3, 8])  # with T = 4: 2, 1, 1, 3, 1 and 2 sequences
TOKENS = np.arange(1, 36, dtype=np.uint8)
LAYOUT = SequenceLayout(TOKENS, LENGTHS, seq_len=4, corpus="a")


def sequence_set(*documents: int) -> SequenceSet:
    return SequenceSet(LAYOUT, np.array(documents), "val")


def test_documents_are_cut_padded_and_masked() -> None:
    batch = sequence_set(0, 1, 3).batch(slice(None))
    assert batch.ids.tolist() == [0, 1, 2, 4, 5, 6]
    assert batch.observed.tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 0],
        [8, 0, 0, 0],
        [13, 14, 15, 16],
        [17, 18, 19, 20],
        [21, 22, 23, 24],
    ]
    assert torch.equal(batch.mask, batch.observed != 0)
    assert (batch.observed.dtype, batch.mask.dtype, batch.ids.dtype) == (
        torch.int64,
        torch.bool,
        torch.int64,
    )


def test_every_token_is_in_exactly_one_sequence() -> None:
    parts = [sequence_set(0, 3), sequence_set(1, 4), sequence_set(2, 5)]
    tokens, ids = [], []
    for part in parts:
        for batch in part.batches(2):
            tokens += batch.observed[batch.mask].tolist()
            ids += batch.ids.tolist()
    assert sorted(tokens) == TOKENS.tolist()
    assert sorted(ids) == list(range(10))
    assert sum(part.n_tokens for part in parts) == len(TOKENS)
    assert sum(part.n_documents for part in parts) == len(LENGTHS)


def test_a_sequence_keeps_its_id_in_any_split() -> None:
    everything = sequence_set(*range(6))
    part = sequence_set(2, 3, 5)
    by_id = everything.batch(ids=part.ids)
    by_position = part.batch(range(len(part)))
    assert torch.equal(by_id.observed, by_position.observed)
    assert torch.equal(by_id.ids, by_position.ids)


@pytest.mark.parametrize(
    "positions",
    [range(3, 0, -1), [3, 2, 1], np.array([3, 2, 1], dtype=np.uint8), torch.tensor([3, 2, 1])],
)
def test_positions_of_any_kind_in_any_order(positions: Any) -> None:
    part = sequence_set(0, 2, 3)
    batch = part.batch(positions)
    assert batch.ids.tolist() == part.ids[[3, 2, 1]].tolist()
    assert torch.equal(part.batch(ids=batch.ids).observed, batch.observed)


def test_slices_are_python_slices() -> None:
    part = sequence_set(*range(6))
    assert part.batch(slice(-2, None)).ids.tolist() == [8, 9]
    assert part.batch(slice(0, 100, 4)).ids.tolist() == [0, 4, 8]
    assert part.batch([1, 1]).ids.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([6], "position 6 is not in the val split: its 6 sequences"),
        ([-1], "position -1"),
        (range(4, 8), "position 6"),
        ([], "at least one sequence"),
        (slice(6, 9), "at least one sequence"),
        (3, "whole numbers"),
        ([0.0], "whole numbers"),
        ([True], "whole numbers"),
        ([[0], [1, 2]], "whole numbers"),
        ("ab", "whole numbers"),
    ],
)
def test_positions_that_are_none(positions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sequence_set(0, 1, 3).batch(positions)


def test_ids_that_are_not_here() -> None:
    part = sequence_set(0, 1, 3)
    for unknown in (3, -1, 10, 99):
        with pytest.raises(InputError, match=f"id {unknown} is not in the val split"):
            part.batch(ids=[0, unknown])
    with pytest.raises(InputError, match="either positions or ids"):
        part.batch([0], ids=[0])  # type: ignore[call-overload]
    with pytest.raises(InputError, match="either positions or ids"):
        part.batch()  # type: ignore[call-overload]


def test_batches_end_with_what_is_left() -> None:
    part = sequence_set(*range(6))
    assert [len(batch) for batch in part.batches(4)] == [4, 4, 2]
    assert [len(batch) for batch in part.batches(100)] == [10]
    for size in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="batch size"):
            part.batches(size)  # type: ignore[arg-type]


def test_the_caller_cannot_change_a_set() -> None:
    part = sequence_set(0, 1)
    part.batch(ids=part.ids).ids[0] = 99
    part.batch([0]).observed[0] = 99
    assert part.ids.tolist() == [0, 1, 2]
    assert TOKENS[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        part.ids[0] = 99


def test_training_batches_are_a_function_of_seed_and_step() -> None:
    steps = [9, 0, 4, 9, 123_456, 0]
    one, other = sequence_set(*range(6)), sequence_set(*range(6))
    for step in steps:
        expected = other.training_batch(step, 3, seed=5)
        assert torch.equal(one.training_batch(step, 3, seed=5).ids, expected.ids)
    assert len({tuple(one.training_batch(s, 3, 5).ids.tolist()) for s in range(30)}) > 20
    assert one.training_batch(0, 10, 5).ids.tolist() != one.training_batch(0, 10, 6).ids.tolist()


def test_the_order_of_training_never_changes() -> None:
    # A resumed fit, perhaps with a newer NumPy, must go on with the same batches.
    part = sequence_set(*range(6))
    assert part.training_batch(0, 5, seed=0).ids.tolist() == [3, 2, 1, 8, 6]
    assert part.training_batch(7, 5, seed=3).ids.tolist() == [9, 6, 5, 4, 2]


def test_an_epoch_has_no_sequence_twice() -> None:
    part = sequence_set(*range(6))
    for batch_size in (1, 3, 4, 5, 10):
        steps = len(part) // batch_size
        for epoch in range(3):
            ids = [
                part.training_batch(epoch * steps + k, batch_size).ids.tolist()
                for k in range(steps)
            ]
            assert all(len(row) == batch_size for row in ids)
            together = [i for row in ids for i in row]
            assert len(set(together)) == len(together)


def test_what_an_epoch_leaves_out_has_its_turn() -> None:
    part = sequence_set(*range(6))
    counts = np.zeros(10)
    for step in range(2_000):
        counts[part.training_batch(step, 8).ids.numpy()] += 1
    # 2,000 epochs of 8 out of 10: mean 1,600, standard deviation 18.
    assert np.abs(counts - 1_600).max() < 90


def test_a_small_set_is_its_own_batch() -> None:
    part = sequence_set(0, 1)
    assert sorted(part.training_batch(7, 16).ids.tolist()) == [0, 1, 2]


def lane_ids(part: SequenceSet, step: int, batch_size: int, seed: int = 0) -> list[int]:
    return part.training_batch(step, batch_size, seed, lanes=True).ids.tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 10])
def test_with_lanes_a_sequence_keeps_its_row(batch_size: int) -> None:
    part = sequence_set(*range(6))  # 10 sequences, whose ids are their positions
    steps = 10 // batch_size
    seen = set()
    for epoch in range(40):
        ids = [lane_ids(part, epoch * steps + k, batch_size) for k in range(steps)]
        for row in ids:
            assert [i % batch_size for i in row] == list(range(batch_size))
        together = [i for row in ids for i in row]
        assert len(set(together)) == len(together) == steps * batch_size
        seen |= set(together)
    assert seen == set(range(10))  # what sits out changes from epoch to epoch


def test_lanes_are_a_function_of_seed_and_step() -> None:
    one, other = sequence_set(*range(6)), sequence_set(*range(6))
    for step in (9, 0, 4, 123_456, 0, 1):
        assert lane_ids(one, step, 3, 5) == lane_ids(other, step, 3, 5)
        one.training_batch(step, 3, 5)  # asked for in between, it makes no difference
    assert len({tuple(lane_ids(one, step, 2)) for step in range(100)}) == 25
    assert lane_ids(one, 0, 2, 5) != lane_ids(one, 0, 2, 6)
    # A resumed fit, perhaps with a newer NumPy, must go on with the same batches.
    assert lane_ids(one, 7, 4, 3) == [4, 5, 2, 7]


@pytest.mark.parametrize("lanes", [False, True])
def test_rows_put_together_are_the_batch(lanes: bool) -> None:
    for step in range(12):
        whole = sequence_set(*range(6)).training_batch(step, 4, 1, lanes=lanes)
        for processes in (1, 2, 4):
            n = 4 // processes
            parts = [
                sequence_set(*range(6)).training_batch(
                    step, 4, 1, lanes=lanes, rows=slice(n * rank, n * (rank + 1))
                )
                for rank in range(processes)
            ]
            assert torch.equal(torch.cat([p.ids for p in parts]), whole.ids)
            assert torch.equal(torch.cat([p.observed for p in parts]), whole.observed)
            assert torch.equal(torch.cat([p.mask for p in parts]), whole.mask)
    for rows in (slice(2, 2), slice(0, 4, 2), slice(9, 12)):
        with pytest.raises(InputError, match="rows that follow one another"):
            sequence_set(*range(6)).training_batch(0, 4, lanes=lanes, rows=rows)


def test_only_the_rows_asked_for_are_read() -> None:
    part, read = sequence_set(*range(6)), []
    batch = part._layout.batch
    part._layout = SimpleNamespace(batch=lambda ids: read.extend(ids) or batch(ids))  # type: ignore[assignment]
    chosen = part.training_batch(3, 8, lanes=True, rows=slice(2, 4))
    assert read == chosen.ids.tolist()
    assert list(part._orders) == [2, 3]  # nor are other lanes' permutations made


def test_an_epoch_costs_few_bytes_per_sequence() -> None:
    n = 200_000
    lengths = np.ones(n, dtype=np.int64)
    part = SequenceSet(SequenceLayout(np.ones(n, np.uint8), lengths, 1, ""), np.arange(n), "train")
    for lanes in (False, True):
        tracemalloc.start()
        part.training_batch(0, 8, lanes=lanes)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 32 * n
        assert kept < 5 * n


@pytest.mark.parametrize("lanes", [False, True])
def test_rows_of_a_batch_are_drawn_anew(lanes: bool) -> None:
    source = sequence_set(*range(6)).batch(range(10))
    seen = set()
    for step in range(60):
        batch = source.training_batch(step, 4, lanes=lanes)
        ids = batch.ids.tolist()
        assert len(set(ids)) == 4
        assert not lanes or [i % 4 for i in ids] == [0, 1, 2, 3]
        part = source.training_batch(step, 4, lanes=lanes, rows=slice(1, 3))
        assert part.ids.tolist() == ids[1:3]
        seen |= set(ids)
    assert seen == set(range(10))
    assert sorted(source.training_batch(0, 99, lanes=lanes).ids.tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 2, 0), "step is -1"), ((0, 0, 0), "batch size is 0"), ((0, 2, -3), "seed is -3")],
)
def test_training_batches_refuse_what_is_out_of_range(
    arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sequence_set(0).training_batch(*arguments)


def test_repr_says_what_it_is() -> None:
    assert repr(sequence_set(0, 1)) == "SequenceSet(val: 3 sequences, 8 tokens)"
    assert sequence_set(0).seq_len == 4


def test_a_batch_knows_its_documents_and_its_corpus_through_every_change() -> None:
    part = sequence_set(0, 2, 3)
    assert part.documents.tolist() == [0, 0, 2, 3, 3, 3]
    batch = part.batch([4, 0, 2])
    assert batch.documents is not None
    assert (batch.documents.tolist(), batch.corpus) == ([3, 0, 2], "a")
    changed = [
        batch.to("cpu"),
        batch.prefix(2),
        batch.suffix(2),
        batch.unobserved(),
        batch.select(slice(None)),
    ]
    for other in changed:
        assert other.documents is not None
        assert (other.documents.tolist(), other.corpus) == ([3, 0, 2], "a")
    some = batch.select(torch.tensor([2, 0]))
    assert some.documents is not None
    assert some.documents.tolist() == [2, 3]


def test_a_batch_made_by_hand_has_no_documents_unless_they_are_given() -> None:
    x = torch.zeros(2, 3, dtype=torch.long)
    plain = Batch(x)
    assert (plain.documents, plain.corpus) == (None, None)
    assert plain.select(slice(1)).documents is None
    given = Batch(x, documents=torch.tensor([5, 5]))
    assert given.to("cpu").documents is not None
    with pytest.raises(InputError, match="documents"):
        Batch(x, documents=torch.tensor([1]))


def test_the_models_own_batches_keep_what_a_batch_knows() -> None:
    model = LatentThoughtModel.from_preset("nano", vocab_size=64)
    batch = sequence_set(0, 3).batch([3, 0])
    hidden = model.hide_inputs(batch, torch.zeros_like(batch.mask))
    for other in (hidden, hidden.select(slice(None)), hidden.to("cpu"), model.prepare(hidden)):
        assert other.documents is not None
        assert (other.documents.tolist(), other.corpus) == ([3, 0], "a")
