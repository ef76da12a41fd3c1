"""Reading CSV and TSV: one passage per record, with the text exactly as it stands in the file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from . import passages
from .decoding import SURROGATE, Line, describe_invalid, read_lines
from .fields import Wanted, list_names
from .passages import TOO_LONG, Broken, Passage, ReadItem

NO_QUOTE = "none"
LIKELY_DELIMITERS = {";": "';'", "\t": "tab", ",": "','", "|": "'|'"}
"""Delimiters to suggest, and how a user types them."""

# csv.reader refuses a carriage return outside quotes, and a line feed in a file whose lines end with carriage returns.
# These lone surrogates, which decoded text never contains, stand for them while the record is split.
_STAND_INS = {"\r": "\udc0d", "\n": "\udc0a"}

UNCLOSED = "a quote that opens here is never closed; use --quote none if quotes are part of the text"
SPANS_LINES = (
    "a quote makes this record span several lines; use --quote none if quotes are part of the text, or "
    "--quote '\"' if the text has line ends"
)
TOO_MANY = "more fields than the header has; check --delimiter and --quote"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the fields of a record are separated and quoted."""

    delimiter: str = ","
    quote: str | None = '"'
    """The character that quotes a field, or None if quotes have no meaning."""
    can_span_lines: bool = True
    """Whether a record may have several lines. In TSV, where a quote is often part of the text, only on request."""


def make_dialect(is_tsv: bool, delimiter: str | None, quote: str | None) -> Dialect:
    """Return the dialect of a file from the options that are given; None means that an option is not given."""
    delimiter = delimiter or ("\t" if is_tsv else ",")
    if quote is None:
        return Dialect(delimiter, '"', can_span_lines=delimiter != "\t")
    return Dialect(delimiter, None if quote == NO_QUOTE else quote)


class _RecordTooLong(Exception):
    """A record of several lines is longer than a passage may be. Its quote is probably never closed."""


class _Lines:
    """Iterates over lines for ``csv.reader``. Unlike a generator, it can continue after it has raised an error."""

    def __init__(self, lines: Iterator[Line], end: str) -> None:
        self._lines = lines
        self.end = end
        self._other = "\r" if end == "\n" else "\n"
        self.number = 0
        """Number of the last line that was read. The count of ``csv.reader`` omits lines that are too long."""
        self.record: list[str] = []
        """Lines of the record that is being read."""
        self._size = 0

    def start_record(self) -> None:
        self.record, self._size = [], 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if line is None and not self.record:
            raise csv.Error(TOO_LONG)
        self._size += passages.MAX_PASSAGE if line is None else len(line)
        if line is None or (self.record and self._size > passages.MAX_PASSAGE):
            raise _RecordTooLong
        line = self._replace_other_ends(line)
        self.record.append(line)
        return line

    def _replace_other_ends(self, line: str) -> str:
        if self._other not in line:
            return line
        end = "\r\n" if self._other == "\r" and line.endswith("\r\n") else ""
        return line.removesuffix(end).replace(self._other, _STAND_INS[self._other]) + end

    def restore(self, field: str) -> str:
        return field.replace(_STAND_INS[self._other], self._other)


def read_csv(
    chunks: Iterable[str], source: str, encoding: str, wanted: Wanted, dialect: Dialect | None = None
) -> Iterator[ReadItem]:
    """Yield one passage per record, from the column ``wanted.field``; the first record names the columns.

    A carriage return outside quotes is part of the text, unless the first line ends with one.
    """
    csv.field_size_limit(max(csv.field_size_limit(), passages.MAX_PASSAGE))
    end, chunks = _find_line_end(chunks)
    return _Records(_Lines(read_lines(chunks, end), end), source, encoding, wanted, dialect or Dialect()).read()


def _find_line_end(chunks: Iterable[str]) -> tuple[str, Iterable[str]]:
    """Return the character that ends lines, and all chunks. It is CR only if the first line ends with a lone CR."""
    iterator = iter(chunks)
    head = ""
    for more in iterator:
        # What follows a carriage return shows whether it ends the line.
        is_found = "\n" in more or "\r" in more[:-1] or head.endswith("\r")
        head += more
        if is_found or len(head) > passages.MAX_PASSAGE:
            break
    first = min((place for place in (head.find("\r"), head.find("\n")) if place >= 0), default=0)
    is_cr = head[first : first + 1] == "\r" and head[first + 1 : first + 2] != "\n"
    return "\r" if is_cr else "\n", chain([head], iterator)


