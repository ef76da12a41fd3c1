"""A text and its own keywords, such as a title, as one text, so that the keywords are part of the text's key.

A cache sees texts only. A call with one keyword value per text could be cached with a space per value, but then a batch
would become one call per text. So a text and its keywords are joined into one composite text, and split again before
the embedder is called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, MappingView, Sequence
from dataclasses import is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, Final
from zlib import crc32

from embedonce import SpaceError

from .describing import read_state
from .embedder_fields import decides_nothing
from .plain_values import is_connection

PER_TEXT: Final = frozenset({"titles"})
"""Names of keywords that have one value per text, wherever a framework accepts them."""

_DIGITS_TO_LETTERS: Final = str.maketrans("0123456789", "ghijklmnop")
_LETTERS_TO_DIGITS: Final = str.maketrans("ghijklmnop", "0123456789")


def split_keywords(
    keywords: Mapping[str, Any], texts: Sequence[str]
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
    """Return the keywords that have one value per text, and the keywords that hold for the whole call.

    Raises:
        ValueError: a keyword that has one value per text does not have as many values as there are texts.
        SpaceError: another keyword has as many values as there are texts. They may belong to the texts by position, and
            a cache passes only some of the texts on.
    """
    per_text: dict[str, Sequence[Any]] = {}
    others: dict[str, Any] = {}
    for name, value in keywords.items():
        if name not in PER_TEXT or not _is_sequence(value):
            others[name] = value
            continue
        if len(value) != len(texts):
            raise ValueError(f"{name} must have one value per text; texts: {len(texts)}, values: {len(value)}")
        per_text[name] = list(value)
    for path in _find_parallel(others, texts, ""):
        raise SpaceError(
            f"{path} has as many values as there are texts, and embedonce cannot tell whether each value belongs to "
            "one text; embed each text in a call of its own with its own value, or embed such batches without the cache"
        )
    return per_text, others


def _find_parallel(item: Any, texts: Sequence[str], path: str, around: tuple[Any, ...] = ()) -> Iterator[str]:
    """Yield the path of each collection whose values may belong to the texts, at any depth.

    A call with one text is searched less deeply, because lists with one item are common. ``around`` holds the objects
    that contain the item.
    """
    if any(item is outer for outer in around):
        return
    around = (*around, item)
    if isinstance(item, Mapping):
        if path and item and _are_positions(item, texts):
            yield path
        for name, value in item.items():
            if isinstance(name, str) and decides_nothing(name):
                continue  # such as `callbacks`
            yield from _find_parallel(value, texts, f"{path}.{name}" if path else str(name), around)
    elif len(texts) > 1 and len(texts) in _read_shape(item):
        yield path  # an array or a table, along any axis
    elif _is_sequence(item):
        if len(item) == len(texts):
            yield path
        elif isinstance(item, list | tuple):
            for index, value in enumerate(item):
                if len(texts) > 1 or isinstance(value, Mapping):
                    yield from _find_parallel(value, texts, f"{path}[{index}]", around)
    elif len(texts) > 1 and _is_record(item):
        yield from _find_parallel(read_state(item), texts, path, around)


def _are_positions(item: Mapping[Any, Any], texts: Sequence[str]) -> bool:
    """Return whether the keys of a mapping are the texts, or may be their positions."""
    keys = set(item)
    if keys == set(range(len(texts))) or keys == set(texts):
        return True
    are_numbers = all(isinstance(key, int | float) or (isinstance(key, str) and key.strip().isdigit()) for key in keys)
    return len(texts) > 1 and len(keys) == len(texts) and are_numbers


def _read_shape(item: Any) -> tuple[Any, ...]:
    """Return the lengths of an array's axes; nothing if the item is no array."""
    shape = getattr(item, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else ()


def _is_record(item: Any) -> bool:
    """Return whether an object is a record of settings: a dataclass, a namespace, or an object of a user's class."""
    cls = type(item)
    if isinstance(item, type | Enum) or callable(item) or is_connection(item):
        return False
    is_own = hasattr(item, "__dict__") and cls.__module__.partition(".")[0] not in sys.stdlib_module_names
    return is_own or is_dataclass(item) or isinstance(item, SimpleNamespace)


def _is_sequence(value: Any) -> bool:
    """Return whether a value has items in an order: a list, a tuple, an array, a column of a table, a dict's values."""
    if isinstance(value, str | bytes | bytearray | Mapping | set | frozenset):
        return False
    try:
        len(value)
    except TypeError:
        return False
    return hasattr(value, "__getitem__") or isinstance(value, MappingView)


def join_keywords(
    texts: Sequence[str], keywords: Mapping[str, Sequence[Any]], normalize: Callable[[str], str]
) -> list[str]:
    """Return one composite text for each text and its keywords.

    ``normalize`` is the normalisation of the cache. The text is normalised before it is joined, because normalisation
    of a composite text would not see where the text ends.

    Raises:
        SpaceError: a keyword's value is neither a text, a number, a boolean nor None.
    """
    return [
        join(normalize(text), {name: values[position] for name, values in keywords.items()})
        for position, text in enumerate(texts)
    ]


def join(text: str, keywords: Mapping[str, Any]) -> str:
    """Join a normalised text and its keywords.

    The composite text is the text, a colon, and the keywords and a checksum as letters from a to p. Normalisation steps
    do not change such letters, and the checksum shows if a step has changed the text.

    Raises:
        SpaceError: a keyword's value is neither a text, a number, a boolean nor None.
    """
    for name, value in keywords.items():
        if not (value is None or isinstance(value, str | bool | int | float)):
            raise SpaceError(
                f"a value of {name} must be a text, a number, a boolean or None, got {type(value).__name__}"
            )
    written = json.dumps(dict(keywords), sort_keys=True).encode()
    return f"{text}:{_to_letters(written + _checksum(text, written))}"


def split(composite: str) -> tuple[str, dict[str, Any]]:
    """Return the text and the keywords that :func:`join` has joined.

    Raises:
        SpaceError: a normalisation step has changed the composite text.
    """
    text, _, letters = composite.rpartition(":")
    try:
        data = bytes.fromhex(letters.translate(_LETTERS_TO_DIGITS))
    except ValueError:
        data = b""
    written, checksum = data[:-4], data[-4:]
    if _checksum(text, written) != checksum:
        raise SpaceError(
            "[key] normalize changes a text that it has already normalised, so the keywords of the text are lost; "
            "change the steps of normalize, or embed such batches without the cache"
        )
    keywords: dict[str, Any] = json.loads(written)
    return text, keywords


def split_all(composites: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the texts, and for each keyword the values of the texts, in order.

    Raises:
        SpaceError: a normalisation step has changed a composite text.
    """
    pairs = [split(composite) for composite in composites]
    names = pairs[0][1] if pairs else {}
    return [text for text, _ in pairs], {name: [keywords[name] for _, keywords in pairs] for name in names}


def _checksum(text: str, written: bytes) -> bytes:
    return crc32(written, crc32(text.encode("utf-8", "surrogatepass"))).to_bytes(4, "big")


def _to_letters(data: bytes) -> str:
    return data.hex().translate(_DIGITS_TO_LETTERS)
