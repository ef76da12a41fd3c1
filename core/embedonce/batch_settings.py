"""Settings that make the vector of a text depend on the other texts of its batch. Such vectors cannot be cached."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import SpaceError


def refuse_batch_settings(settings: object, where: str = "") -> None:
    """Refuse settings that make a vector depend on the other texts of the batch, at any depth of ``settings``.

    ``where`` is the place of the settings, such as ``"extra_body"``; it begins the name of a setting in the message.

    Raises:
        SpaceError: there is such a setting; the message names it and says what to do.
    """
    for name, problem in _find_problems(settings, where):
        raise SpaceError(
            f"with {name}, the vector of a text depends on the other texts of its batch ({problem}), so it cannot be "
            f"cached; turn {name} off, or embed such batches without the cache"
        )


def _find_problems(item: object, where: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each such setting, with the reason."""
    if isinstance(item, Mapping):
        for name, value in item.items():
            path = f"{where}.{name}" if where else str(name)
            letters = _letters(name)
            # Jina's API, and servers that copy it: all texts of a batch go through the model as one text.
            is_late = any(word in letters for word in _LATE) and _is_on(value)
            if is_late or ("chunking" in letters and _letters(value) == "late"):
                yield path, _ONE_TEXT
            # sentence-transformers: without given ranges, each dimension is scaled by the range that it has in the
            # batch (``quantize_embeddings``). "binary" and "ubinary" look at the sign only.
            elif letters.endswith("precision") and _letters(value) in ("int8", "uint8") and not _has_ranges(item):
                yield (
                    f"{path} = {value!r} and without quantization_ranges",
                    "each dimension is scaled by its range in the batch",
                )
            else:
                yield from _find_problems(value, path)
    elif isinstance(item, str):
        if _letters(item) in _LATE or _LATE_IN_JSON.search(item):
            yield where or "late chunking", _ONE_TEXT
    elif isinstance(item, set | frozenset):
        for value in item:
            yield from _find_problems(value, where)
    elif isinstance(item, Sequence) and not isinstance(item, bytes | bytearray | memoryview):
        for index, value in enumerate(item):
            is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
            pair = {value[0]: value[1]} if is_pair and isinstance(value[0], str) else value
            yield from _find_problems(pair, f"{where}[{index}]")


_ONE_TEXT = "its texts are embedded as parts of one long text"
_LATE = ("latechunking", "latechunk", "latepooling")
_LATE_IN_JSON = re.compile(r"late[_-]?chunk\w*[\"']\s*:\s*(true|1|[\"'](true|yes|on|1))", re.IGNORECASE)


def _letters(name: Any) -> str:
    return "".join(character for character in str(name).casefold() if character.isalnum())


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, "") and _letters(value) not in ("false", "no", "off", "0", "none", "disabled")


def _has_ranges(settings: Mapping[Any, Any]) -> bool:
    """Return whether the settings give the ranges, or the vectors from which they are computed."""
    names = ("ranges", "quantizationranges", "calibrationembeddings")
    return any(value is not None and _letters(name) in names for name, value in settings.items())
