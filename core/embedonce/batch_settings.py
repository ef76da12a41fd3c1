"""Settings that make the vector of a text depend on the other texts of its batch. Such vectors cannot be cached."""

from __future__ import annotations

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
            if "latechunk" in letters and _is_on(value):
                yield path, "its texts are embedded as parts of one long text"
            # sentence-transformers: without given ranges, each dimension is scaled by the range that it has in the
            # batch (``quantize_embeddings``). "binary" and "ubinary" look at the sign only.
            if letters == "precision" and value in ("int8", "uint8") and not _has_ranges(item):
                yield (
                    f"{path} = {value!r}",
                    "without quantization_ranges, each dimension is scaled by its range in the batch",
                )
            yield from _find_problems(value, path)
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes | bytearray):
        for index, value in enumerate(item):
            yield from _find_problems(value, f"{where}[{index}]")


def _letters(name: Any) -> str:
    return "".join(character for character in str(name).casefold() if character.isalnum())


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, "", "false", "False", "no", "off", "0")


def _has_ranges(settings: Mapping[Any, Any]) -> bool:
    return any(
        value is not None and ("ranges" in _letters(name) or "calibration" in _letters(name))
        for name, value in settings.items()
    )
