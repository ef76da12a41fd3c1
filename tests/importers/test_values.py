"""Stored vectors are decoded exactly, or refused with a reason that does not repeat the value."""

from __future__ import annotations

import base64
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce_importers._values import DECODERS, MAX_VALUE_BYTES, ValueForm, convert_numbers, decode

VECTORS = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40)


@given(numbers=VECTORS)
def test_json_is_read_as_the_module_json_reads_it(numbers: list[float]) -> None:
    for text in (json.dumps(numbers), json.dumps(numbers, indent=1), json.dumps(numbers, separators=(",", ":"))):
        for value in (text, text.encode()):
            assert decode(value, "json").tobytes() == np.array(json.loads(text), np.float64).tobytes()


@given(numbers=VECTORS)
def test_bytes_and_pickles_are_read_exactly(numbers: list[float]) -> None:
    exact = np.array(numbers, "<f8")
    with np.errstate(over="ignore"):
        rounded = exact.astype("<f4")
    assert decode(rounded.tobytes(), "float32").tobytes() == rounded.tobytes()
    assert decode(exact.tobytes(), "float64").tobytes() == exact.tobytes()
    assert decode(base64.b64encode(exact.tobytes()).decode(), "base64-float64").tobytes() == exact.tobytes()
    assert decode(pickle.dumps(numbers, 5), "pickled-list").tobytes() == exact.tobytes()


def test_the_text_of_a_pgvector_is_read() -> None:
    assert decode("[1,-2.5,1e-07,0]", "pgvector").tolist() == [1, -2.5, 1e-07, 0]


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "[]", "[1, 2", "[1,]", "[,1]", "1", "[true]", "[null]", '["1"]', "[NaN]", "[Infinity]", "[[1]]"),
        *('{"a": [1]}', "[1][2]", "[1], [2]", "[01]", "[+1]", "[.5]", "[1.]", "[1e]", "[0x10]", "[1_000]", "secret"),
        "[" * 100_000,
        "[1" + "0" * 400 + "]",
        "\ufeff[1]",
        "\udc80",
        "[1" + ",1" * MAX_VALUE_BYTES + "]",
    ],
    ids=lambda value: value[:12].encode("unicode_escape").decode(),
)
@pytest.mark.parametrize("form", ["json", "pgvector"])
def test_other_text_is_refused(value: str, form: ValueForm) -> None:
    with pytest.raises(ValueError, match=r"^[a-zA-Z0-9 ]+$") as caught:
        decode(value, form)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (b"", "float32"),
        (b"123", "float32"),
        (b"1234", "float64"),
        (b"", "float64"),
        (b"\0" * 4 * (MAX_VALUE_BYTES // 4 + 1), "float32"),
        (b"not base64", "base64-float64"),
        (base64.b64encode(b"1234"), "base64-float64"),
        (b"", "base64-float64"),
        (b"[1.0]", "pickled-list"),
        (b"", "pickled-list"),
    ],
)
def test_other_bytes_are_refused(value: bytes, form: ValueForm) -> None:
    with pytest.raises(ValueError, match=r"^[a-zA-Z0-9 ]+$"):
        decode(value, form)


@given(value=st.binary(max_size=64) | st.text(alphabet="[]0123456789.,-eE \n", max_size=64).map(str.encode))
def test_no_value_is_anything_but_a_vector_or_a_value_error(value: bytes) -> None:
    for form in DECODERS:
        try:
            vector = decode(value, form)
        except ValueError:
            continue
        assert vector.ndim == 1
        assert vector.size
        if form in ("json", "pgvector"):
            assert vector.tolist() == json.loads(value)


def test_a_json_number_above_the_range_of_floats_is_infinite_or_refused() -> None:
    try:
        (number,) = decode("[1e400]", "json")
    except ValueError:
        return
    assert math.isinf(number)  # the engine refuses it


@pytest.mark.parametrize("numbers", [[], [True, 1.0], [None], ["1"], [[1.0]], [1j], [10**400]])
def test_items_that_are_not_numbers_are_refused(numbers: list[object]) -> None:
    with pytest.raises(ValueError, match=r"empty|number"):
        convert_numbers(numbers)
