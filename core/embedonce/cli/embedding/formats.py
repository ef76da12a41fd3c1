"""One function per format: from an open file to its passages, a bounded piece at a time.

Each reads bytes and decodes piece by piece, so that one wrong byte costs one passage and not the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, TypeAlias

from .passages import MAX_PASSAGE, TOO_LONG, Broken, Found, Passage

Split: TypeAlias = Literal["line", "paragraph", "file"]
Format: TypeAlias = Literal["auto", "text", "jsonl", "csv", "parquet"]
Line: TypeAlias = tuple[int, bytes | None]
"""A line's number, from 1, and its bytes without the line end; None where it is too long."""

BOM = b"\xef\xbb\xbf"
BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Formats by a file name's end; every other file is text."""


class Meter:
    """Counts the bytes that were read, for the progress bar."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


def lines_of(stream: BinaryIO, meter: Meter) -> Iterator[Line]:
    """Yield a file's lines. A byte order mark and the line ends (LF, CR LF) are taken off."""
    number = 0
    while raw := stream.readline(MAX_PASSAGE + 2):
        number += 1
        meter.bytes += len(raw)
        if len(raw) > MAX_PASSAGE and not raw.endswith(b"\n"):
            _skip_line(stream, meter)
            yield number, None
            continue
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.endswith(b"\n"):
            raw = raw[: -2 if raw.endswith(b"\r\n") else -1]
        yield number, raw if len(raw) <= MAX_PASSAGE else None


def _skip_line(stream: BinaryIO, meter: Meter) -> None:
    while raw := stream.readline(2**20):
        meter.bytes += len(raw)
        if raw.endswith(b"\n"):
            return


def _decoded(raw: bytes, source: str, line: int) -> Found:
    try:
        return Passage(raw.decode(), source, line)
    except UnicodeDecodeError as error:
        return Broken(source, line, f"not UTF-8 at byte {error.start + 1}")


# --- text -------------------------------------------------------------------------------------


def read_text(stream: BinaryIO, source: str, meter: Meter, split: Split) -> Iterator[Found]:
    """Yield a text's lines, paragraphs, or the whole; blank ones are no passages."""
    if split == "file":
        return _whole(stream, source, meter)
    lines = lines_of(stream, meter)
    return _by_line(lines, source) if split == "line" else _by_paragraph(lines, source)


def _by_line(lines: Iterable[Line], source: str) -> Iterator[Found]:
    for number, raw in lines:
        if raw is None:
            yield Broken(source, number, TOO_LONG)
        elif not _blank(raw):
            yield _decoded(raw, source, number)


def _blank(raw: bytes) -> bool:
    """Whether there is nothing but white space, among it what Unicode adds, such as U+00A0."""
    stripped = raw.strip()
    return not stripped or (stripped[0] >= 0x80 and not stripped.decode(errors="replace").strip())


def _by_paragraph(lines: Iterable[Line], source: str) -> Iterator[Found]:
    held: list[bytes] = []
    start = size = 0
    for number, raw in lines:
        if raw is not None and _blank(raw):
            if held or size:
                yield _paragraph(held, size, source, start)
            held, size = [], 0
            continue
        if not size:
            start = number
        size += (MAX_PASSAGE + 1 if raw is None else len(raw)) + 1
        if size > MAX_PASSAGE + 1:
            held = []  # too long: what was held is let go, and the rest of it is only counted
        elif raw is not None:
            held.append(raw)
    if size:
        yield _paragraph(held, size, source, start)


def _paragraph(held: list[bytes], size: int, source: str, start: int) -> Found:
    if size > MAX_PASSAGE + 1:
        return Broken(source, start, TOO_LONG)
    return _decoded(b"\n".join(held), source, start)


def _whole(stream: BinaryIO, source: str, meter: Meter) -> Iterator[Found]:
    raw = stream.read(MAX_PASSAGE + len(BOM) + 1)
    meter.bytes += len(raw)
    if len(raw) > MAX_PASSAGE:
        yield Broken(source, None, f"{TOO_LONG}; split it by paragraph or line")
    elif not _blank(raw := raw.removeprefix(BOM)):
        yield _decoded(raw, source, 1)


# --- JSON Lines -------------------------------------------------------------------------------


