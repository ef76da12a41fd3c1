"""SQLite's log (the file ``cache.db-wal``): it is emptied often, and its size is limited.

Writes go into the log first. A checkpoint copies them into the main file, and can then empty the log, unless a reader
still uses the log. A stuck reader, such as a stopped process, would make the log grow forever.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path

from embedonce.errors import TierTimeout

from .errors import DataNotOverwritten, LogTooLarge
from .sqlite import Connection, fetch_rows, get_remaining_seconds

log = logging.getLogger("embedonce.disk")

MIB = 2**20
LOG_BYTES = 32 * MIB
"""Size in bytes above which the log is written back into the file and emptied."""
MIN_LIMIT = 256 * MIB
"""Smallest limit of the log, in bytes. The limit is an eighth of ``max_bytes`` if that is more."""
WAIT_SECONDS = 0.25
"""Maximum number of seconds that a checkpoint waits for active readers."""
OVERWRITE_SECONDS = 5.0
"""Maximum number of seconds that removing entries waits for active readers, and for the checkpoints and writes of other
processes, before it reports that a reader is in the way."""
_ADVICE = "Look for a stopped process or an open transaction in a sqlite3 shell"


class Log:
    """The log of one database file.

    An attempt to empty the log that does not wait for readers takes less than a millisecond, so every write makes one
    while the log is large. Attempts that wait become rarer: the next one comes when the log has doubled.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self._path = f"{file}-wal"
        self.limit = max(MIN_LIMIT, max_bytes // 8)
        """Size in bytes above which writes are refused."""
        self._is_overdue = False
        """Whether the log may contain removed data, because an earlier attempt to empty it failed."""
        self._has_warned = False
        self._refusals = 0
        self._next_wait = LOG_BYTES
        """Size in bytes of the log at which the next attempt waits for readers."""

    def get_bytes(self) -> int:
        """Return the size of the log in bytes, or 0 if there is no log."""
        try:
            return os.stat(self._path).st_size
        except FileNotFoundError:
            return 0

    def describe(self) -> str:
        """Describe the size of the log, and whether a reader keeps it from being emptied."""
        size = self.get_bytes()
        reason = " because a reader still uses it" if size > 2 * LOG_BYTES else ""
        return f"log {size / MIB:.1f} MiB{reason}"

    def is_due(self) -> bool:
        """Return whether the log should be emptied, because it is large or contains removed data."""
        return self._is_overdue or self.get_bytes() > LOG_BYTES

    def limit_size(self, connection: Connection) -> None:
        """Empty the log after a write, unless a reader still uses it."""
        size = self.get_bytes()
        is_waiting = size > self._next_wait
        if not self._empty(connection, is_waiting) and is_waiting:
            self._next_wait = 2 * size

    def empty(self, connection: Connection) -> bool:
        """Empty the log, and wait up to 0.25 s for readers. Return False if a reader still uses the log."""
        return self._empty(connection, is_waiting=True)

    def explain_stop(self) -> LogTooLarge:
        """Return the exception to raise if a long change of the file stops, because the log cannot be emptied."""
        message = (
            f"the log has {self.get_bytes() // MIB} MiB and cannot be emptied, because others read; the "
            f"rest of the file was left as it is, and no entry is lost. {_ADVICE}, and try again"
        )
        return LogTooLarge(errno.EFBIG, message, self._path)

    def make_room(self, connection: Connection, limit: int) -> None:
        """Before a write, empty the log if it is larger than ``limit`` bytes.

        Raises:
            LogTooLarge: the log is too large, and a reader still uses it.
        """
        size = self.get_bytes()
        if size <= limit:
            return
        self._refusals += 1
        is_waiting = self._refusals & (self._refusals - 1) == 0  # at the first refusal, the 2nd, 4th, 8th and so on
        if self._empty(connection, is_waiting):
            return
        message = (
            f"the log has {size // MIB} MiB, because another connection still reads an old state of the file; nothing "
            f"is stored until that connection ends. {_ADVICE}"
        )
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s: %s", self._path, message)
        raise LogTooLarge(errno.EFBIG, message, self._path)

    def overwrite_removed_data(self, connection: Connection) -> None:
        """After removing entries, write the log back and empty it, so that their data is in no file.

        Raises:
            DataNotOverwritten: a reader still uses the log. The next write or removal tries again.
        """
        seconds = WAIT_SECONDS if self._is_overdue else OVERWRITE_SECONDS
        end = time.monotonic() + min(seconds, get_remaining_seconds() / 2)
        # If this attempt is interrupted, the next write must try again, so this is set first.
        self._is_overdue = True
        # SQLite does not wait while another process makes a checkpoint, so this repeats the attempt.
        while not self._empty(connection, is_waiting=True):
            if time.monotonic() >= end:
                raise DataNotOverwritten(
                    "the entries are removed, but a file in the folder still contains their data, because another "
                    "connection is reading; the next write after that connection has ended overwrites the data"
                )
            time.sleep(0.001)

    def _empty(self, connection: Connection, is_waiting: bool) -> bool:
        """Write the log back into the file and empty it. Return False if a reader still uses the log.

        With ``is_waiting``, wait for such readers for up to 0.25 s. Readers that start later are not waited for,
        because they use only the main file.
        """
        wait = int(1000 * min(WAIT_SECONDS, get_remaining_seconds() / 2)) if is_waiting else 0
        connection.execute(f"PRAGMA busy_timeout = {wait}")
        try:
            ((is_blocked, _, _),) = fetch_rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")
        except TierTimeout:
            return False
        finally:
            connection.execute("PRAGMA busy_timeout = 0")
        if is_blocked:
            return False
        self._is_overdue = self._has_warned = False
        self._refusals = 0
        self._next_wait = LOG_BYTES
        return True
