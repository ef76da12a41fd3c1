"""The ``vdf`` importer: exports of vector databases that vector-io has written.

An export is a folder with ``VDF_META.json`` and one folder of Parquet files per index. The format is that of vdf-io
0.1 (``vdf_io/meta_types.py`` and ``export_vdf/vdb_export_cls.py``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._files import check_folder, read_file
from ._missing_names import describe_missing
from ._packages import require_package

if TYPE_CHECKING:
    from ._arrow_rows import Columns

api = 1

log = logging.getLogger("embedonce")

META = "VDF_META.json"
MAX_META_BYTES = 64 * 2**20
"""Maximum size of ``VDF_META.json``. It repeats the name of every Parquet file and the schema of every namespace."""
NOT_PROVIDED = "NOT_PROVIDED"
"""What vector-io writes for a column that it does not know."""


class VdfImporter:
    """Reads the texts and vectors of one namespace of an export of vector-io."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("Folder of the export, which has a file VDF_META.json.")],
        index: Annotated[str | None, Doc("Index or collection to read. Default: the only one.")] = None,
        namespace: Annotated[str | None, Doc("Namespace of the index. Default: the only one.")] = None,
        text_column: Annotated[
            str | None,
            Doc("Column with the texts. Default: the column that the export names, or the only possible one."),
        ] = None,
        vector_column: Annotated[
            str | None, Doc("Column with the vectors. Default: the only one that the export names.")
        ] = None,
    ) -> None:
        require_package("pyarrow")
        self._path = path
        self._index = index
        self._namespace = namespace
        self._text_column = text_column
        self._vector_column = vector_column

    @property
    def source(self) -> Source:
        """The path and the other options. Vector databases store the vectors of documents."""
        options = {
            "index": self._index,
            "namespace": self._namespace,
            "text_column": self._text_column,
            "vector_column": self._vector_column,
        }
        named = ", ".join(f"{option} {value!r}" for option, value in options.items() if value is not None)
        return Source(f"vdf {self._path}{f' ({named})' if named else ''}", task="document")

    def check(self) -> None:
        """Read ``VDF_META.json``, the columns of every file, and the first rows.

        Raises:
            SourceError: the folder is not an export, a file is missing or damaged, or an option must say what to read.
        """
        from ._table_scans import scan_files

        files, columns = self._find_columns()
        found = self._find_namespace()
        if found.exported is not None and found.total is not None and found.exported < found.total:
            log.warning(
                "%s, index %r has %d of the %d vectors of the database, because the export was incomplete",
                self._path,
                found.index,
                found.exported,
                found.total,
            )
        log.info("%s: reading %s", self._path, columns)
        next(scan_files(files, self._path, columns), None)

    def scan(self) -> Iterator[FoundVectors]:
        """Yield the rows of all files of the namespace, in the order of the files' names.

        Raises:
            SourceError: the folder is not an export, a file is missing or damaged, or an option must say what to read.
        """
        from ._table_scans import scan_files

        files, columns = self._find_columns()
        yield from scan_files(files, self._path, columns)

    def count(self) -> int | None:
        """Return the number of rows of all files of the namespace."""
        from ._table_scans import count_rows

        return count_rows(self._list_files(self._find_namespace()), self._path)

    def close(self) -> None:
        """Do nothing, because a file is open only while it is read."""

    def _find_columns(self) -> tuple[list[Path], Columns]:
        from ._table_scans import choose_table_columns

        found = self._find_namespace()
        vector_column = self._choose_vector_column(found)
        files = self._list_files(found)
        columns = choose_table_columns(
            files,
            self._path,
            text_column=self._text_column or found.text_columns.get(vector_column),
            vector_column=vector_column,
            where=f"{self._path}, index {found.index!r}",
        )
        return files, columns

    def _find_namespace(self) -> _Namespace:
        check_folder(self._path)
        indexes = _read_meta(self._path / META)
        index = _choose("index", self._index, list(indexes), str(self._path), "indexes")
        found = {namespace.name: namespace for namespace in indexes[index]}
        return found[
            _choose("namespace", self._namespace, list(found), f"{self._path}, index {index!r},", "namespaces")
        ]

    def _choose_vector_column(self, found: _Namespace) -> str:
        if self._vector_column is not None:
            return self._vector_column
        where = f"{self._path}, index {found.index!r},"
        return _choose("vector_column", None, found.vector_columns, where, "columns of vectors")

    def _list_files(self, found: _Namespace) -> list[Path]:
        from ._table_files import walk_files

        folder = self._path.joinpath(*found.data_path)
        # A folder inside the export must not be a link to another place.
        for count in range(len(found.data_path)):
            check_folder(self._path.joinpath(*found.data_path[: count + 1]))
        files = sorted(file for file in walk_files(folder) if file.suffix == ".parquet")
        if not files:
            raise SourceError(f"{folder} has no Parquet files; the export is incomplete, so export the index again")
        return files


