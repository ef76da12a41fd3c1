"""Compaction: entries move to the end of the file until its pages are full, and the free pages are given back.

SQLite's ``VACUUM`` would copy the whole file twice, and keep all writers waiting meanwhile. Here, each step is a short
transaction, and needs the space of one step. Whoever interrupts the compaction loses nothing.
"""

from __future__ import annotations

from itertools import pairwise

from .database import Database, release_pages
from .sqlite import fetch_rows
from .stored_keys import encode_key

STEP_ROWS = 512
"""Number of rows that are examined together, and the maximum number of rows that one transaction moves."""
STEP_BYTES = 2**20
"""Number of bytes after which a transaction moves no more rows."""
MAX_GAPS = STEP_ROWS // 50
"""Number of gaps in the rowids of a step above which its rows are moved. Where rows have been removed from a page, the
rowids have a gap, and no later row fills it. A gap of any length is one gap, because whole pages are used again."""

_NEXT_ROWS = f"SELECT rowid FROM Cache WHERE rowid >= ? ORDER BY rowid LIMIT {STEP_ROWS}"
_NEXT_TO_MOVE = (
    f"SELECT rowid, key, raw, LENGTH(value) FROM Cache WHERE rowid >= ? AND rowid <= ? ORDER BY rowid LIMIT {STEP_ROWS}"
)
_LAST_ROW = "SELECT COALESCE(MAX(rowid), 0) FROM Cache"
_MOVE = "UPDATE OR REPLACE Cache SET rowid = ?, key = ? WHERE rowid = ?"


def compact(database: Database, *, is_whole: bool) -> None:
    """Move entries out of pages with gaps, give the free pages back, and empty the log.

    The entries keep their order, in which they are evicted. Entries that are stored meanwhile may come before others.
    With ``is_whole``, all entries are moved, and keys that an earlier version stored as text get the form of today.
    """
    ((last,),) = database.read(_LAST_ROW, ())
    start = 0 if is_whole else _find_gaps(database, last)
    while start is not None:
        start = _move_rows(database, start, last)
        database.tidy(database.log.limit_size)
    while database.call_alone(lambda connection: release_pages(connection, 0)):
        database.tidy(database.log.limit_size)
    database.call_alone(database.log.limit_size)


def _find_gaps(database: Database, last: int) -> int | None:
    """Return the first rowid from which on rows must be moved, or None."""
    start = 0
    while start <= last:
        rowids = [rowid for (rowid,) in database.read(_NEXT_ROWS, (start,))]
        if sum(after - before > 1 for before, after in pairwise(rowids)) > MAX_GAPS:
            return int(rowids[0])
        start = rowids[-1] + 1 if rowids else last + 1
    return None


def _move_rows(database: Database, start: int, last: int) -> int | None:
    """Move the next rows to the end of the table. Return the rowid of the row after them, or None after ``last``."""
    with database.open_transaction() as connection:
        rows = fetch_rows(connection, _NEXT_TO_MOVE, (start, last))
        ((end,),) = fetch_rows(connection, _LAST_ROW)
        size = 0
        for number, (rowid, key, raw, length) in enumerate(rows, 1):
            stored = encode_key(key)[1] if raw and isinstance(key, str) else key
            connection.execute(_MOVE, (end + number, stored, rowid))
            size += length or 0
            if size >= STEP_BYTES:
                break
        return int(rowid) + 1 if rows else None
