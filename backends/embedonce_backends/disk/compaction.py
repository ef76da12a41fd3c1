"""Compaction: all entries move to the end of the file, where they fill whole pages, and free pages are given back.

SQLite's ``VACUUM`` would copy the whole file twice, and make all writers wait meanwhile. Here, each step is a short
transaction, and needs the space of one step. If the compaction is interrupted, no entry is lost.
"""

from __future__ import annotations

import time
from typing import Any

from .database import Database, count_used_bytes, estimate_bytes, release_pages
from .log import LOG_BYTES
from .sqlite import Connection, fetch_rows
from .statements import HAS_EARLIER_KEYS, VALUE_SIZES
from .stored_keys import Form, encode_key

STEP_ROWS = 512
"""Maximum number of rows that one transaction moves."""
STEP_BYTES = 2**20
"""Number of bytes after which a transaction moves no more rows."""
PAUSE_SECONDS = 0.002
"""Number of seconds between two steps, in which other threads and processes get the locks that they wait for."""
LOG_SECONDS = 60.0
"""Maximum number of seconds that the compaction waits between two steps until the log can be emptied."""
END_SECONDS = 5.0
"""Maximum number of seconds that the compaction tries to empty the log at its end."""

# The key is read as bytes, because another program may have stored a text that is invalid UTF-8.
_NEXT_TO_MOVE = (
    "SELECT rowid, CAST(key AS BLOB), raw = 1 AND TYPEOF(key) = 'text', LENGTH(value) FROM Cache"
    f" WHERE rowid >= ? AND rowid <= ? ORDER BY rowid LIMIT {STEP_ROWS}"
)
_LAST_ROW = "SELECT COALESCE(MAX(rowid), 0) FROM Cache"
_MOVE = "UPDATE Cache SET rowid = ? WHERE rowid = ?"
_CONVERT = "UPDATE Cache SET rowid = ?, key = ? WHERE rowid = ?"
_REMOVE = "DELETE FROM Cache WHERE rowid = ?"
_HAS_KEY = "SELECT 1 FROM Cache WHERE key = ? AND raw = 1"


def compact(database: Database) -> None:
    """Move the entries to full pages if a tenth of the file is unused, give free pages back, and empty the log.

    If the file has keys that an earlier version stored as text, the entries are also moved, and these keys get the form
    of today. The entries keep their order, in which they are evicted. Entries that are stored meanwhile may come before
    others.

    Raises:
        LogTooLarge: readers kept the log from being emptied for 60 s.
    """
    _wait_for_small_log(database)
    start: int | None = 0 if database.call(_is_worth_moving) else None
    ((last,),) = database.read(_LAST_ROW, ())
    while start is not None:
        start = _move_rows(database, start, last)
        _wait_for_small_log(database)
    while database.call_alone(lambda connection: release_pages(connection, 0)):
        _wait_for_small_log(database)
    _empty_log(database, 0, END_SECONDS)


def _is_worth_moving(connection: Connection) -> bool:
    if fetch_rows(connection, HAS_EARLIER_KEYS):
        return True
    return count_used_bytes(connection) > 1.1 * estimate_bytes(connection, fetch_rows(connection, VALUE_SIZES))


def _wait_for_small_log(database: Database) -> None:
    """Let others use the database, and empty the log if it is large.

    Raises:
        LogTooLarge: the log is still large after 60 s.
    """
    time.sleep(PAUSE_SECONDS)
    if not _empty_log(database, LOG_BYTES, LOG_SECONDS):
        raise database.log.explain_stop()


def _empty_log(database: Database, max_bytes: int, seconds: float) -> bool:
    """Empty the log if it is larger than ``max_bytes``. Return False if that was not possible in ``seconds``."""
    end = time.monotonic() + seconds
    while database.log.get_bytes() > max_bytes:
        if database.call_alone(database.log.empty):
            return True
        if time.monotonic() >= end:
            return False
        # Without this pause, no other thread of this process could write, and no other process could make a checkpoint.
        time.sleep(PAUSE_SECONDS)
    return True


def _move_rows(database: Database, start: int, last: int) -> int | None:
    """Move the next rows to the end of the table. Return the rowid of the row after them, or None after ``last``."""
    with database.open_transaction() as connection:
        rows = fetch_rows(connection, _NEXT_TO_MOVE, (start, last))
        if not rows:
            return None
        ((end,),) = fetch_rows(connection, _LAST_ROW)
        rowid = size = 0
        for number, (rowid, key, is_text, length) in enumerate(rows, 1):
            connection.execute(*_plan_move(connection, rowid, end + number, key if is_text else None))
            size += length or 0
            if size >= STEP_BYTES:
                break
        return int(rowid) + 1


def _plan_move(connection: Connection, rowid: int, target: int, text: bytes | None) -> tuple[str, tuple[Any, ...]]:
    """Return the statement that moves a row, and its parameters. ``text`` is the key if it is stored as text."""
    try:
        form, stored = encode_key("" if text is None else text.decode())
    except UnicodeDecodeError:
        form, stored = Form.TEXT, ""
    if form is Form.TEXT:
        return _MOVE, (target, rowid)
    # Leases expire in seconds, and today they are in another file. An entry in the form of today is the newer one.
    if form is Form.LEASE or fetch_rows(connection, _HAS_KEY, (stored,)):
        return _REMOVE, (rowid,)
    return _CONVERT, (target, stored, rowid)
