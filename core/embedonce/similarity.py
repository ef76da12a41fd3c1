"""Cosine similarity over a matrix in memory: exact, in bounded memory, with numpy alone.

    indices, scores = top_k(queries, matrix, 10)

This is for thousands to a few millions of vectors: an evaluation, an agent's context, near-duplicates. It is no vector
store and keeps no index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["top_k"]

VALUES = 1 << 22
"""Most values of a block, of rows or of scores; as float64 32 MiB."""

Rows = NDArray[np.float64]


def top_k(queries: ArrayLike, matrix: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` rows of ``matrix`` nearest to each query by cosine, nearest first.

    Args:
        queries: Shape (q, d), any float or integer dtype.
        matrix: Shape (n, d), any float or integer dtype; a memory map is read block by block.
        k: How many, at least 1.

    Returns:
        The indices, int64, and the cosines, float32, both of shape (q, min(k, n)). Of rows with the same cosine, as
        float32, the first comes first. A row, or a query, that is all zero has cosine 0 with everything.

    Raises:
        TypeError: an array does not hold real numbers, or k is no integer.
        ValueError: shapes do not fit, k is below 1, or a value is NaN or infinite.
    """
    asked, rows = _matrix(queries, "queries"), _matrix(matrix, "matrix")
    if asked.shape[1] != rows.shape[1]:
        raise ValueError(f"queries have {asked.shape[1]} dimensions, and the matrix has {rows.shape[1]}")
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k is an integer, not {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    most = min(int(k), len(rows))
    indices = np.empty((len(asked), most), np.int64)
    scores = np.empty((len(asked), most), np.float32)
    if most:
        step = _step(rows.shape[1])
        for start in range(0, len(asked), step):
            end = start + step
            indices[start:end], scores[start:end] = _nearest(asked[start:end], rows, most, start)
    return indices, scores


def _step(dimensions: int) -> int:
    """Return how many rows a block has."""
    return max(1, min(VALUES // max(1, dimensions), 1 << 11))


def _matrix(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asanyarray(values)
    if array.ndim != 2:
        hint = "; one vector v is v[None, :]" if array.ndim == 1 else ""
        raise ValueError(f"{name} have two dimensions, shape (n, d), not shape {array.shape}{hint}")
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"{name} hold real numbers, not {array.dtype}")
    return array


def _nearest(
    asked: NDArray[Any], rows: NDArray[Any], k: int, first: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the k nearest rows of a block of queries. Scores are found in float32, and decided in float64.

    A product of matrices rounds a row's score by where the row lies in its block. So it only says which rows may be
    among the nearest; their scores are then computed row by row, which gives equal rows equal scores.
    """
    queries, query_lengths = _scaled(asked, "queries", first)
    coarse = _unit(queries, query_lengths)
    # What float32 may be off by in a sum over d products of two unit vectors, for both sides of a comparison.
    margin = np.float32((rows.shape[1] + 8) * 2.0**-22)
    best = _Best(len(asked), k)
    step = _step(rows.shape[1])
    for start in range(0, len(rows), step):
        block, lengths = _scaled(rows[start : start + step], "matrix", start)
        near = coarse @ _unit(block, lengths).T
        floor = best.floor()
        if near.shape[1] > k:
            floor = np.maximum(floor, np.partition(near, -k, axis=1)[:, -k])
        which, where = np.nonzero(near >= (floor - margin)[:, None])
        for at in range(0, len(which), step):
            query, row = which[at : at + step], where[at : at + step]
            dots = (queries[query] * block[row]).sum(axis=1)
            over = query_lengths[query] * lengths[row]
            cosines = np.divide(dots, over, out=np.zeros_like(dots), where=over > 0).astype(np.float32)
            best.add(query, row + start, cosines)
    return best.indices, best.scores


def _scaled(rows: NDArray[Any], name: str, first: int) -> tuple[Rows, NDArray[np.float64]]:
    """Return rows as float64, scaled by a power of two so that no square is too large or small, and their lengths."""
    wide = np.array(rows, np.float64, order="C", subok=False)
    largest = np.abs(wide).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        wrong = first + int(np.flatnonzero(~np.isfinite(largest))[0])
        raise ValueError(f"row {wrong} of {name} holds NaN or infinity")
    np.ldexp(wide, -np.frexp(largest)[1][:, None], out=wide)
    return wide, np.sqrt((wide * wide).sum(axis=1))


def _unit(rows: Rows, lengths: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.divide(rows, np.where(lengths > 0, lengths, 1.0)[:, None]).astype(np.float32)


class _Best:
    """The k best rows so far of each of several queries: by cosine, then by index."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.indices = np.full((queries, k), -1, np.int64)
        self.scores = np.full((queries, k), -np.inf, np.float32)

    def floor(self) -> NDArray[np.float32]:
        """Return, by query, the score that a row needs to be among the best."""
        return self.scores[:, -1]

    def add(self, query: NDArray[np.intp], index: NDArray[np.intp], score: NDArray[np.float32]) -> None:
        """Add rows, each with the query that it is for and its score; query numbers rise."""
        touched, group = np.unique(query, return_inverse=True)
        owner = np.concatenate([np.repeat(np.arange(len(touched)), self.k), group])
        indices = np.concatenate([self.indices[touched].ravel(), index])
        scores = np.concatenate([self.scores[touched].ravel(), score])
        order = np.lexsort((indices, -scores, owner))
        begins = np.searchsorted(owner[order], np.arange(len(touched)))
        chosen = order[begins[:, None] + np.arange(self.k)]
        self.indices[touched], self.scores[touched] = indices[chosen], scores[chosen]
