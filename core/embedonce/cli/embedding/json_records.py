"""Reading JSON: one object per line, or a file with an array of objects or with objects that span lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from . import passages
from .decoding import make_passage, read_lines, strip_line_end
from .fields import Wanted, read_object
from .passages import TOO_LONG, Broken, ReadItem
from .streams import Damaged

BLANK = " \t\r\n"
"""White space in JSON."""
_OTHER_FORM = re.compile(r"[ \t\r\n]*(?:[{[][ \t\r\n]*|\[[ \t\r\n]*\{.*)")
"""The first line of an array of objects, or of an object that spans lines."""
_ARRAY = re.compile(r"[ \t\r\n]*\[")
_BLANKS = re.compile(r"[ \t\r\n]*")
STEP = 2**16
"""Number of characters to read before the first attempt to parse an object."""
NOT_AN_OBJECT = "not a JSON object"
SPANS_LINES = "not one JSON object per line; use --format json for an array or for objects that span lines"
NOT_CLOSED = "not JSON: the file ends before the array does"


def read_jsonl(chunks: Iterable[str], source: str, encoding: str, wanted: Wanted) -> Iterator[ReadItem]:
    """Yield one passage per line with a JSON object; skip blank lines."""
    is_first = True
    for number, line in read_lines(chunks):
        if line is None:
            yield Broken(source, number, TOO_LONG)
        elif not (text := strip_line_end(line)).strip(BLANK):
            continue
        elif is_first and _OTHER_FORM.fullmatch(text):
            # Without this, every line of a file in another form would be reported.
            yield Broken(source, number, SPANS_LINES)
            return
        else:
            yield _parse_line(text, source, number, encoding, wanted)
        is_first = False


def _parse_line(text: str, source: str, number: int, encoding: str, wanted: Wanted) -> ReadItem:
    item = make_passage(text, source, number, encoding)
    if isinstance(item, Broken):
        return item
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _describe_error(error, source, number)
    return _read_value(value, source, number, wanted)


def _describe_error(error: Exception, source: str, number: int) -> Broken:
    if isinstance(error, json.JSONDecodeError):
        return Broken(source, number, "not JSON", detail=f": {error.msg} at character {error.pos + 1}")
    return Broken(source, number, f"not readable as JSON: {type(error).__name__}")


def _read_value(value: Any, source: str, number: int, wanted: Wanted) -> ReadItem:
    if not isinstance(value, dict):
        return Broken(source, number, NOT_AN_OBJECT)
    return read_object(value, source, number, wanted)


# --- arrays, and objects that span lines ------------------------------------------------------


def read_json(chunks: Iterable[str], source: str, encoding: str, wanted: Wanted) -> Iterator[ReadItem]:
    """Yield one passage per object of an array, per line of JSON Lines, or per object of a sequence of objects."""
    head, chunks = _read_first_line(chunks)
    if _is_object(head.lstrip(BLANK).partition("\n")[0]):
        return read_jsonl(chunks, source, encoding, wanted)
    return _Values(chunks, source, encoding, wanted).read()


def _read_first_line(chunks: Iterable[str]) -> tuple[str, Iterable[str]]:
    """Return the beginning of a file with its first line that is not blank, and all chunks."""
    iterator = iter(chunks)
    head = ""
    for more in iterator:
        head += more
        begins_array = _ARRAY.match(head) is not None
        if begins_array or ("\n" in more and "\n" in head.lstrip(BLANK)) or len(head) > passages.MAX_PASSAGE:
            break
    return head, chain([head], iterator)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Values:
    """The JSON values of a file, with at most one of them in memory. Nothing is read after the first invalid one."""

    def __init__(self, chunks: Iterable[str], source: str, encoding: str, wanted: Wanted) -> None:
        self._chunks = iter(chunks)
        self._decoder = json.JSONDecoder()
        self._source = source
        self._encoding = encoding
        self._wanted = wanted
        self._text = ""
        self._start = 0
        """Place in ``_text`` where the part that is still to be read begins."""
        self._line = 1
        """Number of the line at ``_start``."""
        self._damage: Exception | None = None
        """Why nothing follows ``_text``."""

    def read(self) -> Iterator[ReadItem]:
        return self._read_array() if self._peek() == "[" else self._read_sequence()

    def _read_sequence(self) -> Iterator[ReadItem]:
        is_parsed = True
        while is_parsed and self._peek():
            item, is_parsed = self._read_value()
            yield item

    def _read_array(self) -> Iterator[ReadItem]:
        separator = self._take()
        if self._peek() == "]":
            separator = self._take()
        while separator != "]":
            if not self._peek():
                yield Broken(self._source, self._line, NOT_CLOSED)
                return
            item, is_parsed = self._read_value()
            yield item
            if not is_parsed:
                return
            separator = self._take()
            if separator not in (",", "]", ""):
                yield Broken(self._source, self._line, "not JSON", detail=": a comma is missing in the array")
                return
        if self._peek():
            yield Broken(self._source, self._line, "not JSON", detail=": more text follows the array")

    def _take(self) -> str:
        """Return the next character that is not blank, and go on after it."""
        character = self._peek()
        self._skip_to(self._start + len(character))
        return character

    def _peek(self) -> str:
        """Return the next character that is not blank, or an empty string at the end of the file."""
        while True:
            match = _BLANKS.match(self._text, self._start)
            self._skip_to(match.end() if match else self._start)
            if self._start < len(self._text) or not self._read_more(1):
                return self._text[self._start : self._start + 1]

    def _skip_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._start, place)
        self._start = place

    def _read_more(self, size: int) -> bool:
        """Append at least ``size`` characters to the rest of the text. Return False if the file has no more.

        Damage to the file is raised by the call after the last characters, so that the objects in them are read.
        """
        if self._damage is not None:
            raise self._damage
        parts = [self._text[self._start :]]
        has_more = False
        try:
            while size > 0 and (part := next(self._chunks, None)) is not None:
                has_more = True
                parts.append(part)
                size -= len(part)
        except (Damaged, OSError) as error:
            if not has_more:
                raise
            self._damage = error
        self._text, self._start = "".join(parts), 0
        return has_more

    def _read_value(self) -> tuple[ReadItem, bool]:
        """Return the passage of the next value, and whether the value could be parsed."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._start)
                if end < len(self._text) or not self._read_more(STEP):  # a number at the end may go on
                    break
            except (ValueError, RecursionError) as error:
                size = len(self._text) - self._start
                if size > passages.MAX_PASSAGE:
                    return Broken(self._source, self._line, TOO_LONG), False
                # Reading twice as much each time keeps the work in proportion to the size.
                if not self._read_more(max(STEP, size)):
                    return self._describe_error(error), False
        raw = make_passage(self._text[self._start : end], self._source, self._line, self._encoding)
        item = raw if isinstance(raw, Broken) else _read_value(value, self._source, self._line, self._wanted)
        self._skip_to(end)
        return item, True

    def _describe_error(self, error: Exception) -> Broken:
        if not isinstance(error, json.JSONDecodeError):
            return _describe_error(error, self._source, self._line)
        line = self._line + self._text.count("\n", self._start, error.pos)
        return Broken(self._source, self._line, "not JSON", detail=f": {error.msg} in line {line}")
