from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_pyro.diagnostics.bounds import partners_of


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_partners_are_of_other_documents(documents: list[int]) -> None:
    given = torch.tensor(documents)
    found = partners_of(len(documents), given)
    if len(set(documents)) == 1:
        assert found is None
        return
    assert found is not None
    assert bool((given[found] != given).all())
    if 2 * max(map(documents.count, documents)) <= len(documents):
        assert sorted(found.tolist()) == list(range(len(documents)))


def test_without_documents_every_sequence_is_one() -> None:
    found = partners_of(5)
    assert found is not None
    assert sorted(found.tolist()) == list(range(5))
    assert all(i != j for i, j in enumerate(found.tolist()))
    assert partners_of(1) is None
