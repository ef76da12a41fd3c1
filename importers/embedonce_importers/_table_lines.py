"""Reads tables in text formats, JSON Lines and CSV, and NumPy arrays beside a text file.

This module imports pyarrow, so an importer imports this module inside its methods. A line or row that is invalid is
counted, and the others are read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.csv as arrow_csv  # type: ignore[import-untyped]
import pyarrow.json as arrow_json  # type: ignore[import-untyped]

from embedonce.contracts import FoundVectors
from embedonce.errors import SourceError

from ._arrow_rows import BATCH_ROWS, Columns, read_parts
from ._files import open_file
from ._table_columns import Schema, describe_schema, translate_errors
from ._values import decode_json

SAMPLE = 100
"""Number of rows of a text format that are looked at to find the columns."""
BLOCK_BYTES = 4 * 2**20
"""Number of bytes of JSON Lines and CSV that are parsed at a time."""
MAX_LINE_BYTES = 64 * 2**20
"""Maximum size of a line of JSON Lines and of a text file."""


class JsonLines:
    def __init__(self, path: Path, below: Path) -> None:
        self._path = path
        self._below = below

    def read_schema(self) -> Schema:
        types: dict[str, str] = {}
        texts: dict[str, None] = {}
        vectors: dict[str, None] = {}
        for number, line in enumerate(self._read_objects()):
            # A row may lack a text or a vector, so several rows are looked at.
            types.update({name: _name_type(value) for name, value in line.items() if value is not None})
            texts.update(dict.fromkeys(name for name, value in line.items() if isinstance(value, str)))
            vectors.update(dict.fromkeys(name for name, value in line.items() if _is_numbers(value)))
            if number >= SAMPLE:
                break
        if not types:
            raise SourceError(f"{self._path} has no line that is a JSON object with at least one field")
        return Schema(types, list(texts), list(vectors))

    def _read_objects(self) -> Iterator[dict[str, Any]]:
        """Yield the lines that are JSON objects with at least one field."""
        with open_file(self._path, below=self._below) as file:
            for block in _read_lines(file, self._path):
                for line in block.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
                    try:
                        found = json.loads(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(found, dict) and found:
                        yield found

    def read(self, columns: Columns) -> Iterator[FoundVectors]:
        fields = [(columns.text, pa.string()), (columns.vector, pa.list_(pa.float64()))]
        if columns.node is not None:
            fields.append((columns.node, pa.string()))
        schema = pa.schema(fields)
        with open_file(self._path, below=self._below) as file:
            for block in _read_lines(file, self._path):
                counts: Counter[str] = Counter()
                for table in _parse_json(block, schema, counts):
                    yield from read_parts(table, columns)
                if counts:
                    yield FoundVectors([], [], counts)

    def count(self) -> None:
        return None


def _read_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield blocks of complete lines.

    Raises:
        SourceError: a line is longer than :data:`MAX_LINE_BYTES`.
    """
    rest: list[bytes] = []
    size = 0
    while block := file.read(BLOCK_BYTES):
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            yield b"".join([*rest, head])
            rest, size = [], 0
        rest.append(tail)
        size += len(tail)
        if size > MAX_LINE_BYTES:
            raise SourceError(f"{path} has a line of more than {MAX_LINE_BYTES // 2**20} MiB; check its format")
    if size:
        yield b"".join(rest)


def _name_type(value: object) -> str:
    return "list of numbers" if _is_numbers(value) else type(value).__name__


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) in (int, float) for number in value)


