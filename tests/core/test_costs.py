"""What each text of a call cost: the tokens that a provider reports, and how a call's tokens and seconds are split."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import Cache, Embedded
from embedonce._engine.batch_sizes import count_bytes
from embedonce._engine.provider_calls import count_exactly, read_tokens, split_costs
from embedonce.vectors import MAX_TOKENS, apportion
from embedonce_backends.memory import MemoryBackend

# --- splitting --------------------------------------------------------------------------------


@given(
    total=st.integers(0, MAX_TOKENS),
    weights=st.lists(st.integers(0, 10**7), min_size=1, max_size=300).filter(any),
)
def test_shares_are_whole_numbers_with_the_exact_sum_and_almost_the_exact_size(total: int, weights: list[int]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert type(share) is int
        assert share >= 0
        assert abs(share - Fraction(total * weight, sum(weights))) < 1


@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=50), tokens=st.integers(0, 10**6))
def test_a_call_is_split_by_the_bytes_of_its_texts(texts: list[str], tokens: int) -> None:
    own_tokens, own_seconds = split_costs(tokens, 1.5, texts)
    assert len(own_tokens) == len(own_seconds) == len(texts)
    assert sum(number or 0 for number in own_tokens) == tokens
    assert sum(own_seconds) == pytest.approx(1.5)
    size = sum(map(count_bytes, texts))
    for text, number, seconds in zip(texts, own_tokens, own_seconds, strict=True):
        share = Fraction(count_bytes(text), size) if size else Fraction(1, len(texts))
        assert number is not None
        assert abs(number - tokens * share) < 1
        assert seconds == pytest.approx(1.5 * share)


@pytest.mark.parametrize(
    ("tokens", "texts", "expected"),
    [
        (7, ["one"], [7]),
        (7, ["", "", ""], [2, 2, 3]),
        (7, ["", "abc"], [0, 7]),
        (0, ["a", "b"], [0, 0]),
        (6, ["é", "a"], [4, 2]),
        (None, ["a", "b"], [None, None]),
        ([3, None], ["a", "bbbbb"], [3, None]),
        (5, [], []),
    ],
)
def test_how_tokens_are_split(tokens: Any, texts: list[str], expected: list[int | None]) -> None:
    assert list(split_costs(tokens, 1.0, texts)[0]) == expected


# --- reading ----------------------------------------------------------------------------------


class Rude:
    """Looks like a number and is none."""

    def __index__(self) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (None, None),
        (12, 12),
        (0, 0),
        (np.int64(12), 12),
        (np.array(12), 12),
        (MAX_TOKENS, MAX_TOKENS),
        (MAX_TOKENS + 1, None),
        (-1, None),
        (True, None),
        (np.True_, None),
        (12.0, None),
        (np.float32(12), None),
        (float("nan"), None),
        ("12", None),
        (b"12", None),
        (Rude(), None),
        ({"total": 12}, None),
        ([1, 2], [1, 2]),
        ((1, None), [1, None]),
        (range(2), [0, 1]),
        (np.array([1, 2], np.uint8), [1, 2]),
        (np.array([1.0, 2.0]), [None, None]),
        (np.array([[1, 2], [3, 4]]), [None, None]),
        ([True, -1], [None, None]),
        ([1.5, Rude()], [None, None]),
        ([1], None),
        ([1, 2, 3], None),
        ([], None),
        (np.array([1, 2, 3]), None),
    ],
)
def test_which_numbers_of_tokens_are_valid(tokens: Any, expected: Any) -> None:
    assert read_tokens(Embedded([[1.0], [2.0]], tokens), 2) == expected


def test_plain_vectors_report_no_tokens() -> None:
    assert read_tokens([[1.0], [2.0]], 2) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1, 2], 3),
        (np.array([1, 2]), 3),
        ((0, 0), 0),
        (None, None),
        ([1], None),
        ([1, None], None),
        ([1, -2], None),
        ([1, 2.5], None),
        (3, None),
        (ValueError("no"), None),
    ],
)
def test_counts_of_a_providers_tokenizer_are_used_only_if_all_are_valid(answer: Any, expected: int | None) -> None:
    class Provider:
        def count_exact_tokens(self, texts: list[str], task: str) -> Any:
            assert (texts, task) == (["a", "b"], "query")
            if isinstance(answer, Exception):
                raise answer
            return answer

    provider: Any = Provider()
    assert count_exactly(provider, ["a", "b"], "query") == expected
    other: Any = object()
    assert count_exactly(other, ["a", "b"], "query") is None


# --- through a cache --------------------------------------------------------------------------


def embed_with(tokens: Any, rows: list[Any], texts: list[str], backend: MemoryBackend) -> Any:
    with Cache(lambda texts: Embedded(rows, tokens), [backend], space={"model": "m"}) as cache:
        cache.fetch(texts)
        entries = backend.get_many(cache._get_route(cache._source, "document").keys(texts))
        return cache.stats(), list(entries.values())


def test_entries_have_their_share_of_a_calls_tokens_and_seconds() -> None:
    stats, entries = embed_with(10, [[1.0], [2.0]], ["a", "bbbb"], MemoryBackend())
    assert [entry.tokens for entry in entries] == [2, 8]
    seconds = [entry.seconds for entry in entries]
    assert seconds[1] == pytest.approx(4 * seconds[0])
    assert sum(seconds) == pytest.approx(stats.computed.seconds)
    assert stats.computed.tokens == 10


@pytest.mark.parametrize("tokens", [[10, 20, 30], np.array([10, 20, 30]), 60])
def test_a_row_that_failed_gets_no_entry_but_its_tokens_were_charged(tokens: Any) -> None:
    stats, entries = embed_with(tokens, [[1.0], None, [2.0]], ["a", "b", "c"], MemoryBackend())
    assert [entry.tokens for entry in entries] == ([20, 20] if isinstance(tokens, int) else [10, 30])
    assert stats.computed.texts == 2
    assert stats.computed.tokens == 60
    assert stats.computed.unknown_tokens == 0


@pytest.mark.parametrize("tokens", [[1], np.array([[1, 2]]), np.True_, Rude(), "3", float("inf")])
def test_invalid_tokens_do_not_lose_the_vectors(tokens: Any) -> None:
    stats, entries = embed_with(tokens, [[1.0], [2.0]], ["a", "b"], MemoryBackend())
    assert [entry.tokens for entry in entries] == [None, None]
    assert (stats.computed.texts, stats.computed.unknown_tokens) == (2, 2)


def test_unknown_tokens_of_one_text_are_not_zero() -> None:
    stats, entries = embed_with([7, None], [[1.0], [2.0]], ["a", "b"], MemoryBackend())
    assert [entry.tokens for entry in entries] == [7, None]
    assert (stats.computed.tokens, stats.computed.unknown_tokens) == (7, 1)
