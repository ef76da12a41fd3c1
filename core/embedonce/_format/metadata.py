"""The metadata of an entry as compact JSON, with strict checks when writing and reading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from .entries import Metadata

MAX_METADATA = 64 * 1024
"""Maximum size of an entry's metadata as compact JSON, in bytes."""

MAX_DEPTH = 32
"""Maximum number of levels of objects and lists in an entry's metadata. The metadata itself is the first level.

Copying or comparing metadata that is nested hundreds of levels deep would raise RecursionError."""


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
        TypeError: the metadata is not a JSON object, or has more than :data:`MAX_DEPTH` levels.
        ValueError: the metadata has more than 64 KiB.
    """
    copy: dict[str, Any] = json.loads(write_metadata("an entry", metadata))
    return copy


def write_metadata(key: str, metadata: Metadata) -> bytes:
    """Return the metadata as compact JSON. The errors are those of :func:`plain_metadata`."""
    depth = _measure_depth(metadata)
    if depth is None:
        raise ValueError(f"{key}: metadata must have at most {MAX_METADATA} bytes, got more")
    try:
        if not isinstance(metadata, Mapping) or depth > MAX_DEPTH or not _has_plain_keys(metadata):
            raise TypeError("invalid metadata")
        written = _TO_JSON.encode(dict(metadata)).encode()
    except (TypeError, ValueError, RecursionError):
        # Raise the error without its cause, because the message of the cause may show the metadata.
        raise TypeError(
            f"{key}: metadata must be a JSON object whose keys are strings, with at most {MAX_DEPTH} levels of objects "
            "and lists"
        ) from None
    if len(written) > MAX_METADATA:
        raise ValueError(f"{key}: metadata must have at most {MAX_METADATA} bytes, got {len(written)}")
    return written


def _has_plain_keys(value: Any) -> bool:
    # json.dumps writes {1: …} as {"1": …}, so the metadata would have a different key after it is read from a store.
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _has_plain_keys(item) for name, item in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_plain_keys, value))


def _measure_depth(value: Any) -> int | None:
    """Return the number of levels of objects and lists, or ``MAX_DEPTH + 1`` if there are more.

    Return None if there are so many objects and lists that the value is too large. This function does not recurse.
    """
    level, depth, total = _list_containers([value]), 0, 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        total += len(level)
        if total > MAX_METADATA:  # each of them takes two bytes
            return None
        level = _list_containers(
            part for item in level for part in (item.values() if isinstance(item, Mapping) else item)
        )
    return depth


def _list_containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (dict, list, tuple, Mapping))]


def is_valid_metadata(metadata: Any) -> bool:
    """Return whether a value that a store returned can be the metadata of an entry."""
    if metadata is None:
        return True
    try:
        write_metadata("an entry", metadata)
    except (TypeError, ValueError):
        return False
    return True


def read_metadata(written: bytes) -> dict[str, Any] | None:
    """Return the metadata, or None if ``written`` is not a JSON object that :func:`write_metadata` accepts."""
    try:
        metadata = _FROM_JSON.decode(written.decode())
        if b"\\u" in written:  # an escape may be a lone surrogate, which cannot be written again
            _TO_JSON.encode(metadata).encode()
    except (ValueError, RecursionError):
        return None
    if written.count(b"{") + written.count(b"[") > MAX_DEPTH:
        depth = _measure_depth(metadata)
        if depth is None or depth > MAX_DEPTH:
            return None
    return metadata if isinstance(metadata, dict) else None
