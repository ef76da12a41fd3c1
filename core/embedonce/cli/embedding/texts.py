"""Reading plain text: its lines, its paragraphs, or the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from . import passages
from .decoding import Line, make_passage, read_lines, strip_line_end
from .passages import TOO_LONG, Broken, ReadItem

Split: TypeAlias = Literal["line", "paragraph", "file"]


def read_text(chunks: Iterable[str], source: str, encoding: str, split: Split) -> Iterator[ReadItem]:
    """Yield the lines or paragraphs of a text, or the whole text as one passage; skip blank passages.

    A line has no line end. In a paragraph, each line end is LF, as in a file that Python opens as text. The whole file
    is one unchanged text, apart from a byte order mark.
    """
    if split == "file":
        return _read_whole(chunks, source, encoding)
    lines = _strip_lines(read_lines(chunks))
    if split == "line":
        return _split_lines(lines, source, encoding)
    return _split_paragraphs(lines, source, encoding)


def _strip_lines(lines: Iterable[Line]) -> Iterator[Line]:
    return ((number, None if line is None else strip_line_end(line)) for number, line in lines)


def _split_lines(lines: Iterable[Line], source: str, encoding: str) -> Iterator[ReadItem]:
    for number, line in lines:
        if line is None:
            yield Broken(source, number, TOO_LONG)
        elif line and not line.isspace():
            yield make_passage(line, source, number, encoding)


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
    if passages.is_too_long(text):
        yield Broken(source, None, _TOO_LONG_FILE)
    else:
        yield make_passage(text, source, 1, encoding)


_TOO_LONG_FILE = f"{TOO_LONG}; use --split paragraph or --split line"
