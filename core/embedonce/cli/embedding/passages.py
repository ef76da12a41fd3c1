"""What the readers find: a passage with its place, or something broken with its place and the reason."""

from __future__ import annotations

import os
from typing import NamedTuple, TypeAlias

MAX_PASSAGE = 16 * 2**20
"""Bytes of the longest passage. Longer ones are named and left out, so that a file without line ends
does not decide how much memory is used; no model reads as much."""


class Passage(NamedTuple):
    """One text to embed, and where it begins."""

    text: str
    source: str
    line: int
    """Counts from 1. In a Parquet file: the row."""


class Broken(NamedTuple):
    """Something that gives no passage. The reason holds no text."""

    source: str
    line: int | None
    """None: the file as a whole."""
    reason: str

    def __str__(self) -> str:
        return f"{place(self.source, self.line)}: {self.reason}"


Found: TypeAlias = Passage | Broken

TOO_LONG = f"longer than {MAX_PASSAGE // 2**20} MiB"


def name_of(path: str) -> str:
    """Return a path as valid Unicode: bytes that are not UTF-8 as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def place(source: str, line: int | None) -> str:
    """Return ``source:line`` for a message; control characters in a file's name are written out."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in source)
    return shown if line is None else f"{shown}:{line}"