@dataclass(frozen=True, slots=True)
class _Namespace:
    """A namespace as ``VDF_META.json`` describes it."""

    index: str
    name: str
    data_path: Sequence[str]
    """The names of the folders that lead from the export to the Parquet files."""
    vector_columns: Sequence[str]
    text_columns: Mapping[str, str]
    """The column with the texts, by the column with their vectors."""
    total: int | None
    """The number of vectors in the database, and how many of them were exported; None if this is not known."""
    exported: int | None


def _read_meta(path: Path) -> dict[str, list[_Namespace]]:
    """Return the namespaces by the name of their index.

    Raises:
        SourceError: the file is missing, or is not that of an export.
    """
    try:
        meta = json.loads(read_file(path, MAX_META_BYTES))
        return {
            _check(index, str): [_read_namespace(index, entry) for entry in _check(entries, list)]
            for index, entries in _check(meta["indexes"], dict).items()
        }
    except (KeyError, TypeError, ValueError, RecursionError):
        raise SourceError(
            f"{path} does not describe an export of vector-io; export the index again with a current version of vdf-io"
        ) from None


def _read_namespace(index: str, entry: Any) -> _Namespace:
    parts = PurePosixPath(_check(entry["data_path"], str)).parts
    if any(part in ("..", "/") or "\0" in part for part in parts):
        raise ValueError("the path leads out of the export")
    models = _check(entry.get("model_map") or {}, dict)
    text_columns = {name: model.get("text_column") for name, model in models.items() if isinstance(model, dict)}
    return _Namespace(
        index,
        _check(entry.get("namespace") or "", str),
        parts,
        [_check(name, str) for name in _check(entry.get("vector_columns") or ["vector"], list)],
        {name: text for name, text in text_columns.items() if isinstance(text, str) and text != NOT_PROVIDED},
        _read_number(entry.get("total_vector_count")),
        _read_number(entry.get("exported_vector_count")),
    )


def _read_number(value: Any) -> int | None:
    return value if type(value) is int else None


def _check(value: Any, type_: type[Any]) -> Any:
    if not isinstance(value, type_):
        raise TypeError(f"must be {type_.__name__}")
    return value


def _choose(option: str, wanted: str | None, known: Sequence[str], where: str, plural: str) -> str:
    if wanted is not None:
        if wanted in known:
            return wanted
        raise SourceError(describe_missing(f"{where} has no {option}", wanted, known, plural))
    if len(known) == 1:
        return known[0]
    if not known:
        raise SourceError(f"{where} has no {plural}; the export is empty, so export the index again")
    shown = ", ".join(repr(name) for name in known[:20])
    raise SourceError(f"{where} has several {plural}: {shown}; choose one with the option {option}")


@hookimpl
def embedonce_importers() -> Mapping[str, type[VdfImporter]]:
    return {"vdf": VdfImporter}
