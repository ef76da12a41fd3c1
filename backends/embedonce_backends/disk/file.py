"""A database file: made when first used, and opened read-only if it cannot be written."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

from .errors import ReadOnlyFile, get_primary_code, is_writable
from .folder import check_folder, make_file, make_folder
from .log import LOG_BYTES, Log
from .sqlite import PROGRESS_STEPS, Connection, Stamp, fetch_rows, is_out_of_time

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
    """A folder and a database in it. Both are made when first used, so that a broken disk does not prevent startup."""

    new_file_pragmas: tuple[str, ...] = ()
    """Pragmas that have an effect only before the first table is made."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.folder = path.parent
        self.max_bytes = max_bytes
        self.log = Log(path, max_bytes)
        self.is_made = False

    def make_tables(self, connection: Connection) -> None:
        """Make what is missing in the database, before this process first uses it."""
        raise NotImplementedError

    def note_content(self, connection: Connection) -> None:
        """Look at the content of the database, before this process first uses it."""

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
                self.note_content(connection)
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
            for pragma in (*self.new_file_pragmas, *pragmas) if is_new else pragmas:
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
                self.make_tables(connection)
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
