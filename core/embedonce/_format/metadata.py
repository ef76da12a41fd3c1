"""The metadata of an entry as compact JSON, with strict checks when writing and reading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from .entries import Metadata

MAX_METADATA = 64 * 1024
"""Maximum size of an entry's metadata as compact JSON, in bytes."""


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is too large for a float")
    return number


# The encoder and the decoder are created once. With options, json.dumps would create a new encoder in each call, and
# json.loads would create a new decoder. Creating them takes longer than the conversion itself.
_TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_FROM_JSON = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_parse_finite)


def plain_metadata(metadata: Metadata) -> dict[str, Any]:
    """Return a copy of the metadata as it will be read from a frame. For example, a tuple becomes a list.

    Raises:
        TypeError: the metadata is not a JSON object.
        ValueError: the metadata has more than 64 KiB.
    """
    copy: dict[str, Any] = json.loads(write_metadata("an entry", metadata))
    return copy


def write_metadata(key: str, metadata: Metadata) -> bytes:
    try:
        if not isinstance(metadata, Mapping) or not _has_plain_keys(metadata):
            raise TypeError("a key is not a string")
        written = _TO_JSON.encode(dict(metadata)).encode()
    except (TypeError, ValueError, RecursionError):
        # Raise the error without its cause, because the message of the cause may show the metadata.
        raise TypeError(f"{key}: metadata is not a JSON object whose keys are strings") from None
    if len(written) > MAX_METADATA:
        raise ValueError(f"{key}: metadata must have at most {MAX_METADATA} bytes, got {len(written)}")
    return written


def _has_plain_keys(value: Any) -> bool:
    # json.dumps writes {1: …} as {"1": …}, so the metadata would have a different key after it is read from a store.
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _has_plain_keys(item) for name, item in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_plain_keys, value))


def read_metadata(written: bytes) -> dict[str, Any] | None:
    """Return the metadata, or None if ``written`` is not a JSON object that could be written again."""
    try:
        metadata = _FROM_JSON.decode(written.decode())
        if b"\\u" in written:  # an escape may be a lone surrogate, which cannot be written again
            _TO_JSON.encode(metadata).encode()
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None
