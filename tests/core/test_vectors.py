from __future__ import annotations

import gc
import weakref
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from embedonce.vectors import Dtype, freeze, freeze_rows, round_vectors

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
SMALLEST = 2.0**-126
LARGEST = float(np.finfo(np.float32).max)

# Numbers of every magnitude, made from random bits, including subnormals and both zeros.
wild = st.builds(
    lambda sign, exponent, fraction: float(np.uint32(sign << 31 | exponent << 23 | fraction).view(np.float32)),
    st.integers(0, 1),
    st.integers(0, 254),
    st.integers(0, 2**23 - 1),
)
edges = st.sampled_from(
    [0.0, -0.0, 2.0**-149, SMALLEST, -SMALLEST / 2, 1.0, -127.0, 65504.0, 65520.0, LARGEST, -LARGEST]
)
matrices = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=wild | edges | st.floats(-1, 1, width=32))
)


def bits(values: NDArray[np.float32]) -> bytes:
    return values.tobytes()


def round_row(row: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float32] | None:
    try:
        return round_vectors(row[None], dtype)[0]
    except ValueError:
        return None


# --- read-only vectors ------------------------------------------------------------------------


@pytest.mark.parametrize("given_dtype", [np.float32, np.float64, np.float16, ">f4", np.int64])
def test_freeze_copies_as_float32_and_stays_read_only(given_dtype: Any) -> None:
    vector = np.array([1, -2, 3], given_dtype)
    frozen = freeze(vector)
    vector[0] = 9
    assert frozen.dtype == np.float32
    assert frozen.tolist() == [1.0, -2.0, 3.0]
    with pytest.raises(ValueError, match="read-only"):
        frozen[0] = 5
    with pytest.raises(ValueError, match="WRITEABLE"):
        frozen.setflags(write=True)
    with pytest.raises(ValueError, match="WRITEABLE"):
        frozen[:1].setflags(write=True)


def test_freeze_takes_views_in_any_order_and_lists() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert freeze(matrix[:, 1]).tolist() == [1, 5, 9]
    assert freeze(matrix[1, ::-1]).tolist() == [7, 6, 5, 4]
    assert freeze([1.5, 2.5]).tolist() == [1.5, 2.5]
    assert freeze(np.empty(0, np.float32)).shape == (0,)


def test_freeze_requires_a_vector_and_freeze_rows_a_matrix() -> None:
    with pytest.raises(ValueError, match="one dimension"):
        freeze(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="two dimensions"):
        freeze_rows(np.zeros(3))


def test_frozen_rows_own_their_bytes_and_keep_nothing_else_alive() -> None:
    matrix = np.arange(4 * 384, dtype=np.float32).reshape(4, 384)
    rows = freeze_rows(matrix)
    alive = weakref.ref(matrix)
    expected = [row.tolist() for row in matrix]
    del matrix
    gc.collect()
    assert alive() is None
    assert [row.tolist() for row in rows] == expected
    for row in rows:
        assert type(row.base) is bytes
        assert len(row.base) == 4 * 384
        with pytest.raises(ValueError, match="WRITEABLE"):
            row.setflags(write=True)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_freeze_rows_accepts_an_empty_matrix(shape: tuple[int, int]) -> None:
    assert [row.shape for row in freeze_rows(np.zeros(shape))] == [(shape[1],)] * shape[0]


def test_freeze_rows_takes_a_transposed_matrix() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert [row.tolist() for row in freeze_rows(matrix.T)] == [[0, 3], [1, 4], [2, 5]]


# --- rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(matrix=matrices)
@example(matrix=np.array([[127 * SMALLEST, SMALLEST], [126.5 * SMALLEST, 1e-45]], np.float32))
@example(matrix=np.array([[0.0, -0.0, 1e-45]], np.float32))
@example(matrix=np.zeros((2, 3), np.float32))
@example(matrix=np.array([[1 / 3, -1e-8, 1 / 254]], np.float32))
def test_rounding_again_changes_no_bit_alone_or_in_a_batch(matrix: NDArray[np.float32], dtype: Dtype) -> None:
    alone = [round_row(row, dtype) for row in matrix]
    kept = [index for index, row in enumerate(alone) if row is not None]
    refused = [index for index, row in enumerate(alone) if row is None]
    if refused:
        with pytest.raises(ValueError, match=rf"^row {refused[0]} "):
            round_vectors(matrix, dtype)
    if not kept:
        return
    once = round_vectors(matrix[kept], dtype)
    assert once.dtype == np.float32
    assert bits(once) == b"".join(bits(row) for row in alone if row is not None)
    assert bits(round_vectors(once, dtype)) == bits(once)
    assert bits(round_vectors(once[::-1], dtype)[::-1]) == bits(once)


@given(matrix=matrices)
def test_int8_is_within_half_a_step_and_uses_the_whole_range(matrix: NDArray[np.float32]) -> None:
    for row in matrix:
        rounded = round_row(row, "int8")
        if rounded is None:
            peak = float(np.abs(row).max())
            assert peak < SMALLEST or peak > LARGEST * (1 - 2**-14)
            continue
        scale = max(float(np.abs(row).max()) / 127 * (1 + 2**-15), SMALLEST)
        error = np.abs(rounded.astype(np.float64) - row.astype(np.float64))
        assert float(error.max()) <= scale / 2
        assert len(np.unique(rounded)) <= 255


@given(matrix=matrices)
def test_rounding_to_float32_changes_no_bit(matrix: NDArray[np.float32]) -> None:
    assert bits(round_vectors(matrix, "float32")) == bits(matrix)


def test_float16_keeps_every_float16() -> None:
    every = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    matrix = every[np.isfinite(every)].astype(np.float32)[None]
    assert bits(round_vectors(matrix, "float16")) == bits(matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_error_names_a_row_that_is_not_finite(dtype: Dtype, bad: float) -> None:
    with pytest.raises(ValueError, match=r"^row 2 is not finite$"):
        round_vectors([[1.0, 2.0], [0.5, 0.5], [1.0, bad], [bad, bad]], dtype)


@pytest.mark.parametrize(
    ("dtype", "row", "why"),
    [
        ("float32", [1e300, 0.0], "has a value that is too large for float32"),
        ("float16", [65520.0, 1.0], "has a value that is too large for float16"),
        ("int8", [LARGEST, 1.0], "has a value that is too large for int8"),
        ("float32", [1e-300, 0.0], "becomes all zero as float32"),
        ("float16", [1e-9, -1e-9], "becomes all zero as float16"),
        ("int8", [1e-45, 0.0], "becomes all zero as int8"),
    ],
)
def test_the_error_names_a_row_that_does_not_fit_the_dtype(dtype: Dtype, row: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=f"^row 1 {why}$"):
        round_vectors([[1.0, 0.5], row], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_was_all_zero_before_rounding_is_accepted(dtype: Dtype) -> None:
    assert not round_vectors(np.zeros((2, 3), np.float32), dtype).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_rounding_an_empty_matrix_gives_an_empty_matrix(dtype: Dtype, shape: tuple[int, int]) -> None:
    assert round_vectors(np.zeros(shape, np.float32), dtype).shape == shape


def test_round_vectors_requires_a_matrix() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        round_vectors([1.0, 2.0], "int8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_ignores_the_callers_numpy_errstate(dtype: Dtype) -> None:
    matrix = np.array([[1e-30, 3.0], [1e-38, 1e-42]], np.float32)[: 1 if dtype == "float16" else 2]
    usual = bits(round_vectors(matrix, dtype))
    with np.errstate(all="raise"):
        assert bits(round_vectors(matrix, dtype)) == usual
