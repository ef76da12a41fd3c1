"""Finding the text and the kept values in a record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import passages
from .passages import TOO_LONG, Broken, Passage, ReadItem

MAX_SHOWN = 20
"""Maximum number of field names in a message."""
MAX_NAME = 64
"""Maximum length of a field name in a message. A longer name is probably a text, which no message may contain."""

ABSENT: Any = object()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which fields of a record to read."""

    field: str
    """Name of the field with the text."""
    keep: tuple[str, ...] = ()
    """Names of the fields whose values are kept beside the text."""


def find_field(value: Mapping[str, Any], field: str) -> Any:
    """Return the field with exactly this name; otherwise follow the dots of the name into inner objects."""
    if field in value:
        return value[field]
    inner: Any = value
    for name in field.split("."):
        inner = inner.get(name, ABSENT) if isinstance(inner, Mapping) else ABSENT
    return inner


def read_object(value: Mapping[str, Any], source: str, line: int, wanted: Wanted) -> ReadItem:
    """Return the passage of an object, with the values to keep."""
    found = find_field(value, wanted.field)
    if found is ABSENT:
        return Broken(source, line, f'no field "{wanted.field}"', list_names(value))
    kept = tuple(None if (one := find_field(value, name)) is ABSENT else make_plain(one) for name in wanted.keep)
    return check_text(found, source, line, wanted.field, kept)


def check_text(value: Any, source: str, line: int, field: str, kept: tuple[Any, ...] = ()) -> ReadItem:
    """Return a field's value as a passage, or as broken if it is not a string or too long."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return Broken(source, line, f'field "{field}" is {kind}, not a string')
    # An escape such as \ud800 is a lone surrogate. The key policy decides whether to refuse or to replace it.
    return Broken(source, line, TOO_LONG) if passages.is_too_long(value) else Passage(value, source, line, kept)


def list_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of fields that a message can show."""
    shown = [name for name in names if name and len(name) <= MAX_NAME and name.isprintable()]
    return tuple(shown[:MAX_SHOWN])


def make_plain(value: Any) -> Any:
    """Return a value as one of the types that JSON has. Bytes must be UTF-8; other types become strings.

    Raises:
        UnicodeDecodeError: the value contains bytes that are not UTF-8.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(name): make_plain(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [make_plain(item) for item in value]
    return str(value)
