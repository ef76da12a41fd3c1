"""One reader per format. A reader turns an open file into passages, with a bounded amount of memory.

Each reader decodes the bytes passage by passage, so that an invalid byte breaks only one passage, not the
whole file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, TypeAlias

from .passages import MAX_PASSAGE, TOO_LONG, Broken, Passage, ReadItem

Split: TypeAlias = Literal["line", "paragraph", "file"]
Format: TypeAlias = Literal["auto", "text", "jsonl", "csv", "parquet"]
Line: TypeAlias = tuple[int, bytes | None]
"""Number of a line (from 1) and its bytes without the line end; None instead of the bytes if the line is too long."""

BOM = b"\xef\xbb\xbf"
BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Formats by file suffix. A file with any other suffix is text."""


class Meter:
    """Counts the bytes read, for the progress bar."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


def read_lines(stream: BinaryIO, meter: Meter) -> Iterator[Line]:
    """Yield a file's lines, without a byte order mark and without line ends (LF or CR LF)."""
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


def _decode_passage(raw: bytes, source: str, line: int) -> ReadItem:
    try:
        return Passage(raw.decode(), source, line)
    except UnicodeDecodeError as error:
        return Broken(source, line, f"not UTF-8 at byte {error.start + 1}")


# --- text -------------------------------------------------------------------------------------


def read_text(stream: BinaryIO, source: str, meter: Meter, split: Split) -> Iterator[ReadItem]:
    """Yield the lines or paragraphs of a text, or the whole text as one passage; skip blank passages."""
    if split == "file":
        return _read_whole(stream, source, meter)
    lines = read_lines(stream, meter)
    return _split_lines(lines, source) if split == "line" else _split_paragraphs(lines, source)


def _split_lines(lines: Iterable[Line], source: str) -> Iterator[ReadItem]:
    for number, raw in lines:
        if raw is None:
            yield Broken(source, number, TOO_LONG)
        elif not _is_blank(raw):
            yield _decode_passage(raw, source, number)


def _is_blank(raw: bytes) -> bool:
    """Return whether a line has only white space, including Unicode white space such as U+00A0."""
    stripped = raw.strip()
    return not stripped or (stripped[0] >= 0x80 and not stripped.decode(errors="replace").strip())


def _split_paragraphs(lines: Iterable[Line], source: str) -> Iterator[ReadItem]:
    paragraph: list[bytes] = []
    start = size = 0
    for number, raw in lines:
        if raw is not None and _is_blank(raw):
            if paragraph or size:
                yield _join_paragraph(paragraph, size, source, start)
            paragraph, size = [], 0
            continue
        if not size:
            start = number
        size += (MAX_PASSAGE + 1 if raw is None else len(raw)) + 1
        if size > MAX_PASSAGE + 1:
            paragraph = []  # the paragraph is too long: drop its lines; from now on, only count bytes
        elif raw is not None:
            paragraph.append(raw)
    if size:
        yield _join_paragraph(paragraph, size, source, start)


def _join_paragraph(lines: list[bytes], size: int, source: str, start: int) -> ReadItem:
    if size > MAX_PASSAGE + 1:
        return Broken(source, start, TOO_LONG)
    return _decode_passage(b"\n".join(lines), source, start)


def _read_whole(stream: BinaryIO, source: str, meter: Meter) -> Iterator[ReadItem]:
    raw = stream.read(MAX_PASSAGE + len(BOM) + 1)
    meter.bytes += len(raw)
    if len(raw) > MAX_PASSAGE:
        yield Broken(source, None, f"{TOO_LONG}; use --split paragraph or --split line")
    elif not _is_blank(raw := raw.removeprefix(BOM)):
        yield _decode_passage(raw, source, 1)


# --- JSON Lines -------------------------------------------------------------------------------


def read_jsonl(stream: BinaryIO, source: str, meter: Meter, field: str) -> Iterator[ReadItem]:
    """Yield one passage per JSON object; skip blank lines."""
    for number, raw in read_lines(stream, meter):
        if raw is None:
            yield Broken(source, number, TOO_LONG)
        elif raw.strip():
            yield _parse_json_line(raw, source, number, field)


