"""The lmdb tier: frames in one memory-mapped file in a folder, shared by the processes of a host.

A read needs no system call and no lock. It copies each frame out of the map, inside a transaction. ``README.md``
describes power cuts, eviction and cost.
"""

from __future__ import annotations

import logging
import math
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from heapq import merge
from pathlib import Path
from typing import Annotated

import lmdb
from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, time_left
from embedonce.errors import CacheClosed, ConfigError
from embedonce.options import Doc, Size

from ._environment import Environment, Opened, Settings, acquire, release
from ._names import decode_name, encode_key, encode_keys, find_ranges

api = 1

log = logging.getLogger("embedonce.lmdb")

GIB = 2**30
MIN_BYTES = 2**20
PAGE_KEYS = 512
"""Keys per page of a scan. No transaction is open between pages, so a slow reader keeps no old pages alive."""
MAX_ITEMS = 4096
MAX_TRANSACTION_BYTES = 2**26
"""Maximum items and bytes of one write transaction, because writers in other processes wait for it."""

_UINT64 = struct.Struct(">Q")
NEVER = b"\xff" * 8
"""Expiry time of an entry that does not expire. As bytes, it sorts after every other time."""
MAX_TIME = 2**63


class LmdbBackend:
    """Holds frames in a folder that the threads and processes of a host share. The folder outlives the processes."""

    def __init__(
        self,
        *,
        path: Annotated[
            Path, Doc("A folder of its own on a local disk, created (for this user only) at the first use.")
        ],
        max_bytes: Annotated[
            Size, Ge(MIN_BYTES), Doc("Maximum size of the stored entries. Above it, the oldest entries are evicted.")
        ] = 4 * GIB,
        sync: Annotated[
            bool,
            Doc(
                "Wait for the disk after each write. If false, a power cut (not a killed process) may damage the file."
            ),
        ] = True,
    ) -> None:
        if max_bytes < MIN_BYTES:
            raise ConfigError(f"max_bytes must be at least 1 MiB, got {max_bytes} bytes")
        self.path = Path(path).expanduser().resolve()
        self._max_bytes = max_bytes
        self._max_value_bytes = min(max_bytes // 16, 2**28)
        self.capabilities = Capabilities(
            scope="host",
            deadline=True,
            ttl=True,
            max_value_bytes=self._max_value_bytes,
            get=True,
            delete=True,
            scan=True,
            count=True,
            add=True,
            bounded=True,
        )
        self.clock: Callable[[], float] = time.time
        """Function that returns the Unix time in seconds, for ttl."""
        self._shared = acquire(self.path, Settings(max_bytes, sync))
        self._release = weakref.finalize(self, release, self._shared)
        self._has_warned = False

    # --- reading ------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames of the keys that exist, in one transaction.

        The frames are copies, because a view into the map is invalid once its transaction has ended: a writer may then
        reuse the page.
        """
        if not keys:
            return {}
        now = self._now()
        names = encode_keys(keys)

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> dict[str, bytes]:
            get, index, frames = transaction.get, opened.index, opened.frames
            return {
                key: frame
                for key, name in zip(keys, names, strict=True)
                if (entry := get(name, None, index)) is not None
                and entry[:8] > now
                and (frame := get(entry[8:] + name, None, frames)) is not None
            }

        return self._environment.read(work)

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        now, name = self._now(), encode_key(key)

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> bytes | None:
            entry = transaction.get(name, None, opened.index)
            return None if entry is None or entry[:8] <= now else transaction.get(entry[8:] + name, None, opened.frames)

        return self._environment.read(work)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in order, including expired ones that still take space.

        Keys stored or removed during the scan may or may not appear.
        """
        return merge(*(self._scan_range(first, last) for first, last in find_ranges(prefix)))

    def _scan_range(self, first: bytes, last: bytes) -> Iterator[str]:
        while True:
            page = self._environment.read(partial(_read_page, first=first, last=last, limit=PAGE_KEYS))
            yield from map(decode_name, page)
            if len(page) < PAGE_KEYS:
                return
            first = page[-1] + b"\0"

    def count(self, prefix: str, /) -> int:
        """Return the number of keys that ``scan(prefix)`` yields. This walks over them, unless ``prefix`` is empty."""

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> int:
            if not prefix:
                return transaction.stat(opened.index)["entries"]
            ranges = find_ranges(prefix)
            return sum(len(_read_page(opened, transaction, first=first, last=last)) for first, last in ranges)

        return self._environment.read(work)

    # --- writing ------------------------------------------------------------------------------

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, in transactions of up to 4,096 items that are each stored completely or not at all.

        After this returns, killing the process loses none of them.
        """
        for chunk in self._split(items):
            self._store(chunk, ttl, only_absent=False)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent or expired, and return these keys. Only one caller gets each key."""
        return {key for chunk in self._split(items) for key in self._store(chunk, ttl, only_absent=True)}

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys. Their bytes stay in the file until a later write reuses the pages."""
        if not keys:
            return

        def work(opened: Opened, transaction: lmdb.Transaction[memoryview]) -> None:
            for name in encode_keys(keys):
                _remove(opened, transaction, name)

        self._environment.write(work)

    def close(self) -> None:
        """Release the folder. The last backend that uses it in this process closes it."""
        self._release()

    # --- one call -----------------------------------------------------------------------------

    @property
    def _environment(self) -> Environment:
        if not self._release.alive:
            raise CacheClosed("the lmdb backend is closed")
        time_left()
        return self._shared

    def _now(self) -> bytes:
        return _encode_time(self.clock())

    def _split(self, items: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        max_size = min(MAX_TRANSACTION_BYTES, self._max_bytes // 8)
        chunk: dict[str, bytes] = {}
        size = 0
        for key, value in items.items():
            if len(value) > self._max_value_bytes:
                raise ValueError(
                    f"a value has {len(value)} bytes, and with this max_bytes the maximum is {self._max_value_bytes}"
                )
            if chunk and (len(chunk) == MAX_ITEMS or size + len(value) > max_size):
                yield chunk
                chunk, size = {}, 0
            chunk[key] = value
            size += len(value)
        if chunk:
            yield chunk

    def _store(self, items: Mapping[str, bytes], ttl: float | None, *, only_absent: bool) -> set[str]:
        environment = self._environment
        environment.reopen_if_replaced()
        expires = NEVER if ttl is None else _encode_time(self.clock() + ttl)
        now = self._now()

        # Sorted names use the same pages of the index one after the other.
        rows = sorted(zip(encode_keys(items), items, items.values(), strict=True))

        def work(opened: Opened, transaction: lmdb.Transaction[memoryview]) -> tuple[set[str], int]:
            evicted = self._make_room(opened, transaction, items, now)
            first_number = transaction.id() << 24
            entries = {name: expires + _UINT64.pack(first_number + i) for i, (name, _, _) in enumerate(rows)}
            kept = _index(opened, transaction, entries, None if not only_absent else now)
            frames = [(entries[name][8:] + name, value) for name, _, value in rows if name not in kept]
            _put_all(transaction, opened.frames, frames, append=True)
            if expires != NEVER:
                _put_all(transaction, opened.due, [(entries[name], name) for name in entries if name not in kept])
            return {key for name, key, _ in rows if name not in kept}, evicted

        stored, evicted = environment.write(work)
        if evicted and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s has reached max_bytes (%d): evicting the oldest entries, which have to be computed again. "
                "Raise max_bytes to keep them",
                self.path,
                self._max_bytes,
            )
        return stored

    def _make_room(
        self, opened: Opened, transaction: lmdb.Transaction[memoryview], items: Mapping[str, bytes], now: bytes
    ) -> int:
        """Remove expired entries and, if the write would exceed ``max_bytes``, the oldest entries.

        Only a few expired entries are removed at a time, so that one write does not pay for all of them.

        Returns:
            Number of entries that were evicted before they expired.
        """
        for expires, name in _read_first(transaction, opened.due, 2 * len(items) + 64):
            if expires[:8] > now:
                break
            _remove(opened, transaction, name)
        page_size = transaction.stat(opened.index)["psize"]
        needed = sum(_estimate_bytes(len(value), page_size) for value in items.values())
        evicted = 0
        while opened.count_used_bytes(transaction) + needed > self._max_bytes:
            oldest = _read_first(transaction, opened.frames, max(8, len(items) // 4))
            if not oldest:
                break
            for place, _ in oldest:
                _remove(opened, transaction, place[8:])
            evicted += len(oldest)
        return evicted


def _encode_time(seconds: float) -> bytes:
    """Return a time as eight bytes that sort in the order of time."""
    return _UINT64.pack(min(MAX_TIME, max(0, math.ceil(seconds * 1000))))


def _estimate_bytes(size: int, page_size: int) -> int:
    """Estimate the bytes of the file that a value takes. Small values share a page; larger ones take whole pages."""
    size += 250
    return size * 3 // 2 if size < page_size // 2 else -(-size // page_size) * page_size + 300


def _read_page(
    opened: Opened, transaction: lmdb.Transaction[bytes], *, first: bytes, last: bytes, limit: int | None = None
) -> list[bytes]:
    """Return the names from ``first`` to ``last``, up to ``limit`` names."""
    page: list[bytes] = []
    with transaction.cursor(opened.index) as cursor:
        has_item = cursor.set_range(first)
        while has_item and len(page) != limit and (name := cursor.key()) <= last:
            page.append(name)
            has_item = cursor.next()
    return page


def _read_first(
    transaction: lmdb.Transaction[memoryview], database: lmdb._Database, limit: int
) -> list[tuple[bytes, bytes]]:
    """Return copies of the first pairs of a database, up to ``limit`` pairs."""
    pairs: list[tuple[bytes, bytes]] = []
    with transaction.cursor(database) as cursor:
        has_item = cursor.first()
        while has_item and len(pairs) < limit:
            pairs.append((bytes(cursor.key()), bytes(cursor.value())))
            has_item = cursor.next()
    return pairs


def _index(
    opened: Opened, transaction: lmdb.Transaction[memoryview], entries: Mapping[bytes, bytes], now: bytes | None
) -> set[bytes]:
    """Add entries to the index, and remove the frames of those that they replace.

    With ``now``, do not replace entries that have not expired, and return their names.
    """
    kept: set[bytes] = set()
    if _put_all(transaction, opened.index, list(entries.items()), overwrite=False) == len(entries):
        return kept
    for name, entry in entries.items():
        existing = bytes(transaction.get(name, b"", opened.index))
        if existing == entry:
            continue
        if now is not None and existing[:8] > now:
            kept.add(name)
        else:
            _remove_frame(opened, transaction, name, existing)
            transaction.put(name, entry, db=opened.index)
    return kept


def _put_all(
    transaction: lmdb.Transaction[memoryview],
    database: lmdb._Database,
    pairs: Sequence[tuple[bytes, bytes]],
    *,
    overwrite: bool = True,
    append: bool = False,
) -> int:
    """Store pairs with one call, and return how many were stored. Without ``overwrite``, existing keys stay."""
    with transaction.cursor(database) as cursor:
        _, stored = cursor.putmulti(pairs, overwrite=overwrite, append=append)
    return stored


def _remove(opened: Opened, transaction: lmdb.Transaction[memoryview], name: bytes) -> None:
    entry = transaction.get(name, None, opened.index)
    if entry is not None:
        _remove_frame(opened, transaction, name, bytes(entry))
        transaction.delete(name, db=opened.index)


def _remove_frame(opened: Opened, transaction: lmdb.Transaction[memoryview], name: bytes, entry: bytes) -> None:
    """Remove a frame, and its expiry time if it has one. ``entry`` is its value in the index."""
    transaction.delete(entry[8:] + name, db=opened.frames)
    if entry[:8] != NEVER:
        transaction.delete(entry, db=opened.due)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Return this module's backend by name."""
    return {"lmdb": LmdbBackend}
