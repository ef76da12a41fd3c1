"""Cosine similarity over the rows of a matrix: exact, in bounded memory, and no vector store."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 4_194_304
"""Most similarities that are held at once, 16 MiB of float32."""


def top_k(queries: ArrayLike, matrix: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` rows of ``matrix`` nearest to each query by cosine, nearest first.

    Args:
        queries: shape (q, d), or (d,) for one query.
        matrix: shape (n, d). Lengths do not matter: rows are scaled as they are read. A row that is all zero has
            similarity 0 to everything.
        k: how many; where there are fewer rows, all of them.

    Returns:
        Row numbers, int64, and cosines, float32, both of shape (q, min(k, n)). Of equal cosines, the lower row number
        comes first.

    Raises:
        ValueError: shapes that do not go together, ``k`` below 1, or NaN or infinity among the numbers.
    """
    asked, rows = _matrix(queries, "queries"), _matrix(matrix, "matrix")
    if asked.shape[1] != rows.shape[1]:
        raise ValueError(f"queries have {asked.shape[1]} dimensions and the matrix {rows.shape[1]}")
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    k = min(k, len(rows))
    places = np.empty((len(asked), k), np.int64)
    scores = np.empty((len(asked), k), np.float32)
    if k == 0:
        return places, scores
    many = max(1, min(len(asked), BLOCK // 4096))
    for first in range(0, len(asked), many):
        part = slice(first, first + many)
        places[part], scores[part] = _nearest(_scaled(asked[part]), rows, k)
    return places, scores


def _matrix(values: ArrayLike, name: str) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.ndim not in ((1, 2) if name == "queries" else (2,)):
        wanted = "(q, d) or (d,)" if name == "queries" else "(n, d)"
        raise ValueError(f"{name} are numbers of shape {wanted}, not {array.dtype} of shape {array.shape}")
    rows: NDArray[np.float32] = np.atleast_2d(array).astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} have NaN or infinity")
    return rows


def _scaled(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of length 1, computed in float64 so that squares neither overflow nor vanish; zero stays zero."""
    wide = rows.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None]
    scaled: NDArray[np.float32] = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0).astype(
        np.float32
    )
    return scaled


def _nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Go through the rows block by block, keeping the best ``k`` of what was seen."""
    places = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    step = max(1, BLOCK // max(len(queries), rows.shape[1]))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        found = queries @ _scaled(block).T
        # What was found before has lower numbers and stands before: a stable order keeps the lower one first.
        scores = np.concatenate([scores, found], axis=1)
        numbers = np.broadcast_to(np.arange(start, start + len(block)), found.shape)
        places = np.concatenate([places, numbers], axis=1)
        order = _best(scores, k)
        places = np.take_along_axis(places, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
    return places, scores


def _best(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the columns of the ``k`` highest scores of each row, highest first, and of equal ones the first."""
    if scores.shape[1] <= 4 * k:
        return np.argsort(-scores, axis=1, kind="stable")[:, :k]
    least = np.partition(scores, -k, axis=1)[:, -k]
    order = np.empty((len(scores), k), np.intp)
    for row, (values, bound) in enumerate(zip(scores, least, strict=True)):
        candidates = np.flatnonzero(values >= bound)  # in order, all that are as high as the last one too
        order[row] = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
    return order