class _Records:
    """The records of one file."""

    def __init__(self, lines: _Lines, source: str, encoding: str, wanted: Wanted, dialect: Dialect) -> None:
        self._lines = lines
        self._source = source
        self._encoding = encoding
        self._wanted = wanted
        self._dialect = dialect
        # With strict=True, a stray quote raises an error and breaks only its own record. Without strict=True, the
        # reader would take the records that follow as part of a quoted field.
        self._rows: Any = csv.reader(
            lines,
            delimiter=dialect.delimiter,
            quotechar=dialect.quote,
            quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
            strict=True,
        )

    def read(self) -> Iterator[ReadItem]:
        try:
            header = next(self._rows, None)
        except csv.Error as error:
            yield Broken(self._source, 1, f"not a CSV header: {error}")
            return
        except _RecordTooLong:
            yield self._describe_unclosed(1, is_whole=False)
            return
        if header is None:
            return
        header = [self._lines.restore(name) for name in header]
        count = header.count(self._wanted.field)
        if count != 1:
            yield self._refuse_header(header, count)
            return
        columns = [header.index(name) if name in header else None for name in self._wanted.keep]
        yield from self._read_records(len(header), header.index(self._wanted.field), columns)

    def _refuse_header(self, header: list[str], count: int) -> Broken:
        number = "more than one column" if count else "no column"
        hint = "choose a column with --field"
        if "\0" in "".join(header):
            hint = "if the file is UTF-16 without a byte order mark, use --encoding utf-16-le"
        elif not count and len(header) == 1:
            for delimiter, typed in LIKELY_DELIMITERS.items():
                if delimiter in header[0]:
                    hint, header = (
                        f"use --delimiter {typed} or choose a column with --field",
                        header[0].split(delimiter),
                    )
                    break
        return Broken(self._source, 1, f'{number} "{self._wanted.field}" in the header; {hint}', list_names(header))

    def _read_records(self, width: int, column: int, columns: Sequence[int | None]) -> Iterator[ReadItem]:
        while True:
            start = self._lines.number + 1
            self._lines.start_record()
            try:
                row = next(self._rows, None)
            except csv.Error as error:
                yield self._describe_error(error, start)
                continue
            except _RecordTooLong:
                yield self._describe_unclosed(start, is_whole=False)
                return
            if row is None:
                return
            if len(self._lines.record) > 1 and not self._dialect.can_span_lines:
                yield Broken(self._source, start, SPANS_LINES, detail=self._describe_span(start))
            elif row:
                yield self._read_row(row, start, width, column, columns)

    def _read_row(self, row: list[str], start: int, width: int, column: int, columns: Sequence[int | None]) -> ReadItem:
        if any(row[width:]):
            return Broken(self._source, start, TOO_MANY)
        if column >= len(row):
            return Broken(self._source, start, f'no column "{self._wanted.field}" in this record')
        places = [column, *columns]
        values = [None if place is None or place >= len(row) else self._lines.restore(row[place]) for place in places]
        for place, name in enumerate((self._wanted.field, *self._wanted.keep)):
            if values[place] is not None and SURROGATE.search(values[place] or ""):
                return Broken(self._source, start, f'column "{name}" is {describe_invalid(self._encoding)}')
        text = values[0] or ""
        if passages.is_too_long(text):
            return Broken(self._source, start, TOO_LONG)
        return Passage(text, self._source, start, tuple(values[1:]))

    # --- faults -------------------------------------------------------------------------------

    def _describe_error(self, error: csv.Error, start: int) -> Broken:
        if str(error) == "unexpected end of data":
            return self._describe_unclosed(start, is_whole=True)
        return Broken(self._source, start, f"not CSV: {error}", detail=self._describe_span(start))

    def _describe_span(self, start: int) -> str:
        return f" (lines {start} to {self._lines.number})" if self._lines.number > start else ""

    def _describe_unclosed(self, start: int, *, is_whole: bool) -> Broken:
        """Name the line in which the quote opens. ``is_whole`` means that the record ends with the file."""
        opened = start + self._find_open_quote()
        unread = f"; lines {start} to {self._lines.number} are not read" if self._lines.number > start else ""
        if not is_whole:
            unread = f"; line {start} and all lines after it are not read"
        return Broken(self._source, opened, UNCLOSED, detail=unread)

    def _find_open_quote(self) -> int:
        """Return how many lines of the record come before the line with the quote that is not closed."""
        text, quote = "".join(self._lines.record), self._dialect.quote
        place = 0
        while True:
            close = place
            if quote and text.startswith(quote, place):
                close = text.find(quote, place + 1)
                while close >= 0 and text.startswith(quote, close + 1):  # two quotes stand for one in the text
                    close = text.find(quote, close + 2)
                if close < 0:
                    return text.count(self._lines.end, 0, place)
            place = text.find(self._dialect.delimiter, close) + 1
            if not place:
                return 0
