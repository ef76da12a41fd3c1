"""Decodes the values in which other programs store vectors."""

from __future__ import annotations

import array
import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

# pydantic is a dependency of embedonce. Its parser needs 15 µs for 384 numbers, and the module json 95 µs.
from pydantic_core import from_json

from embedonce.options import Doc

from ._pickled_lists import parse_pickled_list

ValueForm: TypeAlias = Literal["json", "float32", "float64", "base64-float64", "pgvector", "pickled-list"]

ValueOption: TypeAlias = Annotated[
    ValueForm,
    Doc(
        "Form of the stored vectors. json: a list of numbers as text. float32, float64: the bytes of the numbers, "
        "little-endian. base64-float64: the same as base64. pgvector: text such as [1,2,3]. pickled-list: the pickle "
        "of a list of floats, which is read without unpickling it."
    ),
]
"""The option ``value`` of the importers whose stores have no fixed form."""

MAX_VALUE_BYTES = 2**20
"""Maximum size of a stored vector. The longest vectors in use have 16,384 numbers, or about 400 kB as JSON."""

DecodedVector: TypeAlias = NDArray[np.float32] | NDArray[np.float64]

_JSON_CHARACTERS = b"0123456789+-.eE,[] \t\r\n"
"""The characters of a list of numbers in JSON. No string, null, true, NaN or object can be written with them."""


def decode(value: bytes | str, form: ValueForm) -> DecodedVector:
    """Return a stored vector, of shape (d,) with d at least 1. It may have numbers that are not finite.

    Raises:
        ValueError: the value does not have this form. The message is a short reason to be counted.
    """
    return DECODERS[form](value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value)


def decode_json(value: bytes) -> NDArray[np.float64]:
    """Return the numbers of a JSON list of numbers.

    Raises:
        ValueError: the value is not JSON, or not a flat list of at least one number.
    """
    _check_size(value)
    # This check takes a fifth of the time of a check of each parsed number. Without it, `true` would become 1.
    if value.translate(None, _JSON_CHARACTERS):
        raise ValueError("not a JSON list of numbers")
    try:
        numbers = from_json(value, cache_strings="none")
    except ValueError:
        raise ValueError("truncated or invalid JSON") from None  # the parser's message may quote the value
    if not isinstance(numbers, list):
        raise ValueError("not a JSON list of numbers")
    return _convert(numbers)


def convert_numbers(numbers: list[Any]) -> NDArray[np.float64]:
    """Return the items of a parsed list as a vector.

    Raises:
        ValueError: the list is empty, or has something else than numbers, such as a boolean.
    """
    if bool in set(map(type, numbers)):
        raise ValueError("not a flat list of numbers")
    return _convert(numbers)


def _convert(numbers: list[Any]) -> NDArray[np.float64]:
    if not numbers:
        raise ValueError("empty list")
    try:
        return np.frombuffer(array.array("d", numbers), np.float64)
    except TypeError:
        raise ValueError("not a flat list of numbers") from None
    except OverflowError:
        raise ValueError("a number is too large") from None


def _decode_float32(value: bytes) -> NDArray[np.float32]:
    return _read_floats(value, 4).astype(np.float32)


def _decode_float64(value: bytes) -> NDArray[np.float64]:
    return _read_floats(value, 8).astype(np.float64)


def _decode_base64(value: bytes) -> NDArray[np.float64]:
    try:
        content = base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None
    return _decode_float64(content)


def _decode_pickled_list(value: bytes) -> NDArray[np.float64]:
    _check_size(value)
    return parse_pickled_list(value)


def _read_floats(value: bytes, size: int) -> NDArray[np.floating[Any]]:
    _check_size(value)
    if not value:
        raise ValueError("empty value")
    if len(value) % size:
        raise ValueError(f"not a multiple of {size} bytes")
    return np.frombuffer(value, f"<f{size}")


def _check_size(value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError("larger than 1 MiB")


DECODERS: Mapping[ValueForm, Callable[[bytes], DecodedVector]] = {
    "json": decode_json,
    "float32": _decode_float32,
    "float64": _decode_float64,
    "base64-float64": _decode_base64,
    "pgvector": decode_json,  # the text of a pgvector is a list of numbers in JSON
    "pickled-list": _decode_pickled_list,
}
