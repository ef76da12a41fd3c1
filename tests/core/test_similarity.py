"""``top_k`` returns the same result as search_by_brute_force, which compares every pair and sums exactly."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedonce import similarity
from embedonce.similarity import top_k


def search_by_brute_force(queries: Any, matrix: Any, k: int) -> tuple[Any, Any]:
    """Return the expected result of top_k, computed pair by pair with Python floats."""
    indices, scores = [], []
    for query in np.asarray(queries, np.float64).tolist():
        found = []
        for place, row in enumerate(np.asarray(matrix, np.float64).tolist()):
            length = math.sqrt(math.fsum(x * x for x in query)) * math.sqrt(math.fsum(y * y for y in row))
            dot = math.fsum(x * y for x, y in zip(query, row, strict=True))
            found.append((-float(np.float32(dot / length if length else 0.0)), place))
        found.sort()
        indices.append([place for _, place in found[:k]])
        scores.append([-score + 0.0 for score, _ in found[:k]])
    shape = (len(queries), min(k, len(matrix)))
    return np.array(indices, np.int64).reshape(shape), np.array(scores, np.float32).reshape(shape)


small_integers = st.integers(0, 5).flatmap(
    lambda d: st.tuples(
        *(
            hnp.arrays(dtype, st.tuples(st.integers(0, most), st.just(d)), elements=st.integers(-3, 3))
            for dtype, most in ((np.int8, 4), (np.float16, 40))
        )
    )
)


@given(small_integers, st.integers(1, 50), st.sampled_from([1, 7, 64, 1 << 22]))
def test_the_result_equals_brute_force(arrays: tuple[Any, Any], k: int, values: int) -> None:
    """Small integers give many ties, zero rows and exact sums. The size of the blocks must not matter."""
    queries, matrix = arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK_VALUES", values)
        indices, scores = top_k(queries, matrix, k)
    wanted, cosines = search_by_brute_force(queries, matrix, k)
    assert (indices.dtype, scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_array_equal(scores, cosines)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_vectors_that_resemble_a_models(dtype: Any) -> None:
    rng = np.random.default_rng(7)
    matrix = rng.normal(size=(5000, 96)) * (20 if dtype == np.int8 else 1)
    matrix = matrix.astype(dtype)
    queries = np.concatenate([matrix[:20], rng.normal(size=(20, 96)).astype(np.float64).astype(dtype)])
    indices, scores = top_k(queries, matrix, 17)
    wide = matrix.astype(np.float64) / np.maximum(np.linalg.norm(matrix.astype(np.float64), axis=1), 1e-300)[:, None]
    asked = queries.astype(np.float64)
    asked /= np.maximum(np.linalg.norm(asked, axis=1), 1e-300)[:, None]
    exact = (asked @ wide.T).astype(np.float32)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :17], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, indices, axis=1), scores, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (indices[:20, 0] == np.arange(20)).all()


def test_equal_rows_have_equal_scores_at_any_index() -> None:
    rng = np.random.default_rng(3)
    row = rng.normal(size=384).astype(np.float32)
    matrix = rng.normal(size=(9001, 384)).astype(np.float32)
    places = [0, 5, 2047, 2048, 4095, 8999, 9000]
    matrix[places] = row
    indices, scores = top_k(row[None], matrix, len(places))
    assert indices.tolist() == [places]
    assert len(set(scores[0].tolist())) == 1


def test_views_lists_and_memory_maps(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = rng.normal(size=(60, 20)).astype(np.float32)
    expected = top_k(whole[::2, ::-1].copy(), whole[:, ::-1].copy(), 5)
    for queries, matrix in (
        (whole[::2, ::-1], np.asfortranarray(whole[:, ::-1])),
        (whole[::2, ::-1].tolist(), whole[:, ::-1].tolist()),
    ):
        indices, scores = top_k(queries, matrix, 5)
        assert (indices == expected[0]).all()
        np.testing.assert_array_equal(scores, expected[1])
    np.save(tmp_path / "m.npy", whole[:, ::-1])
    mapped = np.load(tmp_path / "m.npy", mmap_mode="r")
    assert (top_k(whole[::2, ::-1], mapped, 5)[0] == expected[0]).all()


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_the_size_of_values_does_not_matter(size: float) -> None:
    matrix = np.array([[1.0, 2.0], [2.0, 1.0], [-1.0, 0.5]])
    indices, scores = top_k(matrix * size, matrix / size, 3)
    wanted, cosines = top_k(matrix, matrix, 3)
    assert (indices == wanted).all()
    np.testing.assert_allclose(scores, cosines, rtol=1e-6, atol=1e-7)


def test_memory_is_bounded() -> None:
    matrix = np.random.default_rng(2).integers(-100, 100, size=(300_000, 16), dtype=np.int8)
    queries = matrix[:100]
    tracemalloc.start()
    indices, _ = top_k(queries, matrix, 3)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (indices[:, 0] == np.arange(100)).all()
    assert most < 16 * 2**20, f"{most / 2**20:.0f} MiB; all scores would need 114 MiB, and the matrix as float64 37 MiB"


def test_rows_that_are_all_the_same() -> None:
    indices, scores = top_k(np.ones((3, 8)), np.ones((20_000, 8), np.int8), 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 3
    assert (scores == 1).all()


@pytest.mark.parametrize(
    ("queries", "matrix", "k", "error", "message"),
    [
        ([1.0, 2.0], [[1.0, 2.0]], 1, ValueError, r"for one vector v, pass v\[None, :\]"),
        ([[1.0]], [[1.0, 2.0]], 1, ValueError, "queries and matrix must have the same dimensions, got 1 and 2"),
        ([[1.0]], [[1.0]], 0, ValueError, "k must be at least 1, got 0"),
        ([[1.0]], [[1.0]], 1.5, TypeError, "k must be an integer, got float"),
        ([[1.0]], [[1.0]], True, TypeError, "k must be an integer, got bool"),
        ([["a"]], [[1.0]], 1, TypeError, "real numbers"),
        ([[1j]], [[1.0]], 1, TypeError, "real numbers"),
        ([[True]], [[1.0]], 1, TypeError, "real numbers"),
        ([[1.0]], [[1.0], [math.nan]], 1, ValueError, "row 1 of matrix has NaN"),
        ([[math.inf]], [[1.0]], 1, ValueError, "row 0 of queries"),
    ],
)
def test_bad_input(queries: Any, matrix: Any, k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top_k(queries, matrix, k)


def test_nothing_asked_and_nothing_there() -> None:
    assert top_k(np.empty((0, 3)), np.ones((2, 3)), 5)[0].shape == (0, 2)
    assert top_k(np.ones((2, 3)), np.empty((0, 3)), 5)[1].shape == (2, 0)
    assert top_k(np.ones((2, 0)), np.empty((1, 0)), 5)[1].tolist() == [[0.0], [0.0]]
