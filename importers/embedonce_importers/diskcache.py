"""The ``diskcache`` importer: vectors that a program keeps in a Cache or FanoutCache of diskcache.

A Cache is a folder with a database, and with a file for each value that is larger than 32 kB. A FanoutCache is a folder
of such folders. Most values are pickles, which are parsed and never unpickled. This importer does not use diskcache,
because diskcache unpickles values (CVE-2025-69872) and writes to the database when it opens it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source, time_left
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._files import Folder, check_folder, open_folder
from ._found import collect_vectors, merge_repeated
from ._key_templates import KeyOption, KeyTemplate, ModelOption, StepsOption
from ._sqlite import ReadOnlyDatabase, check_columns, fetch_by_keys, get_bytes
from ._values import MAX_VALUE_BYTES, DecodedVector, ValueForm, ValueOption, decode

api = 1

DATABASE = "cache.db"
COLUMNS = ("key", "raw", "expire_time", "mode", "filename", "value")

QUERY = (
    "SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND (expire_time IS NULL OR expire_time > ?) AND key IN"
)
"""``raw`` is 0 if the key is a pickle."""

PICKLE = 4
"""The column ``mode`` of a pickle. Other modes are bytes, text and numbers."""

TOO_LARGE = "a row larger than 4 MiB"


class DiskcacheImporter:
    """Finds vectors by keys that are strings, made from the texts."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("Folder of the Cache or the FanoutCache.")],
        key: KeyOption = 'sha256("{text}")',
        model: ModelOption = None,
        steps: StepsOption = (),
        value: ValueOption = "pickled-list",
    ) -> None:
        self._template = KeyTemplate(key, model=model, steps=steps)
        self._path = Path(path)
        self._value: ValueForm = value
        self._databases: dict[Path, list[ReadOnlyDatabase]] = {}
        self.source = Source(f"diskcache: {self._path.absolute()}, {self._template.name}, value={value}")

    def __repr__(self) -> str:
        return f"<DiskcacheImporter of {self.source.name}>"

    def check(self) -> None:
        """Check that the folder has databases of diskcache, whose keys are strings.

        Raises:
            SourceError: it has none, or none of the keys is a string.
        """
        has_strings = has_rows = False
        for database in self._find_databases():
            with database.connect() as connection:
                check_columns(connection, database.path, "Cache", COLUMNS)
                has_rows |= bool(connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchall())
                query = "SELECT 1 FROM Cache WHERE raw = 1 AND typeof(key) = 'text' LIMIT 1"
                has_strings |= bool(connection.execute(query).fetchall())
        if has_rows and not has_strings:
            raise SourceError(
                f"{self._path} has no keys that are strings. The keys of memoize() and of JSONDisk cannot be made from "
                "a text"
            )

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the cache has. Entries that have expired are left out."""
        groups = self._template.group_by_key(texts)
        by_key = {key.encode(): same for key, same in groups.items()}
        with ExitStack() as stack:
            reader = _Reader(self._value, stack)
            items: list[tuple[str, Path, tuple[Any, ...]]] = []
            too_large = 0
            for database in self._find_databases():
                with database.connect() as connection:
                    rows, missing = fetch_by_keys(connection, QUERY, groups, before=[time.time()])
                too_large += missing
                folder = database.path.parent
                items += [(text, folder, row) for row in rows for text in by_key.get(row[0], ())]
            found = merge_repeated(collect_vectors(items, reader.read))
        unreadable = Counter(found.unreadable) + Counter({TOO_LARGE: too_large})
        return FoundVectors(found.texts, found.vectors, unreadable)

    def close(self) -> None:
        """Close the databases."""
        for database in self._databases.get(self._path, ()):
            database.close()

    def _find_databases(self) -> list[ReadOnlyDatabase]:
        """Return the database of a Cache, or those of the parts of a FanoutCache."""
        if self._path not in self._databases:
            found = [ReadOnlyDatabase(path) for path in self._list_databases()]
            self._databases.setdefault(self._path, found)  # atomic: all threads get the same objects
        return self._databases[self._path]

    def _list_databases(self) -> list[Path]:
        with open_folder(self._path) as folder:
            names = sorted(folder.iter_names())
        if DATABASE in names:
            return [self._path / DATABASE]
        parts = [self._path / name for name in names if re.fullmatch("[0-9]{3}", name)]
        if not parts:
            raise SourceError(
                f"{self._path} has no {DATABASE}, and no folder 000 of a FanoutCache; set path to the folder "
                "of the cache"
            )
        for part in parts:
            check_folder(part)
        return [part / DATABASE for part in parts]


class _Reader:
    """Reads the values of rows, in the row or in a file beside the database."""

    def __init__(self, form: ValueForm, stack: ExitStack) -> None:
        self._form: ValueForm = form
        self._stack = stack
        self._folders: dict[Path, Folder] = {}

    def read(self, item: tuple[str, Path, Sequence[Any]]) -> tuple[str, DecodedVector]:
        text, folder, (_, mode, filename, value) = item
        content = get_bytes(value) if filename is None else self._read_file(folder, filename)
        return text, decode(content, "pickled-list") if mode == PICKLE else decode(content, self._form)

    def _read_file(self, path: Path, filename: object) -> bytes:
        time_left()  # raises an error after the deadline
        if path not in self._folders:
            self._folders[path] = self._stack.enter_context(open_folder(path))
        # diskcache on Windows writes backslashes.
        *parents, name = re.split(r"[/\\]", get_bytes(filename).decode(errors="replace"))
        with self._folders[path].open_subfolder(*parents) as folder:
            content = None if folder is None else folder.read(name, MAX_VALUE_BYTES)
        if content is None:
            raise ValueError("the file of the value is missing")
        return content


@hookimpl
def embedonce_importers() -> Mapping[str, type[DiskcacheImporter]]:
    return {"diskcache": DiskcacheImporter}
