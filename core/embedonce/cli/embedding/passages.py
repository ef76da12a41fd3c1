"""Results of the readers: a passage with its place, or a broken item with its place and the reason."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, TypeAlias

MAX_PASSAGE = 16 * 2**20
"""Maximum size of a passage in bytes. Longer passages are reported and left out, so that a file without line ends does
not use up the memory. No model accepts a text of this size."""


class Passage(NamedTuple):
    """One text to embed, and where it starts."""

    text: str
    source: str
    line: int
    """Line number from 1. In a Parquet file: row number from 1. In a JSON array: line where the object begins."""
    kept: tuple[Any, ...] = ()
    """Values of the fields in ``Reader.keep``, in that order. A field that does not exist is None. The values are of
    types that JSON has."""


class Broken(NamedTuple):
    """A line, record or file that yields no passage. Neither reason nor detail quotes the text."""

    source: str
    line: int | None
    """Line number from 1, or None for the whole file."""
    reason: str
    """What is wrong. All items of a file with the same fault have the same reason, so that they can be counted."""
    fields: tuple[str, ...] = ()
    """Names of the fields or columns that exist, if the one to read does not."""
    detail: str = ""
    """What differs from item to item, for example the position of an invalid byte. It follows the reason directly."""

    def __str__(self) -> str:
        return f"{format_place(self.source, self.line)}: {self.reason}{self.detail}"


ReadItem: TypeAlias = Passage | Broken

TOO_LONG = f"longer than {MAX_PASSAGE // 2**20} MiB"


def is_too_long(text: str) -> bool:
    """Return whether a text is longer than MAX_PASSAGE bytes of UTF-8. Lone surrogates count as 3 bytes."""
    if len(text) * 4 <= MAX_PASSAGE:  # a character has at most 4 bytes
        return False
    return len(text) > MAX_PASSAGE or len(text.encode(errors="surrogatepass")) > MAX_PASSAGE


def decode_path(path: str) -> str:
    """Return a path as valid Unicode; bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def format_place(source: str, line: int | None) -> str:
    """Return ``source:line`` for a message; control characters in a file name are escaped."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in source)
    return shown if line is None else f"{shown}:{line}"


def describe_os_error(error: OSError) -> str:
    """Return the operating system's reason for an error, without a path."""
    return error.strerror or type(error).__name__
