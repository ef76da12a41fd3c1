"""Tests for the order of an answer's items."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import ProviderError
from embedonce.answer_order import order_by_index


@given(st.permutations(range(6)))
def test_each_text_gets_the_item_with_its_index(indexes: list[int]) -> None:
    order = order_by_index(indexes, len(indexes))
    assert [indexes[position] for position in order] == list(range(len(indexes)))


@given(st.permutations(range(6)), st.integers(0, 5))
def test_one_item_without_index_takes_the_free_place(indexes: list[int], left_out: int) -> None:
    given_indexes: list[Any] = [None if index == left_out else index for index in indexes]
    assert order_by_index(given_indexes, 6) == order_by_index(indexes, 6)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_an_answer_without_any_index_is_taken_in_its_order(count: int) -> None:
    assert order_by_index([None] * count, count) == list(range(count))


@pytest.mark.parametrize(
    "indexes",
    [
        [0, 0, 1],
        [1, 2, 3],
        [-1, 0, 1],
        [0, 1, 1.0],
        [0, 1, 2.0],
        ["0", "1", "2"],
        [False, True, 2],
        [None, None, 2],
        [None, 0, 0],
        [None, 1, 3],
        [None, "1", 2],
        [0, 1, [2]],
    ],
    ids=str,
)
def test_other_indexes_are_refused(indexes: list[Any]) -> None:
    with pytest.raises(ProviderError, match=r"not exactly the numbers from 0 to 2.*which vector belongs to which text"):
        order_by_index(indexes, 3)


@pytest.mark.parametrize("indexes", [[], [0], [0, 1, 2], [None]], ids=str)
def test_another_number_of_items_is_refused(indexes: list[Any]) -> None:
    with pytest.raises(ProviderError, match=f"texts: 2, vectors received: {len(indexes)}"):
        order_by_index(indexes, 2)
