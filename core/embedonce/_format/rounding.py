"""The precision of stored vectors: rounding to a dtype, and packing rounded values into bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .entries import Dtype, Matrix, as_float32

_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)


def round_vectors(matrix: ArrayLike, dtype: Dtype) -> Matrix:
    """Round the rows of a matrix (n, d) to the dtype, and return them as float32.

    A cache with this dtype returns exactly these values. Rounding them again does not change any bit. Each row is
    rounded independently of the other rows. With ``"float32"``, the result may be ``matrix`` itself.

    Raises:
        ValueError: a row is not finite, is too large for the dtype, or becomes all zero; the message names the row.
    """
    given = np.asarray(matrix)
    if given.ndim != 2:
        raise ValueError(f"expected a matrix with two dimensions, got {given.ndim}")
    rows = as_float32(given)
    values, fits = round_rows(rows, dtype)
    if rows is not given:  # converting float64 to float32 may have rounded small values to zero
        fits &= values.any(axis=1) | ~given.any(axis=1)
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(f"row {row} {explain_unfit(given[row], dtype)}")
    return values


def round_rows(rows: Matrix, dtype: Dtype) -> tuple[Matrix, NDArray[np.bool_]]:
    """Return the rows as they will be read from a store, and a mask of the rows that fit the dtype."""
    return read_back(rows, pack(rows, dtype), dtype)


def read_back(rows: Matrix, payloads: NDArray[np.uint8], dtype: Dtype) -> tuple[Matrix, NDArray[np.bool_]]:
    """Unpack ``payloads``, which :func:`pack` made from ``rows``. Return the values and a mask of the rows that fit."""
    if dtype == "float32":
        return rows, _find_finite_rows(rows)
    values, sound = unpack(payloads, dtype)
    with np.errstate(all="ignore"):  # a signalling NaN makes numpy warn
        became_zero = ~values.any(axis=1) & rows.any(axis=1)
    return values, sound & ~became_zero


def _find_finite_rows(rows: Matrix) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(rows), axis=1)
    return finite


def explain_unfit(row: NDArray[Any], dtype: Dtype) -> str:
    """Return why a row does not fit the dtype, as the end of a sentence about the row."""
    if not np.isfinite(row).all():
        return "is not finite"
    if np.abs(row).max() >= 1:
        return f"has a value that is too large for {dtype}"
    return f"becomes all zero as {dtype}"


def payload_size(dtype: Dtype, dimension: int) -> int:
    if dtype == "int8":
        return 4 + dimension
    return dimension * (2 if dtype == "float16" else 4)


def pack(rows: Matrix, dtype: Dtype) -> NDArray[np.uint8]:
    """Return one payload per row of a matrix (n, d).

    This function does not check whether the rows fit the dtype; :func:`read_back` does.
    """
    if dtype == "float32":
        return _view_as_bytes(rows.astype("<f4", copy=False))
    with np.errstate(all="ignore"):
        if dtype == "float16":
            return _view_as_bytes(rows.astype("<f2"))
        scales, steps = _quantize(rows)
    return np.hstack((_view_as_bytes(scales.astype("<f4", copy=False)[:, None]), _view_as_bytes(steps)))


def unpack(payloads: NDArray[np.uint8], dtype: Dtype) -> tuple[Matrix, NDArray[np.bool_]]:
    """Unpack payloads of the same size. Return the values, shape (n, d), and a mask of the valid rows.

    A row is valid if :func:`pack` could have written it.
    """
    if dtype == "float32":
        values = payloads.view("<f4").astype(np.float32, copy=False)
        return values, _find_finite_rows(values)
    with np.errstate(all="ignore"):
        if dtype == "int8":
            return _dequantize(payloads[:, :4].copy().view("<f4")[:, 0], payloads[:, 4:].view(np.int8))
        values = payloads.view("<f2").astype(np.float32)
    return values, _find_finite_rows(values)


def _view_as_bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    if not rows.size:
        return np.empty((len(rows), rows.shape[1] * rows.itemsize), np.uint8)
    return np.ascontiguousarray(rows).view(np.uint8)


def _quantize(rows: Matrix) -> tuple[Matrix, NDArray[np.int8]]:
    """Return the scales, shape (n,), and the int8 steps, shape (n, d). A value is its step times the scale of its row.

    The scale is the row's largest absolute value / 127, rounded up to 16 significant bits, and at least the
    smallest normal float32. A step has 7 bits, so the product of step and scale has at most 23 bits and is exact in
    float32.

    Rounding a rounded row gives the same scale again. If the scale is the smallest scale, the row gets the smallest
    scale again. With any larger scale, the largest step of the row is 127, so the row's largest absolute value / 127
    is the scale itself.
    """
    finite = _find_finite_rows(rows)
    if not finite.all():
        # Replace a row that is not finite by zeros, because the caller rejects a row that becomes all zero.
        rows = np.where(finite[:, None], rows, np.float32(0))
    peaks = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
    mantissas, exponents = np.frexp(peaks / 127)
    scales = np.maximum(np.ldexp(np.ceil(np.ldexp(mantissas, 16)), exponents - 16), _SMALLEST_SCALE)
    return scales.astype(np.float32), np.rint(rows / scales[:, None]).astype(np.int8)


def _dequantize(scales: NDArray[np.float32], steps: NDArray[np.int8]) -> tuple[Matrix, NDArray[np.bool_]]:
    values = steps.astype(np.float32) * scales.astype(np.float32, copy=False)[:, None]
    # Accept only rows that _quantize can return. Their scale has 16 significant bits. Their largest absolute step
    # is 127, or less if the scale is _SMALLEST_SCALE. Any other row would change when it is rounded again.
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    peaks = np.maximum(steps.max(axis=1, initial=0), -steps.min(axis=1, initial=0).astype(np.int16))
    sound = (bits & 0xFF == 0) & (scales >= _SMALLEST_SCALE) & _find_finite_rows(values)
    return values, sound & ((peaks == 127) | ((scales == _SMALLEST_SCALE) & (peaks < 127)))
