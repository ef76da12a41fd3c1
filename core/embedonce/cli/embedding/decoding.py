"""From bytes to text and lines. Invalid bytes are marked, so that they break one passage and not the whole file."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeAlias

from . import passages
from .passages import TOO_LONG, Broken, Passage, ReadItem
from .streams import Damaged

Line: TypeAlias = tuple[int, str | None]
"""Number of a line (from 1) and its text with the line end; None instead of the text if the line is too long."""

MARK = "\udc80"
"""Stands for invalid bytes. Decoded text never contains a lone surrogate."""
SURROGATE = re.compile("[\ud800-\udfff]")
# The mark of UTF-32 in little-endian order begins with that of UTF-16, so it must come first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return MARK, error.end


codecs.register_error("embedonce-mark", _mark_invalid)


def find_encoding(name: str) -> str:
    """Return Python's name of a text encoding.

    Raises:
        ValueError: Python has no text encoding of this name that can decode a stream.
    """
    try:
        info = codecs.lookup(name)
        # Codecs such as base64 and rot13 are not text encodings. Others cannot decode in steps, or never decode.
        is_usable = getattr(info, "_is_text_encoding", True) and info.incrementaldecoder is not None
        if is_usable:
            codecs.getincrementaldecoder(name)("embedonce-mark").decode(b"", True)
            return info.name
    except (LookupError, ValueError):
        pass
    raise ValueError("is not a text encoding that Python knows; use a name such as utf-8, utf-16, latin-1 or cp1252")


def detect_encoding(head: bytes) -> str:
    """Return UTF-16 or UTF-32 if a file begins with their byte order mark, otherwise UTF-8."""
    return next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")


def decode(chunks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Decode a file without its byte order mark. Invalid bytes become lone surrogates.

    In UTF-8, there is one surrogate per invalid byte, so that the position of the byte can be computed.

    Raises:
        Damaged: the encoding is utf-16 or utf-32, and the file has no byte order mark.
    """
    is_utf8 = encoding == "utf-8"
    # Only these three never decode valid bytes to a surrogate.
    is_strict = encoding.startswith(("utf-8", "utf-16", "utf-32"))
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if is_utf8 else "embedonce-mark")
    # The decoders of these three remove the mark themselves. A second mark is part of the text.
    is_first = encoding not in ("utf-16", "utf-32", "utf-8-sig")
    for data, is_last in chain(((data, False) for data in chunks), [(b"", True)]):
        try:
            text = decoder.decode(data, is_last)
        except UnicodeError:  # Invalid bytes are marked, so this is a fault of the whole file.
            names = f"{encoding}-le or {encoding}-be"
            raise Damaged(f"not {encoding}: the byte order mark is missing; use --encoding {names}") from None
        if not text:
            continue
        if is_first:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text if is_strict else SURROGATE.sub(MARK, text)


def read_lines(chunks: Iterable[str], end: str = "\n") -> Iterator[Line]:
    """Yield the lines of a text with their line ends. A line that is too long is not kept in memory."""
    number = 1
    pending: list[str] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(end)
        size += len(first)
        if size <= passages.MAX_PASSAGE + 1:
            pending.append(first)
        else:
            pending.clear()
        if not others:
            continue
        yield number, _join_line(pending, size, end)
        for line in others[:-1]:
            number += 1
            yield number, _join_line([line], len(line), end)
        number += 1
        pending, size = [others[-1]], len(others[-1])
    if size:
        yield number, _join_line(pending, size, "")


def _join_line(parts: list[str], size: int, end: str) -> str | None:
    if size > passages.MAX_PASSAGE + 1:  # one more, because a carriage return belongs to the line end
        return None
    text = "".join(parts)
    return None if passages.is_too_long(text.removesuffix("\r")) else text + end


def strip_line_end(line: str) -> str:
    """Return a line without its line end: LF, or CR and LF."""
    if not line.endswith("\n"):
        return line
    return line[: -2 if line.endswith("\r\n") else -1]


def make_passage(text: str, source: str, line: int | None, encoding: str) -> ReadItem:
    """Return a decoded text as a passage, or as broken if it is too long or if its bytes are invalid."""
    found = None if text.isascii() else SURROGATE.search(text)
    if found is not None:
        detail = f" at byte {len(text[: found.start()].encode()) + 1}" if encoding == "utf-8" else ""
        return Broken(source, line, describe_invalid(encoding), detail=detail)
    if passages.is_too_long(text):
        return Broken(source, line, TOO_LONG)
    return Passage(text, source, line or 1)


def describe_invalid(encoding: str) -> str:
    """Return the reason for text with invalid bytes."""
    return "not UTF-8" if encoding == "utf-8" else f"not {encoding}"
