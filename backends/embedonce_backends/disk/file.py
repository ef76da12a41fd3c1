"""The database file: made when first used, and opened read-only if it cannot be written."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import diskcache  # type: ignore[import-untyped]

from .errors import ReadOnlyFile, get_primary_code, is_writable
from .folder import check_folder, make_file, make_folder
from .layout import COUNTERS, MAKE_LEASES, SCHEMA_OBJECTS, SETTINGS, TRIGGERS, Layout
from .log import LOG_BYTES, Log
from .sqlite import PROGRESS_STEPS, Connection, Stamp, fetch_rows, is_out_of_time
from .statements import HAS_EARLIER_KEYS

PAGE_BYTES = 16384
"""Page size of the file in bytes. With frames of 1.6 kB (384 dimensions), smaller pages would waste space. With larger
pages, storing an entry would write more bytes, because SQLite writes whole pages."""
# These pragmas have an effect only before the first table is made. Later, auto_vacuum would have no effect, but setting
# it would still write to the file.
NEW_FILE_PRAGMAS = (f"page_size = {PAGE_BYTES}", "auto_vacuum = INCREMENTAL")
READ_PRAGMAS = (
    "cache_size = -65536",  # 64 MiB, which is the size of the index of a million entries
    "mmap_size = 0",
    "temp_store = MEMORY",
    "trusted_schema = OFF",
    "cell_size_check = ON",
)
WRITE_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    f"journal_size_limit = {LOG_BYTES}",
    "secure_delete = ON",  # deleted data is overwritten, not only marked as free space
)


class DatabaseFile:
    """The folder and its database. Both are made when first used, so that a broken disk does not prevent startup."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.path = folder / diskcache.core.DBNAME
        self.max_bytes = max_bytes
        self.log = Log(self.path, max_bytes)
        self.is_made = False
        self.has_earlier_keys = False
        """Whether the file may have entries whose keys are stored as text. An earlier version stored them so."""

    def connect(self) -> Connection:
        """Open a connection. The first call also makes the folder and the tables if they are missing."""
        if not self.is_made:
            check_folder(self.folder)
            self._make_missing_files()
        try:
            connection = self._open_and_make_tables()
        except sqlite3.OperationalError as error:
            if get_primary_code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
                raise
            connection = self._open_immutable(error)
        try:
            if not self.is_made:
                self.has_earlier_keys = bool(fetch_rows(connection, HAS_EARLIER_KEYS))
            if not fetch_rows(connection, "PRAGMA table_info(Leases)"):
                # The file is read-only. With an empty table, every statement works.
                fetch_rows(connection, MAKE_LEASES.format(temporary="TEMPORARY"))
        except BaseException:
            connection.close()
            raise
        self.is_made = True
        return connection

    def is_outdated(self, connection: Connection) -> bool:
        """Return whether a connection opened the file as immutable, and the file has changed since then."""
        return connection.stamp is not None and connection.stamp != self._read_stamp()

    def _make_missing_files(self) -> None:
        try:
            make_folder(self.folder)
            make_file(self.path)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            raise ReadOnlyFile(
                errno.EROFS, "the file system is read-only, and there is no cache in this folder", str(self.path)
            ) from error

    def _open(self, mode: str, pragmas: tuple[str, ...]) -> Connection:
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?{mode}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
        try:
            is_new = fetch_rows(connection, "PRAGMA page_count") == [(0,)]
            for pragma in (*NEW_FILE_PRAGMAS, *pragmas) if is_new else pragmas:
                fetch_rows(connection, f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        connection.set_progress_handler(is_out_of_time, PROGRESS_STEPS)
        return connection

    def _open_and_make_tables(self) -> Connection:
        # With mode=rw, opening a removed file raises an error, and the next call makes the file again with its tables.
        # The default mode would make an empty file without tables. If the file is read-only, but its log can be used,
        # mode=rw opens it for reading.
        connection = self._open("mode=rw", WRITE_PRAGMAS + READ_PRAGMAS)
        try:
            if not self.is_made:
                self._make_tables(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_immutable(self, problem: sqlite3.OperationalError) -> Connection:
        """Open a file that cannot be written, and whose log and index cannot be made.

        SQLite then reads the main file without any lock, so the file must contain everything: an older state could
        contain entries that have been forgotten. Another user may still change the file, so :meth:`is_outdated` checks
        the connection before each call. A page that changes during a call gives an error, or a frame whose checksum is
        wrong.

        Raises:
            ReadOnlyFile: the log has content, but cannot be used.
        """
        stamp = self._read_stamp()
        # If the file is writable, the problem is another one. For example, this process has no file descriptors left.
        if stamp is None or not os.access(self.path, os.R_OK) or is_writable(self.path):
            raise problem
        if self.log.get_bytes():
            raise ReadOnlyFile(
                errno.EROFS,
                "the file is read-only, and its log has content that is not in the file, because the cache is still in "
                "use or was not closed properly. Open the folder once where it can be written, for example with "
                "`embedonce stats`, and copy it afterwards",
                str(self.path),
            ) from problem
        connection = self._open("mode=ro&immutable=1", READ_PRAGMAS)
        connection.stamp = stamp
        return connection

    def _read_stamp(self) -> Stamp | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size, self.log.get_bytes()

    def _make_tables(self, connection: Connection) -> None:
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
        fetch_rows(connection, MAKE_LEASES.format(temporary=""))