def _parse_json(block: bytes, schema: Any, counts: Counter[str]) -> Iterator[Any]:
    """Yield tables with the rows of a block of lines, and count the lines that are invalid.

    pyarrow refuses a block with an invalid line, so such a block is halved until only that line is left.
    """
    if not block.strip():
        return
    try:
        yield arrow_json.read_json(
            pa.BufferReader(block),
            read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowException:
        middle = block.find(b"\n", len(block) // 2)
        if middle < 0:
            middle = block.rfind(b"\n")
        if middle < 0:
            counts["line that is not a JSON object with a text and a flat list of numbers"] += 1
            return
        yield from _parse_json(block[:middle], schema, counts)
        yield from _parse_json(block[middle + 1 :], schema, counts)


class CsvTable:
    """CSV with a header. A vector is a JSON list in one cell."""

    def __init__(self, path: Path, below: Path) -> None:
        self._path = path
        self._below = below
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    @contextmanager
    def _open(self, **options: Any) -> Iterator[Any]:
        counts: Counter[str] = options.pop("counts", Counter())

        def skip(_row: Any) -> str:
            counts["row with too few or too many cells"] += 1
            return "skip"

        with (
            open_file(self._path, below=self._below) as file,
            translate_errors(self._path, "CSV"),
            closing(
                arrow_csv.open_csv(
                    file,
                    read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES),
                    parse_options=arrow_csv.ParseOptions(
                        delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=skip
                    ),
                    convert_options=arrow_csv.ConvertOptions(check_utf8=False, **options),
                )
            ) as reader,
        ):
            yield reader

    def read_schema(self) -> Schema:
        with self._open() as reader:
            schema = reader.schema
            described = describe_schema(schema, self._path)
        with self._open(column_types=dict.fromkeys(schema.names, pa.binary())) as reader:
            first = next(iter(reader), None)
        if first is None:
            raise SourceError(f"{self._path} has a header and no rows; give a file that has rows")
        cells = first.slice(0, SAMPLE).to_pydict()
        vectors = [name for name in described.texts if _has_lists(cells[name])]
        types = {name: "a list as text" if name in vectors else type_ for name, type_ in described.types.items()}
        return Schema(types, [name for name in described.texts if name not in vectors], vectors)

    def read(self, columns: Columns) -> Iterator[FoundVectors]:
        counts: Counter[str] = Counter()
        types = {name: pa.binary() if name == columns.vector else pa.string() for name in columns.names}
        options = {"include_columns": columns.names, "include_missing_columns": True, "column_types": types}
        with self._open(counts=counts, **options) as reader:
            for batch in reader:
                yield from read_parts(_parse_vectors(batch, columns.vector, counts), columns, counts)
                counts.clear()
        if counts:
            yield FoundVectors([], [], dict(counts))

    def count(self) -> None:
        return None


def _has_lists(cells: Sequence[bytes | None]) -> bool:
    """Tell whether more than half of the cells that are not empty start like a JSON list."""
    filled = [cell.lstrip() for cell in cells if cell and cell.strip()]
    return 2 * sum(cell.startswith(b"[") for cell in filled) > len(filled)


def _parse_vectors(batch: Any, column: str, counts: Counter[str]) -> Any:
    """Return a batch whose column has vectors and not JSON. Rows with an invalid vector are counted and left out."""
    vectors: list[Any] = []
    is_kept: list[bool] = []
    for cell in batch.column(column).to_pylist():
        try:
            vector = decode_json(cell) if cell and cell.strip() else None
        except ValueError as error:
            counts[f"vector is {error}"] += 1
            is_kept.append(False)
            continue
        vectors.append(vector)
        is_kept.append(True)
    kept = batch.filter(pa.array(is_kept, pa.bool_()))
    index = kept.schema.get_field_index(column)
    return kept.set_column(index, column, pa.array(vectors, pa.list_(pa.float64())))


class NumpyTable:
    """A matrix in a ``.npy`` file, and a ``.txt`` file of the same name with one text per line."""

    TEXTS, VECTORS = "lines of the text file", "rows of the matrix"

    def __init__(self, path: Path, below: Path) -> None:
        self._path = path
        self._below = below
        self._texts = path.with_suffix(".txt")
        self._below_texts = self._texts if below == path else below

    @contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, tuple[int, int], np.dtype[Any]]]:
        """Give the file, at the first row, with the shape and the type of the matrix."""
        with open_file(self._path, below=self._below) as file:
            shape, dtype, is_fortran = _read_numpy_header(file, self._path)
            if len(shape) != 2 or dtype.kind != "f" or is_fortran or shape[1] == 0:
                raise SourceError(
                    f"{self._path} has an array of the type {dtype}, the shape {shape} and the order "
                    f"{'F' if is_fortran else 'C'}; save a matrix of floats of shape (texts, dimensions) in the order C"
                )
            expected = file.tell() + shape[0] * shape[1] * dtype.itemsize
            if os.fstat(file.fileno()).st_size < expected:
                raise SourceError(f"{self._path} is shorter than its header says; copy it again")
            lines = self._count_lines()
            if lines != shape[0]:
                raise SourceError(
                    f"{self._path} has {shape[0]:,} rows, and {self._texts} has {lines:,} lines; there must be exactly "
                    "one line per row"
                )
            yield file, (shape[0], shape[1]), dtype

    def _count_lines(self) -> int:
        if not os.path.lexists(self._texts):
            raise SourceError(f"{self._path} needs its texts in {self._texts}, one per line and in the same order")
        with open_file(self._texts, below=self._below_texts) as file:
            return sum(block.count(b"\n") + 1 for block in _read_lines(file, self._texts))

    def read_schema(self) -> Schema:
        with self._open() as (_, _, dtype):
            types = {self.TEXTS: "text", self.VECTORS: str(dtype)}
            return Schema(types, [self.TEXTS], [self.VECTORS])

    def read(self, columns: Columns) -> Iterator[FoundVectors]:
        with self._open() as (file, (_, size), dtype), open_file(self._texts, below=self._below_texts) as texts:
            for lines in _read_parts_of_lines(texts, self._texts):
                values = np.frombuffer(file.read(len(lines) * size * dtype.itemsize), dtype)
                yield _pair(lines, values, size, self._path)

    def count(self) -> int:
        with open_file(self._path, below=self._below) as file:
            shape, _, _ = _read_numpy_header(file, self._path)
        return shape[0] if shape else 0


def _read_numpy_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    format_ = np.lib.format
    try:
        version = format_.read_magic(file)
        read: Callable[..., Any] = format_.read_array_header_1_0 if version == (1, 0) else format_.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except ValueError:
        raise SourceError(f"{path} has no valid NumPy header; save it again with numpy.save") from None
    return shape, dtype, is_fortran


def _read_parts_of_lines(file: BinaryIO, path: Path) -> Iterator[list[bytes]]:
    for block in _read_lines(file, path):
        lines = block.split(b"\n")
        for start in range(0, len(lines), BATCH_ROWS):
            yield lines[start : start + BATCH_ROWS]


def _pair(lines: Sequence[bytes], values: Any, size: int, path: Path) -> FoundVectors:
    if len(values) != len(lines) * size:
        raise SourceError(f"{path} became shorter while it was read; run the import again")
    with np.errstate(over="ignore"):
        matrix = values.reshape(len(lines), size).astype(np.float32, copy=False)
    texts: list[str] = []
    kept: list[int] = []
    for index, line in enumerate(lines):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            continue
        kept.append(index)
    if len(kept) == len(lines):
        return FoundVectors(texts, matrix)
    return FoundVectors(texts, matrix[kept], {"text that is not valid UTF-8": len(lines) - len(kept)})
