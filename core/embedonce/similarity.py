"""Exact cosine similarity over a matrix in memory, with numpy alone and a bounded amount of extra memory.

    indices, scores = top_k(queries, matrix, 10)

This module is meant for thousands to a few million vectors, for example to run an evaluation, to choose the context of
an agent, or to find near-duplicates. It is not a vector store and builds no index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["top_k"]

BLOCK_VALUES = 1 << 22
"""Maximum number of values in a block of rows or scores; 32 MiB as float64."""

Rows = NDArray[np.float64]


def top_k(queries: ArrayLike, matrix: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` rows of ``matrix`` that are nearest to each query by cosine, nearest first.

    Args:
        queries: Shape (q, d), any float or integer dtype.
        matrix: Shape (n, d), any float or integer dtype; a memory map is read block by block.
        k: Number of rows to return per query, at least 1.

    Returns:
        The indices (int64) and the cosines (float32), both of shape (q, min(k, n)). Rows with equal
        float32 cosines are in the order of their indices. If a row or a query is all zero, its cosine is 0.

    Raises:
        TypeError: the values of an array are not real numbers, or k is not an integer.
        ValueError: the shapes do not match, k is less than 1, or a value is NaN or infinite.
    """
    query_rows, rows = _to_matrix(queries, "queries"), _to_matrix(matrix, "matrix")
    if query_rows.shape[1] != rows.shape[1]:
        raise ValueError(
            f"queries and matrix must have the same dimensions, got {query_rows.shape[1]} and {rows.shape[1]}"
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = min(int(k), len(rows))
    indices = np.empty((len(query_rows), count), np.int64)
    scores = np.empty((len(query_rows), count), np.float32)
    if count:
        step = _compute_block_size(rows.shape[1])
        for start in range(0, len(query_rows), step):
            end = start + step
            indices[start:end], scores[start:end] = _find_nearest(query_rows[start:end], rows, count, start)
    return indices, scores


def _compute_block_size(dimensions: int) -> int:
    """Return the number of rows per block."""
    return max(1, min(BLOCK_VALUES // max(1, dimensions), 1 << 11))


def _to_matrix(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asanyarray(values)
    if array.ndim != 2:
        hint = "; for one vector v, pass v[None, :]" if array.ndim == 1 else ""
        raise ValueError(f"{name} must have two dimensions: expected shape (n, d), got shape {array.shape}{hint}")
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{name} must have real numbers, got {array.dtype}")
    return array


def _find_nearest(
    query_rows: NDArray[Any], rows: NDArray[Any], k: int, first: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the indices and scores of the k nearest rows for a block of queries; ``first`` is the first query's index.

    A matrix product may round the scores of two equal rows differently, because the rows are at different places in
    the block. So the float32 product only selects candidates. The candidates' scores are then computed row by row in
    float64, so that equal rows get equal scores.
    """
    queries, query_lengths = _scale_rows(query_rows, "queries", first)
    coarse = _to_unit_length(queries, query_lengths)
    # Float32 rounding changes the difference between two dot products of unit vectors by at most this margin.
    margin = np.float32((rows.shape[1] + 8) * 2.0**-22)
    best = _BestRows(len(query_rows), k)
    step = _compute_block_size(rows.shape[1])
    for start in range(0, len(rows), step):
        block, lengths = _scale_rows(rows[start : start + step], "matrix", start)
        approximate = coarse @ _to_unit_length(block, lengths).T
        threshold = best.lowest_scores
        if approximate.shape[1] > k:
            threshold = np.maximum(threshold, np.partition(approximate, -k, axis=1)[:, -k])
        candidate_queries, candidate_rows = np.nonzero(approximate >= (threshold - margin)[:, None])
        for at in range(0, len(candidate_rows), step):
            query, row = candidate_queries[at : at + step], candidate_rows[at : at + step]
            dots = (queries[query] * block[row]).sum(axis=1)
            norms = query_lengths[query] * lengths[row]
            cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).astype(np.float32)
            best.add(query, row + start, cosines)
    return best.indices, best.scores


def _scale_rows(rows: NDArray[Any], name: str, first: int) -> tuple[Rows, NDArray[np.float64]]:
    """Return the rows, scaled and as float64, and the norms of the scaled rows.

    Each row is scaled by a power of two, so that its norm does not overflow or underflow. ``first`` is the index of
    the first row, for the error message.
    """
    wide = np.array(rows, np.float64, order="C", subok=False)
    largest = np.abs(wide).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        invalid = first + int(np.flatnonzero(~np.isfinite(largest))[0])
        raise ValueError(f"row {invalid} of {name} has NaN or infinity")
    np.ldexp(wide, -np.frexp(largest)[1][:, None], out=wide)
    return wide, np.sqrt((wide * wide).sum(axis=1))


def _to_unit_length(rows: Rows, lengths: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.divide(rows, np.where(lengths > 0, lengths, 1.0)[:, None]).astype(np.float32)


class _BestRows:
    """The k best rows so far for each query, ordered by cosine and then by index."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.indices = np.full((queries, k), -1, np.int64)
        self.scores = np.full((queries, k), -np.inf, np.float32)

    @property
    def lowest_scores(self) -> NDArray[np.float32]:
        """For each query, the score that a row must reach to be among the best."""
        return self.scores[:, -1]

    def add(self, query: NDArray[np.intp], index: NDArray[np.intp], score: NDArray[np.float32]) -> None:
        """Offer rows: row ``index[i]`` has the cosine ``score[i]`` with query ``query[i]``. ``query`` is sorted."""
        touched, group = np.unique(query, return_inverse=True)
        owner = np.concatenate([np.repeat(np.arange(len(touched)), self.k), group])
        indices = np.concatenate([self.indices[touched].ravel(), index])
        scores = np.concatenate([self.scores[touched].ravel(), score])
        order = np.lexsort((indices, -scores, owner))
        begins = np.searchsorted(owner[order], np.arange(len(touched)))
        chosen = order[begins[:, None] + np.arange(self.k)]
        self.indices[touched], self.scores[touched] = indices[chosen], scores[chosen]