def _parse_json_line(raw: bytes, source: str, number: int, field: str) -> ReadItem:
    decoded = _decode_passage(raw, source, number)
    if isinstance(decoded, Broken):
        return decoded
    try:
        value = json.loads(decoded.text)
    except json.JSONDecodeError as error:
        return Broken(source, number, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return Broken(source, number, f"not readable as JSON: {type(error).__name__}")
    if not isinstance(value, dict):
        return Broken(source, number, "not a JSON object")
    return _check_text(_find_field(value, field), source, number, field)


_ABSENT: Any = object()


def _find_field(value: dict[str, Any], field: str) -> Any:
    """Return the field with exactly this name; otherwise follow the dots of the name into inner objects."""
    if field in value:
        return value[field]
    inner: Any = value
    for name in field.split("."):
        inner = inner.get(name, _ABSENT) if isinstance(inner, dict) else _ABSENT
    return inner


def _check_text(value: Any, source: str, line: int, field: str) -> ReadItem:
    if value is _ABSENT:
        return Broken(source, line, f'no field "{field}"')
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return Broken(source, line, f'field "{field}" is {kind}, not a string')
    # An escape such as \ud800 is a lone surrogate. The key policy decides whether to refuse or to replace it.
    size = len(value.encode(errors="surrogatepass"))
    return Broken(source, line, TOO_LONG) if size > MAX_PASSAGE else Passage(value, source, line)


# --- CSV --------------------------------------------------------------------------------------


class _CsvLines:
    """Iterates over lines for ``csv.reader``. Unlike a generator, it can continue after it has raised an error."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.number = 0
        """Number of the last line that was read. The count of ``csv.reader`` omits lines that are too long."""

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.number, raw = next(self._lines)
        if raw is None:
            raise csv.Error(TOO_LONG)
        # Invalid bytes become surrogates, so that they break a record only if they are in the column that is read.
        return raw.decode("utf-8", "surrogateescape") + "\n"


def read_csv(stream: BinaryIO, source: str, meter: Meter, field: str, delimiter: str = ",") -> Iterator[ReadItem]:
    """Yield one passage per record, from the column ``field``; the first record names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_PASSAGE))
    # With strict=True, a stray quote raises an error and breaks only its own record. Without strict=True, the reader
    # would take the records that follow as part of a quoted field.
    lines = _CsvLines(read_lines(stream, meter))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
    except csv.Error as error:
        yield Broken(source, 1, f"not a CSV header: {error}")
        return
    if header is None:
        return
    if header.count(field) != 1:
        number = "no column" if field not in header else "more than one column"
        yield Broken(source, 1, f'{number} "{field}" in the header; choose a column with --field')
        return
    yield from _read_records(rows, lines, source, header.index(field), field)


def _read_records(rows: Any, lines: _CsvLines, source: str, column: int, field: str) -> Iterator[ReadItem]:
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
            yield _parse_row(row, source, start, column, field)


def _parse_row(row: list[str], source: str, start: int, column: int, field: str) -> ReadItem:
    if column >= len(row):
        return Broken(source, start, f'no column "{field}" in this record')
    try:
        row[column].encode()
    except UnicodeEncodeError:
        return Broken(source, start, f'column "{field}" is not UTF-8')
    return Passage(row[column], source, start)


# --- Parquet ----------------------------------------------------------------------------------


def read_parquet(path: str, source: str, meter: Meter, field: str, size: int) -> Iterator[ReadItem]:
    """Yield one passage per row of a string column, reading 1,024 rows at a time."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        yield Broken(source, None, "reading Parquet requires pyarrow: pip install 'embedonce[parquet]'")
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _read_batches(file, source, meter, field, size)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield Broken(source, None, f"not readable as Parquet: {type(error).__name__}")


def _read_batches(file: Any, source: str, meter: Meter, field: str, size: int) -> Iterator[ReadItem]:
    if file.schema_arrow.names.count(field) != 1:
        yield Broken(source, None, f'no column "{field}"; choose a column with --field')
        return
    number, total, before = 0, file.metadata.num_rows, meter.bytes
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _check_text(value, source, number, field)
        meter.bytes = before + size * number // max(total, 1)
