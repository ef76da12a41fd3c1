"""The metadata of an entry as compact JSON, written and read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from .entries import Metadata

MAX_METADATA = 64 * 1024
"""Most bytes of an entry's metadata as compact JSON."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite_number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is too large for a float")
    return number


# Made once: json.dumps and json.loads with options make a new one per call, which costs more than the JSON.
_TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_FROM_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_number)


def plain_metadata(metadata: Metadata) -> dict[str, Any]:
    """Return a copy of metadata as it will be read back from a frame (a tuple as a list).

    Raises:
        TypeError: it is not a JSON object.
        ValueError: it is larger than 64 KiB.
    """
    copy: dict[str, Any] = json.loads(write_metadata("an entry", metadata))
    return copy


def write_metadata(key: str, metadata: Metadata) -> bytes:
    try:
        if not isinstance(metadata, Mapping) or not _has_plain_keys(metadata):
            raise TypeError("a key is not a string")
        written = _TO_JSON.encode(dict(metadata)).encode()
    except (TypeError, ValueError, RecursionError):
        # Without the cause: its message may show what the metadata holds.
        raise TypeError(f"{key}: metadata is not a JSON object with strings as keys") from None
    if len(written) > MAX_METADATA:
        raise ValueError(f"{key}: metadata takes {len(written)} bytes; the most is {MAX_METADATA}")
    return written


def _has_plain_keys(value: Any) -> bool:
    # json.dumps writes {1: …} as {"1": …}, and the answer would differ after a restart.
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _has_plain_keys(item) for name, item in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_plain_keys, value))


def read_metadata(written: bytes) -> dict[str, Any] | None:
    """Return the metadata, or None where it is not a JSON object that could be written again."""
    try:
        metadata = _FROM_JSON.decode(written.decode())
        if b"\\u" in written:  # an escape can stand for half a character
            _TO_JSON.encode(metadata).encode()
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None
