"""Counting distinct texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce.cli.embedding.distinct import Distinct


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3))), st.integers(1, 30))
def test_it_counts_as_a_set_does(batches: list[list[str]], held: int) -> None:
    distinct = Distinct(held)
    for batch in batches:
        distinct.add(batch)
    assert distinct.count() == len({text for batch in batches for text in batch})
    assert distinct.count() == distinct.count()
    distinct.close()


@pytest.mark.parametrize("held", [1000, 2**20])
def test_many_texts_in_memory_and_on_disk(held: int) -> None:
    distinct = Distinct(held)
    for start in range(0, 40_000, 2048):
        distinct.add([str(number % 30_011) for number in range(start, start + 2048)])
    assert distinct.count() == 30_011
    distinct.close()
