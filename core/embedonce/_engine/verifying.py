"""Compares vectors that an importer found with vectors that the provider has computed for the same texts.

The same model does not return the same vector twice: batches and machines change the last digits. So two vectors are
equal here if their cosine is at least :data:`LEAST_COSINE` and their norms differ by at most :data:`NORM_TOLERANCE`.
float16 changes a vector less than that, and is recognised by its values instead: each value of the vector is a float16
number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedonce._messages import format_count, join_words
from embedonce.vectors import Dtype, Matrix, Vector, round_vectors

LEAST_COSINE = 0.999
"""Minimum cosine of a found vector and the computed vector of the same text."""
NORM_TOLERANCE = 0.001
"""Maximum difference of their norms, relative to the computed one."""
SAME = 1e-6
"""Maximum difference of two values, relative to the largest value of the vector, that is no loss of precision."""

Cause: TypeAlias = Literal[
    "dimensions", "model", "mixed", "task", "normalized", "not normalized", "scaled", "precision"
]

_ADVICE: Mapping[Cause, str] = {
    "dimensions": "the vectors are from another model, or from the same model with another number of dimensions",
    "model": "the vectors are probably from another model or of another task, or the other program changed the texts "
    "before it embedded them, for example with a prefix",
    "mixed": "the source probably mixes vectors of several models or tasks, or some of its texts were changed before "
    "they were embedded",
    "task": "the vectors are of another task",
    "normalized": "the vectors were normalised to length 1, and those of the provider are not",
    "not normalized": "the provider normalises its vectors to length 1, and those of the source are not normalised",
    "scaled": "the vectors were multiplied by a factor",
    "precision": "the vectors were rounded to less precision",
}
"""What each cause probably means."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How the vectors of a source differ from those of the provider. ``str`` of it is a sentence for people."""

    causes: tuple[Cause, ...]
    compared: int
    """Number of texts whose vectors were compared."""
    equal: int
    """Number of these texts whose vectors are equal, apart from their precision."""
    cosine: float | None
    """The lowest cosine; None if the dimensions differ."""
    detail: str = ""
    """The measured values behind the causes."""

    def __str__(self) -> str:
        reasons = join_words(_ADVICE[cause] for cause in self.causes)
        return f"{self.detail}: {reasons}"


def find_difference(found: Sequence[Vector], computed: Sequence[Vector], dtype: Dtype) -> Difference | None:
    """Return how found vectors differ from the computed vectors of the same texts; None if they are equal.

    ``found`` and ``computed`` have one float32 vector of shape (d,) per text, and at least one text. The computed
    vectors are rounded to ``dtype``, as the cache returns them. The found vectors are as the source has them.
    """
    sizes = {row.size for row in found}
    expected = computed[0].size
    if sizes != {expected}:
        others = join_words(f"{size:,}" for size in sorted(sizes - {expected}))
        detail = f"the source has vectors of {others} dimensions, and the provider returns {expected:,}"
        return Difference(("dimensions",), len(found), sum(row.size == expected for row in found), None, detail)
    theirs, ours = _round(np.stack(found), dtype).astype(np.float64), np.stack(computed).astype(np.float64)
    their_norms, our_norms = np.linalg.norm(theirs, axis=1), np.linalg.norm(ours, axis=1)
    cosines = compute_cosines(theirs, ours)
    ratios = their_norms / our_norms
    is_near = cosines >= LEAST_COSINE
    is_long = np.abs(ratios - 1) <= NORM_TOLERANCE
    equal, lowest = int((is_near & is_long).sum()), float(cosines.min())
    of = f"of {format_count(len(found), 'text')}"
    if not is_near.all():
        far = int((~is_near).sum())
        detail = f"the cosine is below {LEAST_COSINE} for {far:,} {of}; the lowest is {lowest:.4f}"
        return Difference(("mixed" if is_near.any() else "model",), len(found), equal, lowest, detail)
    causes: list[Cause] = []
    details: list[str] = []
    if not is_long.all():
        causes.append(_explain_norms(their_norms, our_norms))
        theirs_shown, ours_shown = their_norms[~is_long][0], our_norms[~is_long][0]
        details.append(
            f"the norms differ for {int((~is_long).sum()):,} {of}, for example {theirs_shown:.4g} and {ours_shown:.4g}"
        )
    precision = find_lost_precision(np.stack(found), np.stack(computed), dtype)
    if precision is not None:
        causes.append("precision")
        name, number = precision
        vectors = "all values of the source" if number == len(found) else f"all values of {number:,} {of}"
        details.append(f"{vectors} are {name}")
    return Difference(tuple(causes), len(found), equal, lowest, ", and ".join(details)) if causes else None


