"""Finds the files of a table, and the format of each file.

This module imports pyarrow, so an importer imports this module inside its methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedonce.errors import SourceError

from ._files import check_file, check_folder, open_file, read_file
from ._table_columns import ArrowStream, ArrowTable, ParquetTable, TableFile
from ._table_lines import CsvTable, JsonLines, NumpyTable

MAX_META_BYTES = 16 * 2**20
"""Maximum size of the file that lists the files of a dataset."""

SUFFIXES: Mapping[str, str] = {
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".ipc": "Arrow",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".npy": "NumPy",
}
_MAGIC: Sequence[tuple[bytes, str]] = (
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\xff\xff\xff\xff", "Arrow stream"),
    (b"\x93NUMPY", "NumPy"),
)
_REFUSED_MAGIC: Sequence[tuple[bytes, str]] = (
    (b"PARE", "it is encrypted Parquet; write it without encryption"),
    (b"FEA1", "it has the first version of Feather; write it again with pyarrow.feather"),
    (b"\x1f\x8b", "it is compressed with gzip; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with Zstandard; decompress it first"),
    (b"BZh", "it is compressed with bzip2; decompress it first"),
    (b"PK\x03\x04", "it is a ZIP archive, as .npz and .xlsx files are; save the vectors in another format"),
    (b"\x89HDF", "it is HDF5; save the vectors in another format"),
    (b"\x80", "it is a pickle, which embedonce does not read because it can run code; write the table as Parquet"),
)


def list_files(path: Path) -> list[Path]:
    """Return the files of a table in a fixed order: a file, the files of a folder, or those of a saved dataset.

    A folder that Hugging Face's ``Dataset.save_to_disk`` has written names its files itself.

    Raises:
        SourceError: the path is missing or is not a file or a folder, the folder has no such file, or it has files of
            several formats.
    """
    if not path.is_dir() or path.is_symlink():
        check_file(path)
        return [path]
    if (path / "VDF_META.json").exists():
        raise SourceError(f"{path} is a folder of vector-io (it has a file VDF_META.json); use the importer vdf")
    if (path / "dataset_dict.json").exists():
        splits = _read_meta(path / "dataset_dict.json").get("splits")
        names = _check_names(splits, path / "dataset_dict.json")
        return [file for name in names for file in _list_dataset(path / name)]
    if (path / "state.json").exists():
        return _list_dataset(path)
    found = sorted(walk_files(path))
    formats = sorted({SUFFIXES[file.suffix.lower()] for file in found})
    if not found:
        raise SourceError(f"{path} has no files whose names end in {', '.join(SUFFIXES)}; give the folder with them")
    if len(formats) > 1:
        raise SourceError(
            f"{path} has files of several formats: {', '.join(formats)}; give one file, or move them to folders of "
            "their own"
        )
    return found


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files in and below a folder whose names have a known suffix. Links to folders are not followed.

    Raises:
        SourceError: a folder is missing or cannot be listed.
    """
    check_folder(folder)

    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=fail):
        # Spark and Dask write files such as _SUCCESS and .part-0.parquet.crc.
        folders[:] = [name for name in folders if not name.startswith(("_", "."))]
        for name in files:
            if not name.startswith(("_", ".")) and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)


def _list_dataset(folder: Path) -> list[Path]:
    check_folder(folder)
    meta = folder / "state.json"
    listed = _read_meta(meta).get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed or ()]
    return [folder / name for name in _check_names(names, meta)]


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(path, MAX_META_BYTES))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SourceError(f"{path} is not a JSON object, so the folder is not a dataset that was saved to disk")
    return found


def _check_names(names: Any, meta: Path) -> list[str]:
    """Check that a list has plain names, so that it cannot lead out of its folder."""
    if not isinstance(names, list) or not names:
        raise SourceError(f"{meta} lists no data; the folder is not a dataset that was saved to disk")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise SourceError(f"{meta} lists something that is not the name of a file beside it")
    return names


def open_table(path: Path, below: Path) -> TableFile:
    """Return a reader for a file. The first bytes determine the format, and the name does for text formats.

    Raises:
        SourceError: the file is missing, is not a regular file, or has none of the formats.
    """
    with open_file(path, below=below) as file:
        start = file.read(512)
    format_ = next((name for magic, name in _MAGIC if start.startswith(magic)), None)
    if format_ is None:
        for magic, reason in _REFUSED_MAGIC:
            if start.startswith(magic):
                raise SourceError(f"{path} cannot be read: {reason}")
        by_name = SUFFIXES.get(path.suffix.lower())
        if by_name in ("JSON Lines", "CSV"):
            format_ = by_name
        elif by_name is not None:
            raise SourceError(f"{path} is not a file of the format {by_name}, although its name says so")
        elif start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            format_ = "JSON Lines"
        else:
            raise SourceError(f"{path} has an unknown format; use a file whose name ends in {', '.join(SUFFIXES)}")
    return _READERS[format_](path, below)


_READERS: Mapping[str, Callable[[Path, Path], TableFile]] = {
    "Parquet": ParquetTable,
    "Arrow": ArrowTable,
    "Arrow stream": ArrowStream,
    "JSON Lines": JsonLines,
    "CSV": CsvTable,
    "NumPy": NumpyTable,
}
