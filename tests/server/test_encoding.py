"""Vectors as JSON, and the memo of their encoded forms."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedonce.vectors import freeze
from embedonce_server.api.encoding import EncodedVectors, Encoding, encode_vector

vectors = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(vectors)
def test_both_forms_give_the_same_float32_values(vector: np.ndarray) -> None:
    numbers = np.array(json.loads(encode_vector(vector, "float")), np.float64).astype(np.float32)
    decoded = np.frombuffer(base64.b64decode(json.loads(encode_vector(vector, "base64"))), "<f4")
    assert numbers.tobytes() == vector.tobytes() or (numbers == vector).all()  # -0.0 may become 0.0
    assert decoded.tobytes() == vector.tobytes()


def test_numbers_have_as_few_digits_as_identify_a_float32() -> None:
    assert encode_vector(np.array([0.1, -2.5, 1e-7], np.float32), "float") == b"[0.1,-2.5,1e-7]"


def test_rows_of_a_matrix_and_reversed_rows_are_encoded_as_they_are() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    for row in (matrix[1], matrix[:, 1], matrix[1][::-1]):
        assert json.loads(encode_vector(row, "float")) == row.tolist()
        assert np.frombuffer(base64.b64decode(encode_vector(row, "base64")), "<f4").tolist() == row.tolist()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_kept_form_is_that_of_the_same_array(encoding: Encoding) -> None:
    encoded = EncodedVectors(encoding)
    for i in range(2000):  # each array is freed, so later arrays get the identities of earlier ones
        vector = freeze(np.full(3, i, np.float32))
        assert encoded.encode(vector) == encode_vector(vector, encoding)
        assert encoded.encode(vector) is encoded.encode(vector)


def test_an_array_that_can_change_is_encoded_each_time() -> None:
    encoded = EncodedVectors("float")
    vector = np.zeros(2, np.float32)
    assert encoded.encode(vector) == b"[0.0,0.0]"
    vector[0] = 1
    assert encoded.encode(vector) == b"[1.0,0.0]"


def test_the_memo_is_bounded_and_keeps_what_is_used() -> None:
    encoded = EncodedVectors("base64", max_bytes=10_000)
    hot = freeze(np.zeros(100, np.float32))
    first = encoded.encode(hot)
    kept = []
    for i in range(200):
        kept.append(freeze(np.full(100, i, np.float32)))
        encoded.encode(kept[-1])
        assert encoded.encode(hot) is first
        assert len(encoded) < 2 * 10_000 / len(first)
    large = freeze(np.zeros(10_000, np.float32))
    assert encoded.encode(large) is not encoded.encode(large)
