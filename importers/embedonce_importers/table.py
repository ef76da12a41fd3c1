"""The ``table`` importer: files with one row per text, which have a column of texts and a column of vectors.

It reads Parquet, Arrow and Feather, JSON Lines, CSV, datasets that Hugging Face's ``save_to_disk`` has written, and
NumPy arrays beside a text file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.options import Doc

from ._packages import require_package

if TYPE_CHECKING:
    from ._arrow_rows import Columns

api = 1

log = logging.getLogger("embedonce")


class TableImporter:
    """Reads the texts and vectors of a file or of all files of a folder."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("File, folder with files of one format, or folder of a saved dataset.")],
        text_column: Annotated[
            str | None, Doc("Column with the texts. Default: the only column that may have texts.")
        ] = None,
        vector_column: Annotated[
            str | None, Doc("Column with the vectors. Default: the only column that may have vectors.")
        ] = None,
    ) -> None:
        require_package("pyarrow")
        self._path = path
        self._text_column = text_column
        self._vector_column = vector_column

    @property
    def source(self) -> Source:
        """The path and the columns. A table does not say of which task its vectors are."""
        columns = {"text_column": self._text_column, "vector_column": self._vector_column}
        named = ", ".join(f"{option} {name!r}" for option, name in columns.items() if name is not None)
        return Source(f"table {self._path}{f' ({named})' if named else ''}")

    def check(self) -> None:
        """Read the columns of every file and the first rows.

        Raises:
            SourceError: a file is missing or damaged, or it is not clear which columns have the texts and the vectors.
        """
        from ._table_scans import scan_files

        files, columns = self._find_columns()
        log.info("%s: reading %s", self._path, columns)
        next(scan_files(files, self._path, columns), None)

    def scan(self) -> Iterator[FoundVectors]:
        """Yield the rows of all files, in the order of the files' names.

        Raises:
            SourceError: a file is missing or damaged, or it is not clear which columns have the texts and the vectors.
        """
        from ._table_scans import scan_files

        files, columns = self._find_columns()
        yield from scan_files(files, self._path, columns)

    def count(self) -> int | None:
        """Return the number of rows; None for JSON Lines, CSV and Arrow streams, which do not say it."""
        from ._table_files import list_files
        from ._table_scans import count_rows

        return count_rows(list_files(self._path), self._path)

    def _find_columns(self) -> tuple[list[Path], Columns]:
        from ._table_files import list_files
        from ._table_scans import choose_table_columns

        files = list_files(self._path)
        return files, choose_table_columns(
            files, self._path, text_column=self._text_column, vector_column=self._vector_column, where=str(self._path)
        )

    def close(self) -> None:
        """Do nothing, because a file is open only while it is read."""


@hookimpl
def embedonce_importers() -> Mapping[str, type[TableImporter]]:
    return {"table": TableImporter}
