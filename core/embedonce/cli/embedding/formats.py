"""Which format a file has, and which reader reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .csv_records import make_dialect, read_csv
from .fields import Wanted
from .json_records import read_json, read_jsonl
from .passages import ReadItem
from .streams import COMPRESSED
from .texts import Split, read_text

Format: TypeAlias = Literal["auto", "text", "jsonl", "json", "csv", "parquet"]

BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Formats by file suffix. A file with any other suffix is text."""

MARKUP = frozenset({".html", ".htm", ".xhtml"})
"""Suffixes of files whose tags are read as text."""
_DOCUMENTS = frozenset(
    {".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".pages", ".ppt", ".pptx", ".odp", ".key", ".djvu"}
)
_TABLES = frozenset(
    {".xls", ".xlsx", ".xlsb", ".ods", ".numbers", ".avro", ".orc", ".arrow", ".feather", ".sqlite", ".db"}
)
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".br"})
UNREADABLE = _DOCUMENTS | _TABLES | _ARCHIVES
"""Suffixes of files that contain text in a form that is not read."""
PROMISES_TEXT = UNREADABLE | MARKUP | frozenset(BY_SUFFIX) | frozenset({".txt", ".text", ".md", ".rst", ".log", ".xml"})
"""Suffixes of files in which a user expects to find text."""


@dataclass(frozen=True, slots=True)
class FileKind:
    """What the name of a file promises."""

    suffix: str
    """Last part of the name, in lowercase and without the suffix of a compressed file: ``.csv`` for ``a.csv.gz``."""
    format: Format
    compression: str | None
    """``gzip``, ``zstd`` or None."""


def classify_file(path: str, format: Format = "auto") -> FileKind:
    """Return what a file's name promises. ``format`` is used instead if it is not ``auto``."""
    name, suffix = os.path.splitext(path.lower())
    compression = COMPRESSED.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(name)[1]
    return FileKind(suffix, BY_SUFFIX.get(suffix, "text") if format == "auto" else format, compression)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How files are read, apart from which files and which fields."""

    split: Split = "paragraph"
    delimiter: str | None = None
    quote: str | None = None


def read_items(
    chunks: Iterable[str], source: str, encoding: str, kind: FileKind, wanted: Wanted, options: TextOptions
) -> Iterator[ReadItem]:
    """Yield the passages of a decoded file of any format except Parquet."""
    if kind.format == "jsonl":
        return read_jsonl(chunks, source, encoding, wanted)
    if kind.format == "json":
        return read_json(chunks, source, encoding, wanted)
    if kind.format == "csv":
        dialect = make_dialect(kind.suffix == ".tsv", options.delimiter, options.quote)
        return read_csv(chunks, source, encoding, wanted, dialect)
    return read_text(chunks, source, encoding, options.split)
