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
from collections import Counter
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

HEADER = 16
"""Bytes before each frame: its expiry time and its number."""
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
        now, names = self._now(), encode_keys(keys)

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> dict[str, bytes]:
            get, frames = transaction.get, opened.frames
            return {
                key: value[HEADER:]
                for key, name in zip(keys, names, strict=True)
                if (value := get(name, None, frames)) is not None and value[:8] > now
            }

        return self._environment.read(work)

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        now, name = self._now(), encode_key(key)

        def work(opened: Opened, transaction: lmdb.Transaction[bytes]) -> bytes | None:
            value = transaction.get(name, None, opened.frames)
            return None if value is None or value[:8] <= now else value[HEADER:]

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
                return transaction.stat(opened.frames)["entries"]
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
        added: set[str] = set()
        for chunk in self._split(items):
            added |= chunk.keys() - self._store(chunk, ttl, only_absent=True)
        return added

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

    def _split(self, items: Mapping[str, bytes]) -> Iterator[Mapping[str, bytes]]:
        max_size = min(MAX_TRANSACTION_BYTES, self._max_bytes // 8)
        sizes = list(map(len, items.values()))
        if items and len(items) <= MAX_ITEMS and sum(sizes) <= max_size and max(sizes) <= self._max_value_bytes:
            yield items  # the usual case, without a loop in Python
            return
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
        """Store the items in one transaction, and return the keys that ``only_absent`` left as they were."""
        environment = self._environment
        environment.reopen_if_replaced()
        expires = NEVER if ttl is None else _encode_time(self.clock() + ttl)
        now, names = self._now(), encode_keys(items)

        def work(opened: Opened, transaction: lmdb.Transaction[memoryview]) -> tuple[set[bytes], int]:
            evicted = self._make_room(opened, transaction, items, now)
            numbers = _make_numbers(transaction.id() << 24, len(names))
            frames = zip(names, numbers, items.values(), strict=True)
            values = [(name, expires + number + frame) for name, number, frame in frames]
            kept = _put_frames(opened, transaction, values, now if only_absent else None)
            order = list(zip(numbers, names, strict=True))
            if kept:
                order = [(number, name) for number, name in order if name not in kept]
            _put_all(transaction, opened.order, order, append=True)
            if expires != NEVER:
                _put_all(transaction, opened.due, [(expires + number, name) for number, name in order])
            return kept, evicted

        kept, evicted = environment.write(work)
        if evicted and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s has reached max_bytes (%d): evicting the oldest entries, which have to be computed again. "
                "Raise max_bytes to keep them",
                self.path,
                self._max_bytes,
            )
        return set(map(decode_name, kept))

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
        page_size = transaction.stat(opened.frames)["psize"]
        sizes = Counter(map(len, items.values()))  # most values have the same size
        needed = sum(count * _estimate_bytes(size, page_size) for size, count in sizes.items())
        evicted = 0
        while opened.count_used_bytes(transaction) + needed > self._max_bytes:
            oldest = _read_first(transaction, opened.order, max(8, len(items) // 4))
            if not oldest:
                break
            for _, name in oldest:
                _remove(opened, transaction, name)
            evicted += len(oldest)
        return evicted


def _encode_time(seconds: float) -> bytes:
    """Return a time as eight bytes that sort in the order of time."""
    return _UINT64.pack(min(MAX_TIME, max(0, math.ceil(seconds * 1000))))


def _make_numbers(first: int, count: int) -> list[bytes]:
    """Return the numbers from ``first`` on as bytes that sort in their order. One call makes all of them."""
    packed = struct.pack(f">{count}Q", *range(first, first + count))
    return [packed[start : start + 8] for start in range(0, 8 * count, 8)]


def _estimate_bytes(size: int, page_size: int) -> int:
    """Estimate the bytes of the file that a value takes. Small values share a page; larger ones take whole pages."""
    size += HEADER + 250
    return size * 3 // 2 if size < page_size // 2 else -(-size // page_size) * page_size + 300


def _read_page(
    opened: Opened, transaction: lmdb.Transaction[bytes], *, first: bytes, last: bytes, limit: int | None = None
) -> list[bytes]:
    """Return the names from ``first`` to ``last``, up to ``limit`` names."""
    page: list[bytes] = []
    with transaction.cursor(opened.frames) as cursor:
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


def _put_frames(
    opened: Opened,
    transaction: lmdb.Transaction[memoryview],
    values: Sequence[tuple[bytes, bytes]],
    now: bytes | None,
) -> set[bytes]:
    """Store values under their names, and remove the values that they replace from the other databases.

    With ``now``, do not replace values that have not expired, and return their names.
    """
    kept: set[bytes] = set()
    if _put_all(transaction, opened.frames, values, overwrite=False) == len(values):
        return kept  # usually, all entries are new, and one search for each is enough
    for name, value in values:
        header = bytes(transaction.get(name, b"", opened.frames)[:HEADER])
        if header == value[:HEADER]:
            continue
        if now is not None and header[:8] > now:
            kept.add(name)
        else:
            _remove_from_indexes(opened, transaction, header)
            transaction.put(name, value, db=opened.frames)
    return kept


def _put_all(
    transaction: lmdb.Transaction[memoryview],
    database: lmdb._Database,
    pairs: Sequence[tuple[bytes, bytes]],
    *,
    overwrite: bool = True,
    append: bool = False,
) -> int:
    """Store pairs with one call, and return how many were stored. Without ``overwrite``, existing values stay."""
    with transaction.cursor(database) as cursor:
        _, stored = cursor.putmulti(pairs, overwrite=overwrite, append=append)
    return stored


def _remove(opened: Opened, transaction: lmdb.Transaction[memoryview], name: bytes) -> None:
    existing = transaction.get(name, None, opened.frames)
    if existing is not None:
        _remove_from_indexes(opened, transaction, bytes(existing[:HEADER]))
        transaction.delete(name, db=opened.frames)


def _remove_from_indexes(opened: Opened, transaction: lmdb.Transaction[memoryview], header: bytes) -> None:
    """Remove an entry from the databases ``order`` and ``due``."""
    transaction.delete(header[8:], db=opened.order)
    if header[:8] != NEVER:
        transaction.delete(header, db=opened.due)


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Return this module's backend by name."""
    return {"lmdb": LmdbBackend}
