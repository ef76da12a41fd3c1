"""Reading plain text: its lines, its paragraphs, or the whole file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal, TypeAlias

from . import passages
from .decoding import Line, make_passage, read_lines, strip_line_end
from .passages import TOO_LONG, Broken, Passage, ReadItem, is_too_long

Split: TypeAlias = Literal["line", "paragraph", "file"]

LONGEST_PART = 2**20
"""Maximum number of characters that are searched for the end of a paragraph at once. Longer parts are read by line."""
WHITE_LINE = re.compile(r"\n[^\S\n]+\n")
"""A line that is not empty, but has only white space."""


def read_text(chunks: Iterable[str], source: str, encoding: str, split: Split) -> Iterator[ReadItem]:
    """Yield the lines or paragraphs of a text, or the whole text as one passage; skip blank passages.

    A line has no line end. In a paragraph, each line end is LF, as in a file that Python opens as text. The whole file
    is one unchanged text, apart from a byte order mark.
    """
    if split == "file":
        return _read_whole(chunks, source, encoding)
    if split == "line":
        return _split_lines(_strip_lines(read_lines(chunks)), source, encoding)
    return _read_paragraphs(iter(chunks), source, encoding)


def _strip_lines(lines: Iterable[Line], first: int = 1) -> Iterator[Line]:
    return ((number + first - 1, None if line is None else strip_line_end(line)) for number, line in lines)


def _split_lines(lines: Iterable[Line], source: str, encoding: str) -> Iterator[ReadItem]:
    for number, line in lines:
        if line is None:
            yield Broken(source, number, TOO_LONG)
        elif line and not line.isspace():
            yield make_passage(line, source, number, encoding)


def _read_paragraphs(chunks: Iterator[str], source: str, encoding: str) -> Iterator[ReadItem]:
    """Yield the paragraphs of a text.

    Most texts need no look at each line: a part of a text that has only plain line ends and blank lines is split in one
    step. Each part ends with a blank line, so that no paragraph is in two parts.
    """
    rest, line = "", 1
    while True:
        try:
            chunk = next(chunks, None)
        except Exception as error:  # noqa: BLE001  (whatever it is, what was read before it counts)
            yield from _read_lines_of(_raise_after(rest, error), source, line, encoding)
            return
        if chunk is None:
            break
        rest += chunk
        if "\r" in chunk or len(rest) > min(LONGEST_PART, passages.MAX_PASSAGE):
            yield from _read_lines_of(chain([rest], chunks), source, line, encoding)
            return
        part, end, after = rest.rpartition("\n\n")
        if end:
            yield from _split_part(part, source, line, encoding)
            line += part.count("\n") + 2
            rest = after
    yield from _split_part(rest, source, line, encoding)


def _read_lines_of(chunks: Iterable[str], source: str, line: int, encoding: str) -> Iterator[ReadItem]:
    """Yield the paragraphs of a text whose first line has the number ``line``. Look at each line."""
    return _split_paragraphs(_strip_lines(read_lines(chunks), line), source, encoding)


def _raise_after(text: str, error: Exception) -> Iterator[str]:
    yield text
    raise error


def _split_part(part: str, source: str, line: int, encoding: str) -> Iterator[ReadItem]:
    """Yield the paragraphs of a part of a text without carriage returns. ``line`` is the number of its first line."""
    if is_too_long(part) or _has_surrogate(part) or WHITE_LINE.search(f"\n{part}\n"):
        yield from _read_lines_of([part], source, line, encoding)
        return
    for block in part.split("\n\n"):
        paragraph = block.strip("\n")
        if paragraph:
            yield Passage(paragraph, source, line + block.startswith("\n"))
        line += block.count("\n") + 2


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()  # much faster than a search
    except UnicodeEncodeError:
        return True
    return False


def _split_paragraphs(lines: Iterable[Line], source: str, encoding: str) -> Iterator[ReadItem]:
    paragraph: list[str] = []
    start = size = 0
    for number, line in lines:
        if line is not None and (not line or line.isspace()):
            if size:
                yield _join_paragraph(paragraph, size, source, start, encoding)
            paragraph, size = [], 0
            continue
        if not size:
            start = number
        size += (passages.MAX_PASSAGE + 1 if line is None else len(line)) + 1
        if size > passages.MAX_PASSAGE + 1:
            paragraph = []  # the paragraph is too long: drop its lines; from now on, only count characters
        elif line is not None:
            paragraph.append(line)
    if size:
        yield _join_paragraph(paragraph, size, source, start, encoding)


def _join_paragraph(lines: list[str], size: int, source: str, start: int, encoding: str) -> ReadItem:
    if size > passages.MAX_PASSAGE + 1:
        return Broken(source, start, TOO_LONG)
    return make_passage("\n".join(lines), source, start, encoding)


def _read_whole(chunks: Iterable[str], source: str, encoding: str) -> Iterator[ReadItem]:
    parts: list[str] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > passages.MAX_PASSAGE:
            yield Broken(source, None, _TOO_LONG_FILE)
            return
        parts.append(chunk)
    text = "".join(parts)
    if not text or text.isspace():
        return
    if is_too_long(text):
        yield Broken(source, None, _TOO_LONG_FILE)
    else:
        yield make_passage(text, source, 1, encoding)


_TOO_LONG_FILE = f"{TOO_LONG}; use --split paragraph or --split line"
