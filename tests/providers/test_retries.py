"""Tests for the retries after a status 500."""

from __future__ import annotations

import math

import pytest

from embedonce_providers._retries import MAX_REMEMBERED, RetryLimits


def test_a_request_of_several_texts_is_not_repeated() -> None:
    limits = RetryLimits(4)
    assert limits.count_retries(["a", "b"]) == 0
    assert limits.count_retries(["a"]) == 4


@pytest.mark.parametrize("texts", [2, 3, 4, 8, 20, 256, 2000])
def test_a_search_with_its_retries_stays_within_its_bound(texts: int) -> None:
    """Halving takes at most ceil(log2 n) requests, one more for the rest, and one that confirms the refusal."""
    limits = RetryLimits(4)
    sent = [f"text {number}" for number in range(texts)]
    limits.note_failure(sent)
    limits.note_failure(sent[:2])
    halvings = math.ceil(math.log2(texts))
    search = min(halvings + 2, 2) if texts == 2 else halvings + 2
    assert search + limits.count_retries(sent[:1]) <= 2 * halvings
    assert limits.count_retries(["another"]) == 4


def test_few_texts_are_remembered() -> None:
    limits = RetryLimits(4)
    for number in range(0, 3 * MAX_REMEMBERED, 1000):
        limits.note_failure([str(number + place) for place in range(1000)])
    assert len(limits._left) <= MAX_REMEMBERED + 1000
