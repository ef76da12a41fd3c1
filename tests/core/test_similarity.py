"""Nearest rows by cosine: against brute force, and at the edges."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedonce import similarity
from embedonce.similarity import top_k

# Few different values, so that equal cosines are common.
SMALL = st.integers(-2, 2).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    d = draw(st.integers(1, 3))
    queries = draw(arrays(np.float32, (draw(st.integers(1, 4)), d), elements=SMALL))
    matrix = draw(arrays(np.float32, (draw(st.integers(0, 40)), d), elements=SMALL))
    return queries, matrix, draw(st.integers(1, 12)), draw(st.sampled_from([1, 7, 64, 4096]))


@given(problems())
def test_it_is_what_brute_force_finds(problem: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    queries, matrix, k, block = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK", block)
        places, scores = top_k(queries, matrix, k)
    assert places.shape == scores.shape == (len(queries), min(k, len(matrix)))
    assert (places.dtype, scores.dtype) == (np.int64, np.float32)
    for query, found, cosines in zip(queries, places, scores, strict=True):
        expected = [cosine(query, row) for row in matrix]
        assert np.allclose(cosines, [expected[i] for i in found], atol=1e-6)
        assert np.allclose(cosines, sorted(expected, reverse=True)[: len(found)], atol=1e-6)
        assert len(set(found.tolist())) == len(found)
        assert (np.diff(cosines) <= 0).all()
        for i, j in itertools.pairwise(found):
            assert i < j or cosines[list(found).index(i)] > cosines[list(found).index(j)]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    lengths = float(np.linalg.norm(one.astype(float)) * np.linalg.norm(other.astype(float)))
    return 0.0 if lengths == 0 else float(one.astype(float) @ other.astype(float)) / lengths


def test_of_equal_rows_the_first_comes_first_also_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK", 10)
    places, _ = top_k([1.0, 0.0], np.tile(np.float32([[2, 0]]), (100, 1)), 5)
    assert places.tolist() == [[0, 1, 2, 3, 4]]


def test_lengths_do_not_matter_even_at_the_ends_of_float32() -> None:
    matrix = np.array([[1e30, 0], [1e-30, 1e-30], [0, 1e-38], [0, 0]], np.float32)
    places, scores = top_k(np.float32([1e-38, 0]), matrix, 4)
    assert places.tolist() == [[0, 1, 2, 3]]
    assert np.allclose(scores, [[1, 0.5**0.5, 0, 0]])


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.uint8])
def test_any_numbers_in_any_layout(dtype: Any) -> None:
    matrix = np.asfortranarray(np.arange(1, 61).reshape(6, 10)[:, ::2].astype(dtype))
    places, scores = top_k(matrix[3], matrix, 1)
    assert places.tolist() == [[3]]
    assert scores[0, 0] == pytest.approx(1)


def test_a_matrix_larger_than_a_block_takes_no_more_memory_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((200_000, 8), np.float32)
    queries = matrix[:50]
    monkeypatch.setattr(similarity, "BLOCK", 100_000)
    tracemalloc.start()
    places, _ = top_k(queries, matrix, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (places[:, 0] == np.arange(50)).all()
    assert peak < 200_000 * 50 * 4 / 3, "all similarities at once would be 40 MB"


def test_bad_input_says_what_is_wrong() -> None:
    good = np.ones((3, 2))
    for queries, matrix, k, match in (
        (np.ones(3), good, 1, "queries have 3 dimensions and the matrix 2"),
        (good, np.ones(2), 1, "matrix are numbers of shape"),
        (np.ones((1, 1, 2)), good, 1, "queries are numbers of shape"),
        (["text"], good, 1, "queries are numbers"),
        (good, good, 0, "k is at least 1"),
        (good, np.array([[np.nan, 1]]), 1, "matrix have NaN"),
        (np.array([np.inf, 1]), good, 1, "queries have NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            top_k(queries, matrix, k)
    places, scores = top_k(np.empty((0, 2)), good, 2)
    assert places.shape == scores.shape == (0, 2)