def read_jsonl(stream: BinaryIO, source: str, meter: Meter, field: str) -> Iterator[Found]:
    """Yield one passage per object; blank lines are passed over."""
    for number, raw in lines_of(stream, meter):
        if raw is None:
            yield Broken(source, number, TOO_LONG)
        elif raw.strip():
            yield _from_json(raw, source, number, field)


def _from_json(raw: bytes, source: str, number: int, field: str) -> Found:
    decoded = _decoded(raw, source, number)
    if isinstance(decoded, Broken):
        return decoded
    try:
        value = json.loads(decoded.text)
    except json.JSONDecodeError as error:
        return Broken(source, number, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return Broken(source, number, f"not JSON that can be read: {type(error).__name__}")
    if not isinstance(value, dict):
        return Broken(source, number, "not a JSON object")
    return _text_in(_field(value, field), source, number, field)


_ABSENT: Any = object()


def _field(value: dict[str, Any], field: str) -> Any:
    """Return the field of that very name, else follow its dots into inner objects."""
    if field in value:
        return value[field]
    inner: Any = value
    for name in field.split("."):
        inner = inner.get(name, _ABSENT) if isinstance(inner, dict) else _ABSENT
    return inner


def _text_in(value: Any, source: str, line: int, field: str) -> Found:
    if value is _ABSENT:
        return Broken(source, line, f'no field "{field}"')
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return Broken(source, line, f'field "{field}" is {kind}, not a string')
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return Broken(source, line, f'field "{field}" has a lone surrogate: it is not valid Unicode')
    return Broken(source, line, TOO_LONG) if size > MAX_PASSAGE else Passage(value, source, line)


# --- CSV --------------------------------------------------------------------------------------


class _CsvLines:
    """Lines as ``csv.reader`` wants them. It goes on after a line that is too long, as a generator could not."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.number = 0
        """Of the last line; the reader's own count leaves out those that are too long."""

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.number, raw = next(self._lines)
        if raw is None:
            raise csv.Error(TOO_LONG)
        # Wrong bytes survive as surrogates until it is known in which field they are.
        return raw.decode("utf-8", "surrogateescape") + "\n"


def read_csv(stream: BinaryIO, source: str, meter: Meter, field: str, delimiter: str = ",") -> Iterator[Found]:
    """Yield one passage per record, by the column that the first record names."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_PASSAGE))
    # strict: a stray quote is a broken record, where the lenient reading would swallow the records after it.
    lines = _CsvLines(lines_of(stream, meter))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
    except csv.Error as error:
        yield Broken(source, 1, f"not a CSV header: {error}")
        return
    if header is None:
        return
    if header.count(field) != 1:
        count = "no column" if field not in header else "more than one column"
        yield Broken(source, 1, f'{count} "{field}" in the header; choose one with --field')
        return
    yield from _records(rows, lines, source, header.index(field), field)


def _records(rows: Any, lines: _CsvLines, source: str, column: int, field: str) -> Iterator[Found]:
    while True:
        start = lines.number + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Broken(source, start, f"not CSV: {error}")
            continue
        if row is None:
            return
        if row:
            yield _from_row(row, source, start, column, field)


def _from_row(row: list[str], source: str, start: int, column: int, field: str) -> Found:
    if column >= len(row):
        return Broken(source, start, f'no column "{field}" in this record')
    try:
        row[column].encode()
    except UnicodeEncodeError:
        return Broken(source, start, f'column "{field}" is not UTF-8')
    return Passage(row[column], source, start)


# --- Parquet ----------------------------------------------------------------------------------


def read_parquet(path: str, source: str, meter: Meter, field: str, size: int) -> Iterator[Found]:
    """Yield one passage per row of a string column, a thousand rows at a time."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        yield Broken(source, None, "reading Parquet needs pyarrow: pip install 'embedonce[parquet]'")
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(file, source, meter, field, size)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield Broken(source, None, f"not readable as Parquet: {type(error).__name__}")


def _batches(file: Any, source: str, meter: Meter, field: str, size: int) -> Iterator[Found]:
    if file.schema_arrow.names.count(field) != 1:
        yield Broken(source, None, f'no column "{field}"; choose one with --field')
        return
    number, total, before = 0, file.metadata.num_rows, meter.bytes
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _text_in(value, source, number, field)
        meter.bytes = before + size * number // max(total, 1)