def compute_cosines(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the cosines of the rows of two matrices of shape (n, d). No row may have only zeros."""
    left, right = one.astype(np.float64), other.astype(np.float64)
    products: NDArray[np.float64] = np.einsum("ij,ij->i", left, right)
    norms: NDArray[np.float64] = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray(products / norms, np.float64)


def _round(rows: Matrix, dtype: Dtype) -> Matrix:
    try:
        return round_vectors(rows, dtype)
    except ValueError:
        return rows  # a vector that cannot be rounded differs in its norm


def _explain_norms(theirs: NDArray[np.float64], ours: NDArray[np.float64]) -> Cause:
    if (np.abs(theirs - 1) <= NORM_TOLERANCE).all():
        return "normalized"
    return "not normalized" if (np.abs(ours - 1) <= NORM_TOLERANCE).all() else "scaled"


def find_lost_precision(found: Matrix, computed: Matrix, dtype: Dtype) -> tuple[str, int] | None:
    """Return what the values of found vectors have in common that those of the computed vectors do not.

    Both are float32 matrices of shape (n, d). The result is for example ``"float16 numbers"``, and the number of
    vectors. It is None if the found vectors have lost no precision, or none that ``dtype`` keeps.
    """
    if dtype == "int8":
        return None
    # A vector that is almost exactly the computed one has lost nothing, whatever its values are.
    is_other = np.abs(found - computed).max(axis=1) > SAME * np.abs(computed).max(axis=1)
    for name, are_coarse in _GRIDS.items():
        is_coarse = are_coarse(found) & ~are_coarse(computed) & is_other
        if is_coarse.any():
            if dtype == "float16" and name == FLOAT16:
                continue  # these vectors can be stored, because they are rounded as the cache rounds its own
            return name, int(is_coarse.sum())
    return None


FLOAT16 = "float16 numbers"


def _are_multiples(matrix: NDArray[np.floating[Any]], step: float) -> NDArray[np.bool_]:
    scaled = matrix.astype(np.float64) / step
    # A float32 has about 7 digits, so a decimal number is not exactly a multiple.
    is_multiple = np.abs(scaled - np.rint(scaled)) <= np.maximum(1e-3, np.abs(scaled) * 1.2e-7)
    return np.asarray(is_multiple.all(axis=1))


def _are_int8(matrix: Matrix) -> NDArray[np.bool_]:
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    return _are_multiples(matrix / np.where(largest > 0, largest, 1), 1 / 127)


def _are_bfloat16(matrix: Matrix) -> NDArray[np.bool_]:
    return np.asarray(((np.ascontiguousarray(matrix).view(np.uint32) & 0xFFFF) == 0).all(axis=1))


def _are_float16(matrix: Matrix) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        return np.asarray((matrix.astype(np.float16).astype(np.float32) == matrix).all(axis=1))


_GRIDS: Mapping[str, Callable[[Matrix], NDArray[np.bool_]]] = {
    "whole steps of 1/127 of the largest value, as in int8 vectors": _are_int8,
    "numbers with at most 3 decimal places": lambda matrix: _are_multiples(matrix, 1e-3),
    "bfloat16 numbers": _are_bfloat16,
    "numbers with at most 4 decimal places": lambda matrix: _are_multiples(matrix, 1e-4),
    FLOAT16: _are_float16,
    "numbers with at most 5 decimal places": lambda matrix: _are_multiples(matrix, 1e-5),
}
"""Functions that return for each row of a matrix whether all its values are on a coarse grid, the coarsest first."""
