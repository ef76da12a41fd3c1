"""The file of the entries, ``cache.db``, in diskcache's layout."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import diskcache  # type: ignore[import-untyped]

from .errors import get_primary_code
from .file import DatabaseFile
from .layout import COUNTERS, SCHEMA_OBJECTS, SETTINGS, TRIGGERS, Layout
from .sqlite import Connection, fetch_rows
from .statements import HAS_EARLIER_KEYS

PAGE_BYTES = 16384
"""Page size of the file in bytes. With frames of 1.6 kB (384 dimensions), smaller pages would waste space. With larger
pages, storing an entry would write more bytes, because SQLite writes whole pages."""


class EntriesFile(DatabaseFile):
    """The file of the entries, and of every other key but leases."""

    # Later, auto_vacuum would have no effect, but setting it would still write to the file.
    new_file_pragmas = (f"page_size = {PAGE_BYTES}", "auto_vacuum = INCREMENTAL")

    def __init__(self, folder: Path, max_bytes: int) -> None:
        super().__init__(folder / diskcache.core.DBNAME, max_bytes)
        self.has_earlier_keys = False
        """Whether the file may have entries whose keys are stored as text. An earlier version stored them so."""

    def note_content(self, connection: Connection) -> None:
        """Look for entries of an earlier version."""
        self.has_earlier_keys = bool(fetch_rows(connection, HAS_EARLIER_KEYS))

    def make_tables(self, connection: Connection) -> None:
        """Make the tables and the settings, unless all of them are already as expected.

        If all of them are as expected, nothing is written, so the file can be opened while the disk is full or the
        database is locked. A file that is read-only is used as it is, with the tables that every version makes.
        """
        settings = {**SETTINGS, "size_limit": self.max_bytes}
        existing = {name for (name,) in fetch_rows(connection, "SELECT name FROM sqlite_master")}
        if "Settings" in existing:
            found = dict(fetch_rows(connection, "SELECT key, value FROM Settings"))
            if (
                existing >= SCHEMA_OBJECTS
                and not existing & TRIGGERS
                and {key: found[key] for key in found if key not in COUNTERS} == settings
            ):
                return
        try:
            self._write_settings(connection, settings, is_new="Settings" not in existing)
        except sqlite3.OperationalError as error:
            if get_primary_code(error) != sqlite3.SQLITE_READONLY or "Cache" not in existing:
                raise

    def _write_settings(self, connection: Connection, settings: dict[str, str | int], *, is_new: bool) -> None:
        if not is_new:
            known = (*settings, *COUNTERS)
            marks = ", ".join("?" * len(known))
            fetch_rows(connection, f"DELETE FROM Settings WHERE key NOT IN ({marks})", known)
        Layout(self.folder, connection, settings)
        for trigger in TRIGGERS:
            fetch_rows(connection, f"DROP TRIGGER IF EXISTS {trigger}")
