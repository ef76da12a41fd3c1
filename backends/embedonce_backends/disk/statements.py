"""The SQL statements that read and change the tables of entries and of leases.

diskcache's table ``Cache`` holds entries, and every key that is stored as text. The table ``Leases``, in another file,
holds leases.

Each statement is written once for every :class:`~.stored_keys.Form` of keys. A statement for a batch of keys begins
with a table ``wanted`` of positions in the batch and stored keys.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .layout import MODE_RAW
from .stored_keys import STORED_BYTES


class Statement(NamedTuple):
    """A statement in the order of :class:`~.stored_keys.Form`: for keys of entries, keys of leases, and text."""

    entry: str
    lease: str
    text: str


_WANTED_BYTES = (
    "WITH RECURSIVE positions(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM positions WHERE i < ?),"
    f" wanted(i, key) AS (SELECT i, SUBSTR(?, 1 + {STORED_BYTES} * i, {STORED_BYTES}) FROM positions) "
)
"""The parameters: the number of keys minus one, and their stored forms, joined."""
_WANTED_TEXTS = "WITH wanted(i, key) AS (SELECT key, value FROM json_each(?)) "
"""The parameter: the keys as a JSON array."""
_IS_ALIVE = "(expire_time IS NULL OR (expire_time > ? AND store_time <= ?))"
"""The parameters: the time now, and the latest time at which an entry may have been stored."""


def _for_forms(statement: str) -> Statement:
    in_cache = statement.format(table="Cache", raw="AND raw = 1")
    return Statement(in_cache, statement.format(table="Leases", raw=""), in_cache)


def _for_batches(statement: str) -> Statement:
    entry, lease, text = _for_forms(statement)
    return Statement(_WANTED_BYTES + entry, _WANTED_BYTES + lease, _WANTED_TEXTS + text)


def _for_ranges(select: str, ending: str = "") -> Statement:
    """Return a statement that reads the rows of a range; its first parameters are those of ``find_range``."""
    # A BLOB that is no stored key was stored by another program. The unary plus removes the TEXT affinity of CAST. With
    # that affinity, SQLite could convert stored keys before it compares them.
    blobs = f"{select} FROM {{table}} WHERE key >= ? AND key < ? AND LENGTH(key) = {STORED_BYTES} {{raw}} {ending}"
    texts = f"{select} FROM Cache WHERE key >= +CAST(? AS TEXT) AND key < ? AND raw = 1 {ending}"
    entry, lease, _ = _for_forms(blobs)
    return Statement(entry, lease, texts)


_JOINED = "FROM wanted CROSS JOIN {table} ON {table}.key = wanted.key {raw}"

GET: Final = _for_forms(f"SELECT value FROM {{table}} WHERE key = ? {{raw}} AND {_IS_ALIVE}")
GET_MANY: Final = _for_batches(f"SELECT wanted.i, value {_JOINED} WHERE {_IS_ALIVE}")
DELETE: Final = _for_batches("DELETE FROM {table} WHERE key IN (SELECT key FROM wanted) {raw}")
SCAN: Final = _for_ranges("SELECT CAST(key AS BLOB)", "ORDER BY key LIMIT ?")
"""The keys are read as bytes, because another program may have stored a text that is invalid UTF-8."""
COUNT: Final = _for_ranges("SELECT COUNT(*)")
MEASURE: Final = _for_ranges("SELECT SUM(LENGTH(value)), MIN(store_time), MAX(store_time)")

_STORE_ENTRY = (
    "INSERT INTO Cache (key, raw, store_time, expire_time, access_time, mode, value)"
    f" VALUES (?1, 1, ?2, ?3, ?2, {MODE_RAW}, ?4)"
    " ON CONFLICT (key, raw) DO UPDATE SET store_time = excluded.store_time, expire_time = excluded.expire_time,"
    " access_time = excluded.access_time, mode = excluded.mode, value = excluded.value,"
    " size = 0, tag = NULL, filename = NULL"
)
_STORE_LEASE = "INSERT OR REPLACE INTO Leases (key, store_time, expire_time, value) VALUES (?1, ?2, ?3, ?4)"
STORE: Final = Statement(_STORE_ENTRY, _STORE_LEASE, _STORE_ENTRY)
"""The parameters: the stored key, the time now, the time of expiry or None, the value."""

MAKE_LEASES: Final = (
    "CREATE TABLE IF NOT EXISTS Leases"
    " (key BLOB PRIMARY KEY, value BLOB, store_time REAL, expire_time REAL) WITHOUT ROWID"
)
EXPIRE: Final = (
    "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE expire_time <= ? ORDER BY expire_time LIMIT ?)"
)
EXPIRE_LEASES: Final = "DELETE FROM Leases WHERE expire_time <= ?"
EVICT: Final = "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache ORDER BY rowid LIMIT ?)"
HAS_EARLIER_KEYS: Final = (
    "SELECT 1 FROM Cache WHERE key >= 'eo1.' AND key < 'eo1/' AND raw = 1 AND (LENGTH(key) = 85"
    " AND SUBSTR(key, 21, 1) = '.' OR LENGTH(key) = 91 AND SUBSTR(key, 1, 10) = 'eo1.lease.') LIMIT 1"
)
"""Whether the table may have an entry or a lease whose key is stored as text, as an earlier version did."""
VALUE_SIZES: Final = "SELECT LENGTH(value), COUNT(*) FROM Cache GROUP BY 1"
